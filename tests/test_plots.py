"""Pictures come from the data files alone, and are large enough to read."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_report import CURVE, LABELS, LAYERS, ZEROS, add, begin, header, row

from sparsity.figures import accuracy, heatmaps, style, training
from sparsity.results.files import SweepFiles
from sparsity.results.rows import Row, accuracy_columns, comparison_columns
from sparsity.results.store import open_sweep, read_sweep
from sparsity.system.errors import UserError
from sparsity.system.files import write_csv


def ink(path):
    """Width and height of a picture, and the share of its pixels that are not white."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.shape[1], pixels.shape[0], float((pixels < 250).any(axis=2).mean())


def edges_are_white(path):
    """Nothing runs out of the picture."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return all((edge >= 250).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def title_header(title="a title", checkpoints=("one.pth",), **changes):
    head = header() | {"title": title} | changes
    head["checkpoints"] = {name: {"sha256": name} for name in checkpoints}
    return head


def finished_sweep(tmp_path, checkpoints, level=40.0):
    files = SweepFiles(tmp_path / "net_pruning")
    sweep = begin(files, title_header(checkpoints=checkpoints), checkpoints=checkpoints)
    for name in checkpoints:
        add(sweep, *(row(each, name) for each in (0.0, 40.0, 100.0)))
    entry = dict(zip(("criterion", "allocation", "recover"), CURVE, strict=True)) | {"level": level, "tolerance": 1.0}
    sweep.finish([entry])
    return files


@pytest.mark.parametrize("checkpoints", [["one.pth"], ["one.pth", "two.pth"]])
def test_a_sweep_is_drawn_from_its_files(tmp_path, checkpoints):
    files = finished_sweep(tmp_path, checkpoints)
    written = accuracy.plot_all(files)
    assert [path.name for path in written] == [f"net_pruning{part}.png" for part in ("", *NAMES)]
    for path in written:
        width, height, share = ink(path)
        assert width >= 800
        assert height >= 500
        assert share > 0.02
        assert edges_are_white(path)
    first = [path.read_bytes() for path in written]
    accuracy.plot_all(files)
    assert [path.read_bytes() for path in written] == first


NAMES = ("_tradeoff", "_classes", "_layers", "_savings")


def test_a_sweep_in_which_nothing_is_within_tolerance_is_drawn_without_a_mark(tmp_path):
    files = finished_sweep(tmp_path, ["one.pth"])
    accuracy.plot_sweep(files)
    marked = files.png.read_bytes()
    (tmp_path / "other").mkdir()
    files = finished_sweep(tmp_path / "other", ["one.pth"], level=None)
    accuracy.plot_sweep(files)
    assert ink(files.png)[2] > 0.02
    assert files.png.read_bytes() != marked


def test_a_title_stays_in_the_picture(files):
    add(begin(files, title_header("$x_{" + "long " * 60 + "w" * 300)), row(0.0), row(40.0))
    for path in accuracy.plot_all(files):
        assert edges_are_white(path)


def many_curves(count):
    recoveries = ("none", "batchnorm", "reconstruction", "finetune")
    return [(f"criterion{index // 4}", "uniform", recoveries[index % 4]) for index in range(count)]


@pytest.mark.parametrize("count", [10, 30])
def test_many_curves_are_named_without_running_out_of_the_picture(files, count):
    sweep = begin(files, title_header())
    add(sweep, *(row(level, curve=curve) for curve in many_curves(count) for level in (0.0, 40.0)))
    accuracy.plot_sweep(files)
    assert edges_are_white(files.png)
    assert ink(files.png)[0] > 1200


def test_curves_of_one_criterion_and_allocation_share_a_colour_and_differ_in_their_lines():
    curves = many_curves(44)
    styles = style.curve_styles(curves)
    for curve in curves:
        for other in curves:
            same = (
                styles[curve]["color"] == styles[other]["color"] and styles[curve]["marker"] == styles[other]["marker"]
            )
            assert same == (curve[:2] == other[:2])
    assert len({tuple(map(str, style.values())) for style in styles.values()}) == len(curves)


def test_a_leader_goes_to_where_the_curve_falls():
    def levels(*pairs):
        made = [(level, dataclasses.replace(row(level), sparsity=level, accuracy=value)) for level, value in pairs]
        return {level: [each] for level, each in made}

    assert accuracy._crossing(levels((0.0, 90.0), (40.0, 80.0), (60.0, 20.0), (80.0, 10.0)), 50) == (50, 50)
    assert accuracy._crossing(levels((60.0, 40.0), (80.0, 10.0)), 50) == (60, 40)
    assert accuracy._crossing(levels((60.0, 80.0), (80.0, 70.0)), 50) == (80, 70)
    assert accuracy._crossing(levels((60.0, 80.0)), 50) == (60, 80)


def test_levels_without_a_finite_ratio_are_left_out(files):
    sweep = begin(files, title_header())
    ratios = {0.0: (1.0, 1.0), 50.0: (2.0, 3.0), 99.0: (1001.0, 999.0), 100.0: (float("inf"), float("inf"))}
    for level, (compression, macs) in ratios.items():
        add(sweep, dataclasses.replace(row(level), compression=compression, macs_ratio=macs))
    accuracy.plot_tradeoff(files)
    axes = Figure().subplots()
    levels = read_sweep(files).curves()[CURVE]
    look = style.curve_styles([CURVE])[CURVE]
    assert accuracy._draw_ratio(axes, levels, look, "compression", CURVE) == 2
    assert accuracy._draw_ratio(axes, levels, look, "macs_ratio", CURVE) == 999
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 3]


def test_a_sweep_of_nothing_but_an_empty_network_is_drawn(files):
    empty = dataclasses.replace(row(100.0), compression=float("inf"), macs_ratio=float("inf"))
    add(begin(files, title_header()), empty)
    for path in accuracy.plot_all(files):
        assert ink(path)[2] > 0.01


def test_checkpoints_without_a_level_in_common_are_drawn_without_a_curve(files):
    names = ("one.pth", "two.pth")
    add(begin(files, title_header(checkpoints=names), checkpoints=names), row(0.0), row(40.0, "two.pth"))
    for path in accuracy.plot_all(files):
        assert ink(path)[2] > 0.003


@pytest.mark.parametrize("classes", [1, 10, 100])
def test_any_number_of_classes(files, classes):
    head = title_header(data={"classes": [f"$class_{{{index}" for index in range(classes)]})
    labels = np.arange(200) % classes
    labels[labels == 7] = 6  # a class without images has no accuracy to change
    sweep = open_sweep(files, head, labels, LAYERS, restart=False)
    sweep.add_dense("one.pth", labels, {"accuracy": 100.0, "loss": 0.1})
    columns = accuracy_columns(200, 200) | comparison_columns(labels == labels, labels == labels)
    for level in (0.0, 40.0):
        sweep.add(dataclasses.replace(row(level), **columns), labels, ZEROS)
    heatmaps.plot_classes(files)
    width, height, _ = ink(files.with_suffix("_classes.png"))
    assert min(width, height) >= 500
    assert edges_are_white(files.with_suffix("_classes.png"))
    assert height > 10 * classes


def layer_row(name, level, layers):
    """A row in which one layer alone is pruned, and what is zero in it."""
    zeros = {layer: round(weights * level / 100) if layer == name else 0 for layer, weights in layers.items()}
    share = round(100 * sum(zeros.values()) / sum(layers.values()), 6)
    made: Row = row(level, curve=("l1", f"only {name}", "none"))
    return dataclasses.replace(made, sparsity=share), zeros


def sensitivity(files, layers, levels=(50.0, 80.0, 90.0)):
    sweep = open_sweep(files, title_header(), LABELS, layers, restart=False)
    sweep.add_dense("one.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    for name in layers:
        for level in levels:
            made, zeros = layer_row(name, level, layers)
            sweep.add(made, (LABELS + int(level) % 3) % 4, zeros)
    return sweep


def test_the_sensitivity_of_many_layers_is_tall_enough_to_read(files):
    sensitivity(files, {f"layer{index}.conv": 100 for index in range(53)}, (50.0,))
    heatmaps.plot_sensitivity(files)
    _, height, share = ink(files.png)
    assert height > 53 * 15
    assert share > 0.1
    assert edges_are_white(files.png)


def test_sensitivity_has_the_layers_in_the_order_of_the_network(files):
    layers = {"z": 100, "a": 100, "m": 100}
    sweep = sensitivity(files, layers, (50.0, 90.0))
    found = {"m": {50.0: -1.0}, "z": {50.0: -2.0, 90.0: -3.0}}
    panel = heatmaps._sensitivity_panel(sweep, ("l1", "none"), found)
    assert (panel.names, panel.levels) == (["z", "m"], [50.0, 90.0])
    assert np.array_equal(panel.values, [[-2, -3], [-1, np.nan]], equal_nan=True)


def test_a_sweep_of_whole_networks_has_no_sensitivity(files):
    add(begin(files, title_header()), row(0.0))
    with pytest.raises(UserError, match="no rows in which one layer alone"):
        heatmaps.plot_sensitivity(files)


@pytest.mark.parametrize(("panels", "numbers"), [(1, True), (4, True), (10, True), (12, False)])
def test_panels_are_laid_out_like_a_page(panels, numbers):
    made = [heatmaps.Panel("t", list("abcdefghij"), list(range(21)), np.zeros((10, 21)))] * panels
    grid = heatmaps._grid(made, numbers)
    assert (grid.rows - 1) * grid.columns < panels <= grid.rows * grid.columns
    assert 0.4 < grid.size[0] / grid.size[1] < 4
    assert max(grid.size) < 40


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_a_confusion_matrix_of_any_size(tmp_path, classes):
    names = [f"$class_{{{index}" for index in range(classes)]  # what matplotlib would take for a broken formula
    rows = [{"true class": name} | {other: int(other == name) for other in names} for name in names]
    write_csv(tmp_path / "confusion.csv", ("true class", *names), rows)
    training.plot_confusion(tmp_path / "confusion.csv", tmp_path / "confusion.png", "title")
    width, height, share = ink(tmp_path / "confusion.png")
    assert min(width, height) >= 800
    assert share > 0.02


def test_a_training_of_one_epoch_is_drawn(tmp_path):
    columns = ("epoch", "loss", "training_accuracy", "test_accuracy")
    write_csv(tmp_path / "training.csv", columns, [dict(zip(columns, (1, 2.0, 30.0, 40.0), strict=True))])
    training.plot_training(tmp_path / "training.csv", tmp_path / "training.png", "title")
    assert ink(tmp_path / "training.png")[2] > 0.02
