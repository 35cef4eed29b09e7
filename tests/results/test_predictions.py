"""Predictions on disk: rows are appended to a journal, which a kill may cut anywhere, and packed in the end."""

import numpy as np
import pytest
from helpers import LABELS, made_predictions, made_row, made_sweep

from sparsity.results.store import read_sweep

ZEROS = {"conv": 100}


def begin(files):
    """A sweep without rows, its dense network known."""
    sweep = made_sweep(files, [], checkpoints={"one.pth": {"sha256": "1"}}, dense={})
    sweep.begin()
    sweep.add_dense("one.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    return sweep


def add(sweep, row):
    sweep.add(row, made_predictions(row.level), ZEROS)


def fill(files, levels):
    sweep = begin(files)
    for level in levels:
        add(sweep, made_row(level))
    return sweep


@pytest.mark.parametrize("last", [20.0, 40.0])
def test_a_kill_while_a_row_is_written_loses_only_that_row_and_the_sweep_goes_on(files, last):
    """Whatever part of the last line of the journal is on the disk; a row that is measured again is not lost either."""
    sweep = fill(files, (0.0, 20.0))
    csv, before = files.csv.read_bytes(), files.journal.stat().st_size
    add(sweep, made_row(last))
    complete, npz = files.journal.read_bytes(), files.npz.read_bytes()
    for length in (before, before + 1, len(complete) - 1, len(complete)):
        for path, content in ((files.npz, npz), (files.csv, csv), (files.journal, complete[:length])):
            path.write_bytes(content)
        found = read_sweep(files)
        assert [each.level for each in found.table()] == [0, 20]
        assert set(found.predictions) == {made_row(0.0).key, made_row(20.0).key}
        found.begin()
        assert not files.journal.exists()
        add(found, made_row(60.0))
        again = read_sweep(files)
        assert [each.level for each in again.table()] == [0, 20, 60]
        assert all(np.array_equal(again.predictions[row.key], made_predictions(row.level)) for row in again.table())


def test_a_row_is_appended_and_the_npz_holds_all_in_the_end(files):
    sweep = begin(files)
    npz, sizes = files.npz.read_bytes(), []
    for level in range(10, 50):
        add(sweep, made_row(float(level)))
        sizes.append(files.journal.stat().st_size)
    assert files.npz.read_bytes() == npz and len(set(np.diff(sizes))) == 1  # a row costs the same, whichever it is
    found = read_sweep(files)
    sweep.pack()
    assert not files.journal.exists()
    packed = read_sweep(files)
    assert packed.table() == found.table() and len(found.table()) == 40
    for key, predictions in found.predictions.items():
        assert np.array_equal(packed.predictions[key], predictions)
        assert np.array_equal(packed.zeros[key], found.zeros[key])
