"""Which curves a sweep measures, and at which levels."""

import argparse
import itertools

from sparsity.allocation import ALLOCATIONS
from sparsity.criteria import CRITERIA
from sparsity.flags import integer, rate_type
from sparsity.header import Curve
from sparsity.recovery import RECOVERIES
from sparsity.report import Sweep
from sparsity.rows import ONE_LAYER

Panel = dict[Curve, list[float]]  # levels in percent, ascending

SENSITIVITY_LEVELS = [50.0, 80.0, 90.0, 95.0]
SENSITIVITY_IMAGES = 1000
RECONSTRUCTED_LEVELS = [60.0, 80.0, 90.0, 95.0]


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what is pruned and what is done afterwards; lists, of which every combination is a curve."""
    for flag, choices, default, text in (
        ("--criterion", CRITERIA, "l1", "what a weight is worth; gradient reads labels"),
        ("--allocation", ALLOCATIONS, "uniform", "how a level is dealt to the layers"),
        ("--recover", RECOVERIES, "none", "what is done after pruning; only finetune reads labels"),
    ):
        parser.add_argument(
            flag, choices=tuple(choices), nargs="+", default=[default], help=f"{text}; one or more ({default})"
        )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="nine standard curves instead of these; reconstruction at 60, 80, 90, 95 %% whatever the --levels",
    )
    parser.add_argument("--sensitivity", action="store_true", help="prune one layer at a time and map the damage")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="weights that stay dense, as globs")
    parser.add_argument(
        "--schedule",
        choices=("oneshot", "iterative"),
        default="oneshot",
        help="a level starts from the dense network, or from the level before it (%(default)s)",
    )
    parser.add_argument(
        "--calibration_images", type=integer(2), help="of the training split (2048, or all where there are fewer)"
    )
    parser.add_argument("--finetune_epochs", type=integer(1, 10_000), default=1, help="a level (%(default)s)")
    parser.add_argument(
        "--finetune_learning_rate",
        type=rate_type,
        default=0.001,
        help="a number, or rewind: that of the last epochs of training (%(default)s)",
    )


def choose_panel(args: argparse.Namespace, layers: list[str]) -> Panel:
    """The curves that the flags ask for, with their levels."""
    if args.compare:
        return standard_panel(args.levels)
    if args.sensitivity:
        return sensitivity_panel(layers, args.criterion[0], args.recover[0], args.levels)
    return product_panel(args.criterion, args.allocation, args.recover, args.levels)


def product_panel(criteria: list[str], allocations: list[str], recoveries: list[str], levels: list[float]) -> Panel:
    """Every combination, at all levels; what differs only in its recovery stands side by side."""
    return dict.fromkeys(itertools.product(*map(dict.fromkeys, (criteria, allocations, recoveries))), levels)


def standard_panel(levels: list[float]) -> Panel:
    """The comparison of `--compare`: magnitude in three allocations and the random control, and what recovery adds."""
    pairs = [("l1", "uniform"), ("l1", "global"), ("l1", "lamp"), ("random", "uniform")]
    panel = {(*pair, recovery): levels for pair in pairs for recovery in ("none", "batchnorm")}
    return panel | {("l1", "global", "reconstruction"): RECONSTRUCTED_LEVELS}


def sensitivity_panel(layers: list[str], criterion: str, recovery: str, levels: list[float]) -> Panel:
    """One curve a layer, in which it alone is pruned."""
    return {(criterion, f"{ONE_LAYER}{layer}", recovery): levels for layer in layers}


def missing_curves(sweep: Sweep, name: str, panel: Panel, whole: bool) -> Panel:
    """The curves of a checkpoint that lack rows, with those levels, or with `whole` with all of their levels."""
    missing = {}
    for curve, levels in panel.items():
        left = [level for level in levels if not sweep.has(name, curve, level)]
        if left:
            missing[curve] = levels if whole else left
    return missing
