"""The CSV files of sweeps and trainings."""

import numpy as np
import pytest
from helpers import made_row, rows_of

from sparsity.results.record import write_confusion
from sparsity.results.rows import COLUMNS, comparison_columns, read_rows, write_rows
from sparsity.results.statistics import mcnemar_p
from sparsity.system.errors import UserError
from sparsity.system.flags import level_text


def test_columns_are_those_that_people_rely_on():
    assert ",".join(COLUMNS) == (
        "checkpoint,criterion,allocation,recover,level,sparsity,nonzero,parameters,compression,macs_ratio,"
        "accuracy,ci_low,ci_high,loss,agreement,seconds,lost,gained,mcnemar_p,notes,"
        "file_bytes,latency_ms,throughput,peak_memory_mb,speedup"
    )
    texts = [level_text(level) for level in (0.0, 5.0, 0.15000000000000002 * 100, 99.5, 33.3)]
    assert texts == ["0", "5", "15", "99.5", "33.3"]


def test_rows_come_back_and_damaged_lines_are_told(tmp_path):
    path = tmp_path / "t.csv"
    assert read_rows(path) == []
    rows = [made_row(0.0), made_row(99.5, notes='of a, b and "c"; ä'), made_row(40.0, notes="'x'\t|")]
    write_rows(path, rows)
    assert read_rows(path) == rows
    *lines, last = path.read_text().splitlines()
    for bad in (last.rpartition(",")[0], last + ",more", last.replace("40", "x", 1)):
        path.write_text("\n".join([*lines, bad, ""]))
        with pytest.raises(UserError, match=r"t.csv cannot be read \(.*--restart"):
            read_rows(path)


def test_the_comparison_counts_both_ways_and_keeps_a_tiny_p():
    dense = np.array([True] * 30 + [False] * 10)
    right = np.array([False] * 10 + [True] * 22 + [False] * 8)
    assert comparison_columns(right, dense) == {"lost": 10, "gained": 2, "mcnemar_p": 0.0385742}
    p = comparison_columns(np.zeros(1000, dtype=bool), np.ones(1000, dtype=bool))["mcnemar_p"]
    assert float(str(p)) == p == pytest.approx(mcnemar_p(1000, 0), rel=1e-5)


def test_a_confusion_matrix_counts_every_image_once(tmp_path):
    path = tmp_path / "t.csv"
    labels, predictions = np.array([0, 0, 2, 2, 2]), np.array([0, 2, 2, 2, 0])
    write_confusion(path, ["cat", "dog", "true, or not"], labels, predictions)
    lines = [",".join(row.values()) for row in rows_of(path)]
    assert lines == ["cat,1,0,1", "dog,0,0,0", "true, or not,1,0,2"]
