"""The tables and the sentences of a sweep."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import LABELS, made_row, made_sweep

from sparsity.results import summary
from sparsity.results.rows import accuracy_columns, comparison_columns
from sparsity.results.statistics import choosing_half, mcnemar_p
from sparsity.system.methods import Curve

UNIFORM, GLOBAL, RANDOM = Curve("l1", "uniform", "none"), Curve("l1", "global", "none"), Curve("random", "erk", "none")
NONE = Curve("random", "global", "none")
NAMES = ("one.pth", "two.pth")


def begin(files, checkpoints=NAMES[:1]):
    """A sweep without rows, of networks that get everything right before pruning."""
    sweep = made_sweep(files, [made_row(0.0, name) for name in checkpoints])
    sweep.rows = {}
    return sweep


def add(sweep, level, lost=0, curve=UNIFORM, checkpoint=NAMES[0]):
    """A row that loses so many of the twenty images of each half."""
    found, half = LABELS.copy(), choosing_half(LABELS)
    for part in (half, ~half):
        found[np.flatnonzero(part)[:lost]] += 1
    found %= 4
    columns = accuracy_columns(40 - 2 * lost, 40) | comparison_columns(found == LABELS, LABELS == LABELS)
    row = replace(made_row(level, checkpoint, curve), **columns)
    sweep.rows[row.key], sweep.predictions[row.key] = row, found


def test_the_table_shows_every_level(files):
    sweep = begin(files)
    for level, lost in ((0.0, 0), (40.0, 20), (99.5, 20), (100.0, 15)):
        add(sweep, level, lost)
    head, curve, *lines = summary.summary_table(sweep).splitlines()
    assert "95 % interval" in head and head.endswith("McNemar p") and curve == "-- l1 uniform --"
    shown = [line.split()[:3:2] for line in lines]
    assert shown == [["0", "100.00"], ["40", "0.00"], ["99.5", "0.00"], ["100", "25.00"]]
    assert [float(line.split()[-1]) for line in lines[:2]] == pytest.approx([1, 2.0**-39], rel=1e-2)
    assert {len(line) for line in lines} == {len(head)}


def test_several_checkpoints_are_averaged_over_the_levels_that_all_have(files):
    sweep = begin(files, NAMES)
    for name, level, lost in ((0, 0.0, 0), (0, 3.0, 0), (0, 40.0, 0), (1, 0.0, 0), (1, 40.0, 10)):
        add(sweep, level, lost, checkpoint=NAMES[name])
    assert sweep.checkpoints_of(UNIFORM) == list(NAMES)
    head, _, *lines = summary.summary_table(sweep).splitlines()
    assert "+/- sd" in head
    assert [line.split()[0] for line in lines] == ["0", "40"]
    assert lines[1].split()[2:4] == ["75.00", f"{np.std([100, 50], ddof=1):.2f}"] and lines[1].endswith(" -")
    width = 12.706204736432095 * np.std([100, 50], ddof=1) / np.sqrt(2)
    assert cells(sweep)[-1][1:] == ["100.00 ± 0.00", f"75.00 ± {width:.2f}", ""]
    assert "Student's t over 2 checkpoints" in summary.markdown_table(sweep)
    (entry,) = summary.summarise_all(sweep, tolerance=1.0)
    assert (entry["level"], entry["accuracy"], entry["checkpoints"]) == (0.0, 100.0, 2)
    assert [entry[name] for name in ("lost", "gained", "mcnemar_p", "p_holm")] == [None] * 4
    assert "over 2 checkpoints)" in entry["sentence"]
    add(sweep, 3.0, checkpoint=NAMES[1])
    assert summary.summarise_all(sweep, tolerance=1.0)[0]["level"] == 3.0


@pytest.mark.parametrize(("criterion", "unit"), [("l1", "weights"), ("filter_l1", "inner filters")])
def test_the_summary_follows_from_the_predictions(files, criterion, unit):
    sweep, curve = begin(files), Curve(criterion, "uniform", "batchnorm")
    for level, lost in ((0.0, 0), (3.0, 0), (40.0, 20)):
        add(sweep, level, lost, curve)
    (entry,) = summary.summarise_all(sweep, tolerance=1.0)
    assert summary.curve_of(entry) == curve
    assert (entry["level"], entry["accuracy"], entry["dense"], entry["difference"]) == (3.0, 100.0, 100.0, 0.0)
    assert entry["difference_low"] < 0 < entry["difference_high"]
    assert [entry[name] for name in ("lost", "gained", "mcnemar_p", "p_holm")] == [0, 0, 1.0, 1.0]
    start = f"{criterion} uniform + batchnorm: 3 % of the {unit} can go within 1 point of dense (chosen on half"
    assert entry["sentence"].startswith(start)


def test_nothing_within_tolerance_is_said(files):
    sweep = begin(files, NAMES)
    add(sweep, 40.0, 20)
    add(sweep, 40.0, curve=RANDOM)
    add(sweep, 30.0, curve=RANDOM, checkpoint=NAMES[1])  # no level in common
    for entry, name in zip(summary.summarise_all(sweep, tolerance=0.5), ("l1 uniform", "random erk"), strict=True):
        figures = ("level", "accuracy", "difference_low", "lost", "gained", "mcnemar_p", "p_holm")
        assert [entry[figure] for figure in figures] == [None] * 7
        assert entry["sentence"] == f"{name}: no measured level stays within 0.5 points of the dense network."
        assert f"| {name} |" in summary.markdown_table(sweep)


def test_p_values_are_of_the_other_half_and_corrected_over_the_curves_that_have_one(files):
    sweep, lost = begin(files), {UNIFORM: 3, GLOBAL: 4, RANDOM: 0}
    for curve in lost:
        add(sweep, 5.0, lost[curve], curve)
    add(sweep, 40.0, 20, NONE)  # chooses no level and is no test
    entries = {summary.curve_of(entry): entry for entry in summary.summarise_all(sweep, 40)}
    for curve in lost:
        assert (entries[curve]["lost"], entries[curve]["gained"]) == (lost[curve], 0)
        assert entries[curve]["mcnemar_p"] == pytest.approx(mcnemar_p(lost[curve], 0), rel=1e-5)
    # 2 x 0.25, 3 x 0.125, 1
    corrected = {curve: entry["p_holm"] for curve, entry in entries.items()}
    assert corrected == {UNIFORM: 0.5, GLOBAL: 0.375, RANDOM: 1.0, NONE: None}
    assert entries[GLOBAL]["sentence"].endswith(
        "; McNemar p = 0.125, Holm-corrected over 3 curves 0.375: these images do not show whether the two differ)."
    )


def test_p_values_in_words_of_which_a_large_one_is_never_called_no_difference(files):
    assert [summary._p_text(p) for p in (0.0123, 1.0, 1e-30, 0.0)] == ["= 0.0123", "= 1", "= 1e-30", "< 1e-300"]
    sweep = begin(files)
    for lost in (0, 5, 6, 9):
        add(sweep, 5.0, lost)
        (entry,) = summary.summarise_all(sweep, tolerance=50)
        assert ("do not show whether the two differ" in entry["sentence"]) == (lost < 6) == (entry["mcnemar_p"] > 0.05)
        assert not any(claim in entry["sentence"] for claim in ("no difference", "no loss", "not significant", "Holm"))


def test_the_layers_that_suffer_most_come_first(files):
    sweep = begin(files)
    for name, lost in (("stem", 9), ("down", 15), ("head", 1)):
        for level in (50.0, 90.0):
            add(sweep, level, lost * (level > 50), Curve("l1", f"only {name}", "none"))
    head, *lines = summary.sensitivity_table(sweep, most=2).splitlines()
    assert "of 3" in head
    assert [line.split() for line in lines] == [["down", "90", "-75.00"], ["stem", "90", "-45.00"]]


def cells(sweep):
    lines = summary.markdown_table(sweep).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_the_table_for_papers(files):
    sweep = begin(files)
    sweep.header["title"] = "net on data\nfour | classes"
    for level in (0.0, 5.0, 15.0, 25.0, 30.0, 35.0, 40.0, 45.0, 55.0, 65.0, 90.0):  # of more than ten the round ones
        add(sweep, level, 20 if level == 40 else 0)
    add(sweep, 40.0, 20, GLOBAL)
    sweep.header["summary"] = summary.summarise_all(sweep, 1.0)
    summary.write_markdown(sweep)
    text = files.with_suffix(".md").read_text()
    assert text.splitlines()[0] == r"net on data / four \| classes"
    (top, rule, *rows), half = cells(sweep), (100 - accuracy_columns(40, 40)["ci_low"]) / 2
    assert top == ["curve", "0 %", "40 %", "90 %", "chosen"] and len(rule) == len(top)
    none, all_ = f"0.00 ± {half:.2f}", f"100.00 ± {half:.2f}"
    assert rows == [["l1 global", "", none, "", "none"], ["l1 uniform", all_, none, all_, "35 %"]]
    end = "on 40 images; ± is half the width of the 95 % interval (Wilson's for one checkpoint). Dense: 100.00.\n"
    assert text.endswith(end)
    sweep = begin(files)
    for level in range(19):  # of which none is round, every second one
        add(sweep, level + 0.5)
    top = cells(sweep)[0]
    assert (len(top), top[2]) == (12, "2.5 %")
