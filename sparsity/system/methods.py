"""Names of criteria, allocations and recoveries, and what each reads; torch-free, so that flags are parsed at once.

The functions behind the names are in `prune/criteria.py`, of filters in `prune/channels.py`, in `prune/allocation.py`
and in `recover/__init__.py`.
"""

import re
from typing import NamedTuple

# Name -> what it reads of the training split: nothing, images, or labels as well.
CRITERIA = {"l1": "", "random": "", "activation": "images", "gradient": "labels", "obs": "images"}
FILTER_CRITERIA = {"filter_l1": "", "filter_activation": "images"}  # these score whole filters
RECOVERIES = {"none": "", "batchnorm": "images", "reconstruction": "images", "distill": "images", "finetune": "labels"}
ALLOCATIONS = ("uniform", "global", "lamp", "erk")  # beside them N:M, see `Curve.pattern`
MOST_INPUTS = 64  # M of an allocation N:M
FILTER_ALLOCATIONS = ("uniform", "global")  # the others are made for single weights
ONE_LAYER = "only "  # begins the allocation of a curve in which one layer alone is pruned


def pattern_of(allocation: str) -> tuple[int, int] | None:
    """N and M of an allocation written N:M, such as 2:4; None for others, and unless 1 <= N < M <= MOST_INPUTS."""
    found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", allocation)
    kept, size = map(int, found.groups()) if found else (0, 0)
    return (kept, size) if 1 <= kept < size <= MOST_INPUTS else None


class Curve(NamedTuple):
    """The networks that one line of the plot joins: over levels, and over checkpoints."""

    criterion: str
    allocation: str
    recover: str

    @property
    def prunes_filters(self) -> bool:
        return self.criterion in FILTER_CRITERIA

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of an allocation N:M, of which N weights of every M inputs stay; None for others."""
        return pattern_of(self.allocation)

    @property
    def needs_calibration(self) -> bool:
        """Whether its criterion or recovery reads calibration images."""
        criteria = CRITERIA | FILTER_CRITERIA
        return bool(criteria[self.criterion]) or RECOVERIES[self.recover] == "images"

    @property
    def trains(self) -> bool:
        """Whether its recovery trains on the labelled training split."""
        return RECOVERIES[self.recover] == "labels"

    @property
    def distills(self) -> bool:
        """Whether its recovery trains on training images without their labels."""
        return self.recover == "distill"


Panel = dict[Curve, list[float]]  # curves of a sweep with their levels in percent, ascending
