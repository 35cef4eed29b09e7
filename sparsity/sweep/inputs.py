"""The inputs of a sweep: checkpoints, test images, calibration images, training images for fine-tuning."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.data.calibration import Calibration, draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, CIFAR100_STATISTICS, Split, class_balanced_order
from sparsity.data.sources import Source, load_split
from sparsity.networks.checkpoint import Checkpoint, newest
from sparsity.networks.families import load_network
from sparsity.recover.finetune import rewound_rates
from sparsity.sweep.flags import CALIBRATION_IMAGES
from sparsity.sweep.work import Panel
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.system.flags import DATASETS
from sparsity.system.machine import DTYPES

# Settings of a training that checkpoints of one experiment, which differ in their seeds, have in common.
RECIPE = ("epochs", "recipe", "optimizer", "learning_rate", "batch_size", "momentum", "weight_decay", "T_max")
REFERENCE_TRAINING = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4}  # where a checkpoint tells no other


def finetuning_rates(args: argparse.Namespace, saved: Checkpoint) -> tuple[float, ...]:
    """The learning rate of each epoch; for 'rewind' those of the last epochs of the checkpoint's training."""
    rate, epochs, told = args.finetune_learning_rate, args.finetune_epochs, saved.settings
    if rate != "rewind":
        return (rate,) * epochs
    if not saved.epoch or not {"learning_rate", "T_max"} <= told.keys():
        raise UserError(
            f"{saved.path} does not tell the learning rates of its training; give --finetune_learning_rate a number"
        )
    rates = rewound_rates(told["learning_rate"], told["T_max"], saved.epoch, epochs, told.get("warmup_epochs", 0))
    if not any(rates):
        raise UserError(f"{saved.path}: the last learning rates of its training are 0; use more --finetune_epochs")
    return rates


def training_recipe(saved: Checkpoint) -> dict[str, Any]:
    """Batch size, momentum and weight decay of a checkpoint's training, the study's where it does not tell them."""
    return {key: saved.settings.get(key, usual) for key, usual in REFERENCE_TRAINING.items()}


@dataclass(frozen=True)
class Inputs:
    """The checkpoints of a sweep (`described` as from `describe_checkpoints`) and its test images.

    `saved` and `dense` are the first checkpoint and its network, on the CPU, which stands for the others in all but
    its weights.
    """

    paths: list[Path]
    described: dict[str, dict[str, Any]]
    saved: Checkpoint
    dense: nn.Module
    source: Source
    test: Split
    classes: list[str]

    @property
    def example(self) -> torch.Tensor:
        """A blank image [1, 3, S, S] of the size of the test images."""
        return torch.zeros(1, 3, self.source.image_size, self.source.image_size)


def load_inputs(args: argparse.Namespace) -> Inputs:
    """Read the checkpoints and the test images that the flags name; UserError where they cannot be swept together."""
    paths = args.checkpoint or [newest(args.checkpoint_dir)]
    described = describe_checkpoints(args, paths)
    saved, dense = load_network(paths[0])
    source = find_source(saved, args.dataset, args.data_dir)
    with processes.first_alone():  # images may have to be downloaded
        test, classes = load_test_images(source, saved, args.max_test_images)
    return Inputs(paths, described, saved, dense, source, test, classes)


def find_source(saved: Checkpoint, dataset: str | None, data_dir: Path | None) -> Source:
    """The images that the flags or else the checkpoint name; UserError when neither does."""
    data = saved.data or {}
    dataset = dataset or data.get("dataset") or {10: "cifar10", 100: "cifar100"}.get(saved.model["num_classes"])
    if dataset not in DATASETS:
        raise UserError(f"{saved.path} does not tell its dataset; name one of {', '.join(DATASETS)} with --dataset")
    if not data:
        print(f"{saved.path} has no metadata: images of {dataset} are normalised with the usual constants of CIFAR")
    folder = data_dir or Path(data.get("data_dir", "datasets"))
    return Source(dataset, folder, data.get("image_size") or DATASETS[dataset])


