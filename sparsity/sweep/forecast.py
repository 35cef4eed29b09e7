"""How long a sweep will take, from a few batches on the machine at hand."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sparsity.data.images import Split
from sparsity.networks.evaluation import evaluate
from sparsity.networks.layers import positions_per_image
from sparsity.prune.criteria import NEEDS_CALIBRATION
from sparsity.recover import Means
from sparsity.recover.reconstruction import ITERATIONS
from sparsity.sweep.level import Bench
from sparsity.sweep.panel import Panel
from sparsity.sweep.subject import Subjects
from sparsity.system.machine import duration

TRAINING_COST = 3.5  # of a forward pass of evaluation: forward, two backward products, the optimizer's step


@dataclass(frozen=True)
class Forecast:
    """`networks` to evaluate, and about how long one level takes of each recovery that is used, in seconds."""

    networks: int
    costs: dict[str, float]


def announce(bench: Bench, missing: dict[str, Panel], subjects: Subjects, processes: int = 1) -> Forecast:
    """Say what is kept and, from a first few batches, how long the rest will take, which `processes` share."""
    sweep, test = bench.sweep, bench.test
    if sweep.kept:
        print(f"{sweep.kept} rows in {sweep.files.csv} were measured with these settings and are kept")
    networks = sum(name not in sweep.dense for name in missing)
    for name, curves in missing.items():
        networks += sum(not sweep.has(name, curve, level) for curve, levels in curves.items() for level in levels)
    costs: dict[str, float] = {}
    if networks:
        panels = list(missing.values())
        rate = evaluation_rate(bench.network, test, bench.batch_size)
        levels = count_levels(panels)
        means = subjects.open(next(iter(missing))).means
        recoveries = {recovery: recovery_seconds(recovery, means, rate) for recovery in levels}
        one = len(test) / rate
        costs = {recovery: one + seconds for recovery, seconds in recoveries.items()}
        seconds = networks * one + sum(count * recoveries[recovery] for recovery, count in levels.items())
        recovered = sum(curve[2] != "none" for curves in panels for curve in curves)
        extra = f", and recovery in {recovered} curves" if recovered else ""
        scored = sorted({curve[0] for curves in panels for curve in curves} & NEEDS_CALIBRATION)
        extra += f"; scoring by {', '.join(scored)} comes on top" if scored else ""
        extra += "; files and timing come on top" if bench.extras else ""
        work = f"{networks} networks x {len(test):,} images at {rate:,.0f} images/s{extra}"
        shared = f" in {processes} processes" if processes > 1 else ""
        print(f"about {duration(seconds / processes)}{shared}: {work}", flush=True)
    return Forecast(networks, costs)


def evaluation_rate(network: nn.Module, test: Split, batch_size: int) -> float:
    """Images a second that `evaluate` gets through."""
    few = test.take(torch.arange(min(len(test), 4 * batch_size)))
    evaluate(network, few, batch_size)  # warm-up
    return len(few) / _seconds(lambda: evaluate(network, few, batch_size))


def recovery_seconds(recovery: str, means: Means, rate: float) -> float:
    """About how long a recovery of RECOVERIES takes for one level; `rate` as from `evaluation_rate`."""
    if recovery == "finetune":
        return TRAINING_COST * len(means.tuning.train) * len(means.tuning.rates) / rate
    if recovery not in ("batchnorm", "reconstruction"):
        return 0.0
    network, (images, _) = means.copy, next(means.calibration.batches())
    with torch.inference_mode():
        network(images)
        one_pass = _seconds(lambda: network(images)) * len(means.calibration) / len(images)
    if recovery == "batchnorm":
        return one_pass
    # Both networks once and, where activations are not kept, again; then batchnorm.
    return 5 * one_pass + reconstruction_work(means) / multiply_rate(images.device)


def count_levels(panels: list[Panel]) -> Counter[str]:
    """How many levels of each recovery `panels` hold."""
    recoveries: Counter[str] = Counter()
    for panel in panels:
        for (_, _, recovery), levels in panel.items():
            recoveries[recovery] += len(levels)
    return recoveries


def reconstruction_work(means: Means) -> float:
    """Multiply-adds of the moments and of the conjugate gradients of one reconstruction, about."""
    calibration, work = means.calibration, 0.0
    images, _ = next(calibration.batches(torch.float32))
    positions = positions_per_image(means.dense, images[:1])
    for name in means.layers:
        weight = means.dense.get_submodule(name).weight
        out, inputs = weight.shape[0], weight[0].numel()
        samples = len(calibration) * min(positions[name], max(1, calibration.position_limit // len(calibration)))
        work += samples * inputs * (inputs + 2 * out)  # second moment, targets, cross moment
        work += ITERATIONS / 2 * out * inputs * inputs
    return work


def multiply_rate(device: torch.device, size: int = 1024) -> float:
    """Multiply-adds a second of a float32 matrix product."""
    square = torch.rand(size, size, device=device)
    square @ square  # warm-up
    return size**3 / min(_seconds(lambda: square @ square) for _ in range(3))


def _seconds(work: Callable[[], object]) -> float:
    """Wall time of `work`, with a GPU synchronised on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
