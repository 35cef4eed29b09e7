"""All flags of run.py, and the recipes that set the defaults of a training; torch-free."""

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsity.system.errors import UserError
from sparsity.system.flags import (
    ARCH_HELP,
    BUILT_IN,
    DATASETS,
    Parser,
    add_arch_flags,
    add_machine_flags,
    given_flags,
    integer,
    number,
    time_span,
)
from sparsity.training.schedule import image_sizes

OPTIMIZERS = ("sgd", "adam", "rmsprop", "muon")  # made by training/optimizer.py
FEW_EPOCHS = 16  # in fewer, a network learns too little rather than too much: no cutout, no moving average

# Flag -> its default in either recipe, in the order in which they are settled: a function may read those above it.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "optimizer": ("sgd", "muon"),
    "batch_size": (128, 128),
    "learning_rate": (0.01, lambda args: 0.12 * args.batch_size / 128),
    "nesterov": (False, True),
    "schedule_shape": ("cosine", "linear"),
    "warmup_share": (0.15, 0.15),
    "warmup_epochs": (0, lambda args: 5 if args.schedule_shape == "cosine" else 0),
    "T_max": (20, lambda args: args.epochs - args.warmup_epochs),
    "label_smoothing": (0.0, 0.1),
    "ema": (0.0, lambda args: 0.0 if args.epochs < FEW_EPOCHS else 0.999),
    "shift": (4, lambda args: min(3 if args.epochs < FEW_EPOCHS else 4, args.image_size - 1)),
    "border": ("zeros", "reflect"),
    "cutout": (0, lambda args: 0 if args.epochs < FEW_EPOCHS else args.image_size // 4),
    "norm_weight_decay": (True, False),
    "zero_init": (False, lambda args: args.arch in BUILT_IN),
    "start_size": (0, lambda args: 4 * (5 * args.image_size // 32)),
}
RECIPES = ("reference", "strong")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of run.py as attributes; `given` holds the names of those that are on the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.given = given_flags(parser, argv)
    args.image_size = args.image_size or DATASETS[args.dataset]
    settle(args)
    if args.time_budget and "epochs" in args.given and not args.resume:
        parser.error("--epochs and --time_budget both say how long to train; give one of them")
    if not args.resume and (problem := contradiction(args)):  # most settings of a resumed run are saved ones
        parser.error(problem)
    return args


def settle(args: argparse.Namespace) -> None:
    """Give the recipe's flags that are None the defaults of their recipe, in place."""
    for name, defaults in DEFAULTS.items():
        if getattr(args, name) is None:
            default = defaults[RECIPES.index(args.recipe)]
            setattr(args, name, default(args) if callable(default) else default)


def settle_epochs(args: argparse.Namespace, epochs: int) -> None:
    """Set `epochs`, and anew the recipe's flags that are not on the command line and may follow them, in place.

    Raises UserError for settings that cannot go together.
    """
    args.epochs = epochs
    vars(args).update(dict.fromkeys(DEFAULTS.keys() - args.given))
    settle(args)
    if problem := contradiction(args):
        raise UserError(f"{epochs} epochs fit into --time_budget, but {problem}")


def training_sizes(args: argparse.Namespace) -> list[int]:
    """The side in pixels of the training images in each epoch.

    With the linear schedule it follows the length of the schedule, as the learning rate does.
    """
    planned = args.T_max if args.schedule_shape == "linear" else args.epochs
    return image_sizes(args.start_size, args.image_size, planned)[: args.epochs]


def build_parser() -> argparse.ArgumentParser:
    """The parser of run.py; flags that a recipe sets are None unless they are given."""
    text = "Train a network on CIFAR, a folder of images or synthetic images; pruning.py reads its checkpoints."
    parser = Parser(prog="run.py", description=text)
    add = parser.add_argument_group("what to train").add_argument
    add_arch_flags(add, "resnet50", f"network: {ARCH_HELP} (%(default)s)")
    text = "channels of the first stage of a built-in network (%(default)s)"
    add("--width", type=integer(1, 4096), default=64, metavar="N", help=text)
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
    add("--batch_size", type=integer(2), metavar="N", help="images a step (128)")
    text = "highest learning rate (0.01; strong: 0.12 for every 128 of --batch_size)"
    add("--learning_rate", type=number(0, 1e30, above=True), metavar="RATE", help=text)
    add("--nesterov", action=BooleanOptionalAction, help="Nesterov's momentum, for sgd and muon (off; strong: on)")
    text = (
        "learning rate over time: cosine, stepped once an epoch, or linear, up and then down to 0, stepped after each "
        "batch (cosine; strong: linear)"
    )
    add("--schedule_shape", choices=("cosine", "linear"), help=text)
    text = "linear: share of --T_max in which the learning rate rises (0.15)"
    add("--warmup_share", type=number(0, 0.99), metavar="X", help=text)
    text = "cosine: epochs of linear warm-up before it (0; strong: 5)"
    add("--warmup_epochs", type=integer(0), metavar="N", help=text)
    text = "epochs: half period of the cosine, length of the linear schedule (20; strong: all after --warmup_epochs)"
    add("--T_max", type=integer(1), metavar="N", help=text)
    text = "share of a label that is spread over all classes (0; strong: 0.1)"
    add("--label_smoothing", type=number(0, 0.99), metavar="X", help=text)
    text = f"decay of the weights' moving average, tested and saved (0; strong: 0.999; 0 below {FEW_EPOCHS} epochs)"
    add("--ema", type=number(0, 0.999999), metavar="X", help=text)
    text = f"largest random shift of an image, in pixels (4; strong: 4; 3 below {FEW_EPOCHS} epochs)"
    add("--shift", type=integer(0, 512), metavar="N", help=text)
    text = "pixels that a shift brings in: zeros, black; reflect, the image mirrored (zeros; strong: reflect)"
    add("--border", choices=("zeros", "reflect"), help=text)
    text = f"side of a square cut out of each image (0; strong: a quarter of --image_size; 0 below {FEW_EPOCHS} epochs)"
    add("--cutout", type=integer(0, 512), metavar="N", help=text)
    add("--norm_weight_decay", action=BooleanOptionalAction, help="decay BatchNorm and biases too (on; strong: off)")
    text = "built-in networks: the last BatchNorm weights of each residual branch start at 0 (off; strong: on)"
    add("--zero_init", action=BooleanOptionalAction, help=text)
    text = (
        "side in pixels of the images of the first epochs, which grows by 4 to --image_size over the first 60 %% of "
        "the epochs; 0: always --image_size (0; strong: five eighths of --image_size)"
    )
    add("--start_size", type=integer(0, 512), metavar="N", help=text)
    add("--epochs", type=integer(1), default=60, metavar="N", help="passes over the training images (%(default)s)")
    text = "instead of --epochs: as many as end within a time such as 2h30m, by a few steps that are timed first (off)"
    add("--time_budget", type=time_span, default=0.0, metavar="TIME", help=text)
    text = (
        "muon: orthogonalised momentum for convolutions and hidden layers, at a sixth of --learning_rate and 200 times "
        "--weight_decay, decoupled; sgd for output layer, BatchNorm and biases (sgd; strong: muon)"
    )
    add("--optimizer", choices=OPTIMIZERS, help=text)
    add("--momentum", type=number(0, 0.9999), default=0.9, metavar="X", help="for adam the first beta (%(default)s)")
    add("--weight_decay", type=number(0, 1e30), default=5e-4, metavar="X", help="L2 regularisation (%(default)s)")


def contradiction(args: argparse.Namespace) -> str | None:
    """The settings that cannot go together, in words, or None."""
    if args.arch in BUILT_IN and args.arch_args:
        return f"--arch_args is not for {args.arch}, a built-in network, which has --width"
    if args.arch not in BUILT_IN and ("width" in args.given or args.zero_init):
        return (
            f"--width and --zero_init are for built-in networks; give --arch {args.arch} its arguments by --arch_args"
        )
    if args.nesterov and (args.optimizer not in ("sgd", "muon") or args.momentum == 0):
        return "--nesterov needs --optimizer sgd or muon, and a --momentum above 0; --no-nesterov trains without it"
    if args.schedule_shape == "cosine" and "warmup_share" in args.given:
        return "--warmup_share belongs to --schedule_shape linear; the cosine has --warmup_epochs"
    if args.schedule_shape == "linear":
        if args.warmup_epochs:
            return "--warmup_epochs belongs to --schedule_shape cosine; the linear schedule has --warmup_share"
        if args.epochs > args.T_max:
            return f"--epochs {args.epochs} goes beyond --T_max {args.T_max}, where the linear schedule ends at rate 0"
    if args.epochs <= args.warmup_epochs:
        return f"--epochs {args.epochs} leaves no epoch after --warmup_epochs {args.warmup_epochs}; change one of them"
    if args.border == "reflect" and args.shift >= args.image_size:
        return f"--shift {args.shift} is too large to mirror images of {args.image_size} pixels; use a smaller one"
    if args.start_size > args.image_size:
        return f"--start_size {args.start_size} is larger than the images of {args.image_size} pixels"
    if args.cutout > args.image_size:
        return f"--cutout {args.cutout} is larger than the images of {args.image_size} pixels; use a smaller one"
    return None
