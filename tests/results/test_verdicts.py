"""The sentence of a curve: which level is chosen, and whether the other half of the images shows it."""

import csv
from pathlib import Path

import pytest
from helpers import add_lost, bare_sweep

from sparsity.results import verdicts
from sparsity.results.files import SweepFiles
from sparsity.results.statistics import mcnemar_p
from sparsity.results.store import read_sweep
from sparsity.results.verdicts import label_text, scope_text, summarise_all
from sparsity.system.methods import Curve

UNIFORM, GLOBAL, RANDOM = Curve("l1", "uniform", "none"), Curve("l1", "global", "none"), Curve("random", "erk", "none")
NONE = Curve("random", "global", "none")
NAMES = ("one.pth", "two.pth")
IMAGES = Path(__file__).parents[2] / "images"
FIGURES = ("accuracy", "dense", "difference", "difference_low", "difference_high", "lost", "gained", "mcnemar_p")


def filled(files, **levels):
    """A sweep of one curve: level -> images that it loses of the twenty of each half."""
    sweep = bare_sweep(files)
    for name, lost in levels.items():
        add_lost(sweep, float(name.removeprefix("at_")), lost)
    return sweep


@pytest.mark.parametrize(("criterion", "unit"), [("l1", "weights"), ("filter_l1", "inner filters")])
def test_the_entry_follows_from_the_predictions_and_the_sentence_says_it(files, criterion, unit):
    sweep, curve = bare_sweep(files), Curve(criterion, "uniform", "batchnorm")
    for level, lost in ((0.0, 0), (3.0, 0), (40.0, 19)):
        add_lost(sweep, level, lost, curve)
    (entry,) = summarise_all(sweep, tolerance=15.0)
    assert verdicts.curve_of(entry) == curve
    assert [entry[name] for name in FIGURES[:3]] == [100.0, 100.0, 0.0]
    assert [entry[name] for name in FIGURES[5:]] == [0, 0, 1.0]
    assert -15 < entry["difference_low"] < 0 < entry["difference_high"]
    assert (entry["level"], entry["next_level"], entry["next_difference"]) == (3.0, 40.0, -95.0)
    assert (entry["verdict"], entry["shown_level"], entry["family"], entry["images"]) == ("shown", 3.0, 1, 20)
    assert entry["sentence"] == (
        f"{criterion} uniform + batchnorm: chosen level 3 % of the {unit} removed, within 15 points of dense on half "
        "of the test images (lowest measured; next measured: 40 %, loses 95.00 points). "
        "Shown within 15 points on the other 20 images: 100.00 % against 100.00 % dense, difference +0.00 points "
        f"(95 % interval {entry['difference_low']:+.2f} to {entry['difference_high']:+.2f})."
    )
    assert (
        label_text(entry) == "3 % pruned: 100.0 %, dense 100.0 %\non the 20 reporting images;\nshown within 15 points"
    )


def test_a_level_that_is_not_shown_is_said_with_the_highest_that_is(files):
    (entry,) = summarise_all(filled(files, at_5=0, at_10=0, at_20=2), tolerance=15)
    assert (entry["level"], entry["verdict"], entry["shown_level"], entry["next_level"]) == (20, "not shown", 10, None)
    assert "(like every lower level measured; highest measured). Not shown within 15 points" in entry["sentence"]
    assert entry["sentence"].endswith("; shown up to 10 %.")
    (entry,) = summarise_all(filled(files, at_5=2, at_20=2), tolerance=15)
    assert entry["shown_level"] is None and entry["sentence"].endswith("; nor is the lowest level measured.")
    sweep = filled(files, at_5=0)
    add_lost(sweep, 20.0, 1, also_lost=4)
    (entry,) = summarise_all(sweep, tolerance=15)
    assert [entry[name] for name in ("level", "accuracy", "lost", "difference")] == [
        20,
        75,
        5,
        -25,
    ]  # of the other half
    (entry,) = summarise_all(filled(files, at_0=0, at_20=2), tolerance=15)
    assert entry["shown_level"] is None and entry["sentence"].endswith(f"{entry['difference_high']:+.2f}).")


