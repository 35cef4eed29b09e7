"""A search finds the level that a sweep of the whole grid chooses, in eight evaluations, whatever was there before."""

import json

import pytest
from helpers import add_lost, bare_sweep, files_of, rows_of, sweep, without_seconds

from sparsity.results.statistics import halves, mean_change
from sparsity.results.store import read_sweep
from sparsity.results.verdicts import paired
from sparsity.sweep.evaluator import Evaluator
from sparsity.sweep.search import levels_ahead, search_levels
from sparsity.system.methods import Curve

UNIFORM = Curve("l1", "uniform", "none")
STEM = "colours_small_net_pruning"
TABLE = f"{STEM}.csv"


def searched(files, loses, before=()):
    """The levels of a search of a network that loses `loses(level)` of twenty images; `before` are there already."""
    found, levels = bare_sweep(files), []
    for level in before:
        add_lost(found, level, lost=loses(level))
    for level in search_levels(found, "one.pth", UNIFORM, 10):  # points: two images
        levels.append(level)
        add_lost(found, level, lost=loses(level))
    return levels


@pytest.mark.parametrize("last", [0, 0.5, 1, 33, 49.5, 50, 77.5, 99.5, 100])
def test_every_level_of_the_grid_is_found_in_at_most_eight(files, last):
    levels = searched(files, lambda level: 2 if level <= last else 3)
    assert len(levels) <= 8 and len(set(levels)) == len(levels) and 0 not in levels
    assert max((level for level in levels if level <= last), default=0) == last
    assert min((level for level in levels if level > last), default=100.5) == last + 0.5


def test_rows_that_are_there_narrow_the_search(files):
    loses = lambda level: 0 if level <= 63 else 9  # noqa: E731
    assert searched(files, loses, before=(0, 60, 62.7, 64, 100)) == [63, 63.5]
    assert searched(files, loses, before=(63, 63.5)) == searched(files, loses, before=(63, 63.4)) == []
    assert searched(files, lambda level: 9, before=(0,)) == []  # a recovery that harms the dense network
    # As at the end of a sweep, no level counts above one that loses too much.
    assert max(searched(files, lambda level: 9 if 20 <= level < 30 else 0, before=(20, 80))) == 19.5


def test_rows_that_lack_a_measurement_are_visited_again(files):
    found = bare_sweep(files)
    for level in (50, 75):
        add_lost(found, level, lost=0)
    assert levels_ahead(found, "one.pth", UNIFORM, 10)[0] == 87.5
    found.outdate(row.key for row in found.table())
    assert levels_ahead(found, "one.pth", UNIFORM, 10)[0] == 50


@pytest.fixture(scope="module")
def whole(accurate, tmp_path_factory):
    """The folder of a full sweep of 201 levels."""
    out = tmp_path_factory.mktemp("whole")
    assert sweep(out, *accurate, "--criterion", "random", "--levels", "0:100:0.5") == 0
    return out


def monotone_tolerances(found):
    """Tolerance in points -> the chosen level, where no level above it is within tolerance on the choosing half."""
    (levels,) = found.curves().values()
    losses = {level: -100 * mean_change(paired(found, rows), halves(found.labels)[0]) for level, rows in levels.items()}
    chosen = {}
    for tolerance in range(1, 60):
        within = [level for level, loss in losses.items() if loss <= tolerance + 1e-7]
        if within == [level for level in losses if level <= max(within)]:
            chosen[tolerance] = max(within)
    return chosen


def test_the_level_of_a_sweep_of_201_levels_is_found(whole, accurate, tmp_path):
    full = read_sweep(files_of(whole, STEM))
    assert len(full.table()) == 201
    chosen = monotone_tolerances(full)
    distinct = {level: tolerance for tolerance, level in chosen.items() if 0 < level < 100}
    assert len(distinct) > 1
    for tolerance in list(distinct.values())[:2]:
        out = tmp_path / str(tolerance)
        assert sweep(out, *accurate, "--criterion", "random", "--search", "--tolerance", tolerance) == 0
        rows = without_seconds(out / TABLE)
        (entry,) = json.loads(files_of(out, STEM).json.read_text())["summary"]
        assert entry["level"] == chosen[tolerance] and len(rows) <= 8
        assert all(row in without_seconds(whole / TABLE) for row in rows)


def test_a_killed_search_goes_on_without_repeating_and_one_that_is_done_measures_nothing(
    accurate, tmp_path, monkeypatch, capsys
):
    class Killed(BaseException):
        pass

    added, add, limit = [], Evaluator.add, [3]

    def watched(self, pruned):
        if len(added) == limit[0]:
            raise Killed
        add(self, pruned)
        added.append((pruned.curve, pruned.level))

    monkeypatch.setattr(Evaluator, "add", watched)
    search = [
        *accurate,
        "--search",
        "--tolerance",
        "10",
        "--allocation",
        "global",
        "2:4",
        "--criterion",
        "l1",
        "random",
    ]
    with pytest.raises(Killed):
        sweep(tmp_path / "killed", *search)
    limit[0] = -1
    assert len(rows_of(tmp_path / "killed" / TABLE)) == 3
    assert sweep(tmp_path / "killed", *search) == 0
    assert len(set(added)) == len(added) <= 2 * 8 + 2
    assert [level for curve, level in added if curve.pattern] == [50, 50]  # which have one level of their own
    count = len(added)
    assert sweep(tmp_path / "whole", *search) == 0
    assert without_seconds(tmp_path / "killed" / TABLE) == without_seconds(tmp_path / "whole" / TABLE)
    assert len(added) == 2 * count
    capsys.readouterr()
    assert sweep(tmp_path / "whole", *search) == 0
    assert len(added) == 2 * count and f"{count} rows in" in capsys.readouterr().out
