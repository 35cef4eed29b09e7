"""Curves against each other: the pairs asked for, levels that are the same, intervals and words."""

import pytest
from helpers import add_lost, bare_sweep

from sparsity.results import comparison
from sparsity.results.comparison import Asked, allocation_sentence, asked_pairs, compare_points, furthest
from sparsity.results.statistics import mcnemar_p
from sparsity.results.verdicts import summarise_all
from sparsity.system.methods import Curve

UNIFORM, LAMP = Curve("l1", "uniform", "reconstruction"), Curve("l1", "lamp", "reconstruction")
PLAIN, RANDOM = Curve("l1", "lamp", "none"), Curve("random", "lamp", "none")
# Curve -> level -> images lost of twenty, ratio of multiply-adds: uniform at 80 and lamp at 95 % leave a fifth.
ROWS = {
    UNIFORM: {0.0: (0, 1), 60.0: (0, 2.5), 80.0: (2, 5), 95.0: (18, 20)},
    LAMP: {0.0: (0, 1), 60.0: (0, 1.6), 80.0: (0, 2.4), 95.0: (2, 4.8)},
    PLAIN: {0.0: (0, 1), 60.0: (0, 1.6), 95.0: (19, 4.8)},
    RANDOM: {95.0: (20, 4.8)},
}


def made(files, rows=ROWS, checkpoints=("one.pth",)):
    sweep = bare_sweep(files, checkpoints)
    for curve, levels in rows.items():
        for level, (lost, ratio) in levels.items():
            for name in checkpoints:
                add_lost(sweep, level, lost, curve, name, sparsity=level, macs_ratio=ratio)
    return sweep


def asked(sweep, tolerance=10):
    pairs = asked_pairs(sweep, summarise_all(sweep, tolerance))
    return [(pair.part, pair.axis, pair.first[:2], pair.second[:2]) for pair in pairs]


def test_the_curve_that_goes_furthest_is_compared_with_those_that_differ_in_one_part(files):
    assert asked(made(files)) == [
        ("criterion", "weights", (PLAIN, 95), (RANDOM, 95)),  # no chosen level in common: the lowest
        ("allocation", "weights", (LAMP, 95), (UNIFORM, 95)),
        ("allocation", "macs", (UNIFORM, 80), (LAMP, 95)),
        ("recover", "weights", (LAMP, 95), (PLAIN, 95)),
    ]
    # Without a tolerance lamp goes to 80 % of the weights, and uniform leaves fewest multiply-adds, at 60 %.
    assert asked(made(files), 0.0)[1:3] == [
        ("allocation", "weights", (LAMP, 80), (UNIFORM, 80)),
        ("allocation", "macs", (UNIFORM, 60), (LAMP, 80)),
    ]
    assert asked(made(files, {LAMP: ROWS[LAMP]})) == [] == asked(made(files, {LAMP: {}}))


def test_the_curve_that_goes_furthest_is_the_more_accurate_one_of_those_that_save_as_much(files):
    def found(rows, axis, tolerance=10):
        sweep = made(files, rows)
        return furthest(sweep, summarise_all(sweep, tolerance), axis)

    assert (found(ROWS, "weights"), found(ROWS, "macs")) == (LAMP, UNIFORM)
    for gap, best in ((0.4, PLAIN), (0.6, LAMP)):
        assert found({LAMP: {80.0 + gap: (2, 2)}, PLAIN: {80.0: (1, 2)}}, "weights") == best
    assert found({LAMP: {80.0: (9, 2)}, PLAIN: {10.0: (2, 1.1)}}, "weights") == PLAIN  # 80 % lose too much


def test_levels_are_the_same_within_the_stated_margins_alone(files):
    for gap, found in ((0.5, 1), (0.6, 0)):
        rows = {LAMP: {80.0: (0, 2)}, PLAIN: {80.0 + gap: (0, 2)}}
        assert len(asked(made(files, rows))) == found
    for ratio, found in ((2.19, 2), (1.83, 2), (2.21, 1), (1.81, 1)):
        assert len(asked(made(files, {LAMP: {80.0: (0, 2)}, UNIFORM: {80.0: (0, ratio)}}))) == found
    assert asked(made(files, {LAMP: {0.0: (0, 1)}, UNIFORM: {0.0: (0, 1)}})) == []  # the dense network twice
    gone = {100.0: (20, float("inf"))}
    assert asked(made(files, {LAMP: gone, UNIFORM: gone})) == []  # nothing is left of either
    nearly = {99.9: (20, 1000.0)} | gone
    assert asked(made(files, {LAMP: nearly, UNIFORM: nearly})) == [
        ("allocation", axis, (LAMP, 99.9), (UNIFORM, 99.9)) for axis in comparison.AXES
    ]


