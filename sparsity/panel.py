"""Which curves a sweep measures, and at which levels."""

import itertools

from sparsity.header import Curve
from sparsity.report import Sweep
from sparsity.rows import ONE_LAYER

Panel = dict[Curve, list[float]]  # levels in percent, ascending

SENSITIVITY_LEVELS = [50.0, 80.0, 90.0, 95.0]
SENSITIVITY_IMAGES = 1000
RECONSTRUCTED_LEVELS = [60.0, 80.0, 90.0, 95.0]


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
