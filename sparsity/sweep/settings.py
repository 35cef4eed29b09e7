"""What a sweep's JSON tells of a run, beside its results."""

import argparse
from typing import Any

import torch

from sparsity.data.images import Split
from sparsity.data.sources import Source
from sparsity.networks.checkpoint import Checkpoint
from sparsity.results.rows import level_text
from sparsity.sweep.inputs import DEFAULT_CALIBRATION, describe_data, needs_calibration, needs_training
from sparsity.sweep.panel import Panel
from sparsity.system.machine import machine, versions


def describe_run(
    args: argparse.Namespace,
    source: Source,
    test: Split,
    classes: list[str],
    saved: Checkpoint,
    checkpoints: dict[str, dict[str, Any]],
    panel: Panel,
) -> dict[str, Any]:
    """What the JSON holds; rows are only mixed where `settings` and `data` are the same."""
    arch, device = saved.model["arch"], torch.device(args.device)
    # An iterative curve depends on all levels before, so that levels cannot be added to one that is there.
    levels = ",".join(map(level_text, args.levels))
    calibrated, tuned = needs_calibration(panel) or None, needs_training(panel) or None
    return {
        "title": f"{arch} on {source.name}, {shorten(list(checkpoints))}\n{len(test):,} test images, {args.precision}",
        "curves": [list(curve) for curve in panel],
        "settings": {
            "arch": arch,
            "test_images": len(test),
            "batch_size": args.batch_size,
            "precision": args.precision,
            "device": device.type,
            "threads": args.threads,
            "seed": args.seed,
            "calibration_images": calibrated and (args.calibration_images or DEFAULT_CALIBRATION),
            "schedule": f"iterative {levels}" if args.schedule == "iterative" else "oneshot",
            "finetune": tuned and f"{args.finetune_epochs} epochs, {args.finetune_learning_rate}",
            "engine": args.engine if _may_be_sparse(args) else None,
            "torch": str(torch.__version__),
            "compile": args.compile == "on" or None,
            "deterministic": args.deterministic or None,
        },
        "data": describe_data(source, test, classes),
        "checkpoints": checkpoints,
        "versions": versions(),
        "machine": machine(device),
        "command": args.command,
    }


def shorten(names: list[str]) -> str:
    """Names in a title: all of one or two, otherwise the first and a count."""
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"


def _may_be_sparse(args: argparse.Namespace) -> bool:
    """Whether some networks of a run may not be run by dense kernels, which changes the last digits of a loss."""
    return args.engine != "dense" and args.precision == "fp32" and torch.device(args.device).type == "cpu"
