"""What pruning really saved, in words and as pictures: ratios, bytes, time, multiply-adds, from the data files only."""

import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity.figures import style
from sparsity.figures.labels import Label, Place, place_labels
from sparsity.results.rows import SEMI_STRUCTURED_NOTE, SPARSE_NOTE, Row, column_mean, curve_name, points, read_rows
from sparsity.results.store import Sweep, dense_accuracy
from sparsity.system.flags import level_text
from sparsity.system.methods import Curve

Costs = dict[str, Callable[[Row], float | None]]  # label of a panel -> cost of a row, None or 0 where it is unknown
MOST_RATIO = 1000  # nothing is left of smaller networks worth drawing
NEAR = 1.0  # points below dense that a title still calls near
ROUNDING = 1e-4  # points: accuracies in the CSV are rounded, that of dense is not


class Point(NamedTuple):
    """A network in a panel of costs."""

    cost: float
    accuracy: float
    name: str
    colour: str = "black"
    level: float | None = None  # of a curve


def savings_lines(sweep: Sweep, exported: Collection[tuple[Curve, float]] = ()) -> list[str]:
    """What was measured of times, and of files of the levels `exported`, in sentences; nothing where nothing was."""
    lines = []
    for curve, levels in sweep.curves().items():
        timed = {level: rows for level, rows in levels.items() if all(row.speedup for row in rows)}
        sparse = {level: rows for level, rows in timed.items() if all(_by_sparse_kernels(row) for row in rows)}
        skipping = timed if curve.prunes_filters else sparse
        if masked := [column_mean(rows, "speedup") for level, rows in timed.items() if level not in skipping]:
            lines.append(
                f"{curve_name(curve)}: {np.median(masked):.2f}x the throughput of dense ({min(masked):.2f}x to "
                f"{max(masked):.2f}x over the levels): dense kernels multiply by masked weights as by any other, so "
                "a ratio other than 1 is noise of the machine"
            )
        if skipping:
            how = "of the smaller network" if curve.prunes_filters else "with sparse kernels"
            speeds = []
            for level, rows in skipping.items():
                speed, ratio = column_mean(rows, "speedup"), column_mean(rows, "macs_ratio")
                fewer = f"for {ratio:.2f}x fewer" if math.isfinite(ratio) else "with no"
                speeds.append(f"{level_text(level)} %: {speed:.2f}x {fewer} multiply-adds")
            lines.append(f"{curve_name(curve)}: throughput {how} against dense, {', '.join(speeds)}")
    files = sweep.header.get("exports", {})
    return lines + [_file_line(row, files[row.key]) for row in sweep.table() if (row.curve, row.level) in exported]


def _file_line(row: Row, entry: dict[str, Any]) -> str:
    """The file of a row in words, from its entry in the JSON."""
    told = ""
    if "reporting_accuracy" in entry:  # committed records of two sweeps do not tell it
        told = f", {entry['reporting_accuracy']:.2f} % on the {entry['reporting_images']:,} images for reporting"
    least = f" (mask entropy and raw values: {entry['entropy_and_values']:.2f})" * entry["file"].endswith(".npz")
    return (
        f"{curve_name(row.curve)} at {level_text(row.level)} %, {entry['file']}: {entry['bytes']:,} bytes "
        f"({entry['precision']}){told}, {entry['bits_a_weight']:.2f} bits a prunable weight{least}"
    )


def _by_sparse_kernels(row: Row) -> bool:
    return SPARSE_NOTE in row.notes or SEMI_STRUCTURED_NOTE in row.notes


def plot_tradeoff(sweep: Sweep) -> Path:
    """Accuracy against compression and against the ratio of multiply-adds: *_tradeoff.png.

    Networks of which less than one part in MOST_RATIO is left are not drawn.
    """
    ratios: Costs = {
        "compression: all parameters / nonzero ones": lambda row: row.compression,
        "multiply-adds of dense / those with nonzero weights": lambda row: row.macs_ratio,
    }
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    for axes, (label, ratio) in zip(figure.subplots(1, 2, sharey=True), ratios.items(), strict=True):
        highest = max([dense_accuracy(sweep), *(point.accuracy for point in _draw_curves(axes, sweep, ratio))])
        axes.set_xlabel(label)
        style.scale_x(axes, log=True, unit="x")
        style.scale_accuracy(axes, high=highest)
        style.draw_references(axes, sweep)
    figure.axes[0].set_ylabel("test accuracy (%)")
    style.name_lines(figure)
    path = sweep.files.with_suffix("_tradeoff.png")
    return style.save_figure(figure, path, _tradeoff_message(sweep, ratios), sweep.header["title"])


