"""A sweep's files: rows with their predictions, kept through kills, never mixed with those of another run."""

import json

import numpy as np
import pytest

from sparsity.results.rows import COLUMNS, Row, accuracy_columns, comparison_columns, level_text
from sparsity.results.statistics import mcnemar_p
from sparsity.results.store import open_sweep, read_sweep
from sparsity.system.errors import UserError

CURVE = ("l1", "uniform", "none")
LABELS = np.arange(40) % 4
LAYERS = {"stem": 200, "down": 800}
ZEROS = {"stem": 21, "down": 84}


def header(**changes):
    settings = {"precision": "fp32", "batch_size": 32} | changes
    return {
        "settings": settings,
        "data": {"classes": list("abcd"), "test_sha256": "data"},
        "checkpoints": {"one.pth": {"sha256": "1"}},
    }


def row(level, checkpoint="one.pth", curve=CURVE, notes=""):
    """A row beside a dense network that gets everything right."""
    right = predictions(level) == LABELS
    values = dict.fromkeys(COLUMNS[5:], 1) | {"sparsity": 10.5, "notes": notes}
    values |= accuracy_columns(int(right.sum()), len(LABELS)) | comparison_columns(right, np.ones(40, dtype=bool))
    return Row(checkpoint, *curve, level=level, **values)


def predictions(level):
    return (LABELS + int(level) % 3) % 4


def begin(files, head=None, labels=LABELS, restart=False, checkpoints=("one.pth",)):
    """A sweep with its dense networks."""
    sweep = open_sweep(files, head or header(), labels, LAYERS, restart)
    for name in checkpoints:
        sweep.add_dense(name, LABELS, {"accuracy": 100.0, "loss": 0.1})
    return sweep


def add(sweep, *rows):
    for each in rows:
        sweep.add(each, predictions(each.level), ZEROS)


def fill(files, levels=(0.0, 40.0), **changes):
    sweep = begin(files, header(**changes))
    add(sweep, *map(row, levels))
    return sweep


def contents(files):
    """Every byte beside a sweep's stem."""
    return {path: path.read_bytes() for path in files.stem.parent.iterdir()}


def test_columns_are_those_that_people_rely_on():
    assert ",".join(COLUMNS) == (
        "checkpoint,criterion,allocation,recover,level,sparsity,nonzero,parameters,compression,macs_ratio,"
        "accuracy,ci_low,ci_high,loss,agreement,seconds,lost,gained,mcnemar_p,notes,"
        "file_bytes,latency_ms,throughput,peak_memory_mb,speedup"
    )


def test_rows_come_back_with_their_predictions(files):
    fill(files)
    found = read_sweep(files)
    assert found.table() == [row(0.0), row(40.0)]
    assert np.array_equal(found.predictions[row(40.0).key], predictions(40))
    assert found.predictions[row(40.0).key].dtype == np.uint8
    assert np.array_equal(found.dense["one.pth"], LABELS)
    assert np.array_equal(found.correct(row(40.0)), predictions(40) == LABELS)
    assert found.layers == LAYERS
    assert found.zeros[row(40.0).key].tolist() == [21, 84]
    assert found.zeros[row(40.0).key].dtype == np.int64


def test_the_settings_are_on_disk_before_the_first_row(files):
    open_sweep(files, header(), LABELS, LAYERS, restart=False)
    assert json.loads(files.json.read_text())["settings"]["precision"] == "fp32"
    assert not files.csv.exists()


def test_added_levels_go_to_their_place(files):
    fill(files, (0.0, 100.0))
    again = open_sweep(files, header(), LABELS, LAYERS, restart=False)
    assert set(again.dense) == {"one.pth"}
    add(again, row(50.0), row(9.0))
    assert again.has("one.pth", CURVE, 9.0)
    assert not again.has("one.pth", CURVE, 10.0)
    found = read_sweep(files)
    assert [each.level for each in found.table()] == [0, 9, 50, 100]
    assert np.array_equal(found.predictions[row(9.0).key], predictions(9))


def test_another_checkpoint_may_be_added_but_none_replaced(files):
    fill(files)
    both = header()
    both["checkpoints"] = both["checkpoints"] | {"two.pth": {"sha256": "2"}}
    add(begin(files, both, checkpoints=("two.pth",)), row(0.0, "two.pth"))
    assert [each.checkpoint for each in read_sweep(files).table()] == ["one.pth", "one.pth", "two.pth"]
    with pytest.raises(UserError, match="checkpoint"):
        open_sweep(files, header(), LABELS, LAYERS, restart=False)
    changed = header()
    changed["checkpoints"] = {"one.pth": {"sha256": "other"}, "two.pth": {"sha256": "2"}}
    with pytest.raises(UserError, match=r"one.pth has changed"):
        open_sweep(files, changed, LABELS, LAYERS, restart=False)


