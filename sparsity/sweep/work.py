"""Which networks a sweep evaluates: its curves and levels, those that are missing, and this process's share."""

import argparse
import itertools
import time
from datetime import timedelta

import torch
from torch import nn

from sparsity.data.images import Split
from sparsity.networks.evaluation import evaluate
from sparsity.results.store import Sweep
from sparsity.sweep.evaluator import Evaluator
from sparsity.sweep.levels import own_levels
from sparsity.sweep.search import levels_ahead
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.system.flags import counted
from sparsity.system.methods import FILTER_CRITERIA, ONE_LAYER, RECOVERIES, Curve, Panel

RECONSTRUCTED_LEVELS = [60.0, 80.0, 90.0, 95.0]


def choose_panel(args: argparse.Namespace, layers: list[str], inner: list[str]) -> Panel:
    """The curves that the flags ask for, with their levels; `inner` are the layers whose filters may be removed.

    Raises UserError where there are no layers, or no filters of a curve that removes them.
    """
    if not layers:
        raise UserError("the network has no layer that can be pruned: its output layer stays dense")
    if args.compare:  # magnitude in three allocations and the random control, and their recoveries
        pairs = [("l1", "uniform"), ("l1", "global"), ("l1", "lamp"), ("random", "uniform")]
        panel = {Curve(*pair, recovery): args.levels for pair in pairs for recovery in ("none", "batchnorm")}
        return panel | {Curve("l1", "global", "reconstruction"): RECONSTRUCTED_LEVELS}
    filters = bool(set(args.criterion) & FILTER_CRITERIA.keys())
    if filters and not inner:
        raise UserError("the network has no filters that can be removed; use another --criterion, or exclude less")
    allocations = args.allocation
    if args.sensitivity:  # one curve per layer, in which this layer alone is pruned
        allocations = [f"{ONE_LAYER}{layer}" for layer in (inner if filters else layers)]
    curves = [Curve(*parts) for parts in itertools.product(args.criterion, allocations, args.recover)]
    return {curve: own_levels(curve.allocation) or args.levels for curve in curves}


def find_missing(sweep: Sweep, panel: Panel, iterative: bool, search: float | None = None) -> dict[str, Panel]:
    """Checkpoint -> curves that lack rows, with the levels without one; in an iterative sweep with all their levels.

    A search, for a tolerance of `search` points, lacks the `levels_ahead` of curves that have no level of their own.
    """
    missing: dict[str, Panel] = {}
    for name in sweep.header["checkpoints"]:
        for curve, levels in panel.items():
            left = [level for level in levels if not sweep.has(name, curve, level)]
            if search is not None and not curve.pattern:
                left = levels_ahead(sweep, name, curve, search)
            if left:
                missing.setdefault(name, {})[curve] = levels if iterative else left
    return missing


def my_share(missing: dict[str, Panel], costs: dict[str, float], iterative: bool) -> dict[str, Panel]:
    """The part of `missing` that falls to this process; all of it to a single one.

    Work is dealt out level by level, or curve by curve in an iterative sweep: the longest first, each to the process
    with the least to do so far. `costs` is recovery -> cost of a level. Every process computes the same shares.
    """
    items = []
    for name, panel in missing.items():
        for curve, levels in panel.items():
            items += [(name, curve, part) for part in ([levels] if iterative else [[level] for level in levels])]
    loads, share = [0.0] * processes.size(), []
    for item in sorted(items, key=lambda item: -costs[item[1].recover] * len(item[2])):
        owner = loads.index(min(loads))
        loads[owner] += costs[item[1].recover] * len(item[2])
        if owner == processes.rank():
            share.append(item)
    mine: dict[str, Panel] = {}
    for name, curve, levels in sorted(share, key=items.index):
        mine.setdefault(name, {}).setdefault(curve, []).extend(levels)
    return mine


def level_costs(
    test_images: int, calibration_images: int, distilled_images: int, finetuned_images: int
) -> dict[str, float]:
    """Recovery -> about how many images a level costs, in forward passes; only their ratios count.

    `distilled_images` and `finetuned_images` are those of all epochs of a level. On ResNet-50 a refit took as long as
    40 passes over its calibration images, a training step as long as 3.5 forward passes.
    """
    costs = dict.fromkeys(RECOVERIES, test_images)
    costs["batchnorm"] += calibration_images
    costs["reconstruction"] += 40 * calibration_images
    costs["distill"] = costs["reconstruction"] + 4.5 * distilled_images  # the dense network runs once for each step
    costs["finetune"] += 3.5 * finetuned_images
    return costs


def images_per_second(network: nn.Module, test: Split, batch_size: int) -> float:
    """The speed of evaluating `network`, on the first few batches, after a warm-up."""
    few = test.take(torch.arange(min(len(test), 2 * batch_size)))
    evaluate(network, few.take(torch.arange(min(len(few), batch_size))), batch_size)
    started = time.perf_counter()
    evaluate(network, few, batch_size)
    return len(few) / (time.perf_counter() - started)


def announce(evaluator: Evaluator, missing: dict[str, Panel], costs: dict[str, float]) -> None:
    """Say how long the missing networks take, without export and timing, and set the length of the bar.

    The time is the sum of the `costs` of `level_costs`, over the speed of the first few batches. On the way to a
    missing level a curve in steps recovers levels again that have a row.
    """
    sweep, test, batch_size = evaluator.sweep, evaluator.test, evaluator.batch_size
    networks = sum(name not in sweep.dense for name in missing)
    images, recovered = costs["none"] * networks, False
    for name, panel in missing.items():
        for curve, levels in panel.items():
            there = sum(sweep.has(name, curve, level) for level in levels)
            networks += len(levels) - there
            images += costs[curve.recover] * len(levels) - costs["none"] * there
            recovered = recovered or curve.recover != "none"
    evaluator.bar.reset(networks * len(test) // processes.size())
    if networks:
        rate = images_per_second(evaluator.network, test, batch_size)
        seconds = timedelta(seconds=round(images / rate / processes.size()))
        shared = f" in {processes.size()} processes" if processes.size() > 1 else ""
        more = ", and recoveries, by their costs on a ResNet-50" if recovered else ""
        work = f"{counted(networks, 'network')} x {counted(len(test), 'image')} at {rate:,.0f} images/s"
        print(f"about {seconds}{shared}: {work}{more}", flush=True)
