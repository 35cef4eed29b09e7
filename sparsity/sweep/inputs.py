"""The inputs of a sweep: checkpoints, test images, calibration images, training images for recoveries."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.data.calibration import AUGMENTATIONS, Augmentation, Calibration, draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, CIFAR100_STATISTICS, Split, class_balanced_order
from sparsity.data.sources import Pick, Source, load_split
from sparsity.networks.checkpoint import Checkpoint, newest
from sparsity.networks.families import load_network, named
from sparsity.networks.inference import inference_copy
from sparsity.networks.outputs import require_logits
from sparsity.recover.batchnorm import augmentation_distances
from sparsity.recover.finetune import rewound_rate
from sparsity.sweep.flags import CALIBRATION_IMAGES
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.system.flags import DATASETS
from sparsity.system.machine import DTYPES
from sparsity.system.methods import Panel

# Settings of a training that checkpoints of one experiment, which differ in their seeds, have in common.
RECIPE = (
    *("epochs", "recipe", "optimizer", "learning_rate", "batch_size", "momentum", "weight_decay", "T_max"),
    *("shift", "border"),
)
# Where a checkpoint tells no other.
REFERENCE_TRAINING = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "shift": 4, "border": "zeros"}
CHOICE_IMAGES = 512  # by whose statistics an augmentation is chosen; twice as many choose the same


def finetuning_rate(args: argparse.Namespace, saved: Checkpoint) -> Callable[[float], float]:
    """The `rate` of a Finetuning: constant, or for 'rewind' that of the last epochs of the training.

    Raises UserError where the checkpoint does not tell it, or it is 0 throughout.
    """
    rate, epochs, told = args.finetune_learning_rate, args.finetune_epochs, saved.settings
    if rate != "rewind":
        return lambda place: rate
    if not saved.epoch or not {"learning_rate", "T_max"} <= told.keys():
        raise UserError(
            f"{saved.path} does not tell the learning rates of its training; give --finetune_learning_rate a number"
        )
    share = told["warmup_share"] if told.get("schedule_shape") == "linear" else None
    schedule = told["T_max"], saved.epoch, epochs, told.get("warmup_epochs", 0), share
    rewound = rewound_rate(told["learning_rate"], *schedule)
    if not any(rewound(epoch + 0.5) for epoch in range(epochs)):
        raise UserError(f"{saved.path}: the last learning rates of its training are 0; use more --finetune_epochs")
    return rewound


def training_recipe(saved: Checkpoint) -> dict[str, Any]:
    """Batch size, momentum, weight decay, shift and border of a checkpoint's training; the study's if it tells none."""
    return {key: saved.settings.get(key, usual) for key, usual in REFERENCE_TRAINING.items()}


def distillation_count(args: argparse.Namespace, images: int) -> int:
    """How many of the `images` of the training split distillation trains on."""
    return min(args.distill_images or images, images)


def distillation_images(args: argparse.Namespace, train: Split) -> Split:
    """The images that distillation trains on: --distill_images of the training split, the classes balanced, or all."""
    count = distillation_count(args, len(train))
    return train if count == len(train) else train.take(class_balanced_order(train.labels.cpu(), args.seed)[:count])


@dataclass(frozen=True)
class Inputs:
    """The checkpoints of a sweep (`described` as from `describe_checkpoints`) and its test images.

    `saved` and `dense` are the first checkpoint and its network, on the CPU, which stands for the others in all but
    its weights; `saved.data` tells the images of the sweep, whatever the file tells.
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
    described, (saved, dense) = describe_checkpoints(args, paths)
    source = find_source(saved, args.dataset, args.data_dir, args.image_size)
    mean, std = find_normalisation(saved, source, args.mean, args.std)
    told = {"image_size": source.image_size, "mean": mean, "std": std}
    images = {"dataset": source.dataset, "data_dir": str(source.data_dir), "name": source.name}
    saved = replace(saved, data=(saved.data or {}) | images | told)
    require_logits(dense, saved.model["arch"], source.image_size, saved.model["num_classes"])
    with processes.first_alone():  # images may have to be downloaded
        test, classes = load_test_images(source, saved, args.max_test_images)
    saved.data.setdefault("classes", classes)
    return Inputs(paths, described, saved, dense, source, test, classes)