def test_other_settings_are_named_and_nothing_is_touched(files):
    fill(files)
    before = contents(files)
    with pytest.raises(UserError, match=r"precision \(fp32 there, bf16 now\).*--restart.*--name"):
        open_sweep(files, header(precision="bf16"), LABELS, LAYERS, restart=False)
    assert contents(files) == before


def test_restart_begins_anew(files):
    fill(files)
    sweep = begin(files, header(precision="bf16"), restart=True)
    assert not sweep.rows
    assert not files.csv.exists()
    add(sweep, row(5.0))
    assert [each.level for each in read_sweep(files).table()] == [5]


def test_settings_without_rows_stand_in_nobodys_way(files):
    open_sweep(files, header(), LABELS, LAYERS, restart=False)
    sweep = open_sweep(files, header(precision="bf16"), LABELS, LAYERS, restart=False)
    assert sweep.header["settings"]["precision"] == "bf16"


def test_a_kill_between_npz_and_csv_loses_only_that_row(files):
    fill(files, (0.0,))
    csv = files.csv.read_bytes()
    add(open_sweep(files, header(), LABELS, LAYERS, restart=False), row(40.0))
    files.csv.write_bytes(csv)
    found = read_sweep(files)
    assert [each.level for each in found.table()] == [0]
    assert set(found.predictions) == {row(0.0).key}


@pytest.mark.parametrize("suffix", [".csv", ".json", ".npz"])
@pytest.mark.parametrize("content", [b"", b"\x00garbage", b"a,b\n1,2\n"])
def test_damaged_files_are_named(files, suffix, content):
    fill(files)
    files.with_suffix(suffix).write_bytes(content)
    with pytest.raises(UserError, match=r"net_pruning.*cannot be read.*--restart"):
        read_sweep(files)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("settings", None),
        ("data", []),
        ("data", {}),
        ("checkpoints", {}),
        ("checkpoints", {"one.pth": 5}),
        ("checkpoints", {"one.pth": {}}),
        ("dense", {"one.pth": {"accuracy": "x"}}),
        ("dense", {"one.pth": {}}),
        ("dense", 5),
        ("curves", "l1"),
        ("curves", ["l1"]),
        ("curves", [["l1", "uniform"]]),
        ("curves", [["l1", "uniform", 3]]),
    ],
)
def test_a_header_of_another_shape_is_damage(files, part, value):
    fill(files)
    content = json.loads(files.json.read_text()) | {part: value}
    files.json.write_text(json.dumps(content))
    before = contents(files)
    with pytest.raises(UserError, match="cannot be read"):
        open_sweep(files, header(), LABELS, LAYERS, restart=False)
    assert contents(files) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", lambda array: np.arange(2)),
        ("rows", lambda array: array[:1]),
        ("predictions", lambda array: array[:, :5]),
        ("predictions", lambda array: array.astype(float)),
        ("predictions", lambda array: (array + 1) % 4),
        ("dense_predictions", lambda array: array[:, :5]),
        ("labels", lambda array: array[::-1]),
        ("labels", lambda array: array[:5]),
        ("labels", lambda array: np.array([None, 1])),
        ("dense_predictions", lambda array: (array + 1) % 4),
        ("dense_checkpoints", lambda array: np.array(["other.pth"])),
        ("layer_names", lambda array: array[:1]),
        ("layer_names", lambda array: np.array(["stem", "stem"])),
        ("layer_names", lambda array: np.arange(2)),
        ("layer_weights", lambda array: array * 2),
        ("layer_weights", lambda array: array - array),
        ("layer_weights", lambda array: array.astype(float)),
        ("layer_zeros", lambda array: array[:, :1]),
        ("layer_zeros", lambda array: array[:1]),
        ("layer_zeros", lambda array: array[0]),
        ("layer_zeros", lambda array: array + 1),
        ("layer_zeros", lambda array: array + np.array([-22, 22])),
        ("layer_zeros", lambda array: array * 100),
        ("layer_zeros", lambda array: array.astype(float)),
    ],
)
def test_predictions_that_do_not_fit_the_rows_are_damage(files, name, change):
    fill(files)
    with np.load(files.npz) as found:
        arrays = dict(found)
    np.savez(files.npz, **arrays | {name: change(arrays[name])})
    before = contents(files)
    with pytest.raises(UserError, match=r"net_pruning.*--restart"):
        open_sweep(files, header(), LABELS, LAYERS, restart=False)
    assert contents(files) == before


