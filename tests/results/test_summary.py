"""The tables of a sweep."""

import math

import numpy as np
import pytest
from helpers import add_lost, bare_sweep

from sparsity.results import summary, verdicts
from sparsity.results.rows import accuracy_columns
from sparsity.system.methods import Curve

UNIFORM, GLOBAL = Curve("l1", "uniform", "none"), Curve("l1", "global", "none")
NAMES = ("one.pth", "two.pth")


def test_the_table_shows_every_level(files):
    sweep = bare_sweep(files)
    for level, lost, ratio in ((0.0, 0, 1.0), (40.0, 20, 2.5), (99.5, 20, 1234.5), (100.0, 15, math.inf)):
        add_lost(sweep, level, lost, compression=ratio, macs_ratio=ratio)
    head, curve, *lines = summary.summary_table(sweep).splitlines()
    assert "95 % interval" in head and head.endswith("McNemar p") and curve == "-- l1 uniform --"
    shown = [line.split()[:3:2] for line in lines]
    assert shown == [["0", "100.00"], ["40", "0.00"], ["99.5", "0.00"], ["100", "25.00"]]
    assert [float(line.split()[-1]) for line in lines[:2]] == pytest.approx([1, 2.0**-39], rel=1e-2)
    assert {len(line) for line in lines} == {len(head)}
    assert "2.50x       2.50x " in lines[1] and "none left   none left " in lines[3]


def test_several_checkpoints_are_averaged_over_the_levels_that_all_have(files):
    sweep = bare_sweep(files, NAMES)
    for name, level, lost in ((0, 0.0, 0), (0, 3.0, 0), (0, 40.0, 0), (1, 0.0, 0), (1, 40.0, 10)):
        add_lost(sweep, level, lost, checkpoint=NAMES[name])
    assert sweep.checkpoints_of(UNIFORM) == list(NAMES)
    head, _, *lines = summary.summary_table(sweep).splitlines()
    assert "+/- sd" in head
    assert [line.split()[0] for line in lines] == ["0", "40"]
    assert lines[1].split()[2:4] == ["75.00", f"{np.std([100, 50], ddof=1):.2f}"] and lines[1].endswith(" -")
    width = 12.706204736432095 * np.std([100, 50], ddof=1) / np.sqrt(2)
    assert cells(sweep)[-1][1:] == ["100.00 ± 0.00", f"75.00 ± {width:.2f}", ""]
    assert "Student's t over 2 checkpoints" in summary.markdown_table(sweep)


def test_the_layers_that_suffer_most_come_first(files):
    sweep = bare_sweep(files)
    for name, lost in (("stem", 9), ("down", 15), ("head", 1)):
        for level in (50.0, 90.0):
            add_lost(sweep, level, lost * (level > 50), Curve("l1", f"only {name}", "none"))
    head, *lines = summary.sensitivity_table(sweep, most=2).splitlines()
    assert "of 3" in head
    assert [line.split() for line in lines] == [["down", "90", "-75.00"], ["stem", "90", "-45.00"]]


def cells(sweep):
    lines = summary.markdown_table(sweep).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_the_table_for_papers(files):
    sweep = bare_sweep(files)
    sweep.header["title"] = "net on data\nfour | classes"
    for level in (0.0, 5.0, 15.0, 20.0, 25.0, 35.0, 40.0, 45.0, 65.0, 80.0, 90.0):  # of more than ten the round ones
        add_lost(sweep, level, 20 if level == 40 else 0)
    add_lost(sweep, 40.0, 20, GLOBAL)
    sweep.header["summary"] = verdicts.summarise_all(sweep, 1.0)
    text = summary.markdown_table(sweep)
    assert text.splitlines()[0] == r"net on data / four \| classes"
    (top, rule, *rows), half = cells(sweep), (100 - accuracy_columns(40, 40)["ci_low"]) / 2
    assert top == ["curve", "0 %", "20 %", "40 %", "80 %", "90 %", "chosen"] and len(rule) == len(top)
    none, all_ = f"0.00 ± {half:.2f}", f"100.00 ± {half:.2f}"
    sparse, full = ["l1 global", "", "", none, "", "", "none"], [all_, all_, none, all_, all_, "35 %, not shown"]
    assert rows == [sparse, ["l1 uniform", *full]]
    start, rest = text.splitlines()[-1].split(" Dense: 100.00. ")
    assert start.endswith("on 40 images; ± is half the width of the 95 % interval (Wilson's for one checkpoint).")
    words = [
        "like every lower measured level, is within 1 point of dense on one half",
        "(simultaneous over",
        "different",
    ]
    assert [word in rest for word in words] == [True, False, True]  # one curve chose a level; the grids differ
    assert rest.endswith(verdicts.scope_text(sweep))
    sweep = bare_sweep(files)
    for level in range(19):  # of which none is round, every second one
        add_lost(sweep, level + 0.5)
    top = cells(sweep)[0]
    assert (len(top), top[2]) == (12, "2.5 %")
