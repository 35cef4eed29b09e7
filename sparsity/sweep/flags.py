"""All flags of pruning.py, and the rules about which of them clash; torch-free."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsity.sweep.levels import allocation_type, export_type, level_rules, search_path
from sparsity.system.flags import (
    ARCH_HELP,
    BUILT_IN,
    DATASETS,
    Parser,
    add_arch_flags,
    add_machine_flags,
    given_flags,
    images_type,
    integer,
    levels_type,
    number,
    rate_type,
    stem_type,
)
from sparsity.system.methods import ALLOCATIONS, CRITERIA, FILTER_ALLOCATIONS, FILTER_CRITERIA, RECOVERIES, Curve

PROGRAMS = {"program": ".pt2", "onnx": ".onnx"}  # exported files that run without this project: name -> ending
EXPORT_FORMATS = {"packed": ".npz", "dense": ".pth", "safetensors": ".safetensors"} | PROGRAMS
EXPORT_BITS = {"fp32": 32, "bf16": 16}  # precision of exported values -> bits of one
PREDICTION = {"predict", "arch", "arch_args", "dataset", "mean", "std", "image_size", "threads"}  # flags with --predict
NORMALISATIONS = {  # name -> of --mean and --std
    "imagenet": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
CALIBRATION_IMAGES = 2048
TRAINING = ("distill", "finetune")  # recoveries with flags of their own: --distill_epochs and so on
SENSITIVITY_LEVELS = [50.0, 80.0, 90.0, 95.0]
SENSITIVITY_IMAGES = 1000


def build_parser() -> argparse.ArgumentParser:
    """The parser of pruning.py; of --criterion, --allocation and --recover every combination is a curve."""
    text = "Prune a trained network level by level, evaluate every level, plot test accuracy over sparsity."
    parser = Parser(prog="pruning.py", description=text)
    _add_pruning_flags(parser.add_argument_group("what to prune").add_argument)
    _add_recovery_flags(parser.add_argument_group("how to recover").add_argument)
    _add_evaluation_flags(parser.add_argument_group("what to measure").add_argument)
    _add_output_flags(parser.add_argument_group("where to write").add_argument)
    add_machine_flags(parser)
    return parser


class Channels(argparse.Action):
    """An argparse action: three numbers in 0..1, those of --std above 0, or the name of one of NORMALISATIONS."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        """Store the three numbers; ArgumentError for anything else."""
        if len(values) == 1 and values[0] in NORMALISATIONS:
            values = NORMALISATIONS[values[0]][self.dest]
        if len(values) != 3:
            names = " or ".join(NORMALISATIONS)
            raise argparse.ArgumentError(self, f"takes three numbers, or {names}, not {' '.join(values)}")
        try:
            setattr(namespace, self.dest, [number(0, 1, above=self.dest == "std")(value) for value in values])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, f"{error}, as images are in 0..1") from error


def _several(names: Iterable[str], default: str, text: str) -> dict[str, Any]:
    """The keywords of a flag that takes one or more of these names."""
    choices = tuple(names)
    text = f"{text}; one or more of {', '.join(choices)} ({default})"
    return {"choices": choices, "nargs": "+", "default": [default], "metavar": "NAME", "help": text}


def _add_pruning_flags(add: Callable[..., Any]) -> None:
    text = "one or more, as seeds of one experiment (the newest numbered one in --checkpoint_dir)"
    add("--checkpoint", type=Path, nargs="+", metavar="FILE", help=text)
    add_arch_flags(
        add, None, f"network of a checkpoint that does not name it, or that a Python file builds: {ARCH_HELP}"
    )
    text = "percent: start:stop:step, or a list such as 0,40,99.5 (%(default)s)"
    add("--levels", type=levels_type, default="0:100:5", metavar="L", help=text)
    text = "score by which weights (filter_...: whole filters) are removed, lowest first"
    add("--criterion", **_several((*CRITERIA, *FILTER_CRITERIA), "l1", text))
    text = "share of weights, or of multiply-adds, that a level removes (%(default)s)"
    add("--budget", choices=("weights", "macs"), default="weights", help=text)
    text = (
        "instead of --levels: bisect for the highest one within --tolerance, to 0.5 %%, in at most 8 evaluations (off)"
    )
    add("--search", action="store_true", help=text)
    text = "how the zeros are spread over the layers; N:M keeps the N best of every M inputs"
    add("--allocation", **_several((*ALLOCATIONS, "N:M"), "uniform", text) | {"choices": None, "type": allocation_type})
    text = "filter_...: remove channels of the whole network, those that shortcuts share together (off)"
    add("--couple", action="store_true", help=text)
    text = "filter_...: of each layer, keep a multiple of N filters (%(default)s)"
    add("--round_filters", type=integer(1, 1024), default=1, metavar="N", help=text)
    text = "a level starts from the dense network, or from the level before it (%(default)s)"
    add("--schedule", choices=("oneshot", "iterative"), default="oneshot", help=text)
    add("--exclude", nargs="+", default=[], metavar="NAME", help="weights that stay dense, as globs (none)")
    text = "nine standard curves; reconstruction at 60, 80, 90, 95 %% whatever the --levels (off)"
    add("--compare", action="store_true", help=text)
    add("--sensitivity", action="store_true", help="prune one layer at a time and map the accuracy lost (off)")
    text = "no sweep: a table of the layers, what can be done with the network, and how long a sweep takes (off)"
    add("--describe", action="store_true", help=text)
    text = "no sweep: the classes that the network of any checkpoint or exported file finds in images (off)"
    add("--predict", type=Path, nargs="+", metavar=("FILE", "IMAGE"), help=text)


def _add_recovery_flags(add: Callable[..., Any]) -> None:
    add("--recover", **_several(RECOVERIES, "none", "recovery after pruning; only finetune reads labels"))
    text = f"training images that criteria and recoveries read ({CALIBRATION_IMAGES}, or all where there are fewer)"
    add("--calibration_images", type=integer(2), metavar="N", help=text)
    text = "of the training split that distill trains on, without labels; a number, or all (%(default)s)"
    add("--distill_images", type=images_type, default="all", metavar="N", help=text)
    text = "epochs of distillation at each level (%(default)s)"
    add("--distill_epochs", type=integer(1, 10_000), default=1, metavar="N", help=text)
    text = "of the first step of distillation, from which it falls to 0; at 98 %% sparsity 0.2 was better (%(default)s)"
    add("--distill_learning_rate", type=number(0, 1e30, above=True), default=0.05, metavar="RATE", help=text)
    text = "epochs of fine-tuning at each level (%(default)s)"
    add("--finetune_epochs", type=integer(1, 10_000), default=1, metavar="N", help=text)
    text = "a number, or rewind: the rates of the last epochs of training (%(default)s)"
    add("--finetune_learning_rate", type=rate_type, default=0.001, metavar="RATE", help=text)


def _add_evaluation_flags(add: Callable[..., Any]) -> None:
    add("--dataset", choices=tuple(DATASETS), help="images to test on (from the checkpoint)")
    add("--data_dir", type=Path, metavar="DIR", help="folder of the images (from the checkpoint)")
    add("--image_size", type=integer(4, 512), metavar="N", help="pixels a side of the images (from the checkpoint)")
    text = "of each channel of images in 0..1: three numbers, imagenet, or half (from the checkpoint)"
    add("--mean", nargs="+", action=Channels, metavar="M", help=text)
    add("--std", nargs="+", action=Channels, metavar="S", help="likewise")
    text = "the first N of a fixed, class-balanced order (all)"
    add("--max_test_images", type=integer(1), metavar="N", help=text)
    add("--batch_size", type=integer(1), metavar="N", help="test images at a time (32 on a CPU, 500 on a GPU)")
    text = "points of accuracy that the chosen level may lose (%(default)s)"
    add("--tolerance", type=number(0, 100), default=1.0, metavar="POINTS", help=text)
    text = "dense kernels, or kernels that skip zeros (%(default)s)"
    add("--engine", choices=("dense", "sparse"), default="dense", help=text)
    text = "time every network against dense: latency, throughput, memory (off)"
    add("--measure", action="store_true", help=text)
    text = "smaller dense networks to compare with (none)"
    add("--controls", type=Path, nargs="+", default=[], metavar="FILE", help=text)


def _add_output_flags(add: Callable[..., Any]) -> None:
    add("--name", type=stem_type, help="stem of the outputs ({dataset}_{arch})")
    add("--images_dir", type=Path, default=Path("images"), metavar="DIR", help="plots and tables (%(default)s)")
    text = "exported files; the newest checkpoint is looked for here (%(default)s)"
    add("--checkpoint_dir", type=Path, default=Path("checkpoints"), metavar="DIR", help=text)
    text = (
        "write the networks of these levels to files, and without --levels measure no others; chosen: of each curve's "
        "chosen level; best: of the curve whose chosen level removes most (none)"
    )
    add("--export", type=export_type, metavar="L", help=text)
    text = "of values in files (%(default)s)"
    add("--export_precision", choices=tuple(EXPORT_BITS), default="fp32", help=text)
    text = "packed (.npz); dense (.pth), safetensors: zeros too; program (.pt2), onnx: run by themselves (%(default)s)"
    add("--export_format", choices=tuple(EXPORT_FORMATS), default="packed", help=text)
    text = "begin the CSV anew; old rows that this command does not measure go at its end (off)"
    add("--restart", action="store_true", help=text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; ends the program, as argparse does, where they have no meaning together."""
    parser = build_parser()
    args, given = parser.parse_args(argv), given_flags(parser, argv)
    if problem := clash(args, given):
        parser.error(problem)
    if args.sensitivity:
        args.levels = args.levels if "levels" in given else SENSITIVITY_LEVELS
        args.max_test_images = args.max_test_images or SENSITIVITY_IMAGES
    if args.search:
        args.levels = search_path()
    if isinstance(args.export, list):  # nobody who wants one file waits for 21 levels
        args.levels = sorted({*args.export, *(args.levels if "levels" in given or args.compare else [])})
    return args