def test_rows_without_their_settings_are_not_trusted(files):
    fill(files)
    files.json.unlink()
    with pytest.raises(UserError, match=r"has no net_pruning.json beside it"):
        open_sweep(files, header(), LABELS, LAYERS, restart=False)


def test_many_classes_need_wider_predictions(files):
    wide = header()
    wide["data"]["classes"] = [str(index) for index in range(300)]
    sweep = begin(files, wide, labels=LABELS + 260)
    sweep.add_dense("one.pth", LABELS + 260, {"accuracy": 100.0, "loss": 0.1})
    sweep.add(row(0.0), LABELS + 260, ZEROS)
    assert np.array_equal(read_sweep(files).predictions[row(0.0).key], LABELS + 260)


def test_levels_are_told_as_a_person_writes_them():
    texts = [level_text(level) for level in (0.0, 5.0, 0.15000000000000002 * 100, 99.5, 33.3)]
    assert texts == ["0", "5", "15", "99.5", "33.3"]


def test_other_layers_are_another_experiment(files):
    fill(files)
    before = contents(files)
    for layers in ({"stem": 200}, LAYERS | {"more": 5}, LAYERS | {"down": 799}):
        with pytest.raises(UserError, match=r"prunable layers \(2 there, \d now; (down|more)\).*--restart.*--name"):
            open_sweep(files, header(), LABELS, layers, restart=False)
    assert contents(files) == before
    # Their order is that of the files: the counts of a row are found by name.
    again = open_sweep(files, header(), LABELS, dict(reversed(LAYERS.items())), restart=False)
    again.add(row(5.0), predictions(5), dict(reversed(ZEROS.items())))
    assert read_sweep(files).zeros[row(5.0).key].tolist() == [21, 84]


@pytest.mark.parametrize("zeros", [{}, {"stem": 1}, ZEROS | {"other": 1}])
def test_zeros_are_counted_in_every_layer(files, zeros):
    with pytest.raises(ValueError, match="other layers"):
        fill(files).add(row(5.0), predictions(5), zeros)
    assert len(read_sweep(files).rows) == 2


@pytest.mark.parametrize("notes", ["", "reconstruction kept 3 rows", 'of a, b and "c", d', " ä; 'x'\t|"])
def test_notes_come_back_as_they_were(files, notes):
    sweep = fill(files)
    add(sweep, row(5.0, notes=notes))
    assert read_sweep(files).rows[row(5.0).key].notes == notes


@pytest.mark.parametrize("notes", ["two\nlines", "end\n", "\r", "a\u2028b"])
def test_notes_are_one_line(notes):
    with pytest.raises(ValueError, match="one line"):
        row(5.0, notes=notes)


@pytest.mark.parametrize("column", ["lost", "gained", "mcnemar_p", "accuracy", "sparsity"])
def test_figures_that_do_not_follow_from_the_predictions_are_damage(files, column):
    fill(files)
    lines = files.csv.read_text().splitlines()
    cells = lines[1].split(",")
    cells[COLUMNS.index(column)] = "7" if column != "mcnemar_p" else "0.5"
    files.csv.write_text("\n".join([lines[0], ",".join(cells), lines[2], ""]))
    with pytest.raises(UserError, match=r"net_pruning.csv cannot be read \(.*disagree at level 0\)"):
        read_sweep(files)


@pytest.mark.parametrize("change", [lambda line: line.rpartition(",")[0], lambda line: line + ",more"])
def test_lines_of_another_length_are_damage(files, change):
    fill(files)
    first, second, third = files.csv.read_text().splitlines()
    files.csv.write_text("\n".join([first, second, change(third), ""]))
    with pytest.raises(UserError, match="another number of columns"):
        read_sweep(files)


def test_the_comparison_counts_both_ways():
    dense = np.array([True] * 30 + [False] * 10)
    right = np.array([False] * 10 + [True] * 22 + [False] * 8)
    assert comparison_columns(right, dense) == {"lost": 10, "gained": 2, "mcnemar_p": 0.0385742}


def test_a_tiny_p_is_kept():
    dense = np.ones(1000, dtype=bool)
    found = comparison_columns(~dense, dense)
    assert found["mcnemar_p"] == pytest.approx(2.0**-999, rel=1e-5)
    assert float(str(found["mcnemar_p"])) == found["mcnemar_p"] == pytest.approx(mcnemar_p(1000, 0), rel=1e-5)


GLOBAL, RANDOM = ("l1", "global", "none"), ("random", "uniform", "none")


