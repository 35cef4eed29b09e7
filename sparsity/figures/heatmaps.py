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


class HeatMap(NamedTuple):
    """One heat map: `values` [names, levels], nan where there is nothing to show."""

    title: str
    names: list[str]
    levels: list[float]
    values: np.ndarray


def plot_classes(sweep: Sweep) -> Path:
    """Change of each class's accuracy against dense, in points, class x level, a panel a curve: *_classes.png."""
    names = sweep.header["data"]["classes"]

    def changes(row: Row) -> np.ndarray:
        pair = sweep.predictions[row.key], sweep.dense[row.checkpoint]
        found, dense = (class_accuracy(predictions, sweep.labels, len(names)) for predictions in pair)
        return 100 * (found - dense)

    panels = []
    for curve, levels in sweep.curves().items():
        columns = [np.mean([changes(row) for row in rows], axis=0) for rows in levels.values()]
        panels.append(HeatMap(curve_name(curve), names, list(levels), np.transpose(columns)))
    path = sweep.files.with_suffix("_classes.png")
    return _plot(sweep, path, "accuracy of each class", panels, numbers=len(names) <= 25)


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
    """Draw the panels as a grid with one colour bar, under the sweep's title and `about`.

    Values are changes of accuracy, or `shares` in percent; `numbers` asks for them in the cells that have the room.
    """
    # Red where accuracy is lost, blue where it is gained; the same scale both ways, so that white is no change.
    highest = max([1.0, *(np.nanmax(np.abs(panel.values), initial=1.0) for panel in panels)])
    look, label = {"cmap": "RdBu", "vmin": -highest, "vmax": highest}, "change of accuracy against dense (points)"
    if shares:
        look, label = {"cmap": "viridis", "vmin": 0, "vmax": 100}, "zeros in the layer (%)"
    nothing = HeatMap("no level that all checkpoints have", [""], [0.0], np.full((1, 1), math.nan))
    panels = [panel for panel in panels if panel.levels] or [nothing]
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
            _write_numbers(axes, panel.values, highest, font=min(8.0, 26 * cell))
    slender = max(20.0, figure.get_figheight() / 0.25)
    figure.colorbar(image, ax=places, label=label, fraction=0.05, pad=0.01, aspect=slender)
    return style.save_figure(figure, path, sweep.header["title"], about)


class Grid(NamedTuple):
    """The layout of panels; lengths in inches."""

    rows: int
    columns: int
    panel_width: float
    cell_height: float
    size: tuple[float, float]


def _grid(panels: list[HeatMap], numbers: bool) -> Grid:
    """The layout in at most four columns that comes nearest to a page on its side.

    Cells are as large as legible text needs, as far as the picture stays below about 30 inches.
    """
    tallest, widest = np.max([panel.values.shape for panel in panels], axis=0)
    longest = max(len(name) for panel in panels for name in panel.names)
    grids = []
    for columns in range(1, min(4, len(panels)) + 1):
        rows = math.ceil(len(panels) / columns)
        cell_height = min(0.26 if numbers else 0.15, 28 / rows / tallest)
        panel_width = max(2.6, min(0.34 * widest, 8) if numbers else min(0.3 * widest, 3.4))
        width = columns * panel_width + 1.6 + 0.07 * min(longest, 40)
        height = rows * (max(1.2, cell_height * tallest) + 0.75) + 1.0
        grids.append(Grid(rows, columns, panel_width, cell_height, (max(6.5, width), max(4.0, height))))
    return min(grids, key=lambda grid: abs(math.log(grid.size[0] / grid.size[1] / 1.3)))


def _label(axes: Axes, panel: HeatMap, grid: Grid, names: bool) -> None:
    """Title, levels below and names at the left, as many as fit."""
    axes.set_title(style.wrapped(panel.title, 12 * grid.panel_width), fontsize=9)
    axes.set_xlabel("pruned (%)", fontsize=8)  # of the weights, or of the filters
    levels = [level_text(level) for level in panel.levels]
    step = math.ceil(len(levels) * 0.3 / grid.panel_width)
    axes.set_xticks(range(0, len(levels), step), levels[::step], fontsize=7)
    step = math.ceil(0.085 / grid.cell_height)
    shown = [style.literal(name if len(name) <= 40 else name[:37] + "...") if names else "" for name in panel.names]
    axes.set_yticks(range(0, len(shown), step), shown[::step], fontsize=min(8.0, 61 * grid.cell_height * step))


def _write_numbers(axes: Axes, values: np.ndarray, highest: float, font: float) -> None:
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        colour = "white" if abs(value) > 0.6 * highest else "black"  # the ends of a diverging map are dark
        text = "0" if abs(value) < 0.05 else f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+.1f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)
