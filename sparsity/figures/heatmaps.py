"""Figures that tell where a sweep does its damage: class by class and layer by layer, from the data files only."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity.figures import style
from sparsity.results.rows import Row, curve_name
from sparsity.results.statistics import class_accuracy
from sparsity.results.store import Sweep, SweepFiles, read_sweep
from sparsity.system.flags import level_text
from sparsity.system.methods import ONE_LAYER

MOST_PANELS = 12
MOST_LEVELS = 11  # whose numbers are legible in half the width
LEAST_SCALE = 10.0  # points at the ends of the colours, so that noise stays pale
WIDTH = 8.0  # inches: letters of 7 points are legible where the picture is 800 pixels wide


class HeatMap(NamedTuple):
    """One heat map: `values` [names, levels], nan where there is nothing to show."""

    title: str
    names: list[str]
    levels: list[float]
    values: np.ndarray


def plot_classes(sweep: Sweep) -> Path:
    """Change of each class's accuracy against dense, in points, class x level, one panel per curve: *_classes.png.

    Of more than MOST_LEVELS levels so many, evenly spread, are drawn.
    """
    names = sweep.header["data"]["classes"]

    def changes(row: Row) -> np.ndarray:
        pair = sweep.predictions[row.key], sweep.dense[row.checkpoint]
        found, dense = (class_accuracy(predictions, sweep.labels, len(names)) for predictions in pair)
        return 100 * (found - dense)

    panels, about = [], "change of each class's accuracy"
    for curve, levels in sweep.curves().items():
        shown = list(levels)
        if len(levels) > MOST_LEVELS:
            shown = [shown[index] for index in np.linspace(0, len(levels) - 1, MOST_LEVELS).round().astype(int)]
            about = f"change of each class's accuracy; {MOST_LEVELS} of {len(levels)} levels"
        columns = [np.mean([changes(row) for row in levels[level]], axis=0) for level in shown]
        panels.append(HeatMap(curve_name(curve), names, shown, np.transpose(columns)))
    return _plot(sweep, sweep.files.with_suffix("_classes.png"), about, panels, numbers=len(names) <= 25)


def plot_layers(sweep: Sweep) -> Path:
    """Share of zeros in each layer, layer x level, a panel for each criterion and allocation: *_layers.png.

    Rows that differ in their recovery alone are of the same masks and share a panel, except in an iterative sweep.
    """
    weights = np.array(list(sweep.layers.values()))
    iterative = sweep.header["settings"].get("schedule", "oneshot") != "oneshot"
    groups: dict[str, dict[float, list[np.ndarray]]] = {}
    for curve, levels in sweep.curves().items():
        group = groups.setdefault(curve_name(curve) if iterative else " ".join(curve[:2]), {})
        for level, rows in levels.items():
            group.setdefault(level, []).extend(100 * sweep.zeros[row.key] / weights for row in rows)
    panels = []
    for title, group in groups.items():
        columns = [np.mean(group[level], axis=0) for level in sorted(group)]
        panels.append(HeatMap(title, list(sweep.layers), sorted(group), np.transpose(columns)))
    return _plot(sweep, sweep.files.with_suffix("_layers.png"), "share of zeros in each layer", panels, shares=True)


def plot_sensitivity(files: SweepFiles) -> Path:
    """Change of accuracy against dense, in points, when one layer alone is pruned, layer x level: the sweep's .png.

    A panel for each criterion and recovery; its layers are in the order of the network.
    """
    sweep = read_sweep(files)
    dense = sweep.header["dense"]
    groups: dict[str, dict[tuple[str, float], float]] = {}
    for curve, levels in sweep.curves().items():
        layer = curve.allocation.removeprefix(ONE_LAYER)
        group = groups.setdefault(curve.criterion + ("" if curve.recover == "none" else f" + {curve.recover}"), {})
        for level, rows in levels.items():
            group[layer, level] = np.mean([row.accuracy - dense[row.checkpoint]["accuracy"] for row in rows])
    panels = []
    for title, group in groups.items():
        names = [name for name in sweep.layers if any(name == layer for layer, _ in group)]
        levels = sorted({level for _, level in group})
        values = [[group.get((name, level), math.nan) for level in levels] for name in names]
        panels.append(HeatMap(title, names, levels, np.array(values)))
    return _plot(sweep, files.png, "one layer pruned at a time", panels, numbers=True)


def _plot(
    sweep: Sweep, path: Path, about: str, panels: list[HeatMap], numbers: bool = False, shares: bool = False
) -> Path:
    """Draw the panels as a grid with one colour bar; the title of the sweep stands below the message.

    Values are changes of accuracy, or `shares` in percent; `numbers` asks for them in the cells that have the room.
    """
    # Red where accuracy is lost, blue where it is gained; the same scale both ways, so that white is no change.
    highest = max(LEAST_SCALE, *(np.nanmax(np.abs(panel.values), initial=0.0) for panel in panels), 0.0)
    look, label = {"cmap": "RdBu", "vmin": -highest, "vmax": highest}, "change of accuracy (points)"
    if shares:
        look, label = {"cmap": "viridis", "vmin": 0, "vmax": 100}, "zeros in the layer (%)"
    nothing = HeatMap("no level that all checkpoints have", [""], [0.0], np.full((1, 1), math.nan))
    panels = [panel for panel in panels if panel.levels] or [nothing]
    message = _shares_message(panels) if shares else _changes_message(panels)
    if len(panels) > MOST_PANELS:
        about += f" (the first {MOST_PANELS} of {len(panels)} panels)"
        panels = panels[:MOST_PANELS]
    grid = _grid(panels, numbers)
    figure = Figure(figsize=grid.size, layout="constrained")
    places = figure.subplots(grid.rows, grid.columns, squeeze=False)
    for axes in places.flat[len(panels) :]:
        axes.set_visible(False)
    for index, (panel, axes) in enumerate(zip(panels, places.flat, strict=False)):
        image = axes.imshow(panel.values, aspect="auto", **look)
        axes.set_facecolor("#d9d9d9")  # where there is no value
        # The rows of all panels are the same ones as a rule; names then stand once, at the left.
        _label(axes, panel, grid, names=index % grid.columns == 0 or panel.names != panels[index - 1].names)
        cell = grid.panel_width / len(panel.levels)
        if numbers and cell >= 0.25:
            _write_numbers(axes, panel.values, highest, font=min(6.8, 26 * cell))
    slender = max(20.0, figure.get_figheight() / 0.25)
    figure.colorbar(image, ax=places, label=label, fraction=0.05, pad=0.01, aspect=slender)
    return style.save_figure(figure, path, message, *sweep.header["title"].splitlines(), about)


class Grid(NamedTuple):
    """The layout of panels; lengths in inches."""

    rows: int
    columns: int
    panel_width: float
    cell_height: float
    size: tuple[float, float]


def _grid(panels: list[HeatMap], numbers: bool) -> Grid:
    """A layout in which text is legible at WIDTH, in two columns of panels with numbers, or in up to four without.

    Cells are as high as text needs, as far as the picture stays below about 30 inches.
    """
    tallest, widest = np.max([panel.values.shape for panel in panels], axis=0)
    most = 4 if not numbers else 2 if widest <= MOST_LEVELS else 1
    columns = min(most, len(panels))
    rows = math.ceil(len(panels) / columns)
    cell_height = min(0.2 if numbers else 0.15, 28 / rows / tallest)
    beside = 1.1 + 0.06 * min(max(len(name) for panel in panels for name in panel.names), 40)
    panel_width = (WIDTH - beside) / columns
    height = rows * (max(1.2, cell_height * tallest) + 0.6) + 1.1
    return Grid(rows, columns, panel_width, cell_height, (WIDTH, max(4.0, height)))


def _label(axes: Axes, panel: HeatMap, grid: Grid, names: bool) -> None:
    """Title, levels below and names at the left, as many as fit."""
    axes.set_title(style.wrapped(panel.title, 14 * grid.panel_width), fontsize=8.5)
    axes.set_xlabel("pruned (%)", fontsize=8)  # of the weights, or of the filters
    levels = [level_text(level) for level in panel.levels]
    step = math.ceil(len(levels) * 0.26 / grid.panel_width)
    axes.set_xticks(range(0, len(levels), step), levels[::step], fontsize=7.5)
    step = math.ceil(0.1 / grid.cell_height)
    shown = [style.literal(_short(name)) for name in panel.names if names]
    axes.set_yticks(range(0, len(shown), step), shown[::step], fontsize=min(7.5, 61 * grid.cell_height * step))


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."


def _write_numbers(axes: Axes, values: np.ndarray, highest: float, font: float) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        colour = "white" if abs(value) > 0.6 * highest else "black"  # the ends of a diverging map are dark
        text = "0" if abs(value) < 0.05 else f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+.1f}"
        look = {"ha": "center", "va": "center", "color": colour, "fontsize": font}
        axes.text(column, row, text, **look).set_in_layout(False)  # a thousand of them would take half of the time


def _changes_message(panels: list[HeatMap]) -> str:
    """The class or layer that loses most at the highest level of a panel at which the median loses at most a point."""

    def mild(panel: HeatMap) -> int:
        """The number of that level, -1 without one."""
        known = [column[np.isfinite(column)] for column in panel.values.T]
        return max((i for i, column in enumerate(known) if len(column) and np.median(column) >= -1), default=-1)

    panel = max(panels, key=lambda panel: panel.levels[mild(panel)] if mild(panel) >= 0 else -1.0)
    if mild(panel) < 0:
        return "The median loses more than 1 point at every level"
    changes, where = panel.values[:, mild(panel)], f"{panel.title}, {level_text(panel.levels[mild(panel)])} % pruned"
    worst = int(np.nanargmin(changes))
    if changes[worst] >= 0:
        return f"{where}: nothing is lost"
    most = f"{_short(panel.names[worst])} loses most ({changes[worst]:+.1f} points)"
    return f"{where}: {most}; the median is {np.nanmedian(changes):+.1f}"


def _shares_message(panels: list[HeatMap]) -> str:
    """The layers that lose least and most, in the panel where they differ most, at the level next to 80 %."""

    def near_80(panel: HeatMap) -> int:
        return int(np.argmin(np.abs(np.array(panel.levels) - 80)))

    panel = max(panels, key=lambda panel: np.nan_to_num(np.ptp(panel.values[:, near_80(panel)])))
    column = near_80(panel)
    shares, where = panel.values[:, column], f"{panel.title}, {level_text(panel.levels[column])} % pruned"
    if not np.ptp(shares) >= 2:
        return f"{where}: the same share of every layer"
    low, high = int(np.argmin(shares)), int(np.argmax(shares))
    least = f"{_short(panel.names[low])} loses {shares[low]:.1f} % of its weights"
    return f"{where}: {least}, {_short(panel.names[high])} {shares[high]:.1f} %"
