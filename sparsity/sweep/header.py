"""The JSON of a sweep: its settings, data, checkpoints, versions and machine."""

import argparse
from typing import Any

import torch

from sparsity.data.sources import Source
from sparsity.networks.families import file_word, network_name, short_name
from sparsity.sweep.flags import CALIBRATION_IMAGES
from sparsity.sweep.inputs import Inputs, recorded_augmentation
from sparsity.system.flags import level_text
from sparsity.system.machine import describe_machine, versions
from sparsity.system.methods import Panel


def output_name(name: str | None, source: Source, spec: dict) -> str:
    """The stem of the outputs; that images are synthetic is always in it."""
    name = name or f"{source.name}_{file_word(spec['arch'])}"
    return name if source.dataset != "synthetic" or "synthetic" in name else f"synthetic_{name}"


def describe_sweep(args: argparse.Namespace, given: Inputs, panel: Panel) -> dict[str, Any]:
    """The content of the JSON; rows are only mixed where `settings` and `data` are the same."""
    network, source, test, names = network_name(given.saved.model), given.source, given.test, list(given.described)
    title = ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"
    ways = [f"{len(test):,} test images", args.precision, *["coupled channels"] * args.couple]
    ways += [f"filters in multiples of {args.round_filters}"] * (args.round_filters > 1)
    ways += ["levels are shares of the multiply-adds"] * (args.budget == "macs")
    return {
        "title": f"{network} on {source.name}, {title}\n{', '.join(ways)}",
        "curves": [list(curve) for curve in panel],
        "settings": _settings(args, given, panel),
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
        "machine": describe_machine(torch.device(args.device)),
        "command": args.command,
    }


def _settings(args: argparse.Namespace, given: Inputs, panel: Panel) -> dict[str, Any]:
    """What decides the figures of rows, beside the images; None for what has no part in them."""
    spec, told = given.saved.model, recorded_augmentation(given.saved)
    # An iterative curve depends on all levels before, so that levels cannot be added to one that is there.
    levels = ",".join(map(level_text, args.levels))
    calibrated = any(curve.needs_calibration for curve in panel) or None
    tuned = any(curve.trains for curve in panel) or None
    distilled = any(curve.distills for curve in panel) or None
    taught = f"{args.distill_epochs} epochs, {args.distill_images or 'all'} images, {args.distill_learning_rate:g}"
    return {
        "arch": short_name(spec["arch"]),
        "arch_args": spec.get("arch_args") or None,
        "arch_sha256": spec.get("sha256"),
        "test_images": len(given.test),
        "batch_size": args.batch_size,
        "precision": args.precision,
        "device": torch.device(args.device).type,
        "threads": args.threads,
        "seed": args.seed,
        "calibration_images": calibrated and (args.calibration_images or CALIBRATION_IMAGES),
        "calibration_augmentation": calibrated and told and str(told),  # chosen later where no checkpoint tells it
        "budget": None if args.budget == "weights" else args.budget,
        "schedule": f"iterative {levels}" if args.schedule == "iterative" else "oneshot",
        "distill": distilled and taught,
        "finetune": tuned and f"{args.finetune_epochs} epochs, {args.finetune_learning_rate}",
        "couple": args.couple or None,
        "round_filters": args.round_filters if args.round_filters > 1 else None,
        "engine": args.engine,
        "torch": str(torch.__version__),
        "compile": args.compile == "on" or None,
        "deterministic": args.deterministic or None,
    }
