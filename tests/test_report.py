"""A sweep's files: rows with their predictions, kept through kills, never mixed with those of another run."""

import json

import numpy as np
import pytest

from sparsity import report
from sparsity.report import COLUMNS, Row, accuracy_columns, open_sweep, read_sweep
from sparsity.runtime import UserError

CURVE = ("l1", "uniform", "none")
LABELS = np.arange(40) % 4


def header(**changes):
    settings = {"precision": "fp32", "batch_size": 32} | changes
    return {
        "settings": settings,
        "data": {"classes": list("abcd"), "test_sha256": "data"},
        "checkpoints": {"one.pth": {"sha256": "1"}},
    }


def row(level, checkpoint="one.pth"):
    values = dict.fromkeys(COLUMNS[5:], 1) | {"sparsity": 10.5}
    values |= accuracy_columns(int((predictions(level) == LABELS).sum()), len(LABELS))
    return Row(checkpoint, *CURVE, level=level, **values)


def predictions(level):
    return (LABELS + int(level) % 3) % 4


def fill(files, levels=(0.0, 40.0), **changes):
    sweep = open_sweep(files, header(**changes), LABELS, restart=False)
    sweep.add_dense("one.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    for level in levels:
        sweep.add(row(level), predictions(level))
    return sweep


def test_columns_are_those_that_people_rely_on():
    assert ",".join(COLUMNS) == (
        "checkpoint,criterion,allocation,recover,level,sparsity,nonzero,parameters,compression,macs_ratio,"
        "accuracy,ci_low,ci_high,loss,agreement,seconds"
    )


def test_rows_come_back_with_their_predictions(files):
    fill(files)
    found = read_sweep(files)
    assert found.table() == [row(0.0), row(40.0)]
    assert np.array_equal(found.predictions[row(40.0).key], predictions(40))
    assert found.predictions[row(40.0).key].dtype == np.uint8
    assert np.array_equal(found.dense["one.pth"], LABELS)
    assert np.array_equal(found.correct(row(40.0)), predictions(40) == LABELS)


def test_the_settings_are_on_disk_before_the_first_row(files):
    open_sweep(files, header(), LABELS, restart=False)
    assert json.loads(files.json.read_text())["settings"]["precision"] == "fp32"
    assert not files.csv.exists()


def test_added_levels_go_to_their_place(files):
    fill(files, (0.0, 100.0))
    again = open_sweep(files, header(), LABELS, restart=False)
    assert set(again.dense) == {"one.pth"}
    again.add(row(50.0), predictions(50))
    again.add(row(9.0), predictions(9))
    found = read_sweep(files)
    assert [each.level for each in found.table()] == [0, 9, 50, 100]
    assert np.array_equal(found.predictions[row(9.0).key], predictions(9))


def test_another_checkpoint_may_be_added_but_none_replaced(files):
    fill(files)
    both = header()
    both["checkpoints"] = both["checkpoints"] | {"two.pth": {"sha256": "2"}}
    sweep = open_sweep(files, both, LABELS, restart=False)
    sweep.add(row(0.0, "two.pth"), predictions(0))
    assert [each.checkpoint for each in read_sweep(files).table()] == ["one.pth", "one.pth", "two.pth"]
    with pytest.raises(UserError, match="checkpoint"):
        open_sweep(files, header(), LABELS, restart=False)
    changed = header()
    changed["checkpoints"] = {"one.pth": {"sha256": "other"}, "two.pth": {"sha256": "2"}}
    with pytest.raises(UserError, match=r"one.pth has changed"):
        open_sweep(files, changed, LABELS, restart=False)


def test_other_settings_are_named_and_nothing_is_touched(files):
    fill(files)
    before = {path: path.read_bytes() for path in files.stem.parent.iterdir()}
    with pytest.raises(UserError, match=r"precision \(fp32 there, bf16 now\).*--restart.*--name"):
        open_sweep(files, header(precision="bf16"), LABELS, restart=False)
    assert {path: path.read_bytes() for path in files.stem.parent.iterdir()} == before


def test_restart_begins_anew(files):
    fill(files)
    sweep = open_sweep(files, header(precision="bf16"), LABELS, restart=True)
    assert not sweep.rows
    assert not files.csv.exists()
    sweep.add(row(5.0), predictions(5))
    assert [each.level for each in read_sweep(files).table()] == [5]


def test_settings_without_rows_stand_in_nobodys_way(files):
    open_sweep(files, header(), LABELS, restart=False)
    sweep = open_sweep(files, header(precision="bf16"), LABELS, restart=False)
    assert sweep.header["settings"]["precision"] == "bf16"


def test_a_kill_between_npz_and_csv_loses_only_that_row(files):
    fill(files, (0.0,))
    csv = files.csv.read_bytes()
    open_sweep(files, header(), LABELS, restart=False).add(row(40.0), predictions(40))
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
    ],
)
def test_a_header_of_another_shape_is_damage(files, part, value):
    fill(files)
    content = json.loads(files.json.read_text()) | {part: value}
    files.json.write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in files.stem.parent.iterdir()}
    with pytest.raises(UserError, match="cannot be read"):
        open_sweep(files, header(), LABELS, restart=False)
    assert {path: path.read_bytes() for path in files.stem.parent.iterdir()} == before


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
    ],
)
def test_predictions_that_do_not_fit_the_rows_are_damage(files, name, change):
    fill(files)
    with np.load(files.npz) as found:
        arrays = dict(found)
    np.savez(files.npz, **arrays | {name: change(arrays[name])})
    before = {path: path.read_bytes() for path in files.stem.parent.iterdir()}
    with pytest.raises(UserError, match=r"net_pruning.*--restart"):
        open_sweep(files, header(), LABELS, restart=False)
    assert {path: path.read_bytes() for path in files.stem.parent.iterdir()} == before


def test_rows_without_their_settings_are_not_trusted(files):
    fill(files)
    files.json.unlink()
    with pytest.raises(UserError, match=r"has no net_pruning.json beside it"):
        open_sweep(files, header(), LABELS, restart=False)


def test_many_classes_need_wider_predictions(files):
    wide = header()
    wide["data"]["classes"] = [str(index) for index in range(300)]
    sweep = open_sweep(files, wide, LABELS, restart=False)
    sweep.add(row(1.0), LABELS + 260)
    assert np.array_equal(read_sweep(files).predictions[row(1.0).key], LABELS + 260)


def test_levels_are_told_as_a_person_writes_them():
    texts = [report.level_text(level) for level in (0.0, 5.0, 0.15000000000000002 * 100, 99.5, 33.3)]
    assert texts == ["0", "5", "15", "99.5", "33.3"]
