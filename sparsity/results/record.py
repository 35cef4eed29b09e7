"""CSV files of a training: its curve over epochs and its confusion matrix."""

from pathlib import Path

import numpy as np

from sparsity.system.files import write_csv

# Of a training, one row per epoch; accuracies are in percent, `loss` is that of training.
HISTORY_COLUMNS = ("epoch", "learning_rate", "loss", "training_accuracy", "test_loss", "test_accuracy", "seconds")
HISTORY_COLUMNS += ("image_size",)  # side in pixels of the training images


def write_confusion(path: Path, classes: list[str], labels: np.ndarray, predictions: np.ndarray) -> None:
    """Write the counts of images, a row for each true class and a column for each predicted one.

    `labels` and `predictions` are class numbers [N], those of the same images.
    """
    columns = ("true class", *classes)
    counts = np.bincount(labels * len(classes) + predictions, minlength=len(classes) ** 2).reshape(len(classes), -1)
    lines = zip(classes, counts.tolist(), strict=True)
    write_csv(path, columns, (dict(zip(columns, (name, *line), strict=True)) for name, line in lines))
