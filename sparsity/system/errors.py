"""errors"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from sparsity.system.processes import ROUND, LostProcess, Ranks, is_first, launch_words, launched, start


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
            team = start(continue_command)
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
        if isinstance(error, LostProcess):
            raise UserError(f"{reason}; start all processes again") from error
        if launched() == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo/" in reason):
            raise
        if isinstance(error, torch.distributed.DistBackendError):  # it may be that they cannot work together at all
            raise UserError(f"the processes of this run failed together: {reason[:200]}") from error
        time.sleep(4 * ROUND)  # in which the watching thread finds out who died, and ends this process
        raise UserError(
            f"the connection to another process of this run is lost ({reason[-120:]}); give the same command "
            "again, for training with --resume"
        ) from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Let the first process of a run alone say what is wrong with the command line."""
    if is_first():
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
    words = [*launch_words(), program, *arguments, *(word for word in extra if word not in arguments)]
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
