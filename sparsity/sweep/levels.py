"""Levels that the user does not list: of allocations N:M, of searches, of exports by choice; torch-free."""

import argparse
import math
from collections.abc import Iterator

from sparsity.system.errors import PROCESSES
from sparsity.system.flags import level_text, levels_type
from sparsity.system.methods import ALLOCATIONS, MOST_INPUTS, pattern_of

CHOICES = ("chosen", "best")  # of levels by the results, beside the levels that --export names
SEARCH_STEP = 0.5  # percent, the grid of --search


def allocation_type(text: str) -> str:
    """An argparse type: the name of an allocation, or N:M."""
    if text not in ALLOCATIONS and not pattern_of(text):
        known = f"{', '.join(ALLOCATIONS)}, nor N:M with 1 <= N < M <= {MOST_INPUTS}, such as 2:4"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return text


def own_levels(allocation: str) -> list[float]:
    """The only level of an allocation N:M, in percent; none of others, which take any."""
    pattern = pattern_of(allocation)
    return [float(level_text(100 * (1 - pattern[0] / pattern[1])))] if pattern else []


def export_type(text: str) -> str | list[float]:
    """An argparse type: one of CHOICES, or levels as for --levels."""
    if text in CHOICES:
        return text
    try:
        return levels_type(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; nor is it {' or '.join(CHOICES)}") from error


def search_path(low: float = 0.0, high: float = 100 + SEARCH_STEP) -> list[float]:
    """The levels that a search measures between `low`, within tolerance, and `high`, which is not, if each is within.

    They are multiples of SEARCH_STEP; the first one halves the gap, and is the next level whatever comes after.
    """
    below, above, path = math.floor(low / SEARCH_STEP), math.ceil(high / SEARCH_STEP), []
    while above - below > 1:
        below = (below + above) // 2
        path.append(below * SEARCH_STEP)
    return path


def level_rules(args: argparse.Namespace, given: set[str]) -> Iterator[str]:
    """Which of these flags have no meaning together, and why; `given` names those on the command line."""
    iterative, listed, several = args.schedule == "iterative", isinstance(args.export, list), PROCESSES > 1
    own = [own_levels(name) for name in args.allocation]
    if all(own) and (given & {"levels", "budget"} or iterative or args.search):
        yield (
            f"--allocation {args.allocation[0]} has one level of its own; leave out --levels, --budget, --schedule and "
            "--search"
        )
    if listed and all(own) and not set(args.export) & {level for (level,) in own}:
        yield (
            f"--allocation {args.allocation[0]} has one level of its own; name it with --export, or use --export chosen"
        )
    if args.search and ("levels" in given or iterative or args.compare or args.sensitivity or listed):
        yield (
            "--search finds levels of its own, each from the dense network; leave out --levels, --schedule, --compare, "
            "--sensitivity, and --export with levels"
        )
    if listed and iterative and "levels" not in given:
        yield "--schedule iterative prunes in the steps of --levels; give them with --export"
    if args.search and len(args.checkpoint or []) > 1:
        yield "--search goes by the accuracy of one network; name one --checkpoint"
    if several and (args.search or args.export in CHOICES):
        yield "--search and --export chosen or best go by all rows so far; leave torchrun out for them"
    if several and args.measure:
        yield "--measure times networks, which other processes would disturb; leave torchrun out for it"
    if args.sensitivity and "budget" in given:
        yield "--sensitivity prunes one layer at a time, in which both budgets are the same; leave out --budget"
