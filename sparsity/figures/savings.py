"""What pruning really saved, in words and as pictures: ratios, bytes, time, multiply-adds, from the data files only."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity.figures import style
from sparsity.results.rows import SPARSE_NOTE, Row, curve_name, read_rows
from sparsity.results.store import Sweep
from sparsity.results.summary import column_mean
from sparsity.system.flags import level_text

Pairs = list[tuple[float, float]]  # cost and accuracy of networks
Costs = dict[str, Callable[[Row], float | None]]  # label of a panel -> cost of a row, None or 0 where it is unknown
MOST_RATIO = 1000  # nothing is left of smaller networks worth drawing


def savings_lines(sweep: Sweep) -> list[str]:
    """What was measured of files and times, in sentences; nothing where nothing was."""
    lines = []
    for curve, levels in sweep.curves().items():
        timed = {level: rows for level, rows in levels.items() if all(row.speedup for row in rows)}
        sparse = {level: rows for level, rows in timed.items() if all(SPARSE_NOTE in row.notes for row in rows)}
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
                speeds.append(f"{level_text(level)} %: {speed:.2f}x for {ratio:.2f}x fewer multiply-adds")
            lines.append(f"{curve_name(curve)}: throughput {how} against dense, {', '.join(speeds)}")
    for entry in sweep.header.get("exports", {}).values():
        lines.append(
            f"{entry['file']}: {entry['bytes']:,} bytes ({entry['precision']}), {entry['bits_a_weight']:.2f} bits a "
            f"prunable weight (mask entropy and raw values: {entry['entropy_and_values']:.2f})"
        )
    return lines


def plot_tradeoff(sweep: Sweep) -> Path:
    """Accuracy against compression and against the ratio of multiply-adds: *_tradeoff.png.

    Networks of which less than one part in MOST_RATIO is left are not drawn.
    """
    ratios: Costs = {
        "compression: all parameters / nonzero ones": lambda row: row.compression,
        "multiply-adds of dense / those with nonzero weights": lambda row: row.macs_ratio,
    }
    figure = Figure(figsize=(11, 5 + 0.2 * math.ceil(len(sweep.curves()) / 3)), layout="constrained")
    for axes, (label, ratio) in zip(figure.subplots(1, 2, sharey=True), ratios.items(), strict=True):
        highest = max([2.0, *(x for x, _ in _draw_curves(axes, sweep, ratio))])
        style.scale_accuracy(axes, label, xlim=(0.93, 1.15 * highest))
        style.use_log_scale(axes, "x")
        style.draw_references(axes, sweep)
    figure.axes[0].set_ylabel("test accuracy (%)")
    style.name_lines(figure)
    return style.save_figure(figure, sweep.files.with_suffix("_tradeoff.png"), sweep.header["title"])


def plot_savings(sweep: Sweep) -> Path | None:
    """Accuracy against file size, latency and multiply-adds: *_savings.png, a panel for each that was measured.

    Pareto-optimal networks of a panel are ringed and joined. Controls are dense networks from the controls' CSV. None,
    and no picture, where there is nothing but multiply-adds, which the trade-off figure shows already.
    """
    picture, controls = sweep.files.with_suffix("_savings.png"), read_rows(sweep.files.controls)
    if not controls and not any(row.file_bytes or row.latency_ms for row in sweep.table()):
        picture.unlink(missing_ok=True)  # of rows that were replaced
        return None
    panels = {label: cost for label, cost in _costs(sweep).items() if any(map(cost, [*sweep.table(), *controls]))}
    figure = Figure(figsize=(4.2 * len(panels) + 0.6, 5.6), layout="constrained")
    places = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, cost) in zip(places, panels.items(), strict=True):
        drawn = _draw_curves(axes, sweep, cost) + _draw_controls(axes, controls, cost)
        front = np.reshape(pareto(drawn), (-1, 2)).T
        axes.step(*front, where="post", color=style.QUIET, linewidth=4, alpha=0.25, zorder=0, label="Pareto front")
        axes.plot(*front, markersize=9, **style.RING)
        style.draw_references(axes, sweep, "left")
        axes.margins(x=0.12)
        style.scale_accuracy(axes, label)
        style.use_log_scale(axes)
    places[0].set_ylabel("test accuracy (%)")
    notes = ["Dense kernels multiply by the zeros of a mask; only removed filters and sparse kernels save time."]
    for recipe in dict.fromkeys(control.notes for control in controls):
        names = ", ".join(control.allocation for control in controls if control.notes == recipe)
        notes.append(f"Controls ({names}): {recipe}.")
    style.name_lines(figure, style.wrapped("\n".join(notes), 16 * figure.get_figwidth()))
    return style.save_figure(figure, picture, sweep.header["title"])


def _costs(sweep: Sweep) -> Costs:
    """The panels of `plot_savings`, each in its unit."""
    macs = next(iter(sweep.header["dense"].values())).get("macs", 0) / 1e6
    precisions = sorted({entry["precision"] for entry in sweep.header.get("exports", {}).values()})
    values = f", {' and '.join(precisions)} values" if precisions else ""
    return {
        f"file (MB){values}": lambda row: row.file_bytes and row.file_bytes / 1e6,
        "latency of one image (ms)": lambda row: row.latency_ms,
        "multiply-adds with nonzero weights (millions an image)": lambda row: macs / row.macs_ratio,
    }


def _draw_curves(axes: Axes, sweep: Sweep, cost: Callable[[Row], float | None]) -> Pairs:
    """Draw a line for each curve, and return its points: those of levels whose costs are known for all checkpoints."""
    curves, drawn = {curve: levels for curve, levels in sweep.curves().items() if levels}, []
    for curve, look in style.curve_styles(curves).items():
        pairs = []
        for rows in curves[curve].values():
            costs = [cost(row) for row in rows if max(row.compression, row.macs_ratio) <= MOST_RATIO]
            if len(costs) == len(rows) and all(costs):
                pairs.append((float(np.mean(costs)), column_mean(rows, "accuracy")))
        axes.plot(*np.reshape(pairs, (-1, 2)).T, **look, markersize=3.5, linewidth=1.5, label=curve_name(curve))
        drawn += pairs
    return drawn


def _draw_controls(axes: Axes, controls: list[Row], cost: Callable[[Row], float | None]) -> Pairs:
    """Draw the controls whose cost is known as black diamonds with their names, and return their points."""
    known = [control for control in controls if cost(control)]
    points = [(cost(control), control.accuracy) for control in known]
    if points:
        look = {"marker": "D", "color": "black", "linestyle": "none", "markersize": 6}
        axes.plot(*np.transpose(points), **look, label="dense networks (controls)")
    low, high = axes.dataLim.intervalx
    for control, point in zip(known, points, strict=True):
        side, x = ("left", 6) if point[0] < low**0.2 * high**0.8 else ("right", -6)  # on a logarithmic axis
        axes.annotate(control.allocation, point, (x, -5), textcoords="offset points", ha=side, va="top", fontsize=8)
    return points


def pareto(points: Iterable[tuple[float, float]]) -> Pairs:
    """Of (cost, gain) pairs those that no other beats: ascending in both. Of equal ones one stays."""
    front: Pairs = []
    for cost, gain in sorted(set(points), key=lambda pair: (pair[0], -pair[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front
