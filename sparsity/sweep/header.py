"""The JSON of a sweep: its settings, data, checkpoints, versions and machine."""

import argparse
from typing import Any

import torch

from sparsity.data.sources import Source
from sparsity.sweep.flags import CALIBRATION_IMAGES
from sparsity.sweep.inputs import Inputs
from sparsity.sweep.work import Panel
from sparsity.system.flags import level_text
from sparsity.system.machine import describe_machine, versions


def output_name(name: str | None, source: Source, spec: dict) -> str:
    """The stem of the outputs; that images are synthetic is always in it."""
    name = name or f"{source.name}_{spec['arch']}"
    return name if source.dataset != "synthetic" or "synthetic" in name else f"synthetic_{name}"


def describe_sweep(args: argparse.Namespace, given: Inputs, panel: Panel) -> dict[str, Any]:
    """The content of the JSON; rows are only mixed where `settings` and `data` are the same."""
    arch, source, test, device = given.saved.model["arch"], given.source, given.test, torch.device(args.device)
    names = list(given.described)
    title = ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
    # An iterative curve depends on all levels before, so that levels cannot be added to one that is there.
    levels = ",".join(map(level_text, args.levels))
    calibrated = any(curve.needs_calibration for curve in panel) or None
    tuned = any(curve.trains for curve in panel) or None
    return {
        "title": f"{arch} on {source.name}, {title}\n{len(test):,} test images, {args.precision}",
        "curves": [list(curve) for curve in panel],
        "settings": {
            "arch": arch,
            "test_images": len(test),
            "batch_size": args.batch_size,
            "precision": args.precision,
            "device": device.type,
            "threads": args.threads,
            "seed": args.seed,
            "calibration_images": calibrated and (args.calibration_images or CALIBRATION_IMAGES),
            "schedule": f"iterative {levels}" if args.schedule == "iterative" else "oneshot",
            "finetune": tuned and f"{args.finetune_epochs} epochs, {args.finetune_learning_rate}",
            "engine": args.engine,
            "torch": str(torch.__version__),
            "compile": args.compile == "on" or None,
            "deterministic": args.deterministic or None,
        },
        "data": {
            "dataset": source.name,
            "image_size": source.image_size,
            "mean": list(test.mean),
            "std": list(test.std),
            "classes": given.classes,
            "test_sha256": test.hash(),
        },
        "checkpoints": given.described,
        "versions": versions(),
        "machine": describe_machine(device),
        "command": args.command,
    }
