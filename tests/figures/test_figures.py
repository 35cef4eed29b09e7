"""Figures, drawn from the data files alone: the values that they show, and pictures that can be read."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers import LABELS, ink, line_points, made_row, made_sweep

from sparsity.figures import accuracy, heatmaps, savings, training
from sparsity.results.record import HISTORY_COLUMNS, write_confusion
from sparsity.results.rows import write_rows
from sparsity.system.errors import UserError
from sparsity.system.files import write_csv

CHOICE = {"criterion": "l1", "allocation": "uniform", "recover": "none", "level": 40.0, "tolerance": 1.0}
CHOICE |= {"images": 20, "accuracy": 83.21, "dense": 85.04, "verdict": "not shown", "shown_level": None}
WIDE = {"stem": 200, "down": 800}


@pytest.fixture
def panels(monkeypatch):
    """Have the heat maps return their panels instead of drawing them."""
    monkeypatch.setattr(heatmaps, "_plot", lambda sweep, path, about, panels, **more: panels)


def saved(sweep):
    """The files of a sweep that is on disk."""
    sweep.record("title", "a title")
    sweep._write_predictions()
    sweep._write_rows()
    return sweep.files


def layer_rows(names, levels):
    return [made_row(level, curve=("l1", f"only {name}", "none")) for name in names for level in levels]


def test_a_sweep_is_drawn_from_its_files_the_same_each_time(files):
    rows = [made_row(level, name) for name in ("one.pth", "two.pth") for level in (0.0, 40.0, 100.0)]
    sweep = made_sweep(files, rows, summary=[CHOICE])
    written = accuracy.plot_all(saved(sweep))
    parts = ("", "_tradeoff", "_classes", "_layers", "_savings")
    assert [path.name for path in written] == [f"net_pruning{part}.png" for part in parts]
    for path in written:
        width, height, share = ink(path)
        assert width >= 800 and height >= 500 and share > 0.02
    first = files.png.read_bytes()
    accuracy.plot_sweep(sweep)
    assert files.png.read_bytes() == first


@pytest.mark.parametrize(
    "rows",
    [
        [made_row(0.0), made_row(40.0, "two.pth")],  # no level that both checkpoints have
        [replace(made_row(100.0), compression=math.inf, macs_ratio=math.inf)],  # an empty network
    ],
)
def test_a_sweep_with_nothing_to_show_is_drawn_and_its_long_title_stays_in_the_picture(files, rows):
    sweep = made_sweep(files, rows, title="$x_{" + "long " * 60 + "w" * 300)
    for plot in (accuracy.plot_sweep, savings.plot_tradeoff, heatmaps.plot_classes, savings.plot_savings):
        assert ink(plot(sweep))[2] > 0.003


@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_networks_that_are_all_equally_good_are_drawn_without_a_warning(files, percent):
    sweep = made_sweep(files, [replace(made_row(level), accuracy=percent) for level in (0.0, 40.0)])
    sweep.header["dense"]["one.pth"]["accuracy"] = percent
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ink(accuracy.plot_sweep(sweep))[2] > 0.003
        assert ink(savings.plot_tradeoff(sweep))[2] > 0.003


def test_networks_with_next_to_no_weights_have_no_ratio_to_draw(files, figures):
    ratios = [(0.0, 1, 1), (50.0, 2, 3), (90.0, 1000, 9), (99.0, 1001, 999), (100.0, math.inf, math.inf)]
    rows = [replace(made_row(level), compression=weights, macs_ratio=macs) for level, weights, macs in ratios]
    savings.plot_tradeoff(made_sweep(files, rows))
    found = [[x for x, _ in line_points(axes.get_lines()[0])] for axes in figures[0].axes]
    assert found == [[1, 2, 1000], [1, 3, 9]]
    points = [savings.Point(*pair, "a") for pair in ((1, 10), (2, 30), (2, 20), (3, 30), (4, 29), (5, 50), (1, 10))]
    assert [point[:2] for point in savings.pareto(points)] == [(1, 10), (2, 30), (5, 50)] and savings.pareto([]) == []


def test_savings_in_words_are_those_of_the_rows_and_nothing_is_said_where_nothing_was_measured(files):
    rows = [replace(made_row(level), speedup=speed) for level, speed in ((0.0, 0.9), (50.0, 1.0), (90.0, 1.2))]
    (masks,) = savings.savings_lines(made_sweep(files, rows))
    assert "l1 uniform: 1.00x the throughput of dense (0.90x to 1.20x over the levels)" in masks
    rows[-1] = replace(rows[-1], notes="sparse arithmetic in 20 of 20 convolutions", macs_ratio=3.0)
    filters = replace(made_row(50.0, curve=("filter_l1", "uniform", "none")), speedup=1.5)
    empty = replace(filters, level=100.0, speedup=9.0, macs_ratio=math.inf)
    entry = {"file": "net.npz", "bytes": 12_345, "precision": "fp16", "bits_a_weight": 4.0, "entropy_and_values": 3.9}
    entry |= {"reporting_accuracy": 71.5, "reporting_images": 1234}
    exports = {rows[0].key: entry, rows[2].key: entry | {"file": "net.pth"}}
    sweep, curve = made_sweep(files, [*rows, filters, empty], exports=exports), rows[0].curve
    assert len(savings.savings_lines(sweep)) == 3  # files of earlier commands
    thin, masks, sparse, file, dense = savings.savings_lines(sweep, {(curve, row.level) for row in rows[::2]})
    size = "12,345 bytes (fp16), 71.50 % on the 1,234 images for reporting, 4.00 bits a prunable weight"
    assert file == f"l1 uniform at 0 %, net.npz: {size} (mask entropy and raw values: 3.90)"
    assert dense == f"l1 uniform at 90 %, net.pth: {size}"
    assert "0.95x the throughput of dense (0.90x to 1.00x over the levels)" in masks
    assert sparse.endswith("throughput with sparse kernels against dense, 90 %: 1.20x for 3.00x fewer multiply-adds")
    assert thin.endswith("against dense, 50 %: 1.50x for 1.00x fewer multiply-adds, 100 %: 9.00x with no multiply-adds")
    unmeasured = made_sweep(files, [replace(made_row(0.0), file_bytes=None, latency_ms=None, speedup=None)])
    picture = files.with_suffix("_savings.png")
    picture.write_bytes(b"of rows that were measured again")
    assert savings.savings_lines(unmeasured) == [] and savings.plot_savings(unmeasured) is None
    assert not picture.exists()


def test_recovered_networks_have_the_costs_of_those_with_the_same_masks_and_dense_its_own(files, figures):
    measured = [replace(made_row(x), latency_ms=x, file_bytes=None) for x in (50.0, 60.0)]
    recovered = [
        replace(made_row(x, curve=("l1", "uniform", "batchnorm")), latency_ms=None, file_bytes=None) for x in (50, 60)
    ]
    dense = {"one.pth": {"accuracy": 100.0, "macs": 8_000_000, "latency_ms": 70.0, "parameters": 1000}}
    for schedule, expected in (("oneshot", [50, 60]), ("iterative 50,60", [])):
        header = {"dense": dense, "settings": {"schedule": schedule}}
        savings.plot_savings(made_sweep(files, [*measured, *recovered], **header))
        lines = {line.get_label(): line for line in figures[-1].axes[0].get_lines()}
        assert [x for x, _ in line_points(lines["l1 uniform + batchnorm"])] == expected
        assert line_points(lines["dense"]) == [[70, 100]]


def test_classes_at_many_levels_are_drawn_at_as_many_as_are_legible(files, panels):
    sweep = made_sweep(files, [made_row(float(level)) for level in range(21)])
    (panel,) = heatmaps.plot_classes(sweep)
    assert panel.levels == list(range(0, 21, 2)) and panel.values.shape == (4, heatmaps.MOST_LEVELS)


def control(name, accuracy, **columns):
    row = made_row(0.0, f"{name}.pth", ("dense", name, "none"), notes="cifar10, epochs 8")
    return replace(row, accuracy=accuracy, **columns)


def test_controls_stand_beside_the_curves_in_every_panel_that_was_measured(files, figures):
    rows = [replace(made_row(level), latency_ms=None) for level in (0.0, 40.0)]
    write_rows(files.controls, [control("resnet18", 90.0, macs_ratio=4.0, file_bytes=5_000_000, latency_ms=None)])
    savings.plot_savings(made_sweep(files, rows))
    sizes, macs = figures[0].axes  # no latency
    for axes, cost, x in ((sizes, 1e-6, 5), (macs, 8, 2)):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert [x for x, _ in line_points(lines["l1 uniform"])] == [cost, cost]
        assert line_points(lines["dense networks (controls)"]) == [[x, 90]]
        assert min(lines["Pareto front"].get_xdata()) == min(cost, x)
        assert "resnet18" in [text.get_text() for text in axes.texts]
    assert line_points({line.get_label(): line for line in macs.get_lines()}["dense"]) == [[8, 100]]
    assert "Controls (resnet18): cifar10, epochs 8." in figures[0].legends[0].get_title().get_text()


def test_the_cheapest_network_may_lose_the_tolerance_itself_and_level_0_is_dense(files, figures):
    third = 202 / 3  # dense in full, rows with six digits
    for lost, winner in ((1, "l1 uniform at 40 %"), (1.001, "dense")):
        rows = [
            replace(made_row(0.0), accuracy=round(third, 6), latency_ms=1.0, macs_ratio=1, compression=1),
            replace(made_row(40.0), accuracy=round(third - lost, 6), latency_ms=0.5, macs_ratio=2, compression=2),
        ]
        dense = {"one.pth": {"accuracy": third, "latency_ms": 2.0, "macs": 8_000_000, "parameters": 1000}}
        sweep = made_sweep(files, rows, dense=dense)
        savings.plot_savings(sweep)
        told = figures[-1].get_suptitle().replace("\u00a0", " ").replace("\n", " ")
        assert f"{winner} (smallest file, lowest latency, fewest multiply-adds)" in told
        savings.plot_tradeoff(sweep)
        assert ("2x fewer parameters" in figures[-1].get_suptitle().replace("\u00a0", " ")) == (lost == 1)


def test_names_of_controls_stay_in_the_picture_and_a_damaged_table_of_them_is_told(files):
    sweep = made_sweep(files, [made_row(0.0), made_row(40.0)])
    write_rows(files.controls, [control(f"{size} and its long name", 50.0, file_bytes=size) for size in (1, 10**7)])
    width, height, _ = ink(savings.plot_savings(sweep))
    assert width > height >= 600
    files.controls.write_text("checkpoint,accuracy\na,1\n")
    with pytest.raises(UserError, match=r"net_pruning_controls.csv cannot be read"):
        savings.plot_savings(sweep)


def test_the_change_of_a_class_is_its_accuracy_minus_that_of_dense(files, panels):
    sweep = made_sweep(files, [made_row(level, name) for level in (0.0, 40.0) for name in ("one.pth", "two.pth")])
    sweep.dense["two.pth"] = np.full(40, 3)
    (panel,) = heatmaps.plot_classes(sweep)
    assert (panel.names, panel.levels) == (list("abcd"), [0, 40])
    # At 0 % everything is right, at 40 % nothing, which is no change where the dense network is wrong.
    assert panel.values.T.tolist() == [[50, 50, 50, 0], [-50, -50, -50, -100]]


def test_curves_of_the_same_masks_share_a_panel_of_zeros(files, panels):
    rows = [made_row(level, curve=("l1", "global", how)) for level in (0.0, 50.0) for how in ("none", "batchnorm")]
    sweep = made_sweep(files, rows, WIDE)
    sweep.zeros = {row.key: np.array([2, 8]) * int(row.level) for row in rows}
    (panel,) = heatmaps.plot_layers(sweep)
    assert (panel.title, panel.names, panel.values.tolist()) == ("l1 global", list(WIDE), [[0, 50], [0, 50]])
    sweep.header["settings"]["schedule"] = "iterative 0,50"  # a recovery decides on the masks of the next level
    assert [panel.title for panel in heatmaps.plot_layers(sweep)] == ["l1 global + batchnorm", "l1 global"]


def test_sensitivity_has_the_layers_in_the_order_of_the_network_and_gaps(files, panels):
    rows = [replace(row, accuracy=100 - row.level) for row in layer_rows("zm", (50.0, 90.0))]
    sweep = made_sweep(files, [rows[2], rows[0], rows[1]], {"z": 100, "a": 100, "m": 100})
    (panel,) = heatmaps.plot_sensitivity(saved(sweep))
    assert (panel.title, panel.names, panel.levels) == ("l1", ["z", "m"], [50.0, 90.0])
    assert np.array_equal(panel.values, [[-50, -90], [-50, math.nan]], equal_nan=True)


def test_the_sensitivity_of_many_layers_is_tall_enough_to_read_and_no_change_is_white(files, figures):
    layers = {f"layer{index}.conv": 100 for index in range(53)}
    heatmaps.plot_sensitivity(saved(made_sweep(files, layer_rows(layers, (40.0,)), layers)))
    assert figures[0].get_figheight() > 53 / 10
    assert figures[0].axes[0].images[0].get_clim() == (-100, 100)


@pytest.mark.parametrize("classes", [1, 10, 30])
def test_any_number_of_classes_and_a_training_of_one_epoch(files, tmp_path, classes):
    names = [f"$class_{{{index}" for index in range(classes)]  # which matplotlib would take for a broken formula
    sweep = made_sweep(files, [made_row(0.0), made_row(40.0)], data={"classes": names})
    sweep.labels = np.where(classes > LABELS, LABELS, 0)  # classes without images have no accuracy to change
    width, height, _ = ink(heatmaps.plot_classes(sweep))
    assert min(width, height) >= 500 and height > 10 * classes
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    write_confusion(table, names, sweep.labels, np.zeros(40, dtype=np.int64))
    training.plot_confusion(table, picture, "title")
    assert min(ink(picture)[:2]) >= 800
    write_csv(table, HISTORY_COLUMNS, [dict.fromkeys(HISTORY_COLUMNS, 30) | {"epoch": 1}])
    training.plot_training(table, picture, "title")
    assert ink(picture)[2] > 0.02


def test_panels_have_the_width_that_is_legible_and_of_many_the_first_are_drawn_which_the_title_says(files, figures):
    for curves in (1, 4, 10, 14):
        names = [(f"criterion{index}", "uniform", "none") for index in range(curves)]
        rows = [made_row(float(level), curve=curve) for curve in names for level in range(21)]
        heatmaps.plot_layers(made_sweep(files, rows))
        assert len([axes for axes in figures[-1].axes if axes.get_title()]) == min(curves, 12)
        assert figures[-1].get_figwidth() == heatmaps.WIDTH and figures[-1].get_figheight() < 30
    assert figures[-1].get_suptitle().endswith("(the first 12 of 14 panels)")
