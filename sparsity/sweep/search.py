"""The search of a curve for its highest level within tolerance: each row decides the next level."""

from collections.abc import Iterator

from sparsity.results.statistics import choose_level, halves
from sparsity.results.store import Sweep
from sparsity.results.verdicts import paired
from sparsity.sweep.levels import search_path
from sparsity.system.methods import Curve


def search_levels(sweep: Sweep, checkpoint: str, curve: Curve, tolerance: float) -> Iterator[float]:
    """The levels of a search one after the other, each decided by the rows of those before; `tolerance` in points."""
    while path := levels_ahead(sweep, checkpoint, curve, tolerance):
        yield path[0]


def levels_ahead(sweep: Sweep, checkpoint: str, curve: Curve, tolerance: float) -> list[float]:
    """The levels that a search still has to measure, if each turns out to be within tolerance; none at its end.

    Rows that are there count, whichever run measured them: a level is chosen of them as at the end of a sweep, and the
    search goes on between it and the next level that was measured.
    """
    measured = {
        level: paired(sweep, rows)
        for level, rows in sweep.curves().get(curve, {}).items()
        if sweep.has(checkpoint, curve, level)
    }
    low = choose_level(measured, halves(sweep.labels)[0], tolerance / 100)
    above = [level for level in measured if low is None or level > low]
    return search_path(low or 0.0, *above[:1])