def _tradeoff_message(sweep: Sweep, ratios: Costs) -> str:
    """How far the ratios go, and by which curve, of networks that lose at most NEAR points against dense."""
    parts = []
    for what, ratio in zip(("parameters", "multiply-adds"), ratios.values(), strict=True):
        found = [(1.0, "")]
        for curve, levels in sweep.curves().items():
            near = [rows for rows in levels.values() if _is_near(column_mean(rows, "accuracy"), dense_accuracy(sweep))]
            found += [(float(np.mean([ratio(row) or 0 for row in rows])), curve_name(curve)) for rows in near]
        times, name = max(pair for pair in found if pair[0] <= MOST_RATIO)
        if times > 1.005:
            parts.append(style.unbroken(f"{times:.3g}x fewer {what}") + " " + style.unbroken(f"({name})"))
    words = ", ".join(parts) or "none with fewer weights"
    return f"Measured at most {points(NEAR)} below dense: {words}"


def _is_near(accuracy: float, dense: float) -> bool:
    """Whether an accuracy is at most NEAR points below that of dense."""
    return accuracy >= dense - NEAR - ROUNDING


def plot_savings(sweep: Sweep) -> Path | None:
    """Accuracy against file size, latency and multiply-adds: *_savings.png, a panel for each that was measured.

    Pareto-optimal networks of a panel are ringed and joined. Controls are dense networks from the controls' CSV. A
    network that was not measured has the file and latency of one with the same masks that was. None, and no picture,
    where there is nothing but multiply-adds, which the trade-off figure shows already.
    """
    picture, controls = sweep.files.with_suffix("_savings.png"), read_rows(sweep.files.controls)
    if not controls and not any(row.file_bytes or row.latency_ms for row in sweep.table()):
        picture.unlink(missing_ok=True)  # of rows that were replaced
        return None
    panels = {label: cost for label, cost in _costs(sweep).items() if any(map(cost, [*sweep.table(), *controls]))}
    dense = _dense_costs(sweep)
    figure = Figure(figsize=(3.6 * len(panels) + 0.6, 4.8), layout="constrained")
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    drawn_by_label = {}
    for axes, (label, cost) in zip(places, panels.items(), strict=True):
        drawn = _draw_curves(axes, sweep, cost) + _draw_controls(axes, controls, cost)
        if dense.get(label):
            drawn.append(Point(dense[label], dense_accuracy(sweep), "dense"))
            axes.plot(*drawn[-1][:2], marker="*", color="black", markersize=11, linestyle="none", label="dense")
        drawn_by_label[label] = drawn
        _draw_front(axes, drawn)
        axes.set_xlabel(label)
        style.scale_x(axes, log=True, room=0.1)
        style.scale_accuracy(axes, high=max([dense_accuracy(sweep), *(point.accuracy for point in drawn)]))
        style.draw_references(axes, sweep, "left")
    places[0].set_ylabel("test accuracy (%)")
    style.name_lines(figure, "\n".join(_notes(controls)))
    figure.draw_without_rendering()
    for axes, cost in zip(places, panels.values(), strict=True):
        known = {control.allocation: (cost(control), control.accuracy) for control in controls if cost(control)}
        nudges = np.array([[0, 0], [0, -18], [0, 18]])  # pixels; off a curve that passes close by
        spots = {name: axes.transData.transform([point]) + nudges for name, point in known.items()}
        place_labels(Place(axes), [Label(name, "black", spot) for name, spot in spots.items()], fontsize=8.5)
    return style.save_figure(
        figure, picture, _savings_message(drawn_by_label, dense_accuracy(sweep)), sweep.header["title"]
    )


def _notes(controls: list[Row]) -> list[str]:
    """The caption: why masks save no time, whose costs are drawn, and how the controls were trained."""
    notes = [
        "Dense kernels multiply by the zeros of a mask; only removed filters and sparse kernels save time. A network "
        "that was not measured has the file and latency of one with the same masks; dense: values without packing."
    ]
    for recipe in dict.fromkeys(control.notes for control in controls):
        names = ", ".join(control.allocation for control in controls if control.notes == recipe)
        notes.append(f"Controls ({names}): {recipe}.")
    return notes


def _draw_front(axes: Axes, drawn: list[Point]) -> None:
    """Join and ring the Pareto-optimal points."""
    front = pareto(drawn)
    steps = np.reshape([point[:2] for point in front], (-1, 2)).T
    axes.step(*steps, where="post", color=style.QUIET, linewidth=4, alpha=0.25, zorder=0, label="Pareto front")
    for point in front:
        style.ring(axes, np.array(point[:2]), point.colour)