def test_figures_are_those_of_the_reporting_half_by_holm_over_all_pairs(files):
    sweep = made(files)
    entries = compare_points(sweep, asked_pairs(sweep, summarise_all(sweep, 10)))
    assert [entry["better"] for entry in entries] == [None, "first", None, "first"]
    weights, macs = entries[1:3]
    sides = {"first": (LAMP, 90.0, 100 / 4.8), "second": (UNIFORM, 10.0, 5.0)}
    for side, (curve, accuracy, left) in sides.items():
        assert {name: weights[side][name] for name in Curve._fields} == curve._asdict()
        assert [weights[side][name] for name in ("level", "sparsity", "accuracy")] == [95, 95, accuracy]
        assert weights[side]["macs"] == pytest.approx(left, abs=1e-6)
    assert (weights["difference"], weights["lost"], weights["gained"], weights["images"]) == (80, 0, 16, 20)
    assert weights["mcnemar_p"] == pytest.approx(mcnemar_p(16, 0), rel=1e-5)
    assert macs["difference"] == 0 and macs["difference_low"] < 0 < macs["difference_high"]
    assert {entry["pairs"] for entry in entries} == {4}
    points = comparison.measured_points(sweep)
    pair = Asked("weights", "recover", points[LAMP][-1], points[PLAIN][-1])
    (alone,) = compare_points(sweep, [pair])
    assert alone["difference_low"] > entries[3]["difference_low"] and compare_points(sweep, []) == []
    add_lost(sweep, 95.0, 2, LAMP, also_lost=5)
    (other,) = compare_points(sweep, [pair])
    assert (other["first"]["accuracy"], other["lost"], other["gained"]) == (65, 0, 12)


def test_the_words_give_both_shares_and_never_say_that_nothing_differs(files):
    sweep = made(files)
    entries = compare_points(sweep, asked_pairs(sweep, summarise_all(sweep, 10)))
    low, high = entries[2]["difference_low"], entries[2]["difference_high"]
    assert entries[2]["sentence"] == (
        "l1 uniform + reconstruction at 80 % against l1 lamp + reconstruction at 95 %, the same multiply-adds "
        "(80.0 % and 95.0 % of the weights gone, 20.0 % and 20.8 % of the multiply-adds left): "
        "90.00 % against 90.00 % on the 20 images for reporting, difference +0.00 points "
        f"(95 % interval {low:+.2f} to {high:+.2f}, Holm over 4 pairs): "
        "no difference is shown."
    )
    assert entries[1]["sentence"].endswith("): l1 lamp + reconstruction is more accurate.")
    assert allocation_sentence(entries) == (
        "Allocations at the same share of weights, for bytes: lamp at 95 % is more accurate than uniform at 95 %. "
        "At the same multiply-adds, for arithmetic: uniform at 80 % is not shown to differ from lamp at 95 %."
    )
    assert allocation_sentence([]) == ""
    second = [entry | {"better": "second"} for entry in entries if entry["axis"] == "weights"]
    assert "uniform at 95 % is more accurate than lamp at 95 %. At" in allocation_sentence(second)
    assert allocation_sentence(second).endswith("arithmetic: no two measured levels can be compared.")


def test_several_checkpoints_are_compared_by_their_mean_and_only_with_the_same_ones(files):
    names = ("one.pth", "two.pth")
    sweep = made(files, checkpoints=names)
    entries = compare_points(sweep, asked_pairs(sweep, summarise_all(sweep, 10)))
    assert [entry["lost"] for entry in entries] == [None] * 4
    assert all(", over 2 checkpoints)" in entry["sentence"] for entry in entries)
    add_lost(sweep, 95.0, 0, Curve("l1", "erk", "reconstruction"), sparsity=95.0, macs_ratio=4.8)
    assert "erk" not in str(asked(sweep))
