"""The processes of one run, as torchrun starts them: who is who, who speaks, and what is said when one dies."""

import math
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch.distributed as dist

from sparsity.system.startup import PARENT

GLANCE = 0.05  # seconds between two looks at the store


ROUND = 0.5  # seconds between two looks at the other processes


SILENCE = 30.0  # seconds after which a process of another machine counts as dead


PATIENCE = 120.0  # seconds in which all processes have to come by at the start


class LostProcess(RuntimeError):
    """A process of this run did not come, or is gone."""


class Ranks:
    """One process's view of all `size` processes of a run; it is number `rank`, and `local_rank` on its `node`.

    What they tell each other goes through the store that torchrun keeps, by polling, so that a signal is answered at
    once. Values are pickled, as in `torch.distributed.broadcast_object_list`: the store must not be open to strangers.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, node: int = 0, store: Any = None):
        self.rank, self.size, self.local_rank, self.node, self.store = rank, size, local_rank, node, store
        self.watching = False
        self._exchanges = 0
        self._processes: dict[int, tuple[str, int]] = {}  # of every rank that was met: the machine, the process
        self._beats: dict[int, tuple[bytes, float]] = {}  # of ranks elsewhere: the last sign of life, and since when

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def wait_for(self, key: str, seconds: float = math.inf) -> bool:
        """Wait until somebody has set `key`, or so many seconds; whether it is set."""
        until = time.monotonic() + seconds
        while not (there := self.store.check([key])) and time.monotonic() < until:
            time.sleep(GLANCE)
        return there

    def gather(self, value: Any) -> list[Any]:
        """What all processes give here, in the order of the ranks. Every process has to come by, in the same order."""
        if self.size == 1:
            return [value]
        self._exchanges += 1
        keys = [f"gather/{self._exchanges}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], pickle.dumps(value))
        if self._exchanges > 2:  # all have come to the last one, and so have read what was said in the one before it
            self.store.delete_key(f"gather/{self._exchanges - 2}/{self.rank}")
        values = []
        for key in keys:
            self.wait_for(key)
            values.append(pickle.loads(self.store.get(key)))
        return values

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, in all of them."""
        return self.gather(make() if self.first else None)[0]

    @contextmanager
    def in_turn(self, key: str) -> Iterator[None]:
        """The first process works first, as on a download; then one of each other machine; then all others."""
        if self.local_rank:
            self.wait_for(f"{key}/{self.node}")
        elif not self.first:
            self.wait_for(f"{key}/first")
        yield
        if self.size > 1 and self.first:
            self.store.set(f"{key}/first", "done")
        if self.size > 1 and not self.local_rank:
            self.store.set(f"{key}/{self.node}", "done")

    def claim(self, key: str) -> bool:
        """Whether this process is the first one that asks for `key`."""
        return self.size == 1 or self.store.add(key, 1) == 1

    def join(self) -> None:
        """Meet the others: each tells where it runs. LostProcess when one has not come after PATIENCE seconds."""
        if self.size == 1:
            return
        self.store.set(f"process/{self.rank}", pickle.dumps((_machine(), os.getpid())))
        until = time.monotonic() + PATIENCE
        for rank in range(self.size):
            if not self.wait_for(f"process/{rank}", until - time.monotonic()):
                raise LostProcess(f"rank {rank} of {self.size} did not start within {PATIENCE:.0f} s")
        self._meet()

    def _meet(self) -> None:
        """Take note of all processes that have come."""
        for rank in range(self.size):
            if rank not in self._processes and self.store.check([f"process/{rank}"]):
                self._processes[rank] = pickle.loads(self.store.get(f"process/{rank}"))

    def leave(self) -> None:
        """End together, when the first process has done its work, so that until then a death is noticed."""
        if self.size == 1:
            return
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.first:
            self.store.set("done", "done")
        self.wait_for("done")
        self.watching = False
        self.store.set(f"left/{self.rank}", "done")
        if self.first:  # the store may be this process's own
            for rank in range(self.size):
                self.wait_for(f"left/{rank}", SILENCE)

    def dead(self) -> list[int]:
        """The ranks on this machine whose processes ended although their work was not done."""
        here = _machine()
        neighbours = [
            (rank, process) for rank, (machine, process) in sorted(self._processes.items()) if machine == here
        ]
        ended = [rank for rank, process in neighbours if not is_running(process)]
        return [rank for rank in ended if not self.store.check([f"left/{rank}"])]

    def silent(self) -> list[int]:
        """The ranks on other machines that have given no sign of life for SILENCE seconds; gives one of its own."""
        here = _machine()
        elsewhere = [rank for rank, (machine, _) in sorted(self._processes.items()) if machine != here]
        if elsewhere:
            self.store.set(f"beat/{self.rank}", str(time.monotonic_ns()))
        for rank in elsewhere:
            key = f"beat/{rank}"
            beat = self.store.get(key) if self.store.check([key]) else b""
            if beat != self._beats.get(rank, (None, 0.0))[0]:
                self._beats[rank] = beat, time.monotonic()
        quiet = [rank for rank in elsewhere if time.monotonic() - self._beats[rank][1] > SILENCE]
        return [rank for rank in quiet if not self.store.check([f"left/{rank}"])]

    def speaks_last(self) -> bool:
        """Whether this process is the one that says why the run ended; the answer is yes once in a run.

        Where the store is gone, and with it the means to agree, it is the first process of a machine.
        """
        if self.size == 1:
            return is_first()  # of processes that have not met yet
        try:
            return self.claim("last words")
        except RuntimeError:
            return self.local_rank == 0

    def watch(self, continue_command: Callable[[], str]) -> None:
        """End this process, from a thread, within a second after another one died.

        On another machine it takes SILENCE seconds until a process counts as dead. A rank that dies would otherwise be
        waited for, in a collective that no signal interrupts. One line is said.
        """
        self.watching = self.size > 1

        def look() -> None:
            while self.watching:
                reason = self._loss()
                if reason and self.watching:
                    _end(f"{reason}; to go on: {continue_command()}" if self.speaks_last() else None)
                time.sleep(ROUND)

        if self.watching:
            threading.Thread(target=look, name="watch", daemon=True).start()

    def _loss(self) -> str | None:
        """What is missing of the run, in words."""
        try:
            silent = ", ".join(f"{rank} ({self._processes[rank][0].split()[0]})" for rank in self.silent())
            return f"rank {silent} of {self.size} on another machine is silent" if silent else self.death()
        except RuntimeError:
            return "the store of torchrun is gone (another machine, or a process that died)"

    def death(self) -> str | None:
        """The processes of this machine that died, in words."""
        if self.size == 1:
            return None
        self._meet()
        dead = self.dead()
        numbers = ", ".join(f"{rank} (process {self._processes[rank][1]})" for rank in dead)
        return f"rank {numbers} of {self.size} died; what was finished before is kept" if dead else None


