"""The images that a checkpoint is tested on, and the training images that calibration and fine-tuning read."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sparsity.data.calibration import Calibration, draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, CIFAR100_STATISTICS, Split, class_balanced_order
from sparsity.data.sources import DATASETS, Source, default_image_size, load_split
from sparsity.networks.checkpoint import Checkpoint
from sparsity.prune.criteria import NEEDS_CALIBRATION, READS_LABELS
from sparsity.recover import NEED_CALIBRATION, NEED_TRAINING
from sparsity.recover.finetune import Finetuning, rewound_rates
from sparsity.results.rows import Curve
from sparsity.system.errors import UserError

DEFAULT_CALIBRATION = 2048


REFERENCE_TRAINING = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4}  # where a checkpoint tells no other


def find_source(saved: Checkpoint, dataset: str | None, data_dir: Path | None) -> Source:
    """The images that the flags or else the checkpoint name; UserError when neither does."""
    data = saved.data or {}
    dataset = dataset or data.get("dataset") or {10: "cifar10", 100: "cifar100"}.get(saved.model["num_classes"])
    if dataset not in DATASETS:
        raise UserError(f"{saved.path} does not tell its dataset; name one of {', '.join(DATASETS)} with --dataset")
    if not data:
        print(f"{saved.path} has no metadata: images of {dataset} are normalised with the usual constants of CIFAR")
    folder = data_dir or Path(data.get("data_dir", "datasets"))
    return Source(dataset, folder, data.get("image_size") or default_image_size(dataset))


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


def output_name(name: str | None, source: Source, spec: dict) -> str:
    """The stem of the outputs; that images are synthetic is always in it."""
    name = name or f"{source.name}_{spec['arch']}"
    return name if source.dataset != "synthetic" or "synthetic" in name else f"synthetic_{name}"


def describe_data(source: Source, test: Split, classes: list[str]) -> dict[str, Any]:
    """What a sweep's JSON tells of its images."""
    return {
        "dataset": source.name,
        "image_size": source.image_size,
        "mean": list(test.mean),
        "std": list(test.std),
        "classes": classes,
        "test_sha256": test.hash(),
    }


def needs_calibration(curves: Iterable[Curve]) -> bool:
    """Whether a criterion or recovery among `curves` looks at calibration images."""
    return any(criterion in NEEDS_CALIBRATION or recover in NEED_CALIBRATION for criterion, _, recover in curves)


def needs_training(curves: Iterable[Curve]) -> bool:
    """Whether a recovery among `curves` trains."""
    return any(recover in NEED_TRAINING for _, _, recover in curves)


def finetuning_rates(saved: Checkpoint, rate: float | str, epochs: int) -> tuple[float, ...]:
    """The learning rate of each epoch of fine-tuning: `rate`, or for 'rewind' those of the last epochs of training."""
    if rate != "rewind":
        return (rate,) * epochs
    first, t_max = saved.settings.get("learning_rate"), saved.settings.get("T_max")
    warmup = saved.settings.get("warmup_epochs", 0)
    whole = all(isinstance(value, int) for value in (t_max, warmup))
    if not isinstance(first, float) or not whole or not saved.epoch or t_max < 1 or warmup < 0 or not first > 0:
        raise UserError(
            f"{saved.path} does not tell the learning rates of its training; give --finetune_learning_rate a number"
        )
    rates = rewound_rates(first, t_max, saved.epoch, epochs, warmup)
    if not any(rates):
        raise UserError(f"{saved.path}: the last learning rates of its training are 0; use more --finetune_epochs")
    return rates


def training_recipe(saved: Checkpoint) -> dict[str, Any]:
    """Batch size, momentum and weight decay of a checkpoint's training, the study's where it does not tell them."""
    recipe = dict(REFERENCE_TRAINING)
    for key, usual in REFERENCE_TRAINING.items():
        value = saved.settings.get(key, usual)
        sound = isinstance(value, type(usual)) and math.isfinite(value) and value >= (1 if key == "batch_size" else 0)
        if not sound:
            raise UserError(f"{saved.path} was trained with {key} {value!r}, which cannot be; the file is damaged")
        recipe[key] = value
    return recipe


def finetuning(saved: Checkpoint, train: Split, rate: float | str, epochs: int, dtype: torch.dtype) -> Finetuning:
    """Fine-tuning of one checkpoint on `train`, as it was trained as far as it tells."""
    return Finetuning(train, finetuning_rates(saved, rate, epochs), **training_recipe(saved), dtype=dtype)


def distinct_names(paths: list[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart, as seed0/net.pth: plots and tables show them."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def describe_checkpoints(
    paths: list[Path], load: Callable[[Path], tuple[Checkpoint, Any]], rates: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """Name -> hash and epoch of every checkpoint, after making sure that all can be read and belong together.

    `load` gives a checkpoint and its network; `rates` are those of fine-tuning, None where nothing is fine-tuned.
    """
    names = distinct_names(paths)
    described: dict[str, dict[str, Any]] = {}
    kinds = []
    for name, path in zip(names, paths, strict=True):
        saved, _ = load(path)
        twins = [other for other, entry in described.items() if entry["sha256"] == saved.sha256]
        if twins or name in described:
            raise UserError(f"--checkpoint {path} is the same as {(twins or [name])[0]}; name each one once")
        described[name] = {"sha256": saved.sha256, "epoch": saved.epoch}
        data = saved.data or {}
        if rates:  # whether it can be fine-tuned is found out before long work
            training_recipe(saved)
            finetuning_rates(saved, **rates)
        kinds.append((saved.model, *(data.get(key) for key in ("dataset", "image_size", "mean", "std", "classes"))))
        if kinds[-1] != kinds[0]:
            raise UserError(f"{path} and {paths[0]} differ in network or data; sweep them apart, with --name for each")
    return described


def load_evidence(
    source: Source,
    saved: Checkpoint,
    asked: int | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    curves: set[Curve],
) -> tuple[Calibration | None, Split | None]:
    """The calibration images, and the training images for fine-tuning; loaded only if one of `curves` needs them."""
    if not needs_calibration(curves) and not needs_training(curves):
        return None, None
    train, _ = _load(source, saved, train=True)
    calibration = None
    if needs_calibration(curves):
        if asked and asked > len(train):
            raise UserError(f"--calibration_images {asked} is more than the {len(train)} images of the training split")
        if any(criterion in READS_LABELS for criterion, _, _ in curves):
            print("the criterion gradient reads the labels of the calibration images")
        calibration = draw_calibration(train, min(asked or DEFAULT_CALIBRATION, len(train)), seed, device, dtype)
    if not needs_training(curves):
        return calibration, None
    print(f"fine-tuning reads the labels of {len(train):,} training images")
    return calibration, train.to(device)


def _load(source: Source, saved: Checkpoint, train: bool) -> tuple[Split, list[str]]:
    data, num_classes = saved.data, saved.model["num_classes"]
    usual = CIFAR100_STATISTICS if source.dataset == "cifar100" else CIFAR10_STATISTICS
    statistics = (tuple(data["mean"]), tuple(data["std"])) if data else usual
    split, classes = load_split(source, train, statistics)
    if len(classes) != num_classes:
        raise UserError(f"{saved.path} tells {num_classes} classes apart, {source.name} has {len(classes)}")
    if data and data["classes"] != classes:
        differing = next(pair for pair in zip(data["classes"], classes, strict=False) if pair[0] != pair[1])
        raise UserError(
            f"{saved.path} was trained on other classes than {source.name} has: {' against '.join(differing)}"
        )
    return split, classes
