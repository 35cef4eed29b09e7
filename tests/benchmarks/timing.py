"""What the benchmarks share: timing with the device synchronised, taking turns, and a line a contestant."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, with the device synchronised on both sides."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(
    contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every contestant, `repeats` times A B C A B C, so that a drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            times[name].append(seconds(work, device))
    return times


def print_rates(times: dict[str, list[float]], images: int, remarks: dict[str, str] | None = None) -> None:
    """Images a second by the median run, the range over the runs, and the ratio to the first contestant."""
    base = statistics.median(next(iter(times.values())))
    for name, runs in times.items():
        median = statistics.median(runs)
        rate, low, high = (images / value for value in (median, max(runs), min(runs)))
        remark = (remarks or {}).get(name, "")
        print(f"{name:20} {rate:8.1f} images/s ({low:.1f} to {high:.1f}) {base / median:6.2f}x{remark}")
