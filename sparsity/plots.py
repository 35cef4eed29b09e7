"""Figures, drawn from the data files only."""

import csv
import io
import warnings
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsity.report import Row, Sweep, SweepFiles, curve_name, level_text, points, read_sweep
from sparsity.runtime import write_atomic
from sparsity.statistics import mean_and_deviation

# Okabe and Ito's palette: distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
QUIET = "#777777"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks is drawn as boxes
        figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getbuffer())


def plot_sweep(files: SweepFiles) -> None:
    """Accuracy against pruned share, from a sweep's JSON, CSV and NPZ to its PNG."""
    sweep = read_sweep(files)
    header = sweep.header
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for colour, (curve, levels) in zip(_cycle(COLOURS), sweep.curves().items(), strict=False):
        _draw_curve(axes, curve, list(levels.values()), colour)
    dense = float(np.mean([figures["accuracy"] for figures in header["dense"].values()]))
    chance = 100 / len(header["data"]["classes"])
    # The names of the lines stand where a falling curve is not: at the top right and at the bottom left.
    for height, x, side, text in (
        (dense, 100, "right", f"dense {dense:.1f} %"),
        (chance, 0, "left", f"chance {chance:.3g} %"),
    ):
        axes.axhline(height, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.text(x, height + 1, text, color=QUIET, ha=side, va="bottom", fontsize=9)
    for choice in header.get("summary", []):
        if choice["level"] is not None:
            _mark_choice(axes, sweep, choice)
    axes.set(xlabel="pruned weights (%)", ylabel="test accuracy (%)", xlim=(-1, 101), ylim=(0, 104))
    axes.set_xticks(range(0, 101, 10))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    axes.set_title(_literal(header["title"]), fontsize=11)
    save_figure(figure, files.png)


def _draw_curve(axes, curve: tuple[str, str, str], levels: list[list[Row]], colour: str) -> None:
    """Mean accuracy over the checkpoints of each level; the band is the deviation over them, or the interval of one."""
    x = [float(np.mean([row.sparsity for row in rows])) for rows in levels]
    pairs = [mean_and_deviation([row.accuracy for row in rows]) for rows in levels]
    y = [mean for mean, _ in pairs]
    count = max(len(rows) for rows in levels)
    if count > 1:
        low, high = ([mean + sign * np.nan_to_num(sd) for mean, sd in pairs] for sign in (-1, 1))
        band = f"mean of {count} checkpoints and standard deviation"
    else:
        low, high = [rows[0].ci_low for rows in levels], [rows[0].ci_high for rows in levels]
        band = "95 % interval"
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=f"{curve_name(curve)} ({band})")


def _mark_choice(axes, sweep: Sweep, choice: dict) -> None:
    rows = sweep.curves()[(choice["criterion"], choice["allocation"], choice["recover"])][choice["level"]]
    x, y = float(np.mean([row.sparsity for row in rows])), float(np.mean([row.accuracy for row in rows]))
    axes.plot([x], [y], marker="o", markersize=11, markerfacecolor="none", markeredgecolor="black", linestyle="none")
    text = f"{level_text(choice['level'])} % pruned: {y:.1f} %\n(within {points(choice['tolerance'])} of dense)"
    # Below the marker, where a falling curve leaves room.
    side = "left" if x < 25 else "right"
    arrow = {"arrowstyle": "-", "color": "black", "linewidth": 0.8, "shrinkB": 6, "relpos": (0.0, 1.0)}
    if side == "right":
        arrow["relpos"] = (1.0, 1.0)
    axes.annotate(text, (x, y), xytext=(x, 0.5 * y), ha=side, va="top", fontsize=9, arrowprops=arrow)


def plot_training(table: Path, picture: Path, title: str) -> None:
    """Accuracy and loss against epochs, from the CSV of a training."""
    rows = _read_csv(table)
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for column, label, colour in (
        ("training_accuracy", "training accuracy (augmented images)", COLOURS[1]),
        ("test_accuracy", "test accuracy", COLOURS[0]),
    ):
        axes.plot(epochs, [float(row[column]) for row in rows], marker="o", markersize=3.5, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 104))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    right = axes.twinx()
    losses = [float(row["loss"]) for row in rows]
    right.plot(epochs, losses, color=QUIET, linestyle="--", linewidth=1.2, label="training loss (right axis)")
    right.set(ylabel="loss", ylim=(0, None))
    lines = [*axes.get_lines(), *right.get_lines()]
    names = [line.get_label() for line in lines]
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    axes.set_title(_literal(title), fontsize=11)
    save_figure(figure, picture)


def plot_confusion(table: Path, picture: Path, title: str) -> None:
    """A confusion matrix as counts, from a CSV with a column `true class` and one for each predicted class."""
    rows = _read_csv(table)
    names = [_literal(row.pop("true class")) for row in rows]
    counts = np.array([[int(count) for count in row.values()] for row in rows])
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    size = float(np.clip(0.62 * len(names), 6.5, 24))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:  # more would not be legible
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    font = 9 if len(names) <= 20 else 6
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=font)
    axes.set_yticks(range(len(names)), names, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class (images)")
    axes.set_title(_literal(title), fontsize=11)
    save_figure(figure, picture)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _literal(text: str) -> str:
    """Text as it is, where matplotlib would take what stands between dollar signs for a formula."""
    return text.replace("$", r"\$")


def _cycle(values: tuple[str, ...]):
    while True:
        yield from values
