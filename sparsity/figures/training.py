"""Figures of a training: its curve over epochs and its confusion matrix, drawn from their CSV files."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsity.figures import style
from sparsity.system.files import read_csv


def plot_training(table: Path, picture: Path, title: str) -> None:
    """Accuracy and loss against epochs, from the CSV of a training; lines mark where the size of the images changes."""
    rows = read_csv(table)
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    labels = {"training_accuracy": "training accuracy (augmented images)", "test_accuracy": "test accuracy"}
    for (column, label), colour in zip(labels.items(), (style.COLOURS[1], style.COLOURS[0]), strict=True):
        axes.plot(epochs, [float(row[column]) for row in rows], marker="o", markersize=3.5, color=colour, label=label)
    axes.set(xlabel="epoch", ylabel="accuracy (%)")
    style.scale_accuracy(axes, high=max(float(row[column]) for row in rows for column in labels))
    mark_sizes(axes, epochs, [row["image_size"] for row in rows])
    axes.set_xticks([tick for tick in style.inner_ticks(epochs[0], epochs[-1]) if tick.is_integer()])
    right = axes.twinx()
    losses = [float(row["loss"]) for row in rows]
    right.plot(epochs, losses, color=style.QUIET, linestyle="--", linewidth=1.2, label="training loss (right axis)")
    right.set(ylabel="loss", ylim=(0, None))
    style.name_lines(figure)
    last = f"{float(rows[-1]['test_accuracy']):.2f} % test accuracy after {epochs[-1]} epochs"
    style.save_figure(figure, picture, last, title)


def mark_sizes(axes: Axes, epochs: list[int], sizes: list[str]) -> None:
    """Draw a line before the first epoch at each size of the training images, with the size, if there are several."""
    changes = [index for index, size in enumerate(sizes) if index == 0 or size != sizes[index - 1]]
    for index in changes if len(changes) > 1 else ():
        place = epochs[index] - 0.5
        axes.axvline(place, color=style.QUIET, linewidth=0.6, linestyle=":")
        text = f" {sizes[index]} px"
        axes.text(place, 0.02, text, transform=axes.get_xaxis_transform(), color=style.QUIET, fontsize=8)


def plot_confusion(table: Path, picture: Path, title: str) -> None:
    """A confusion matrix as counts, from a CSV with a column `true class` and one for each predicted class."""
    rows = read_csv(table)
    names = [style.literal(row.pop("true class")) for row in rows]
    counts = np.array([[int(count) for count in row.values()] for row in rows])
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    size = float(np.clip(0.62 * len(names), 6.5, 24))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    legible = len(names) <= 20
    for (row, column), count in np.ndenumerate(counts) if legible else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    font = 9 if legible else 6
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=font)
    axes.set_yticks(range(len(names)), names, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class (images)")
    accuracy = 100 * np.trace(counts) / counts.sum()
    style.save_figure(figure, picture, f"{accuracy:.2f} % test accuracy", title)
