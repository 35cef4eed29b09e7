"""Figures that tell where a sweep does its damage: class by class and layer by layer, from the data files only."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from sparsity.figures.style import literal, save_figure, set_title, wrapped
from sparsity.results.files import SweepFiles
from sparsity.results.rows import ONE_LAYER, Row, curve_name, level_text
from sparsity.results.statistics import class_accuracy
from sparsity.results.store import Sweep, read_sweep
from sparsity.system.errors import UserError

MOST_PANELS = 12


@dataclass(frozen=True)
class Panel:
    """One heat map: `values` [names, levels], nan where there is nothing to show."""

    title: str
    names: list[str]
    levels: list[float]
    values: np.ndarray


@dataclass(frozen=True)
class Scale:
    """What the colours of all panels mean."""

    label: str
    colours: str
    low: float
    high: float


def plot_classes(files: SweepFiles) -> None:
    """Change of each class's accuracy against dense, in points, class x level, a panel a curve: *_classes.png."""
    sweep = read_sweep(files)
    names = sweep.header["data"]["classes"]
    panels = []
    for curve, levels in sweep.curves().items():
        columns = [_mean([_class_changes(sweep, row, len(names)) for row in rows]) for rows in levels.values()]
        panels.append(Panel(curve_name(curve), names, list(levels), _matrix(columns, len(names))))
    figure = _draw(panels, _around_zero(panels, "change of accuracy against dense (points)"), numbers=len(names) <= 25)
    set_title(figure, sweep.header["title"], "accuracy of each class" + _left_out(panels))
    save_figure(figure, files.with_suffix("_classes.png"))


def plot_layers(files: SweepFiles) -> None:
    """Share of zeros in each layer, layer x level, a panel for each criterion and allocation: *_layers.png.

    Rows that differ in their recovery alone are of the same masks and share a panel, except in an iterative sweep.
    """
    sweep = read_sweep(files)
    weights = np.array(list(sweep.layers.values()))
    iterative = sweep.header["settings"].get("schedule", "oneshot") != "oneshot"
    groups: dict[str, dict[float, list[np.ndarray]]] = {}
    for curve, levels in sweep.curves().items():
        group = groups.setdefault(curve_name(curve) if iterative else " ".join(curve[:2]), {})
        for level, rows in levels.items():
            group.setdefault(level, []).extend(100 * sweep.zeros[row.key] / weights for row in rows)
    panels = []
    for group, levels in groups.items():
        columns = [_mean(levels[level]) for level in sorted(levels)]
        panels.append(Panel(group, list(sweep.layers), sorted(levels), _matrix(columns, len(weights))))
    figure = _draw(panels, Scale("zeros in the layer (%)", "viridis", 0, 100))
    set_title(figure, sweep.header["title"], "share of zeros in each layer" + _left_out(panels))
    save_figure(figure, files.with_suffix("_layers.png"))


def plot_sensitivity(files: SweepFiles) -> None:
    """Change of accuracy against dense, in points, when one layer alone is pruned, layer x level: the sweep's .png.

    Drawn are the rows whose allocation is "only LAYER", a panel for each criterion and recovery. Raises UserError when
    there are none.
    """
    sweep = read_sweep(files)
    groups: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for curve, levels in sweep.curves().items():
        if curve[1].startswith(ONE_LAYER):
            changes = {level: _change(sweep, rows) for level, rows in levels.items()}
            groups.setdefault((curve[0], curve[2]), {})[curve[1].removeprefix(ONE_LAYER)] = changes
    if not groups:
        raise UserError(f"{files.csv} holds no rows in which one layer alone is pruned")
    panels = [_sensitivity_panel(sweep, *item) for item in groups.items()]
    figure = _draw(panels, _around_zero(panels, "change of accuracy against dense (points)"), numbers=True)
    set_title(figure, sweep.header["title"], "one layer pruned at a time" + _left_out(panels))
    save_figure(figure, files.png)


def _sensitivity_panel(sweep: Sweep, kind: tuple[str, str], found: dict[str, dict[float, float]]) -> Panel:
    """Layers in the order of the sweep, those it does not know after them."""
    names = [name for name in sweep.layers if name in found] + [name for name in found if name not in sweep.layers]
    levels = sorted({level for changes in found.values() for level in changes})
    values = np.array([[found[name].get(level, math.nan) for level in levels] for name in names])
    criterion, recover = kind
    return Panel(criterion if recover == "none" else f"{criterion} + {recover}", names, levels, values)


def _change(sweep: Sweep, rows: list[Row]) -> float:
    """Accuracy minus that of dense in points, mean over checkpoints."""
    pairs = [(sweep.correct(row), sweep.dense_correct(row.checkpoint)) for row in rows]
    return float(np.mean([100 * (right.mean() - dense.mean()) for right, dense in pairs]))


def _class_changes(sweep: Sweep, row: Row, classes: int) -> np.ndarray:
    """Accuracy of each class minus that of dense in points, [classes]."""
    found, dense = (
        class_accuracy(predictions, sweep.labels, classes)
        for predictions in (sweep.predictions[row.key], sweep.dense[row.checkpoint])
    )
    return 100 * (found - dense)