def clash(args: argparse.Namespace, given: set[str]) -> str | None:
    """Why the flags have no meaning together, or None; `given` names those on the command line."""
    return next(itertools.chain(_method_rules(args, given), level_rules(args, given), _file_rules(args, given)), None)


def _method_rules(args: argparse.Namespace, given: set[str]) -> Iterator[str]:
    """Which flags about curves and their methods clash, and why."""
    filters = sorted(set(args.criterion) & FILTER_CRITERIA.keys())
    weights = [name for name in args.allocation if name not in FILTER_ALLOCATIONS]
    recoveries = [] if args.compare else args.recover
    idle = [flag for flag in sorted(given) if (name := flag.split("_")[0]) in TRAINING and name not in recoveries]
    curves = [Curve(*parts) for parts in itertools.product(args.criterion, args.allocation, args.recover)]
    calibrated = args.compare or any(curve.needs_calibration for curve in curves)
    if args.compare and (given & {"criterion", "allocation", "recover", "schedule"} or args.sensitivity):
        yield "--compare is a panel of its own; leave out --criterion --allocation --recover --schedule --sensitivity"
    if args.sensitivity and ("allocation" in given or args.schedule == "iterative" or args.couple):
        yield "--sensitivity prunes one layer at a time; leave out --allocation, --schedule and --couple"
    if args.sensitivity and (len(args.criterion) > 1 or len(args.recover) > 1):
        yield "--sensitivity takes one --criterion and one --recover"
    if idle:
        yield f"--{idle[0]} has no effect without --recover {idle[0].split('_')[0]}"
    if filters and weights:
        yield (
            f"--criterion {filters[0]} removes whole filters, which --allocation {weights[0]} is not made for; "
            f"use {' or '.join(FILTER_ALLOCATIONS)}"
        )
    if (lone := sorted(given & {"couple", "round_filters"})) and not filters:
        yield f"--{lone[0]} has no effect without a --criterion of filters: {' or '.join(FILTER_CRITERIA)}"
    if "calibration_images" in given and not calibrated:
        yield "--calibration_images has no effect without a criterion or --recover that looks at images"