@pytest.mark.parametrize(
    ("levels", "level", "reason"),
    [
        ({"at_0": 0, "at_5": 4}, 0.0, "the lowest above 0 %, 5 %, loses 20.00 points on half of the test images"),
        ({"at_0": 4, "at_5": 0}, None, "the lowest, 0 %, loses 20.00 points on half of the test images"),
        ({"at_30": 4, "at_50": 0}, None, "the lowest, 30 %, loses 20.00 points on half of the test images"),
        ({"at_0": 0}, 0.0, "no other was measured"),
    ],
)
def test_without_a_level_above_0_the_reason_is_said_and_there_is_no_verdict(files, levels, level, reason):
    (entry,) = summarise_all(filled(files, **levels), tolerance=0.5)
    assert (entry["level"], entry["verdict"], entry["shown_level"], entry["family"]) == (level, "none", None, 0)
    assert [entry[name] is None for name in FIGURES] == [level is None] * 8
    said = f"l1 uniform: no measured level above 0 % chosen; {reason} (tolerance 0.5 points)."
    assert (entry["sentence"], label_text(entry), verdicts.verdict_text(entry)) == (said, "", "")


def test_intervals_are_simultaneous_over_the_curves_that_chose_a_level(files):
    sweep, lost = bare_sweep(files), {UNIFORM: 3, GLOBAL: 4, RANDOM: 0}
    for curve in lost:
        add_lost(sweep, 5.0, lost[curve], curve)
    (alone,) = summarise_all(filled(files, at_5=3), 35)
    add_lost(sweep, 40.0, 20, NONE)
    entries = {verdicts.curve_of(entry): entry for entry in summarise_all(sweep, 35)}
    assert {entry["family"] for entry in entries.values()} == {3}
    for curve in lost:
        assert (entries[curve]["lost"], entries[curve]["gained"]) == (lost[curve], 0)
        assert entries[curve]["mcnemar_p"] == pytest.approx(mcnemar_p(lost[curve], 0), rel=1e-5)
        assert ", simultaneous over 3 curves)" in entries[curve]["sentence"]
    assert entries[UNIFORM]["difference_low"] < alone["difference_low"]
    # Alone it is shown within 35 points, as one of three it is not.
    verdict = [entry["verdict"] for entry in (alone, entries[UNIFORM], entries[RANDOM])]
    assert verdict == ["shown", "not shown", "shown"]


def test_several_checkpoints_and_no_level_in_common(files):
    sweep = bare_sweep(files, NAMES)
    assert "One checkpoint, one seed" in scope_text(bare_sweep(files))
    for name, level, lost in ((0, 0.0, 0), (0, 3.0, 0), (0, 40.0, 0), (1, 0.0, 0), (1, 40.0, 10), (1, 3.0, 0)):
        add_lost(sweep, level, lost, checkpoint=NAMES[name])
    for name, level in zip(NAMES, (30.0, 40.0), strict=True):
        add_lost(sweep, level, 0, RANDOM, name)
    entry, none = summarise_all(sweep, tolerance=20.0)
    assert [entry[name] for name in ("level", "checkpoints", "verdict")] == [3.0, 2, "shown"]
    assert [entry[name] for name in FIGURES[5:]] == [None] * 3 and ", over 2 checkpoints)" in entry["sentence"]
    assert none["sentence"].startswith("random erk: no measured level above 0 % chosen; no level was measured of every")
    assert scope_text(sweep).startswith("Means over 2 checkpoints") and "of one checkpoint" not in scope_text(sweep)
    add_lost(sweep, 3.0, 0, GLOBAL)
    assert "those of one checkpoint cover other test images only" in scope_text(sweep)


def test_committed_sweeps_have_sentences_and_committed_simulations_err_in_at_most_one_of_twenty():
    tables = list(IMAGES.glob("*/*_pruning.csv"))
    assert tables
    for table in tables:
        entries = summarise_all(read_sweep(SweepFiles(table.with_suffix(""))), 1.0)
        assert all(entry["sentence"].endswith(".") and "nan" not in entry["sentence"] for entry in entries)
        assert verdicts.rule_text(entries)
    with (IMAGES / "verdicts" / "verdicts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["images"]) for row in rows} == {1000, 2000, 10_000}
    assert 0 < max(float(row["wrongly_shown"]) for row in rows) <= 5
    assert verdicts.rule_text([]) == ""
