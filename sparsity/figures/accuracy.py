"""Accuracy against sparsity; and all figures of a sweep, from its files alone."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsity.figures import style
from sparsity.figures.heatmaps import plot_classes, plot_layers
from sparsity.figures.savings import plot_savings, plot_tradeoff
from sparsity.results.rows import Row, curve_name, points
from sparsity.results.statistics import mean_and_deviation
from sparsity.results.store import Sweep, SweepFiles, read_sweep
from sparsity.results.summary import column_mean, curve_of
from sparsity.system.flags import level_text

Levels = dict[float, list[Row]]


def plot_all(files: SweepFiles) -> list[Path]:
    """Draw every figure of a sweep from its files, and return their paths."""
    sweep = read_sweep(files)
    drawn = (plot(sweep) for plot in (plot_sweep, plot_tradeoff, plot_classes, plot_layers, plot_savings))
    return [path for path in drawn if path]


def plot_sweep(sweep: Sweep) -> Path:
    """Accuracy against the pruned share of the weights, a line a curve: the sweep's .png."""
    curves = {curve: levels for curve, levels in sweep.curves().items() if levels}
    several = len(curves) > 1
    figure = Figure(figsize=(10, max(5.5, 0.22 * len(curves) + 1.5)) if several else (8, 5), layout="constrained")
    axes, styles, lines = figure.subplots(), style.curve_styles(curves), {}
    for curve, levels in curves.items():
        # Of many points only their line is looked at; a few are easily missed.
        size = 3.5 if not several else 2.2 if len(levels) > 8 else 4.5
        look = styles[curve] | {"markersize": size, "linewidth": 1.6}
        lines[curve] = _draw_curve(axes, levels, look, f"{curve_name(curve)} ({_band_words(levels)})")
    middle = style.draw_references(axes, sweep)
    for entry in sweep.header.get("summary", []):
        if rows := curves.get(curve_of(entry), {}).get(entry["level"]):
            _mark_choice(axes, rows, entry, several)
    xlabel = "pruned weights (%)"
    if several:
        bands = ", ".join(sorted({_band_words(levels) for levels in curves.values()}))
        xlabel += f"\nbands: {bands}; rings: chosen levels"
        # The names stand in the order in which the curves fall, the last one at the top.
        order = sorted(curves, key=lambda curve: _fall(curves[curve], middle), reverse=True)
        look = {"frameon": False, "fontsize": 10, "handlelength": 4, "labelcolor": "linecolor"}
        names = [style.wrapped(curve_name(curve), 40) for curve in order]
        figure.legend([lines[curve] for curve in order], names, loc="outside right center", **look)
    elif curves:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.15), frameon=False, fontsize=9)
    style.scale_accuracy(axes, xlabel, ylabel="test accuracy (%)", xlim=(-1, 101), xticks=range(0, 101, 10))
    return style.save_figure(figure, sweep.files.png, sweep.header["title"])


def _band_words(levels: Levels) -> str:
    count = max(len(rows) for rows in levels.values())
    return "95 % interval" if count == 1 else f"mean of {count} checkpoints and standard deviation"


def _draw_curve(axes: Axes, levels: Levels, look: dict, label: str) -> Line2D:
    """Mean accuracy over the checkpoints of each level; the band is the deviation over them, or the interval of one."""
    x = [column_mean(rows, "sparsity") for rows in levels.values()]
    means, deviations = np.transpose([mean_and_deviation([row.accuracy for row in rows]) for rows in levels.values()])
    low, high = means - deviations, means + deviations
    if all(len(rows) == 1 for rows in levels.values()):
        low, high = np.transpose([(rows[0].ci_low, rows[0].ci_high) for rows in levels.values()])
    axes.fill_between(x, low, high, color=look["color"], alpha=0.14, linewidth=0)
    return axes.plot(x, means, **look, label=label)[0]


def _fall(levels: Levels, height: float) -> tuple[float, float]:
    """The sparsity at which a curve falls below a height, infinite where it does not, and its accuracy at the end."""
    x, y = ([column_mean(rows, column) for rows in levels.values()] for column in ("sparsity", "accuracy"))
    below = next((index for index, accuracy in enumerate(y) if accuracy < height), None)
    if below is None:
        return math.inf, y[-1]
    before = max(0, below - 1)
    return float(np.interp(height, (y[below], y[before]), (x[below], x[before]))), y[-1]


def _mark_choice(axes: Axes, rows: list[Row], entry: dict, several: bool) -> None:
    """A ring around a curve's chosen level; with one curve also in words."""
    x, y = column_mean(rows, "sparsity"), column_mean(rows, "accuracy")
    axes.plot([x], [y], markersize=8 if several else 11, **style.RING)
    if several:
        return
    text = f"{level_text(entry['level'])} % pruned: {y:.1f} %\n(within {points(entry['tolerance'])} of dense)"
    # Below the marker, where a falling curve leaves room.
    side, corner = ("left", 0.0) if x < 25 else ("right", 1.0)
    arrow = {"arrowstyle": "-", "color": "black", "linewidth": 0.8, "shrinkB": 6, "relpos": (corner, 1.0)}
    axes.annotate(text, (x, y), xytext=(x, 0.5 * y), ha=side, va="top", fontsize=9, arrowprops=arrow)