def load_test_images(source: Source, saved: Checkpoint, max_images: int | None) -> tuple[Split, list[str]]:
    """The first `max_images` (or all) test images in the fixed, class-balanced order, and the names of the classes."""
    test, classes = _load(source, saved, train=False)
    test = test.take(class_balanced_order(test.labels)[:max_images])
    if len(test) < 2 * len(classes):
        raise UserError(
            f"{len(test)} test images are too few for {len(classes)} classes: a level is chosen on one half of them "
            f"and reported on the other; use at least {2 * len(classes)}"
        )
    return test, classes


def load_training_images(
    args: argparse.Namespace, given: Inputs, panels: Iterable[Panel]
) -> tuple[Calibration | None, Split | None]:
    """Calibration images, and the labelled training images of fine-tuning; each only if a curve of `panels` needs it.

    Both are on the sweep's device.
    """
    device, asked = torch.device(args.device), args.calibration_images
    curves = {curve for panel in panels for curve in panel}
    calibrated, tuned = any(curve.needs_calibration for curve in curves), any(curve.trains for curve in curves)
    if not calibrated and not tuned:
        return None, None
    with processes.first_alone():
        train, _ = _load(given.source, given.saved, train=True)
    calibration = None
    if calibrated:
        if asked and asked > len(train):
            raise UserError(f"--calibration_images {asked} is more than the {len(train)} images of the training split")
        if any(curve.criterion == "gradient" for curve in curves):
            print("the criterion gradient reads the labels of the calibration images")
        count = min(asked or CALIBRATION_IMAGES, len(train))
        calibration = draw_calibration(train, count, args.seed, device, DTYPES[args.precision])
    if not tuned:
        return calibration, None
    print(f"fine-tuning reads the labels of {len(train):,} training images")
    return calibration, train.to(device)


def _load(source: Source, saved: Checkpoint, train: bool) -> tuple[Split, list[str]]:
    """A split, normalised as the checkpoint was trained; UserError unless both tell the same classes apart."""
    data, num_classes = saved.data, saved.model["num_classes"]
    usual = CIFAR100_STATISTICS if source.dataset == "cifar100" else CIFAR10_STATISTICS
    statistics = (tuple(data["mean"]), tuple(data["std"])) if data else usual
    split, classes = load_split(source, train, statistics)
    if len(classes) != num_classes:
        raise UserError(f"{saved.path} tells {num_classes} classes apart, {source.name} has {len(classes)}")
    if data and data["classes"] != classes:
        pairs = zip(data["classes"], classes, strict=False)
        differing = next((pair for pair in pairs if pair[0] != pair[1]), ("fewer", "more"))
        raise UserError(
            f"{saved.path} was trained on other classes than {source.name} has: {' against '.join(differing)}"
        )
    return split, classes


def describe_checkpoints(args: argparse.Namespace, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Name -> hash and epoch of every checkpoint, after making sure that all can be read and belong together.

    Says in which settings, beside the seed, their trainings differ.
    """
    described: dict[str, dict[str, Any]] = {}
    alike, trained = [], []
    for name, path in zip(distinct_names(paths), paths, strict=True):
        saved, _ = load_network(path)
        twins = [other for other, entry in described.items() if entry["sha256"] == saved.sha256]
        if twins or name in described:
            raise UserError(f"--checkpoint {path} is the same as {(twins or [name])[0]}; name each one once")
        described[name] = {"sha256": saved.sha256, "epoch": saved.epoch}
        if "finetune" in args.recover:
            finetuning_rates(args, saved)  # whether they can be rewound is found out before long work
        data = saved.data or {}
        alike.append((saved.model, *(data.get(key) for key in ("dataset", "image_size", "mean", "std", "classes"))))
        if alike[-1] != alike[0]:
            raise UserError(f"{path} and {paths[0]} differ in network or data; sweep them apart, with --name for each")
        trained.append(saved.settings | {"epochs": saved.epoch})
    differing = [key for key in RECIPE if len({repr(settings.get(key)) for settings in trained}) > 1]
    if differing:
        print(f"the checkpoints differ in more than the seed of their training: {', '.join(differing)}")
    return described


def distinct_names(paths: list[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart, as seed0/net.pth: plots and tables show them."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