def _savings_message(panels: dict[str, list[Point]], dense: float) -> str:
    """Which network is the cheapest in each panel, of those that lose at most NEAR points against dense.

    Level 0 is left to dense itself: the same network, whose time differs by the machine's noise alone.
    """
    least = {"file": "smallest file", "latency": "lowest latency", "multiply-adds": "fewest multiply-adds"}
    cheapest: dict[str, list[str]] = {}
    for label, drawn in panels.items():
        if near := [point for point in drawn if point.level != 0 and _is_near(point.accuracy, dense)]:
            cheapest.setdefault(min(near).name, []).append(least[label.split()[0]])
    names = (f"{style.unbroken(name)} ({style.unbroken(', '.join(kinds))})" for name, kinds in cheapest.items())
    words = ", ".join(names) or "none that was measured"
    return f"Cheapest network measured at most {points(NEAR)} below dense: {words}"


def _costs(sweep: Sweep) -> Costs:
    """The panels of `plot_savings`, each in its unit; rows that were not measured have the costs of the same masks."""
    macs = next(iter(sweep.header["dense"].values())).get("macs", 0) / 1e6
    values = f", {' and '.join(_precisions(sweep))} values" if _precisions(sweep) else ""
    oneshot = sweep.header["settings"].get("schedule", "oneshot") == "oneshot"  # in steps recoveries change the masks
    rows = sweep.table() if oneshot else []

    def measured(column: str) -> Callable[[Row], float | None]:
        known = {_masks(row): getattr(row, column) for row in rows if getattr(row, column)}
        return lambda row: getattr(row, column) or known.get(_masks(row))

    size, latency = measured("file_bytes"), measured("latency_ms")
    return {
        f"file (MB){values}": lambda row: size(row) and size(row) / 1e6,
        "latency of one image (ms)": latency,
        "multiply-adds with nonzero weights\n(millions an image)": lambda row: macs / row.macs_ratio,
    }


def _masks(row: Row) -> tuple[str, str, str, str]:
    """The rows of equal masks in a one-shot sweep have this in common."""
    return row.checkpoint, row.criterion, row.allocation, level_text(row.level)


def _precisions(sweep: Sweep) -> list[str]:
    return sorted({entry["precision"] for entry in sweep.header.get("exports", {}).values()})


def _dense_costs(sweep: Sweep) -> dict[str, float]:
    """Label of a panel -> cost of the untouched network, mean over checkpoints, where it is known."""
    value = 2 if _precisions(sweep) == ["bf16"] else 4
    scales = ("parameters", value / 1e6), ("latency_ms", 1.0), ("macs", 1e-6)
    figures, costs = sweep.header["dense"].values(), {}
    for label, (key, scale) in zip(_costs(sweep), scales, strict=True):
        if all(entry.get(key) for entry in figures):
            costs[label] = scale * float(np.mean([entry[key] for entry in figures]))
    return costs


def _draw_curves(axes: Axes, sweep: Sweep, cost: Callable[[Row], float | None]) -> list[Point]:
    """Draw a line for each curve, and return its points: those of levels whose costs are known for all checkpoints."""
    curves, drawn = {curve: levels for curve, levels in sweep.curves().items() if levels}, []
    for curve, look in style.curve_styles(curves).items():
        found = {}
        for level, rows in curves[curve].items():
            costs = [cost(row) for row in rows if max(row.compression, row.macs_ratio) <= MOST_RATIO]
            if len(costs) == len(rows) and all(costs):
                name = f"{curve_name(curve)} at {level_text(level)} %"
                found[level] = Point(float(np.mean(costs)), column_mean(rows, "accuracy"), name, look["color"], level)
        x, y = style.broken(list(found), *np.reshape([point[:2] for point in found.values()], (-1, 2)).T)
        axes.plot(x, y, **look, markersize=3.5, linewidth=1.5, label=curve_name(curve))
        drawn += found.values()
    return drawn


def _draw_controls(axes: Axes, controls: list[Row], cost: Callable[[Row], float | None]) -> list[Point]:
    """Draw the controls whose cost is known as black diamonds, and return their points."""
    drawn = [Point(cost(control), control.accuracy, control.allocation) for control in controls if cost(control)]
    if drawn:
        look = {"marker": "D", "color": "black", "linestyle": "none", "markersize": 6}
        axes.plot(*np.transpose([point[:2] for point in drawn]), **look, label="dense networks (controls)")
    return drawn


def pareto(networks: Iterable[Point]) -> list[Point]:
    """The networks that no other beats: ascending in both cost and accuracy. Of equal ones one stays."""
    front: list[Point] = []
    for point in sorted(networks, key=lambda point: (point.cost, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front
