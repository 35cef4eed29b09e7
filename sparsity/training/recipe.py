"""The recipe of a training: the parts beside network and images, a flag each, and the defaults that `--recipe` sets."""

import argparse
from typing import Any

from sparsity.system.flags import integer, number

# Each flag's default, in the order in which they are settled: a function may read what stands before it.
RECIPES: dict[str, dict[str, Any]] = {
    "reference": {
        "batch_size": 128,
        "learning_rate": 0.01,
        "nesterov": False,
        "warmup_epochs": 0,
        "T_max": 20,
        "label_smoothing": 0.0,
        "ema": 0.0,
        "cutout": 0,
        "norm_weight_decay": True,
    },
    "strong": {
        "batch_size": 256,
        "learning_rate": lambda args: 0.1 * args.batch_size / 128,
        "nesterov": True,
        "warmup_epochs": 5,
        "T_max": lambda args: args.epochs - args.warmup_epochs,
        "label_smoothing": 0.1,
        "ema": 0.999,
        "cutout": lambda args: args.image_size // 4,
        "norm_weight_decay": False,
    },
}


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and the flags that it sets; those that are not given are None until `settle_recipe`."""
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default="reference",
        help="sets the defaults that differ below; --precision auto (bfloat16 where the hardware is made for it) and "
        "channels_last belong to both (%(default)s)",
    )
    for name, kind, text, strong in (
        ("batch_size", integer(2), "images a step", None),
        ("learning_rate", number(0, 1e30, above=True), "highest learning rate", "0.1 for every 128 of --batch_size"),
        ("nesterov", bool, "Nesterov's momentum, for sgd", None),
        ("warmup_epochs", integer(0), "epochs in which the learning rate rises linearly", None),
        ("T_max", integer(1), "half period of the cosine after them, in epochs", "all epochs after the warm-up"),
        ("label_smoothing", number(0, 0.99), "share of a label that is spread over all classes", None),
        ("ema", number(0, 0.999999), "decay a step of the weights' moving average, which is tested and saved", None),
        ("cutout", integer(0, 512), "side in pixels of a square cut out of each image", "a quarter of --image_size"),
        ("norm_weight_decay", bool, "weight decay on BatchNorm and biases too", None),
    ):
        defaults = f"{_word(RECIPES['reference'][name])}; strong: {strong or _word(RECIPES['strong'][name])}"
        takes = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", help=f"{text} ({defaults})", **takes)


def settle_recipe(args: argparse.Namespace) -> None:
    """Give the recipe's flags that are None their defaults, in place; `epochs` and `image_size` are known by now."""
    for name, default in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, default(args) if callable(default) else default)


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with settings that cannot go together, in words, or None."""
    if args.nesterov and (args.optimizer != "sgd" or args.momentum == 0):
        return "--nesterov needs --optimizer sgd and a --momentum above 0; --no-nesterov trains without it"
    if args.epochs <= args.warmup_epochs:
        return f"--epochs {args.epochs} leaves no epoch after --warmup_epochs {args.warmup_epochs}; change one of them"
    if args.cutout > args.image_size:
        return f"--cutout {args.cutout} is larger than the images of {args.image_size} pixels; use a smaller one"
    return None


def _word(default: Any) -> str:
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default:g}"
