"""Figures of accuracy, drawn from the data files only."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sparsity.figures.heatmaps import plot_classes, plot_layers
from sparsity.figures.savings import plot_savings
from sparsity.figures.style import QUIET, curve_styles, save_figure, set_title, wrapped
from sparsity.results.files import SweepFiles
from sparsity.results.rows import Curve, Row, curve_name, level_text, points
from sparsity.results.statistics import mean_and_deviation
from sparsity.results.store import Sweep, read_sweep

Levels = dict[float, list[Row]]


MOST_COMPRESSION = 1000


def plot_all(files: SweepFiles) -> list[Path]:
    """Draw every figure of a sweep from its files; the paths written."""
    plot_sweep(files)
    plot_tradeoff(files)
    plot_classes(files)
    plot_layers(files)
    names = ["tradeoff", "classes", "layers"] + ["savings"] * plot_savings(files)
    return [files.png, *(files.with_suffix(f"_{name}.png") for name in names)]


def plot_sweep(files: SweepFiles) -> None:
    """Accuracy against pruned share, from a sweep's JSON, CSV and NPZ to its PNG."""
    sweep = read_sweep(files)
    curves = {curve: levels for curve, levels in sweep.curves().items() if levels}
    several = len(curves) > 1
    figure = Figure(figsize=(11, max(5.8, 0.2 * len(curves) + 1)) if several else (8, 5), layout="constrained")
    axes = figure.subplots()
    styles = curve_styles(list(curves))
    for curve, levels in curves.items():
        _draw_curve(axes, levels, styles[curve], several, f"{curve_name(curve)} ({_band_words(levels)})")
    _draw_references(axes, sweep, (0, 100))
    for choice in sweep.header.get("summary", []):
        if choice["level"] is not None:
            _mark_choice(axes, sweep, choice, several)
    axes.set(xlabel="pruned weights (%)", ylabel="test accuracy (%)", xlim=(-1, 101), ylim=(0, 106))
    axes.set_xticks(range(0, 101, 10))
    axes.grid(alpha=0.25)
    if several:
        words = sorted({_band_words(levels) for levels in curves.values()})
        axes.set_xlabel(f"pruned weights (%)\nbands: {', '.join(words)}; rings: chosen levels")
        _name_curves(axes, curves, styles, _middle(sweep))
    elif curves:
        axes.legend(loc="lower left", frameon=False, fontsize=9)
    set_title(figure, sweep.header["title"])
    save_figure(figure, files.png)


def _band_words(levels: Levels) -> str:
    count = max(len(rows) for rows in levels.values())
    return "95 % interval" if count == 1 else f"mean of {count} checkpoints and standard deviation"


def _mean(rows: list[Row], column: str) -> float:
    """A column's mean over the checkpoints of a level."""
    return float(np.mean([getattr(row, column) for row in rows]))


def _draw_curve(axes, levels: Levels, style: dict, several: bool, label: str) -> None:
    """Mean accuracy over the checkpoints of each level; the band is the deviation over them, or the interval of one."""
    x = [_mean(rows, "sparsity") for rows in levels.values()]
    pairs = [mean_and_deviation([row.accuracy for row in rows]) for rows in levels.values()]
    if max(len(rows) for rows in levels.values()) > 1:
        low, high = ([mean + sign * deviation for mean, deviation in pairs] for sign in (-1, 1))
    else:
        low, high = ([getattr(rows[0], bound) for rows in levels.values()] for bound in ("ci_low", "ci_high"))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.12 if several else 0.2, linewidth=0)
    size = 2.2 if several and len(levels) > 8 else 4.5 if several else 3.5  # a few points are easily missed
    axes.plot(x, [mean for mean, _ in pairs], **style, markersize=size, linewidth=1.6, label=label)