def _mean(columns: list[np.ndarray]) -> np.ndarray:
    return np.mean(columns, axis=0)


def _matrix(columns: list[np.ndarray], height: int) -> np.ndarray:
    """Columns side by side, [height, columns], also when there are none."""
    return np.array(columns, dtype=float).reshape(-1, height).T


def _around_zero(panels: list[Panel], label: str) -> Scale:
    """Red where something is lost, blue where it is gained; the same scale both ways, so that white is no change."""
    finite = [np.abs(panel.values[np.isfinite(panel.values)]).max(initial=0) for panel in panels]
    limit = max(1.0, *finite, 0.0)
    return Scale(label, "RdBu", -limit, limit)


def _left_out(panels: list[Panel]) -> str:
    return "" if len(panels) <= MOST_PANELS else f" (the first {MOST_PANELS} of {len(panels)} panels)"


def _draw(panels: list[Panel], scale: Scale, numbers: bool = False) -> Figure:
    """The panels as a grid with one colour bar; `numbers` asks for the values in the cells where they are legible."""
    # A curve whose checkpoints have no level in common has nothing to show.
    panels = [panel for panel in panels if panel.levels][:MOST_PANELS]
    grid = _grid(panels, numbers)
    figure = Figure(figsize=(max(6.5, grid.size[0]), max(4.0, grid.size[1])), layout="constrained")
    places = figure.subplots(grid.rows, grid.columns, squeeze=False)
    colours = colormaps[scale.colours].with_extremes(bad="#d9d9d9")
    image = None
    for index, axes in enumerate(places.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[index]
        image = axes.imshow(panel.values, cmap=colours, vmin=scale.low, vmax=scale.high, aspect="auto")
        # The rows of all panels are the same ones as a rule; names then stand once, at the left.
        first = index % grid.columns == 0 or panel.names != panels[index - 1].names
        _label(axes, panel, grid, names=first)
        if numbers and grid.cell_width >= 0.25:
            _write_numbers(axes, panel, scale, font=min(8.0, 26 * grid.cell_width))
    if image is None:
        figure.text(0.5, 0.5, "no level that all checkpoints have", ha="center", fontsize=11)
    else:
        slender = max(20.0, figure.get_figheight() / 0.25)
        figure.colorbar(image, ax=places, label=scale.label, fraction=0.05, pad=0.01, aspect=slender)
    return figure


@dataclass(frozen=True)
class Grid:
    """How panels are laid out; lengths in inches."""

    rows: int
    columns: int
    cell_height: float
    cell_width: float
    panel_width: float
    size: tuple[float, float]


def _grid(panels: list[Panel], numbers: bool) -> Grid:
    """The layout in at most four columns that comes nearest to a page on its side."""
    grids = [_grid_of(panels, numbers, columns) for columns in range(1, min(4, max(1, len(panels))) + 1)]
    return min(grids, key=lambda grid: abs(math.log(grid.size[0] / grid.size[1] / 1.3)))


def _grid_of(panels: list[Panel], numbers: bool, columns: int) -> Grid:
    """Cells are as large as legible text needs, as far as the picture stays below about 30 inches."""
    tallest = max([1, *(len(panel.names) for panel in panels)])
    widest = max([1, *(len(panel.levels) for panel in panels)])
    longest = max([0, *(len(name) for panel in panels for name in panel.names)])
    rows = max(1, math.ceil(len(panels) / columns))
    height = min(0.26 if numbers else 0.15, 28 / rows / tallest)
    width = min(0.34, 8 / widest) if numbers else min(0.3, 3.4 / widest)
    panel_width = max(2.6, width * widest)
    size = (
        columns * panel_width + 1.6 + 0.07 * min(longest, 40),
        rows * (max(1.2, height * tallest) + 0.75) + 1.0,
    )
    return Grid(rows, columns, height, panel_width / widest, panel_width, size)


def _label(axes, panel: Panel, grid: Grid, names: bool) -> None:
    """Title, levels below (as many as fit), names at the left."""
    axes.set_title(wrapped(panel.title, int(12 * grid.panel_width)), fontsize=9)
    step = max(1, math.ceil(len(panel.levels) * 0.3 / grid.panel_width))
    ticks = range(0, len(panel.levels), step)
    axes.set_xticks(ticks, [level_text(panel.levels[tick]) for tick in ticks], fontsize=7)
    axes.set_xlabel("pruned (%)", fontsize=8)  # of the weights, or of the filters
    step = max(1, math.ceil(0.085 / grid.cell_height))
    ticks = range(0, len(panel.names), step)
    font = min(8.0, 72 * grid.cell_height * step * 0.85)
    axes.set_yticks(ticks, [_shortened(panel.names[tick]) if names else "" for tick in ticks], fontsize=font)


def _shortened(name: str) -> str:
    return literal(name if len(name) <= 40 else name[:37] + "...")


def _write_numbers(axes, panel: Panel, scale: Scale, font: float) -> None:
    for (row, column), value in np.ndenumerate(panel.values):
        if math.isfinite(value):
            # The ends of a diverging map are dark, its middle is white.
            colour = "white" if abs(value) > 0.6 * scale.high else "black"
            text = f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+.1f}"
            text = "0" if abs(value) < 0.05 else text
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=font)