def find_source(saved: Checkpoint, dataset: str | None, data_dir: Path | None, image_size: int | None = None) -> Source:
    """The images that the flags or else the checkpoint name; UserError when neither does."""
    data = saved.data or {}
    dataset = dataset or data.get("dataset") or {10: "cifar10", 100: "cifar100"}.get(saved.model["num_classes"])
    if dataset not in DATASETS:
        raise UserError(f"{saved.path} does not tell its dataset; name one of {', '.join(DATASETS)} with --dataset")
    folder = data_dir or Path(data.get("data_dir", "datasets"))
    told = data.get("image_size")
    if image_size and told and image_size != told:
        print(f"{saved.path} was trained on images of {told} pixels; --image_size {image_size} is used instead")
    return Source(dataset, folder, image_size or told or DATASETS[dataset])


def find_normalisation(
    saved: Checkpoint, source: Source, mean: list[float] | None, std: list[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels: of the flags, of the checkpoint, or the usual ones; says which."""
    usual = CIFAR100_STATISTICS if source.dataset == "cifar100" else CIFAR10_STATISTICS
    told = ([*saved.data["mean"]], [*saved.data["std"]]) if saved.data else None
    used = (mean, std) if mean and std else told or tuple(map(list, usual))
    whence = "--mean and --std" if mean else "its training" if told else "CIFAR, as it has no metadata"
    if mean and told and used != told:
        whence += f", not those of its training ({_constants(told)})"
    print(f"{saved.path}: images of {source.image_size} pixels, {_constants(used)}, the constants of {whence}")
    return used


def _constants(statistics: tuple[list[float], list[float]]) -> str:
    """Mean and standard deviation, in words."""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in statistics)
    return f"mean {mean}, std {std}"


def load_test_images(source: Source, saved: Checkpoint, max_images: int | None) -> tuple[Split, list[str]]:
    """The first `max_images` (or all) test images in the fixed, class-balanced order, and the names of the classes."""
    test, classes = _load(source, saved, False, lambda labels: class_balanced_order(labels)[:max_images])
    if len(test) < 2 * len(classes):
        raise UserError(
            f"{len(test)} test images are too few for {len(classes)} classes: a level is chosen on one half of them "
            f"and reported on the other; use at least {2 * len(classes)}"
        )
    return test, classes


def load_training_images(
    args: argparse.Namespace, given: Inputs, panels: Iterable[Panel], augmentation: str | None
) -> tuple[Calibration | None, Split | None]:
    """Calibration images, and the training split that recoveries train on; each only if a curve of `panels` needs it.

    Both are on the sweep's device. `augmentation` is that of the calibration images of rows that are there.
    """
    device, asked = torch.device(args.device), args.calibration_images
    curves = {curve for panel in panels for curve in panel}
    calibrated, tuned = any(curve.needs_calibration for curve in curves), any(curve.trains for curve in curves)
    distilled = any(curve.distills for curve in curves)
    if not calibrated and not tuned:
        return None, None
    with processes.first_alone():
        train, _ = _load(given.source, given.saved, True)
    calibration = None
    if calibrated:
        if asked and asked > len(train):
            raise UserError(f"--calibration_images {asked} is more than the {len(train)} images of the training split")
        if any(curve.criterion == "gradient" for curve in curves):
            print("the criterion gradient reads the labels of the calibration images")
        count = min(asked or CALIBRATION_IMAGES, len(train))
        chosen = find_augmentation(args, given, train, augmentation)
        calibration = draw_calibration(train, count, args.seed, device, DTYPES[args.precision], chosen)
    if distilled:
        count = distillation_count(args, len(train))
        print(f"distillation trains on {count:,} training images, without their labels")
    if tuned:
        print(f"fine-tuning reads the labels of {len(train):,} training images")
    return calibration, train.to(device) if tuned or distilled else None


def recorded_augmentation(saved: Checkpoint) -> Augmentation | None:
    """The augmentation of a checkpoint's training; None where it does not tell it, as in the study's format."""
    recipe = training_recipe(saved)
    return Augmentation(recipe["shift"], recipe["border"]) if saved.settings else None


def find_augmentation(args: argparse.Namespace, given: Inputs, train: Split, known: str | None) -> Augmentation:
    """The augmentation of calibration images: that of the training of the first checkpoint, as it tells it.

    Where it tells none, the one that is `known` from earlier rows, or else that of AUGMENTATIONS under which the dense
    network's statistics come nearest to the stored ones, on a few of the training images and without their labels.
    """
    there = {str(augmentation): augmentation for augmentation in AUGMENTATIONS}
    if told := recorded_augmentation(given.saved) or there.get(known):
        return told
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    choices = [choice for choice in AUGMENTATIONS if choice.shift < train.images.shape[-1]]
    drawn = (draw_calibration(train, CHOICE_IMAGES, args.seed, device, dtype, choice) for choice in choices)
    distances = augmentation_distances(inference_copy(given.dense.to(device), dtype, fold=False), drawn)
    chosen = processes.gather(min(distances, key=distances.get, default=Augmentation()))[0]
    found = "nearest to its BatchNorm statistics" if distances else "calibration images get the usual one"
    print(f"{given.saved.path} does not tell the augmentation of its training; {found}: {chosen}")
    return chosen


def _load(source: Source, saved: Checkpoint, train: bool, pick: Pick | None = None) -> tuple[Split, list[str]]:
    """A split, normalised as `saved.data` tells; UserError unless both tell the same classes apart."""
    data, num_classes = saved.data, saved.model["num_classes"]
    split, classes = load_split(source, train, (tuple(data["mean"]), tuple(data["std"])), pick)
    if len(classes) != num_classes:
        told = f"{saved.path} has {num_classes} output classes, {source.name} has {len(classes)}"
        raise UserError(f"{told}; name the images of its training with --dataset and --data_dir")
    if data.get("classes", classes) != classes:
        pairs = zip(data["classes"], classes, strict=False)
        differing = next((pair for pair in pairs if pair[0] != pair[1]), ("fewer", "more"))
        raise UserError(
            f"{saved.path} was trained on other classes than {source.name} has: {' against '.join(differing)}"
        )
    return split, classes


def describe_checkpoints(
    args: argparse.Namespace, paths: list[Path]
) -> tuple[dict[str, dict[str, Any]], tuple[Checkpoint, nn.Module]]:
    """Name -> hash and epoch of every checkpoint, and the first one with its network; all are made sure to be readable.

    Says in which settings, beside the seed, their trainings differ.
    """
    described: dict[str, dict[str, Any]] = {}
    alike, trained, first = [], [], None
    for name, path in zip(distinct_names(paths), paths, strict=True):
        saved, network = load_network(path, named(args.arch, args.arch_args))
        first = first or (saved, network)
        twins = [other for other, entry in described.items() if entry["sha256"] == saved.sha256]
        if twins or name in described:
            raise UserError(f"--checkpoint {path} is the same as {(twins or [name])[0]}; name each one once")
        described[name] = {"sha256": saved.sha256, "epoch": saved.epoch}
        if "finetune" in args.recover:
            finetuning_rate(args, saved)  # whether they can be rewound is found out before long work
        data = saved.data or {}
        alike.append((saved.model, *(data.get(key) for key in ("dataset", "image_size", "mean", "std", "classes"))))
        if alike[-1] != alike[0]:
            raise UserError(f"{path} and {paths[0]} differ in network or data; sweep them apart, with --name for each")
        trained.append(saved.settings | {"epochs": saved.epoch})
    differing = [key for key in RECIPE if len({repr(settings.get(key)) for settings in trained}) > 1]
    if differing:
        print(f"the checkpoints differ in more than the seed of their training: {', '.join(differing)}")
    return described, first


def distinct_names(paths: list[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart, as seed0/net.pth: plots and tables show them."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
