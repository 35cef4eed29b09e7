"""Device, precision, threads and seeds; files written whole or not at all; errors told in one line."""

import ctypes
import glob
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsity import ranks
from sparsity.ranks import Ranks

BLOCK = 1 << 20


class UserError(Exception):
    """Something the user can mend: its text is one line that says what is wrong and what to do."""


class Terminated(BaseException):
    """SIGTERM arrived; raised where the program stands, as KeyboardInterrupt is for SIGINT."""


def run_main(body: Callable[[Ranks], None], continue_command: Callable[[], str]) -> int:
    """Run a script's work and return its exit status: 0, 1 (UserError), 130 (Ctrl-C), 143 (SIGTERM).

    `body` takes the processes of the run. The one place that prints errors: a single line on stderr, of one process,
    and no traceback for what the user can mend. `continue_command` gives the command line that goes on after an
    interruption.
    """

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    previous = signal.signal(signal.SIGTERM, terminate)
    team = Ranks()
    try:
        with torch_errors(), lost_connections():
            team = ranks.start(continue_command)
            team.join()
            team.watch(continue_command)
            body(team)
            team.leave()
    except UserError as error:
        return _end(team, 1, f"error: {one_line(error)}")
    except OSError as error:  # a path too long, a disk that filled up, a reader of our output that is gone
        _give_up_broken_stdout()
        return _end(team, 1, None if isinstance(error, BrokenPipeError) else f"error: {one_line(error)}")
    except (KeyboardInterrupt, Terminated) as stop:
        try:
            death = team.death()  # torchrun ends the others when one process died
        except RuntimeError:  # the store is gone, so that nothing is known of the others
            death = None
        if death:
            return _end(team, 1, f"\nerror: {death}; to go on: {continue_command()}")
        return _end(
            team, 143 if isinstance(stop, Terminated) else 130, f"\ninterrupted; to go on: {continue_command()}"
        )
    finally:
        team.watching = False
        signal.signal(signal.SIGTERM, previous)
    return 0


def _end(team: Ranks, status: int, line: str | None) -> int:
    """Say why the run ends, in the first of its processes that comes here, and give back the exit status.

    One of several processes ends at once: the others may be waiting for it in a collective, and it for them.
    """
    if team.speaks_last() and line:
        print(line, file=sys.stderr)
    if team.size > 1:
        _give_up_broken_stdout()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def lost_connections() -> Iterator[None]:
    """Turn the error of a collective whose other side is gone into a UserError, where a run has several processes."""
    try:
        yield
    except RuntimeError as error:
        reason = one_line(error)
        if isinstance(error, ranks.LostProcess):
            raise UserError(f"{reason}; start all processes again") from error
        if ranks.launched() == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo/" in reason):
            raise
        if isinstance(error, torch.distributed.DistBackendError):  # it may be that they cannot work together at all
            raise UserError(f"the processes of this run failed together: {reason[:200]}") from error
        time.sleep(4 * ranks.ROUND)  # in which the watching thread finds out who died, and ends this process
        raise UserError(
            f"the connection to another process of this run is lost ({reason[-120:]}); give the same command "
            "again, for training with --resume"
        ) from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Let the first process of a run alone say what is wrong with the command line."""
    if ranks.is_first():
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            yield
    except SystemExit as stop:
        if stop.code:
            time.sleep(60)  # torchrun would end the first process before it has spoken
        raise


def _give_up_broken_stdout() -> None:
    """Where stdout takes no more, send it nowhere, or Python would fail once more when it flushes at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: object) -> str:
    """The text of an error with all white space folded, so that it is one line."""
    return " ".join(str(error).split())


def command_line(program: str, arguments: list[str], *extra: str) -> str:
    """The shell command that runs `program` again with `arguments`, and `extra` ones that are not among them."""
    words = [*ranks.launch_words(), program, *arguments, *(word for word in extra if word not in arguments)]
    return shlex.join(words)


@contextmanager
def torch_errors() -> Iterator[None]:
    """Turn an exhausted memory, of the device or of the machine, into a UserError with the way out.

    Also what torch says of an operation that cannot keep the promise of `--deterministic`.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "use_deterministic_algorithms" in str(error):
            reason = one_line(error).split(", but you set")[0]
            raise UserError(f"{reason}; use another --device, or leave --deterministic out") from error
        exhausted = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if not exhausted and "allocate memory" not in str(error):
            raise
        raise UserError("out of memory; use a smaller --batch_size, network or image") from error


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that `--device` names; 'auto' is cuda, then mps, then cpu. Raises UserError when it is not here.

    With a `local_rank`, of one of several processes on a machine, cuda is the GPU of that number, in turn.
    """
    if name in ("auto", "cuda") and local_rank is not None and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = one_line(error).split(". ")[0][:160]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from error
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """'fp32' or 'bf16'; 'auto' is bf16 where the hardware is made for it: new GPUs, CPUs with AVX-512-BF16 or AMX."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bfloat16() else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """The torch type of a precision's name."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def seed_everything(seed: int) -> None:
    """Seed torch (all devices) and numpy; called before anything is drawn."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def derived_seed(*keys: int) -> int:
    """One well-mixed seed from several numbers, as (seed, epoch): neighbours give unrelated streams."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded from several numbers; drawing on the CPU gives every device the same numbers."""
    return torch.Generator().manual_seed(derived_seed(*keys))


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("torchvision", "numpy", "matplotlib")
    own = {"python": platform.python_version(), "torch": str(torch.__version__)}  # which tells the build too
    return own | {package: version(package) for package in packages}


def machine(device: torch.device) -> dict[str, Any]:
    """What a result ran on: processor, cores, device, threads, system."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": ranks.launched(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tensor_hash(*tensors: torch.Tensor) -> str:
    """SHA-256 over the bytes of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename, fsync of the folder.

    Raises UserError (no space, no permission); what was at `path` is then still there.
    """
    if isinstance(data, str):
        data = data.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _remove_leftovers(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _remove_leftovers(path: Path) -> None:
    """Remove half-written files of processes that were killed while they wrote `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if process.isdecimal() and not ranks.is_running(int(process)):
            leftover.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, where a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically, readable by a person."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def prepare_folder(folder: Path, flag: str, needed_bytes: int = 0) -> None:
    """Create a folder that outputs go to, and check now that it can be written to and has room.

    Raises UserError that names `flag`, so that hours of work are not lost to a typing error.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to ({error.strerror or error}); choose another") from error
    if free < needed_bytes:
        need, have = needed_bytes / 1e6, free / 1e6
        raise UserError(f"{flag} {folder} has {have:.0f} MB free and {need:.0f} MB are needed; make room or move it")


def duration(seconds: float) -> str:
    """Seconds as a person says them: '8 s', '3 min 20 s', '2 h 05 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def release_memory() -> None:
    """Give memory that was freed back to the system where the C library (glibc) would keep it for itself."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
