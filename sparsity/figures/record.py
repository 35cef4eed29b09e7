"""What a training leaves in --images_dir: its curve, its confusion matrix, and the record of what it was made of."""

import argparse
from pathlib import Path
from typing import Any

import torch

from sparsity.data.images import Split
from sparsity.figures.training import plot_confusion, plot_training
from sparsity.networks.evaluation import Evaluation
from sparsity.system.files import file_hash, write_csv, write_json
from sparsity.system.machine import machine, versions
from sparsity.training.resume import HISTORY_COLUMNS, kept_settings


def draw_pictures(
    args: argparse.Namespace,
    stem: str,
    history: list[dict[str, Any]],
    final: Evaluation,
    test: Split,
    data: dict[str, Any],
) -> tuple[Path, Path]:
    """Training curve and confusion matrix, each as CSV and picture in `images_dir`; returns the pictures' paths.

    `history` holds a row of HISTORY_COLUMNS for each epoch, `final` the predictions for `test`.
    """
    classes = data["classes"]
    title = f"{args.arch} on {data['name']}, {args.image_size} px, {len(history)} epochs"
    smoothed = f", labels smoothed by {args.label_smoothing:g}" if args.label_smoothing else ""
    training = args.images_dir / f"{stem}_training.csv"
    write_csv(training, HISTORY_COLUMNS, history)
    plot_training(training, training.with_suffix(".png"), f"Training {title}{smoothed}")
    confusion = args.images_dir / f"{stem}_confusion.csv"
    pairs = test.labels.cpu() * len(classes) + final.predictions
    counts = torch.bincount(pairs, minlength=len(classes) ** 2).view(len(classes), -1).tolist()
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    columns = ("true class", *classes)
    write_csv(confusion, columns, (dict(zip(columns, row, strict=True)) for row in rows))
    heading = f"{title}: test accuracy {final.accuracy:.2f} %"
    plot_confusion(confusion, confusion.with_suffix(".png"), heading)
    return training.with_suffix(".png"), confusion.with_suffix(".png")


def write_record(
    args: argparse.Namespace, stem: str, network: Path, final: Evaluation, test: Split, data: dict[str, Any]
) -> Path:
    """Write `{stem}_training.json`, what a result was made of and where, and return its path.

    `network` is the last numbered checkpoint; `args` holds, beside the settings, the command line as `command`.
    """
    record = args.images_dir / f"{stem}_training.json"
    content = {
        "command": args.command,
        "seed": args.seed,
        "settings": kept_settings(args),
        "versions": versions(),
        "machine": machine(test.labels.device),
        "images": {"training_sha256": data["training_sha256"], "test_sha256": test.hash()},
        "checkpoint": {"file": network.name, "sha256": file_hash(network)},
        "test_accuracy": final.accuracy,
    }
    write_json(record, content)
    return record
