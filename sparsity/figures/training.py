"""training"""

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sparsity.figures.style import COLOURS, QUIET, literal, save_figure, set_title


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
    axes.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 106))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    right = axes.twinx()
    losses = [float(row["loss"]) for row in rows]
    right.plot(epochs, losses, color=QUIET, linestyle="--", linewidth=1.2, label="training loss (right axis)")
    right.set(ylabel="loss", ylim=(0, None))
    lines = [*axes.get_lines(), *right.get_lines()]
    names = [line.get_label() for line in lines]
    figure.legend(lines, names, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    set_title(figure, title)
    save_figure(figure, picture)


def plot_confusion(table: Path, picture: Path, title: str) -> None:
    """A confusion matrix as counts, from a CSV with a column `true class` and one for each predicted class."""
    rows = _read_csv(table)
    names = [literal(row.pop("true class")) for row in rows]
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
    set_title(figure, title)
    save_figure(figure, picture)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
