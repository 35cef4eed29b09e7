"""The networks that --export writes: those of levels, or those that the summary of a sweep chooses."""

from typing import Any

from sparsity.results.comparison import furthest
from sparsity.results.rows import curve_name
from sparsity.results.store import Sweep
from sparsity.results.verdicts import curve_of
from sparsity.sweep.levels import SEARCH_STEP
from sparsity.system.methods import Curve, Panel


def export_candidates(export: list[float] | str, panel: Panel, search: bool) -> tuple[list[tuple[Curve, float]], int]:
    """The networks, by curve and level, that --export may write, and how many of them it writes at most."""
    if isinstance(export, list):
        wanted = [(curve, level) for curve, levels in panel.items() for level in levels if level in export]
        return wanted, len(wanted)
    grid = [SEARCH_STEP * step for step in range(1, round(100 / SEARCH_STEP) + 1)]
    reached = {curve: grid if search and not curve.pattern else levels for curve, levels in panel.items()}
    wanted = [(curve, level) for curve, levels in reached.items() for level in levels]
    return wanted, len(panel) if export == "chosen" else 1


def chosen_panel(
    sweep: Sweep, entries: list[dict[str, Any]], panel: Panel, best: bool, macs: bool
) -> tuple[Panel, list[str]]:
    """Curve -> its chosen level, of the curves in `panel` or the `best` of them; and lines about curves without one.

    `entries` are those of `summarise_all`. The best curve's chosen level removes the most weights, or multiply-adds
    with `macs`. A level of 0 % is no network to take away.
    """
    mine = [entry for entry in entries if curve_of(entry) in panel]
    found = {curve_of(entry): [entry["level"]] for entry in mine if entry["level"]}
    if best and found:
        curve = furthest(sweep, [entry for entry in mine if entry["level"]], "macs" if macs else "weights")
        return {curve: found[curve]}, []
    without = [curve_name(curve_of(entry)) for entry in mine if not entry["level"]]
    return found, [f"{name}: no file is written, because no level above 0 % was chosen" for name in without]