ALONE = Ranks()  # a run of a single process


def launched() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that speaks, as the environment tells it, before it has met the others."""
    return launched() == 1 or os.environ["RANK"] == "0"


def start(continue_command: Callable[[], str] = str) -> Ranks:
    """This process among those of its run, which `join` meets; a single one without torchrun.

    From now on only the first one speaks, and a process whose torchrun is gone ends within a second, whatever it is in.
    """
    if launched() == 1:
        return Ranks()
    environment = os.environ
    threading.Thread(target=_watch_launcher, args=(continue_command,), name="launcher", daemon=True).start()
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE)))
    if rank:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (for as long as the process lives)
        sys.stderr = _without_terminal(sys.stderr)
    local_rank, node = int(environment.get("LOCAL_RANK", rank)), int(environment.get("GROUP_RANK", 0))
    return Ranks(rank, size, local_rank, node, dist.PrefixStore("run", store))


def _watch_launcher(continue_command: Callable[[], str]) -> None:
    """End this process when its parent is no longer the one that started it; the first of a machine says so."""
    while os.getppid() == PARENT:
        time.sleep(ROUND)
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    _end(f"torchrun is gone, and its processes end with it; to go on: {continue_command()}" if speaks else None)


def _end(line: str | None) -> NoReturn:
    """End this process at once, from any thread; files are written whole or not at all, so none is left half done."""
    if line:
        print(f"\nerror: {line}", file=sys.stderr)
    sys.stderr.flush()
    with suppress(OSError):  # whoever read it may be gone as well
        sys.stdout.flush()
    os._exit(1)


def share(total: int, rank: int, size: int, unit: int = 1) -> tuple[int, int]:
    """Begin and end of the part that `rank` of `size` has of `total`: consecutive, whole units, as even as they can."""
    units = -(-total // unit)
    begin, end = (min(total, unit * (units * number // size)) for number in (rank, rank + 1))
    return begin, end


def launch_words() -> list[str]:
    """How this process was started, as the words of a command line before the name of the script."""
    if launched() == 1:
        return ["python"]
    here, all_processes = int(os.environ.get("LOCAL_WORLD_SIZE", launched())), launched()
    nodes = [f"--nnodes={all_processes // here}", "..."] if all_processes > here else []
    return ["torchrun", *nodes, f"--nproc_per_node={here}"]


def is_running(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but is not ours
        return True
    try:  # one that ended stays in the list until its parent has asked how
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # no such file where there is no Linux
        return True


def _machine() -> str:
    """What tells apart the machines, or containers, whose process numbers mean different processes."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{platform.node()} {space}"


def _without_terminal(stream: TextIO) -> TextIO:
    """A stream to the same place that calls itself no terminal, so that no progress bar is drawn on it."""
    copy = os.fdopen(os.dup(stream.fileno()), "w", buffering=1)
    copy.isatty = lambda: False
    return copy
