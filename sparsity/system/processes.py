"""The processes of one run, as torchrun starts them: rank, size, and what they tell each other."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)  # how long a process waits for the others, whose shares of a sweep may take far longer


def join() -> None:
    """Meet the other processes of a run, if torchrun started several."""
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        devices = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(devices, timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes, when all have done their work."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks; every process has to come by."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Wait until every process is here, answering signals meanwhile; RuntimeError where one is gone."""
    if size() > 1:
        waiting = dist.all_reduce(torch.zeros(1), async_op=True)
        while not waiting.is_completed():
            time.sleep(0.05)
        waiting.wait()  # raises what went wrong


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process of each machine work before the others, as on a download."""
    follows = size() > 1 and int(os.environ["LOCAL_RANK"]) > 0
    if follows:
        wait()
    yield
    if not follows:
        wait()


def share(total: int, part: tuple[int, int], unit: int = 1) -> tuple[int, int]:
    """Begin and end of one process's slice of `range(total)`; `part` is (rank, number of processes).

    Slices are consecutive, of nearly equal size, and begin at multiples of `unit`.
    """
    number, parts = part
    units = -(-total // unit)
    begin, end = (min(total, unit * (units * count // parts)) for count in (number, number + 1))
    return begin, end
