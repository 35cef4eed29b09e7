"""How long a sweep will take, from a few batches on the machine at hand."""

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from sparsity.criteria import NEEDS_CALIBRATION
from sparsity.data import Split
from sparsity.evaluation import evaluate
from sparsity.masks import positions_per_image
from sparsity.panel import Panel
from sparsity.recovery import Means
from sparsity.recovery.reconstruction import ITERATIONS
from sparsity.report import Sweep
from sparsity.runtime import duration

TRAINING_COST = 3.5  # of a forward pass of evaluation: forward, two backward products, the optimizer's step


def announce(
    sweep: Sweep,
    missing: dict[str, Panel],
    means: Means,
    inference: nn.Module,
    test: Split,
    batch_size: int,
    extras: int = 0,
) -> int:
    """Say what is kept and, from a first few batches, how long the rest will take; returns the networks to evaluate.

    `extras` counts what else is measured of each network, whose time is not foreseen.
    """
    if sweep.kept:
        print(f"{sweep.kept} rows in {sweep.files.csv} were measured with these settings and are kept")
    networks = sum(name not in sweep.dense for name in missing)
    for name, curves in missing.items():
        networks += sum(not sweep.has(name, curve, level) for curve, levels in curves.items() for level in levels)
    if networks:
        panels = list(missing.values())
        seconds, rate = sweep_seconds(panels, networks, means, inference, test, batch_size)
        recovered = sum(curve[2] != "none" for curves in panels for curve in curves)
        extra = f", and recovery in {recovered} curves" if recovered else ""
        scored = sorted({curve[0] for curves in panels for curve in curves} & NEEDS_CALIBRATION)
        extra += f"; scoring by {', '.join(scored)} comes on top" if scored else ""
        extra += "; files and timing come on top" if extras else ""
        work = f"{networks} networks x {len(test):,} images at {rate:,.0f} images/s{extra}"
        print(f"about {duration(seconds)}: {work}", flush=True)
    return networks


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


def sweep_seconds(
    panels: list[Panel], networks: int, means: Means, inference: nn.Module, test: Split, batch_size: int
) -> tuple[float, float]:
    """About how long `networks` evaluations and the recoveries in `panels` take, and the images evaluated a second."""
    rate = evaluation_rate(inference, test, batch_size)
    recoveries = Counter()
    for panel in panels:
        for (_, _, recovery), levels in panel.items():
            recoveries[recovery] += len(levels)
    spent = sum(count * recovery_seconds(recovery, means, rate) for recovery, count in recoveries.items())
    return networks * len(test) / rate + spent, rate


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
