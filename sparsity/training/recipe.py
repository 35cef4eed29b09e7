"""All flags of run.py, and the recipes that set the defaults of a training; torch-free."""

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsity.system.flags import DATASETS, add_machine_flags, given_flags, integer, number

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # built by Build_Resnet.py
OPTIMIZERS = ("sgd", "adam", "rmsprop")  # made by training/optimizer.py

# Flag -> its default in either recipe, in the order in which they are settled: a function may read those above it.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "batch_size": (128, 256),
    "learning_rate": (0.01, lambda args: 0.1 * args.batch_size / 128),
    "nesterov": (False, True),
    "warmup_epochs": (0, 5),
    "T_max": (20, lambda args: args.epochs - args.warmup_epochs),
    "label_smoothing": (0.0, 0.1),
    "ema": (0.0, 0.999),
    "cutout": (0, lambda args: args.image_size // 4),
    "norm_weight_decay": (True, False),
}
RECIPES = ("reference", "strong")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of run.py as attributes; `given` holds the names of those that are on the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    args.image_size = args.image_size or DATASETS[args.dataset]
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            default = defaults[RECIPES.index(args.recipe)]
            setattr(args, name, default(args) if callable(default) else default)
    if not args.resume and (problem := contradiction(args)):  # most settings of a resumed run are saved ones
        parser.error(problem)
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser of run.py; flags that a recipe sets are None unless they are given."""
    text = "Train a network on CIFAR, a folder of images or synthetic images; pruning.py reads its checkpoints."
    parser = argparse.ArgumentParser(prog="run.py", description=text, allow_abbrev=False)
    add = parser.add_argument_group("what to train").add_argument
    add("--arch", choices=ARCHITECTURES, default="resnet50", help="network (%(default)s)")
    add("--width", type=integer(1, 4096), default=64, metavar="N", help="channels of the first stage (%(default)s)")
    add("--dataset", choices=tuple(DATASETS), default="cifar10", help="images (%(default)s)")
    text = "folder of the images, which CIFAR is downloaded to (%(default)s)"
    add("--data_dir", type=Path, default=Path("datasets"), metavar="DIR", help=text)
    add("--image_size", type=integer(4, 512), metavar="N", help="side in pixels, resized to (32; synthetic: 16)")
    _add_training_flags(parser.add_argument_group("how to train it").add_argument)
    add = parser.add_argument_group("where to write").add_argument
    text = "networks, and the training state (%(default)s)"
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), metavar="DIR", help=text)
    add("--images_dir", type=Path, default=Path("images"), metavar="DIR", help="plots and tables (%(default)s)")
    add("--save_every", type=integer(1), default=10, metavar="N", help="epochs between numbered files (%(default)s)")
    add("--resume", action="store_true", help="go on from the training state in --checkpoint_dir (off)")
    add_machine_flags(parser)
    return parser


def _add_training_flags(add: Callable[..., Any]) -> None:
    text = (
        "sets the defaults that differ below; --precision auto (bfloat16 where the hardware is made for it) and "
        "channels_last belong to both (%(default)s)"
    )
    add("--recipe", choices=RECIPES, default="reference", help=text)
    add("--batch_size", type=integer(2), metavar="N", help="images a step (128; strong: 256)")
    text = "highest learning rate (0.01; strong: 0.1 for every 128 of --batch_size)"
    add("--learning_rate", type=number(0, 1e30, above=True), metavar="RATE", help=text)
    add("--nesterov", action=BooleanOptionalAction, help="Nesterov's momentum, for sgd (off; strong: on)")
    add("--warmup_epochs", type=integer(0), metavar="N", help="epochs of linear warm-up (0; strong: 5)")
    text = "half period of the cosine after them, in epochs (20; strong: all epochs after the warm-up)"
    add("--T_max", type=integer(1), metavar="N", help=text)
    text = "share of a label that is spread over all classes (0; strong: 0.1)"
    add("--label_smoothing", type=number(0, 0.99), metavar="X", help=text)
    text = "decay a step of the weights' moving average, tested and saved (0; strong: 0.999)"
    add("--ema", type=number(0, 0.999999), metavar="X", help=text)
    text = "side of a square cut out of each image (0; strong: a quarter of --image_size)"
    add("--cutout", type=integer(0, 512), metavar="N", help=text)
    add("--norm_weight_decay", action=BooleanOptionalAction, help="decay BatchNorm and biases too (on; strong: off)")
    add("--epochs", type=integer(1), default=60, metavar="N", help="passes over the training images (%(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="optimizer (%(default)s)")
    add("--momentum", type=number(0, 0.9999), default=0.9, metavar="X", help="for adam the first beta (%(default)s)")
    add("--weight_decay", type=number(0, 1e30), default=5e-4, metavar="X", help="L2 regularisation (%(default)s)")


def contradiction(args: argparse.Namespace) -> str | None:
    """The settings that cannot go together, in words, or None."""
    if args.nesterov and (args.optimizer != "sgd" or args.momentum == 0):
        return "--nesterov needs --optimizer sgd and a --momentum above 0; --no-nesterov trains without it"
    if args.epochs <= args.warmup_epochs:
        return f"--epochs {args.epochs} leaves no epoch after --warmup_epochs {args.warmup_epochs}; change one of them"
    if args.cutout > args.image_size:
        return f"--cutout {args.cutout} is larger than the images of {args.image_size} pixels; use a smaller one"
    return None