def _file_rules(args: argparse.Namespace, given: set[str]) -> Iterator[str]:
    """Which flags about what is read, measured and written clash, and why."""
    export, formats = args.export is not None, sorted(given & {"export_precision", "export_format"})
    others = sorted(given - PREDICTION)
    if args.sensitivity and "tolerance" in given:
        yield "--tolerance has no effect with --sensitivity, which chooses no level"
    if args.sensitivity and (export or args.measure):
        yield "--sensitivity prunes one layer at a time; leave out --export and --measure"
    if args.sensitivity and args.controls:
        yield "--sensitivity draws no controls; leave out --controls"
    if args.controls and export and args.export_format in PROGRAMS:
        yield f"--controls are not written as {args.export_format}; use another --export_format, or leave them out"
    if args.describe and (export or args.measure or args.controls or args.restart):
        yield "--describe writes nothing; leave out --export, --measure, --controls and --restart"
    if args.arch_args and (args.arch is None or args.arch in BUILT_IN):
        yield "--arch_args needs an --arch that is not built in"
    if formats and not export:
        yield f"--{formats[0]} has no effect without --export"
    if export and len(args.checkpoint or []) > 1:
        yield "--export writes a file for each curve and level; name one --checkpoint"
    if len(given & {"mean", "std"}) == 1:
        yield "--mean and --std belong together; give both"
    if args.export_format == "onnx" and args.export_precision != "fp32":
        yield "--export_format onnx is written in fp32: onnxruntime has no bf16 on a CPU; leave out --export_precision"
    if args.predict and len(args.predict) < 2:
        yield "--predict takes a file of a network and one or more images"
    if args.predict and others:
        yield f"--predict sweeps nothing; leave out --{', --'.join(others)}"
