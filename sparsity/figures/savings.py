"""What pruning really saved, in words and as a picture: bytes, time and multiply-adds, from the data files only."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sparsity.figures.style import QUIET, curve_styles, save_figure, set_title, wrapped
from sparsity.prune.criteria import FILTER_CRITERIA
from sparsity.results.files import SweepFiles
from sparsity.results.rows import SPARSE_NOTE, Row, curve_name, level_text
from sparsity.results.store import Sweep, read_sweep
from sparsity.sweep.controls import Control, read_controls

PANELS = {
    "file": "file (MB)",
    "latency": "latency of one image (ms)",
    "macs": "multiply-adds with nonzero weights (millions an image)",
}


MOST_RATIO = 1000  # of multiply-adds


@dataclass(frozen=True)
class Point:
    """One network: `costs` by the keys of PANELS where they are known, and accuracy in percent."""

    name: str
    costs: dict[str, float]
    accuracy: float


def savings_lines(sweep: Sweep) -> list[str]:
    """What was measured of files and times, in sentences; nothing where nothing was."""
    lines = []
    for curve, levels in sweep.curves().items():
        timed = {level: found for level, found in levels.items() if all(row.speedup for row in found)}
        skipping = {level: found for level, found in timed.items() if all(SPARSE_NOTE in row.notes for row in found)}
        if curve[0] in FILTER_CRITERIA and timed:
            lines.append(f"{curve_name(curve)}: throughput of the smaller network against dense, {_speeds(timed)}")
            continue
        if masked := [_mean(found, "speedup") for level, found in timed.items() if level not in skipping]:
            lines.append(
                f"{curve_name(curve)}: {np.median(masked):.2f}x the throughput of dense ({min(masked):.2f}x to "
                f"{max(masked):.2f}x over the levels): dense kernels multiply by masked weights as by any other, so "
                "masks alone make nothing faster"
            )
        if skipping:
            lines.append(f"{curve_name(curve)}: throughput with sparse kernels against dense, {_speeds(skipping)}")
    for entry in sweep.header.get("exports", {}).values():
        lines.append(
            f"{entry['file']}: {entry['bytes']:,} bytes ({entry['precision']}), {entry['bits_a_weight']:.2f} bits a "
            f"prunable weight (mask entropy and raw values: {entry['entropy_and_values']:.2f})"
        )
    return lines


def _speeds(levels: dict[float, list[Row]]) -> str:
    return ", ".join(
        f"{level_text(level)} %: {_mean(rows, 'speedup'):.2f}x for {_mean(rows, 'macs_ratio'):.2f}x fewer multiply-adds"
        for level, rows in levels.items()
    )


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain) pairs those that no other beats: ascending in both. Of equal ones one stays."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(set(points), key=lambda pair: (pair[0], -pair[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def has_savings(sweep: Sweep, controls: list[Control]) -> bool:
    """Whether there is more to draw than multiply-adds, which the trade-off figure shows already."""
    return bool(controls) or any(row.file_bytes or row.latency_ms for row in sweep.table())


def plot_savings(files: SweepFiles) -> bool:
    """Accuracy against file size, latency and multiply-adds to *_savings.png, if any was measured; whether it was.

    Pareto-optimal networks of a panel are ringed and joined. Controls are dense networks from `controls`.
    """
    sweep, controls = read_sweep(files), read_controls(files.controls)
    curves = {curve: [_point(sweep, rows) for rows in levels.values()] for curve, levels in sweep.curves().items()}
    styles = curve_styles(list(curves))
    others = [_control_point(control) for control in controls]
    panels = [
        key for key in PANELS if any(key in point.costs for points in [*curves.values(), others] for point in points)
    ]
    if not panels or not has_savings(sweep, controls):
        files.with_suffix("_savings.png").unlink(missing_ok=True)  # of rows that were replaced
        return False
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 6.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve, points in curves.items():
            _draw(axes, [point for point in points if key in point.costs], key, styles[curve], curve_name(curve))
        _draw_controls(axes, [point for point in others if key in point.costs], key)
        _draw_front(
            axes, [point for points in [*curves.values(), others] for point in points if key in point.costs], key
        )
        _dress(axes, sweep, key)
    _explain(figure, sweep, controls)
    save_figure(figure, files.with_suffix("_savings.png"))
    return True


def _mean(rows: list[Row], column: str) -> float:
    return float(np.mean([getattr(row, column) for row in rows]))


def _point(sweep: Sweep, rows: list[Row]) -> Point:
    """One level of a curve, mean over its checkpoints."""
    costs = {}
    if all(row.file_bytes for row in rows):
        costs["file"] = _mean(rows, "file_bytes") / 1e6
    if all(row.latency_ms for row in rows):
        costs["latency"] = _mean(rows, "latency_ms")
    macs = [sweep.header["dense"][row.checkpoint].get("macs") for row in rows]
    if all(macs) and all(row.macs_ratio <= MOST_RATIO for row in rows):  # nothing is left of others worth drawing
        costs["macs"] = float(np.mean([count / row.macs_ratio for count, row in zip(macs, rows, strict=True)])) / 1e6
    return Point(level_text(rows[0].level), costs, _mean(rows, "accuracy"))


def _control_point(control: Control) -> Point:
    costs = {"macs": control.macs / 1e6}
    if control.file_bytes:
        costs["file"] = control.file_bytes / 1e6
    if control.latency_ms:
        costs["latency"] = control.latency_ms
    return Point(control.network, costs, control.accuracy)


def _draw(axes, points: list[Point], key: str, style: dict, label: str) -> None:
    x, y = [point.costs[key] for point in points], [point.accuracy for point in points]
    axes.plot(x, y, **style, markersize=4, linewidth=1.3, label=label)


def _draw_controls(axes, points: list[Point], key: str) -> None:
    """Black diamonds, each with the name of its network."""
    if not points:
        return
    x, y = [point.costs[key] for point in points], [point.accuracy for point in points]
    axes.plot(x, y, marker="D", color="black", linestyle="none", markersize=6, label="dense networks (controls)")
    for point in points:
        place = {"xytext": (0, -9), "textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
        axes.annotate(point.name, (point.costs[key], point.accuracy), **place)


def _draw_front(axes, points: list[Point], key: str) -> None:
    front = pareto((point.costs[key], point.accuracy) for point in points)
    x, y = [cost for cost, _ in front], [gain for _, gain in front]
    axes.step(x, y, where="post", color=QUIET, linewidth=4, alpha=0.25, zorder=0, label="Pareto front")
    ring = {"markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "none", "zorder": 5}
    axes.plot(x, y, marker="o", markersize=9, **ring)


def _dress(axes, sweep: Sweep, key: str) -> None:
    """Axes, the line of the dense network, ticks that can be read."""
    dense = float(np.mean([figures["accuracy"] for figures in sweep.header["dense"].values()]))
    axes.axhline(dense, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.text(0.01, dense + 1, f"dense {dense:.1f} %", color=QUIET, fontsize=9, transform=axes.get_yaxis_transform())
    label = PANELS[key]
    if key == "file":
        precisions = sorted({entry["precision"] for entry in sweep.header.get("exports", {}).values()})
        label += f", {' and '.join(precisions)} values" if precisions else ""
    axes.set(xscale="log", ylim=(0, 106), xlabel=label, ylabel="test accuracy (%)")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)


def _explain(figure: Figure, sweep: Sweep, controls: list[Control]) -> None:
    """Legend, and what has to be known: how the controls were trained, and who multiplies by zeros."""
    named = {}
    for axes in figure.axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    notes = ["Dense kernels multiply by the zeros of a mask; only removed filters and sparse kernels save time."]
    for recipe in dict.fromkeys(control.recipe for control in controls):
        names = ", ".join(control.network for control in controls if control.recipe == recipe)
        notes.append(f"Controls ({names}): {recipe}.")
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=min(3, len(named)),
        frameon=False,
        handlelength=4,  # long enough to tell dashes from dots
        title=wrapped("\n".join(notes), int(16 * figure.get_figwidth())),
        title_fontsize=9,
    )
    set_title(figure, sweep.header["title"])
