"""Which curves a sweep measures, and at which levels."""

import argparse
import itertools

from sparsity.prune.allocation import ALLOCATIONS
from sparsity.prune.criteria import CRITERIA, FILTER_ALLOCATIONS, FILTER_CRITERIA
from sparsity.recover import RECOVERIES
from sparsity.results.rows import ONE_LAYER, Curve
from sparsity.results.store import Sweep
from sparsity.system.errors import UserError
from sparsity.system.flags import integer, rate_type

Panel = dict[Curve, list[float]]  # levels in percent, ascending


SENSITIVITY_LEVELS = [50.0, 80.0, 90.0, 95.0]


SENSITIVITY_IMAGES = 1000


RECONSTRUCTED_LEVELS = [60.0, 80.0, 90.0, 95.0]


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what is pruned and what is done afterwards; lists, of which every combination is a curve."""
    for flag, choices, default, text in (
        (
            "--criterion",
            (*CRITERIA, *FILTER_CRITERIA),
            "l1",
            "what a weight is worth, or with filter_l1 a whole filter; gradient reads labels",
        ),
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


def refuse_clashes(parser: argparse.ArgumentParser, args: argparse.Namespace, explicit: set[str]) -> None:
    """End the program, as argparse does, on flags that have no meaning together; `explicit` are those given."""
    methods = explicit & {"criterion", "allocation", "recover"}
    if args.compare and (methods or args.sensitivity or "schedule" in explicit):
        parser.error(
            "--compare is a panel of its own; leave out --criterion --allocation --recover --schedule --sensitivity"
        )
    if args.sensitivity and ("allocation" in explicit or args.schedule == "iterative"):
        parser.error("--sensitivity prunes one layer at a time; leave out --allocation and --schedule")
    if args.sensitivity and (len(args.criterion) > 1 or len(args.recover) > 1):
        parser.error("--sensitivity takes one --criterion and one --recover")
    if args.sensitivity and "tolerance" in explicit:
        parser.error("--tolerance has no effect with --sensitivity, which chooses no level")
    tuned = {"finetune_epochs", "finetune_learning_rate"} & explicit
    if tuned and (args.compare or "finetune" not in args.recover):
        parser.error(f"--{min(tuned)} has no effect without --recover finetune")
    filters = sorted(set(args.criterion) & FILTER_CRITERIA.keys())
    weights = [name for name in args.allocation if name not in FILTER_ALLOCATIONS]
    if filters and weights:
        parser.error(
            f"--criterion {filters[0]} removes whole filters, which --allocation {weights[0]} is not made for; "
            f"use {' or '.join(FILTER_ALLOCATIONS)}"
        )


def choose_panel(args: argparse.Namespace, layers: list[str], inner: list[str]) -> Panel:
    """The curves that the flags ask for, with their levels; `inner` are the layers whose filters may be removed.

    Raises UserError when filters are to be removed of a network that has no such layer.
    """
    filters = bool(set(args.criterion) & FILTER_CRITERIA.keys()) and not args.compare
    if filters and not inner:
        raise UserError("the network has no filters that can be removed; use another --criterion, or exclude less")
    if args.compare:
        return standard_panel(args.levels)
    if args.sensitivity:
        return sensitivity_panel(inner if filters else layers, args.criterion[0], args.recover[0], args.levels)
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