def order(files):
    return list(read_sweep(files).curves())


def test_curves_stand_in_the_order_of_the_header_and_unknown_ones_after_them(files):
    sweep = begin(files, header() | {"curves": [list(RANDOM), list(CURVE)]})
    add(sweep, *(row(0.0, curve=curve) for curve in (CURVE, RANDOM, ("x", "b", "none"), GLOBAL)))
    assert order(files) == [RANDOM, CURVE, GLOBAL, ("x", "b", "none")]
    assert [each.curve for each in read_sweep(files).table()] == order(files)


def test_curves_without_an_order_are_sorted(files):
    add(fill(files), row(0.0, curve=RANDOM), row(0.0, curve=GLOBAL))
    assert order(files) == [GLOBAL, CURVE, RANDOM]


def test_going_on_with_other_curves_loses_none(files):
    first = begin(files, header() | {"curves": [list(RANDOM), list(CURVE)]})
    add(first, row(0.0, curve=RANDOM), row(0.0))
    for curves in ([list(GLOBAL), list(CURVE)], None):
        head = header() | ({"curves": curves} if curves else {})
        again = open_sweep(files, head, LABELS, LAYERS, restart=False)
        assert again.header["curves"] == [list(RANDOM), list(CURVE), list(GLOBAL)]
        again.record_images()
    add(again, row(0.0, curve=GLOBAL))
    assert order(files) == [RANDOM, CURVE, GLOBAL]


def test_only_levels_that_all_checkpoints_of_a_curve_have_are_compared(files):
    both = header()
    both["checkpoints"] = both["checkpoints"] | {"two.pth": {"sha256": "2"}}
    sweep = begin(files, both, checkpoints=("one.pth", "two.pth"))
    add(sweep, row(0.0), row(40.0), row(5.0, curve=GLOBAL), row(40.0, "two.pth"), row(60.0, "two.pth"))
    levels = {curve: {level: len(rows) for level, rows in found.items()} for curve, found in sweep.curves().items()}
    assert levels == {CURVE: {40.0: 2}, GLOBAL: {5.0: 1}}
    assert sweep.checkpoints_of(CURVE) == ["one.pth", "two.pth"]


def test_images_of_the_training_split_are_not_mixed_and_a_refused_run_leaves_the_files(files):
    fill(files).record_images(calibration_sha256="a", training_sha256=None)
    again = open_sweep(files, header(), LABELS, LAYERS, restart=False)
    again.record_images(calibration_sha256=None, training_sha256="t")  # a run that needs other images than the first
    before = contents(files)
    for hashes in ({"calibration_sha256": "b"}, {"training_sha256": "u"}):
        with pytest.raises(UserError, match=f"rows of other {next(iter(hashes)).split('_')[0]} images"):
            open_sweep(files, header(), LABELS, LAYERS, restart=False).record_images(**hashes)
    assert contents(files) == before


def test_settings_that_only_some_rows_use_do_not_clash(files):
    fill(files).record_images()
    used = header(calibration_images=64)
    open_sweep(files, used, LABELS, LAYERS, restart=False).record_images()
    plain = open_sweep(files, header(calibration_images=None), LABELS, LAYERS, restart=False)
    assert plain.header["settings"]["calibration_images"] == 64
    with pytest.raises(UserError, match=r"calibration_images \(64 there, 32 now\)"):
        open_sweep(files, header(calibration_images=32), LABELS, LAYERS, restart=False)


def test_the_summary_stays_until_there_is_a_new_one(files):
    fill(files).finish([{"level": 40}])
    open_sweep(files, header(), LABELS, LAYERS, restart=False).record_images()
    assert json.loads(files.json.read_text())["summary"] == [{"level": 40}]


def test_a_restart_sets_the_old_rows_aside_until_the_new_ones_are_complete(files):
    fill(files)
    old = files.csv.read_bytes(), files.npz.read_bytes(), files.json.read_bytes()
    sweep = begin(files, header(precision="bf16"), restart=True)
    aside = [path.with_name(path.name + ".old") for path in (files.csv, files.npz, files.json)]
    assert tuple(path.read_bytes() for path in aside) == old
    sweep.drop_old()
    assert not any(path.exists() for path in aside)


def test_the_fingerprint_tells_settings_and_images_apart(files):
    sweep = fill(files)
    first = sweep.fingerprint()
    sweep.record_images(calibration_sha256="a")
    second = sweep.fingerprint()
    sweep.header["settings"]["precision"] = "bf16"
    assert len({first, second, sweep.fingerprint()}) == 3
