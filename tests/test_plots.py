"""Pictures come from the data files alone, and are large enough to read."""

import numpy as np
import pytest
from PIL import Image
from test_report import CURVE, LABELS, header, predictions, row

from sparsity import plots
from sparsity.report import SweepFiles, open_sweep, write_csv


def ink(path):
    """Width and height of a picture, and the share of its pixels that are not white."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.shape[1], pixels.shape[0], float((pixels < 250).any(axis=2).mean())


def finished_sweep(tmp_path, checkpoints, level=40.0):
    files = SweepFiles(tmp_path / "net_pruning")
    head = header() | {"title": "a title"}
    head["checkpoints"] = {name: {"sha256": name} for name in checkpoints}
    sweep = open_sweep(files, head, LABELS, restart=False)
    for name in checkpoints:
        sweep.add_dense(name, LABELS, {"accuracy": 90.0, "loss": 0.1})
        for each in (0.0, 40.0, 100.0):
            sweep.add(row(each, name), predictions(each))
    entry = dict(zip(("criterion", "allocation", "recover"), CURVE, strict=True)) | {"level": level, "tolerance": 1.0}
    sweep.finish([entry])
    return files


@pytest.mark.parametrize("checkpoints", [["one.pth"], ["one.pth", "two.pth"]])
def test_a_sweep_is_drawn_from_its_files(tmp_path, checkpoints):
    files = finished_sweep(tmp_path, checkpoints)
    plots.plot_sweep(files)
    width, height, share = ink(files.png)
    assert width >= 800
    assert height >= 500
    assert share > 0.02
    first = files.png.read_bytes()
    plots.plot_sweep(files)
    assert files.png.read_bytes() == first


def test_a_sweep_in_which_nothing_is_within_tolerance_is_drawn_without_a_mark(tmp_path):
    files = finished_sweep(tmp_path, ["one.pth"])
    plots.plot_sweep(files)
    marked = files.png.read_bytes()
    files = (
        finished_sweep(tmp_path / "other", ["one.pth"], level=None) if (tmp_path / "other").mkdir() is None else None
    )
    plots.plot_sweep(files)
    assert ink(files.png)[2] > 0.02
    assert files.png.read_bytes() != marked


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_a_confusion_matrix_of_any_size(tmp_path, classes):
    names = [f"$class_{{{index}" for index in range(classes)]  # what matplotlib would take for a broken formula
    rows = [{"true class": name} | {other: int(other == name) for other in names} for name in names]
    write_csv(tmp_path / "confusion.csv", ("true class", *names), rows)
    plots.plot_confusion(tmp_path / "confusion.csv", tmp_path / "confusion.png", "title")
    width, height, share = ink(tmp_path / "confusion.png")
    assert min(width, height) >= 800
    assert share > 0.02


def test_a_training_of_one_epoch_is_drawn(tmp_path):
    columns = ("epoch", "loss", "training_accuracy", "test_accuracy")
    write_csv(tmp_path / "training.csv", columns, [dict(zip(columns, (1, 2.0, 30.0, 40.0), strict=True))])
    plots.plot_training(tmp_path / "training.csv", tmp_path / "training.png", "title")
    assert ink(tmp_path / "training.png")[2] > 0.02
