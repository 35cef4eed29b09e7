"""Shared parts of the pruning study: every module is one noun of the field and takes a model, none builds one."""

import os
import signal
import sys

PARENT = os.getppid()  # of a process that torchrun starts: torchrun, unless it is gone by then


def answer_interrupts() -> None:
    """Let Ctrl-C and SIGTERM end the process with a line while torch is imported, which takes seconds."""

    def leave(signum: int, frame: object) -> None:
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
            print("\ninterrupted before anything was done", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
