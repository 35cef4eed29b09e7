"""Errors that the user can mend, and the one place where a script ends: exit status and one line on stderr."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr

PROCESSES = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1  # as torchrun started them
RANK = int(os.environ.get("RANK", "0"))
SHOWN = 3  # names in one line


class UserError(Exception):
    """Something the user can mend: its text is one line that says what is wrong and what to do."""


class Terminated(BaseException):
    """SIGTERM arrived; raised where the program stands, as KeyboardInterrupt is for SIGINT."""


def start(parse_args: Callable[[], object]) -> None:
    """Answer --help, usage errors, Ctrl-C and SIGTERM before torch is imported, which takes seconds."""
    if RANK:  # of several processes, the first one speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (for as long as the process lives)

    def leave(signum: int, frame: object) -> None:
        if not RANK:
            print("\ninterrupted before anything was done", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        with redirect_stderr(sys.stdout if RANK else sys.stderr):
            parse_args()
    except SystemExit as stop:
        if RANK and stop.code:  # torchrun ends all processes when one fails, and the first has to speak before that
            time.sleep(10)
        raise


def run_main(work: Callable[[], None], continue_command: Callable[[], str]) -> int:
    """Run a script's work and return its exit status: 0, 1 (an error), 130 (Ctrl-C), 143 (SIGTERM).

    What the user can mend, an operating system's error and an interruption are told in one line on stderr, without a
    traceback. `continue_command` gives the command that goes on after an interruption.
    """

    def terminate(signum: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        work()
    except BrokenPipeError:  # whoever read our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail again at exit
        return _end(1, None)
    except (UserError, OSError) as error:
        return _end(1, f"error: {one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        return _end(1, f"error: {_explained(error)}")
    except (KeyboardInterrupt, Terminated) as stop:
        line = None if RANK else f"\ninterrupted; to go on: {continue_command()}"
        return _end(143 if isinstance(stop, Terminated) else 130, line)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _end(status: int, line: str | None) -> int:
    """Print why the run ends, if there is a line, and return `status`.

    One of several processes ends at once, because the others may be waiting in a collective. Others than the first
    wait two seconds before they speak: by then torchrun has ended them if the first one failed as well.
    """
    if line and PROCESSES > 1 and RANK:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    if line:
        print(line, file=sys.stderr, flush=True)
    if PROCESSES > 1:
        sys.stdout.flush()
        os._exit(status)
    return status


def _explained(error: MemoryError | RuntimeError) -> str:
    """An error of torch that the user can mend, with the way out; any other is raised again."""
    text = one_line(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "allocate memory" in text:
        return "out of memory; use a smaller --batch_size, network or image"
    if "use_deterministic_algorithms" in text:
        return f"{text.split(', but you set')[0]}; use another --device, or leave --deterministic out"
    if PROCESSES > 1 and ("gloo" in text or type(error).__name__.startswith("Dist")):
        return f"the connection to another process of this run is lost ({text[-120:]}); give the command again"
    raise error


def one_line(error: object) -> str:
    """The text of an error with all white space folded, so that it is one line."""
    return " ".join(str(error).split())


def by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> the names that have it."""
    return {reason: [name for name in reasons if reasons[name] == reason] for reason in dict.fromkeys(reasons.values())}


def few(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} more" * (len(names) > SHOWN)


def described(error: BaseException) -> str:
    """The kind of an exception and its text, on one line of bounded length."""
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def command_line(program: str, arguments: list[str], *extra: str) -> str:
    """The shell command that runs `program` again with `arguments`, and `extra` ones that are not among them."""
    launcher = ["python"]
    if PROCESSES > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES))
        nodes = [f"--nnodes={PROCESSES // here}", "..."] if here < PROCESSES else []
        launcher = ["torchrun", *nodes, f"--nproc_per_node={here}"]
    return shlex.join([*launcher, program, *arguments, *(word for word in extra if word not in arguments)])
