"""CSV files of a training: its curve over epochs and its confusion matrix."""

from pathlib import Path
from typing import Any

import numpy as np

from sparsity.system.files import write_csv

HISTORY_COLUMNS = ("epoch", "learning_rate", "loss", "training_accuracy", "test_loss", "test_accuracy", "seconds")
HISTORY_COLUMNS += ("image_size",)  # side in pixels of the training images


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write a training's rows of HISTORY_COLUMNS, one an epoch; accuracies in percent, `loss` that of training."""
    write_csv(path, HISTORY_COLUMNS, history)


def write_confusion(path: Path, classes: list[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    """Write the counts of images, a row for each true class and a column for each predicted one.

    `labels` and `predictions` are class numbers [N], those of the same images.
    """
    columns = ("true class", *classes)
    counts = np.bincount(labels * len(classes) + predictions, minlength=len(classes) ** 2).reshape(len(classes), -1)
    lines = zip(classes, counts.tolist(), strict=True)
    write_csv(path, columns, (dict(zip(columns, (name, *line), strict=True)) for name, line in lines))