def _draw_references(axes, sweep: Sweep, ends: tuple[float, float], below: bool = False) -> None:
    """Lines at dense and at chance; their names stand where a falling curve is not: top right and bottom left.

    `below` puts the name of chance under its line, if there is room.
    """
    dense, chance = _dense(sweep), _chance(sweep)
    for height, x, side, text, under in (
        (dense, ends[1], "right", f"dense {dense:.1f} %", False),
        (chance, ends[0], "left", f"chance {chance:.3g} %", below and chance > 6),
    ):
        axes.axhline(height, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        place = {"va": "top"} if under else {"va": "bottom"}
        axes.text(x, height - 1 if under else height + 1, text, color=QUIET, ha=side, fontsize=9, **place)


def _dense(sweep: Sweep) -> float:
    return float(np.mean([figures["accuracy"] for figures in sweep.header["dense"].values()]))


def _chance(sweep: Sweep) -> float:
    return 100 / len(sweep.header["data"]["classes"])


def _middle(sweep: Sweep) -> float:
    return (_dense(sweep) + _chance(sweep)) / 2


def _name_curves(axes, curves: dict[Curve, Levels], styles: dict[Curve, dict], middle: float) -> None:
    """The names of the curves at the right, in the order in which the curves fall, the last one to fall at the top.

    A leader goes to where a curve crosses `middle`: at the ends, where all are dense or all are lost, they coincide.
    """
    anchors = {curve: _crossing(levels, middle) for curve, levels in curves.items()}
    ordered = sorted(anchors, key=anchors.__getitem__)
    gap = min(6.0, 100 / len(ordered))
    lowest = min(max(2.0, middle - gap * (len(ordered) - 1) / 2), 102 - gap * (len(ordered) - 1))
    for index, curve in enumerate(ordered):
        (x, y), height, style = anchors[curve], lowest + gap * index, styles[curve]
        axes.plot([x, 103], [y, height], color=style["color"], linewidth=0.6, alpha=0.55, clip_on=False, zorder=1)
        axes.plot([103.5, 109], [height, height], **style, markersize=0, linewidth=1.8, clip_on=False)
        axes.plot([106.25], [height], **style | {"linestyle": "none"}, markersize=4, clip_on=False)
        text = wrapped(curve_name(curve), 60)
        axes.text(110, height, text, color=style["color"], va="center", fontsize=min(9.0, 3.2 * gap + 1))


def _crossing(levels: Levels, height: float) -> tuple[float, float]:
    """Where a curve first falls below a height; its first point when that is below, its last when none is."""
    path = [(_mean(rows, "sparsity"), _mean(rows, "accuracy")) for rows in levels.values()]
    for (x, y), (next_x, next_y) in pairwise(path):
        if y >= height > next_y:
            return x + (y - height) / (y - next_y) * (next_x - x), height
    return path[0] if path[0][1] < height else path[-1]


def _mark_choice(axes, sweep: Sweep, choice: dict, several: bool) -> None:
    """A ring around a curve's chosen level; with one curve also in words."""
    curve = (choice["criterion"], choice["allocation"], choice["recover"])
    rows = sweep.curves().get(curve, {}).get(choice["level"])
    if rows is None:  # a summary of before levels were added for some checkpoints only
        return
    x, y = _mean(rows, "sparsity"), _mean(rows, "accuracy")
    ring = {"markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "none"}
    axes.plot([x], [y], marker="o", markersize=8 if several else 11, zorder=5, **ring)
    if several:
        return
    text = f"{level_text(choice['level'])} % pruned: {y:.1f} %\n(within {points(choice['tolerance'])} of dense)"
    # Below the marker, where a falling curve leaves room.
    side, corner = ("left", 0.0) if x < 25 else ("right", 1.0)
    arrow = {"arrowstyle": "-", "color": "black", "linewidth": 0.8, "shrinkB": 6, "relpos": (corner, 1.0)}
    axes.annotate(text, (x, y), xytext=(x, 0.5 * y), ha=side, va="top", fontsize=9, arrowprops=arrow)


def plot_tradeoff(files: SweepFiles) -> None:
    """Accuracy against compression and against the ratio of multiply-adds, from a sweep's files to *_tradeoff.png."""
    sweep = read_sweep(files)
    curves = {curve: levels for curve, levels in sweep.curves().items() if levels}
    styles = curve_styles(list(curves))
    lines = math.ceil(len(curves) / 3)
    figure = Figure(figsize=(11, 5 + 0.2 * lines), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label in (
        (panels[0], "compression", "compression: all parameters / nonzero ones"),
        (panels[1], "macs_ratio", "multiply-adds of dense / those with nonzero weights"),
    ):
        highest = max(
            [_draw_ratio(axes, levels, styles[curve], column, curve) for curve, levels in curves.items()] + [2]
        )
        axes.set(xlabel=label, xscale="log", xlim=(0.93, 1.15 * highest), ylim=(0, 106))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        _draw_references(axes, sweep, (1, 1.1 * highest), below=True)
    panels[0].set_ylabel("test accuracy (%)")
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=min(3, len(names)),
            frameon=False,
            fontsize=9,
            handlelength=4,  # long enough to tell dashes from dots
        )
    set_title(figure, sweep.header["title"])
    save_figure(figure, files.with_suffix("_tradeoff.png"))


def _draw_ratio(axes, levels: Levels, style: dict, column: str, curve: Curve) -> float:
    """Mean accuracy against the mean of a ratio, without ratios that are infinite or nearly so; the highest drawn."""
    pairs = [(_mean(rows, column), _mean(rows, "accuracy")) for rows in levels.values()]
    pairs = [pair for pair in pairs if 0 < pair[0] <= MOST_COMPRESSION]
    x, y = [ratio for ratio, _ in pairs], [accuracy for _, accuracy in pairs]
    axes.plot(x, y, **style, markersize=3.5, linewidth=1.5, label=curve_name(curve))
    return max(x, default=1.0)
