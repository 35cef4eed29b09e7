"""Accuracy against pruned weights and multiply-adds; and all figures of a sweep, from its files alone."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsity.figures import style
from sparsity.figures.heatmaps import plot_classes, plot_layers
from sparsity.figures.labels import name_lines_directly, point_out
from sparsity.figures.savings import plot_savings, plot_tradeoff
from sparsity.results.rows import Row, column_mean, curve_name, points, unit
from sparsity.results.statistics import mean_and_deviation
from sparsity.results.store import Sweep, SweepFiles, dense_accuracy, read_sweep
from sparsity.results.verdicts import curve_of, label_text, scope_text
from sparsity.system.flags import level_text
from sparsity.system.methods import Curve

Levels = dict[float, list[Row]]
NEAR = 3.0  # points below dense that the second row of panels shows
LEAST_LEFT = 0.1  # percent; a logarithmic axis ends here


class Axis(NamedTuple):
    """An x axis: its label and the share, in percent, of dense that a network has lost."""

    label: str
    lost: Callable[[Row], float]


WEIGHTS = Axis("weights", lambda row: row.sparsity)
MACS = Axis("multiply-adds", lambda row: 100 - 100 / row.macs_ratio)


def plot_all(files: SweepFiles) -> list[Path]:
    """Draw every figure of a sweep from its files, and return their paths."""
    sweep = read_sweep(files)
    drawn = (plot(sweep) for plot in (plot_sweep, plot_tradeoff, plot_classes, plot_layers, plot_savings))
    return [path for path in drawn if path]


def plot_sweep(sweep: Sweep) -> Path:
    """Accuracy against the pruned share of the weights, and of the multiply-adds: the sweep's .png.

    There is a panel for multiply-adds where allocations differ in them or levels are shares of them, and a second row,
    of the last NEAR points below dense, where a third of the networks lie there. Where half of the levels are 90 % and
    more, the axes are the shares that are left, on a logarithmic scale. Up to MOST_NAMES curves have their names beside
    them.
    """
    curves = {curve: levels for curve, levels in sweep.curves().items() if levels}
    dense, log = dense_accuracy(sweep), _levels_crowd(curves)
    both = _macs_differ(curves) or sweep.header["settings"].get("budget") == "macs"
    axis_list = [WEIGHTS, MACS] if both else [WEIGHTS]
    panels = [(axis, near) for near in ([False, True] if _many_near(curves, dense) else [False]) for axis in axis_list]
    columns = min(2, len(panels))
    size = (10, 4.2 * len(panels) / columns + 0.6) if columns == 2 else (8, 5)
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(len(panels) // columns, columns, squeeze=False)
    highest = max([dense, *(column_mean(rows, "accuracy") for levels in curves.values() for rows in levels.values())])
    named = []
    for axes, (axis, near) in zip(places.flat, panels, strict=True):
        named.append(_draw_panel(axes, sweep, curves, axis, log, bands=not near or len(curves) == 1))
        style.scale_x(axes, log)
        if log:
            axes.invert_xaxis()  # pruning goes to the right, as on a linear axis
        axes.set_xlabel(f"{axis.label} {'left' if log else 'removed'} (%)")
        style.scale_accuracy(axes, dense - NEAR - 0.5 if near else 0.0, highest)
        style.draw_references(axes, sweep)
    for axes in places[:, 0]:
        axes.set_ylabel("test accuracy (%)")
    _name(figure, sweep, curves, named)
    return style.save_figure(figure, sweep.files.png, _message(sweep), sweep.header["title"])


def _draw_panel(
    axes: Axes, sweep: Sweep, curves: dict[Curve, Levels], axis: Axis, log: bool, bands: bool
) -> dict[Curve, Line2D]:
    """Draw the curves and rings around their chosen levels, thick ones where the level is shown to be within."""
    styles, lines = style.curve_styles(curves), {}

    def place(rows: list[Row]) -> float:
        lost = float(np.mean([axis.lost(row) for row in rows]))
        return lost if not log else 100 - lost if lost <= 100 - LEAST_LEFT else math.nan

    for curve, levels in curves.items():
        # Of many points only their line is looked at; a few are easily missed.
        look = styles[curve] | {"markersize": 2.2 if len(levels) > 8 and len(curves) > 1 else 4, "linewidth": 1.5}
        lines[curve] = _draw_curve(axes, levels, [place(rows) for rows in levels.values()], look, bands)
    for entry in _chosen(sweep, curves):
        rows, width = curves[curve_of(entry)][entry["level"]], 2.2 if entry["verdict"] == "shown" else 1.0
        point = np.array([place(rows), column_mean(rows, "accuracy")])
        style.ring(axes, point, styles[curve_of(entry)]["color"], width)
    return lines


def _draw_curve(axes: Axes, levels: Levels, x: list[float], look: dict, bands: bool) -> Line2D:
    """Mean accuracy over the checkpoints of each level; the band is the deviation over them, or the interval of one.

    Levels that were not measured are not crossed; a point that no line reaches has a bar in place of the band.
    """
    means, deviations = np.transpose([mean_and_deviation([row.accuracy for row in rows]) for rows in levels.values()])
    low, high = means - deviations, means + deviations
    if all(len(rows) == 1 for rows in levels.values()):
        low, high = np.transpose([(rows[0].ci_low, rows[0].ci_high) for rows in levels.values()])
    x, means, low, high = style.broken(list(levels), x, means, low, high)
    if bands:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.14, linewidth=0)
    if bands and (single := style.alone(x)).any():
        axes.vlines(x[single], low[single], high[single], color=look["color"], alpha=0.4, linewidth=1.5)
    return axes.plot(x, means, **look)[0]


def _name(figure: Figure, sweep: Sweep, curves: dict[Curve, Levels], panels: list[dict[Curve, Line2D]]) -> None:
    """Name the curves beside their lines, or many in a legend in the order in which they fall; write the caption."""
    entries = _chosen(sweep, curves)
    words = [scope_text(sweep)]
    if entries:
        within = f"within {points(entries[0]['tolerance'])} of dense"
        words.append(f"Rings: levels chosen on half of the images, thick where the other half shows them {within}.")
    counts = sorted({len(rows) for levels in curves.values() for rows in levels.values()})
    kinds = ["95 % interval" if count == 1 else f"standard deviation over {count} checkpoints" for count in counts]
    where = " on the full scale" * (len(curves) > 1 and any(axes.get_ylim()[0] > 0 for axes in figure.axes))
    words.append(f"Bands{where}: {', '.join(kinds)}; no line or band crosses levels that were not measured.")
    text = " ".join(filter(None, words))
    if len(curves) > style.MOST_NAMES:
        middle = (dense_accuracy(sweep) + 100 / len(sweep.header["data"]["classes"])) / 2
        order = sorted(curves, key=lambda curve: _fall(curves[curve], middle), reverse=True)
        style.caption(figure, text, [panels[0][curve] for curve in order], [curve_name(curve) for curve in order])
        return
    style.caption(figure, text)
    figure.draw_without_rendering()
    if len(curves) == 1 and entries:
        _tell_choice(figure.axes[0], entries[0])
    columns = min(2, len(panels))  # colours tell the curves in the second one
    for axes, lines in zip(figure.axes[::columns], panels[::columns], strict=True):
        name_lines_directly(axes, {line: curve_name(curve) for curve, line in lines.items()})


def _chosen(sweep: Sweep, curves: dict[Curve, Levels]) -> list[dict]:
    """The entries of the summary that chose a level above 0 %, of which there are rows."""
    entries = sweep.header.get("summary", [])
    return [entry for entry in entries if entry["level"] and entry["level"] in curves.get(curve_of(entry), {})]


def _tell_choice(axes: Axes, entry: dict) -> None:
    """Say at the ring of the chosen level its figures on the images that it was not chosen on."""
    *_, ring = (line for line in axes.get_lines() if line.get_label() == style.RING)
    if text := label_text(entry):
        point_out(axes, ring.get_xydata()[0], text)


def _levels_crowd(curves: dict[Curve, Levels]) -> bool:
    """Whether half of the levels between 0 and 100 %, and at least three, are 90 % and more."""
    levels = {level for found in curves.values() for level in found if 0 < level < 100}
    high = sum(level >= 90 for level in levels)
    return high >= 3 and 2 * high >= len(levels)


def _macs_differ(curves: dict[Curve, Levels]) -> bool:
    """Whether networks of equal sparsity of two allocations differ by more than 2 points in their multiply-adds."""
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for curve, levels in curves.items():
        pairs = [(WEIGHTS.lost(row), MACS.lost(row)) for rows in levels.values() for row in rows]
        groups.setdefault(curve[:2], []).extend(pairs)
    for one, other in combinations((np.array(sorted(pairs)).T for pairs in groups.values()), 2):
        shared = one[:, (one[0] >= other[0, 0]) & (one[0] <= other[0, -1])]
        if shared.size and np.abs(np.interp(shared[0], *other) - shared[1]).max() > 2:
            return True
    return False


def _many_near(curves: dict[Curve, Levels], dense: float) -> bool:
    """Whether a third of the pruned networks, and at least two, lie within NEAR points of dense."""
    means = [column_mean(rows, "accuracy") for levels in curves.values() for level, rows in levels.items() if level]
    near = sum(accuracy >= dense - NEAR for accuracy in means)
    return near >= 2 and 3 * near >= len(means)


def _fall(levels: Levels, height: float) -> tuple[float, float]:
    """The sparsity at which a curve falls below a height, infinite where it does not, and its accuracy at the end."""
    x, y = ([column_mean(rows, column) for rows in levels.values()] for column in ("sparsity", "accuracy"))
    below = next((index for index, accuracy in enumerate(y) if accuracy < height), None)
    if below is None:
        return math.inf, y[-1]
    before = max(0, below - 1)
    return float(np.interp(height, (y[below], y[before]), (x[below], x[before]))), y[-1]


def _message(sweep: Sweep) -> str:
    """The highest level that is shown to be within tolerance, or else chosen, and beside it that of the first curve."""
    entries = sweep.header.get("summary", [])
    chosen = [entry for entry in entries if entry["level"]]
    if not chosen:
        if not entries:
            return "Accuracy of pruned networks"
        within = f"within {points(entries[0]['tolerance'])} of dense"
        return f"No level above 0 % was chosen ({within} on half of the images)"
    best = max(chosen, key=lambda entry: (entry.get("shown_level") or 0, entry["level"]))
    key = "shown_level" if best.get("shown_level") else "level"
    shown = {"shown_level": "Shown to be", "level": "Chosen, but not shown to be"}[key]
    parts = []
    for entry in (best, entries[0]) if best is not entries[0] else (best,):
        level, what = entry.get(key), unit(curve_of(entry), sweep.header["settings"])
        amount = f"{level_text(level)} %{'' if parts else f' of the {what} gone'}" if level else "no level"
        parts.append(f"{amount} {style.unbroken(f'({curve_name(curve_of(entry))})')}")
    return f"{shown} within {points(best['tolerance'])} of dense: {', '.join(parts)}"
