"""Rows of several processes end in the files of one; threads stand in for processes, around one store."""

import shutil

import numpy as np
import pytest
from test_ranks import teams, together
from test_report import LABELS, ZEROS, add, begin, contents, fill, predictions, row

from sparsity.results.store import read_sweep
from sparsity.sweep.collector import Collector, DistantSweep, share_sweep
from sparsity.system.errors import UserError
from sparsity.system.processes import Ranks

LEVELS = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]


def collect(team, files, levels=LEVELS):
    """One process's part of a sweep: every rank measures the levels whose turn it is; returns what was told."""
    sweep = share_sweep(team, lambda: begin(files))
    told = []
    collector = Collector(team, sweep, told.append)
    for level in levels[team.rank :: team.size]:
        sweep.add(row(level), predictions(level), ZEROS)
        sweep.merge("exports", {f"{level:g}": {"file": f"of rank {team.rank}"}})
    if team.first:
        collector.finish(lambda: all(sweep.has("one.pth", row(level).curve, level) for level in levels))
    return told


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_files_are_those_of_one_process(files, tmp_path, size):
    add(begin(files), *map(row, LEVELS))
    alone = {path.suffix: path.read_bytes() for path in contents(files) if path.suffix == ".csv"}
    expected = read_sweep(files)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    told = together(teams(size), lambda team: collect(team, files))
    assert {path.suffix: data for path, data in contents(files).items() if path.suffix == ".csv"} == alone
    found = read_sweep(files)
    assert list(found.rows.values()) == list(expected.rows.values())
    for key in expected.rows:
        assert np.array_equal(found.predictions[key], expected.predictions[key])
        assert np.array_equal(found.zeros[key], expected.zeros[key])
    others = [level for rank in range(1, size) for level in LEVELS[rank::size]]
    assert sorted(each.level for each in told[0]) == sorted(others) and not any(told[1:])


def test_entries_of_all_processes_are_in_the_header(files):
    together(teams(3), lambda team: collect(team, files))
    assert read_sweep(files).header["exports"]["20"] == {"file": "of rank 1"}


def test_the_others_know_what_is_there_and_write_nothing(files):
    fill(files)
    before = contents(files)

    def look(team):
        sweep = share_sweep(team, lambda: read_sweep(files))
        team.gather("all have it")
        if not team.first:
            sweep.add_dense("two.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
            sweep.record("anything", 1)
            sweep.record_images(calibration_sha256="c")
        return sweep

    sweeps = together(teams(3), look)
    assert contents(files) == before
    for sweep in sweeps[1:]:
        assert isinstance(sweep, DistantSweep)
        assert sweep.has("one.pth", row(0).curve, 40.0) and not sweep.has("one.pth", row(0).curve, 50.0)
        assert sweep.kept == 2 and "two.pth" in sweep.dense


def test_a_row_that_cannot_be_written_ends_the_run(files, tmp_path):
    first, second = teams(2)

    def work(team):
        sweep = share_sweep(team, lambda: begin(files))
        if team.first:
            collector = Collector(team, sweep, lambda row: None)
            team.gather("begun")
            shutil.rmtree(tmp_path)
            team.gather("gone")
            with pytest.raises(UserError, match="cannot write"):
                collector.finish(lambda: False)
            with pytest.raises(UserError, match="cannot write"):
                collector.require_well()
        else:
            team.gather("begun")
            team.gather("gone")
            sweep.add(row(20), predictions(20), ZEROS)
        return True

    assert together([first, second], work) == [True, True]
    tmp_path.mkdir()


def test_a_single_process_writes_by_itself(files):
    assert collect(Ranks(), files) == []
    assert len(read_sweep(files).rows) == len(LEVELS)
