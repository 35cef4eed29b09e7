"""Intervals against published values, and the choice of a level."""

import math
from fractions import Fraction

import numpy as np
import pytest

from sparsity.results.statistics import (
    choose_level,
    choosing_half,
    class_accuracy,
    discordant,
    holm,
    mcnemar_p,
    mean_and_deviation,
    mean_interval,
    paired_difference,
    t_quantile,
    wilson_interval,
)
from sparsity.system.errors import UserError


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_intervals(correct, total, low, high):
    found = wilson_interval(correct, total)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_both_ends_and_mirrored():
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low), abs=1e-15)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(11, 10)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706204736432095), (2, 4.302652729911275), (3, 3.182446305284263), (4, 2.7764451051977987)],
)
def test_t_quantiles(degrees, quantile):
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-9)
    assert t_quantile(0.025, degrees) == pytest.approx(-quantile, abs=1e-9)


def test_t_quantile_approaches_the_normal_one():
    z = 1.959963984540054
    # The next term of its expansion in powers of 1 / n is far below the tolerance.
    assert t_quantile(0.975, 2_000) == pytest.approx(z + (z**3 + z) / (4 * 2_000), abs=2e-6)


def test_paired_difference_by_hand():
    first = np.array([True] * 80 + [False] * 20)
    second = np.array([True] * 78 + [False] * 2 + [True] * 7 + [False] * 13)
    found = paired_difference(first, second)  # 2 gained, 7 lost
    assert found.value == pytest.approx(-0.05)
    p, q = 3 / 102, 8 / 102
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / 102)
    assert (found.low, found.high) == pytest.approx((p - q - half, p - q + half), abs=1e-12)


def test_equal_predictions_differ_by_nothing_but_have_an_interval():
    same = np.ones(100, dtype=bool)
    found = paired_difference(same, same)
    assert found.value == 0
    assert found.low < 0 < found.high


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = mean_and_deviation([5.0])
    assert mean == 5
    assert math.isnan(deviation)
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-9)


def test_the_interval_around_one_value_is_unknown():
    found = mean_interval([5.0])
    assert found.value == 5
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (0, 0, 1.0),
        (1, 0, 1.0),
        (7, 7, 1.0),
        (7, 8, 1.0),
        (6, 0, 2 / 64),
        (3, 8, 2 * (1 + 11 + 55 + 165) / 2048),
    ],
)
def test_mcnemar_by_hand(lost, gained, p):
    assert mcnemar_p(lost, gained) == pytest.approx(p, abs=1e-12)
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)


@pytest.mark.parametrize(("lost", "gained"), [(150, 86), (600, 500), (40, 90), (1200, 1000), (999, 1)])
def test_mcnemar_is_the_exact_sum(lost, gained):
    n = lost + gained
    exact = Fraction(2 * sum(math.comb(n, k) for k in range(min(lost, gained) + 1)), 2**n)
    assert mcnemar_p(lost, gained) == float(exact)


def test_mcnemar_at_the_ends():
    assert mcnemar_p(1000, 0) == 2.0**-999
    assert mcnemar_p(60_000, 0) == 0  # below the smallest double, without an error
    assert mcnemar_p(30_001, 29_999) == pytest.approx(0.9967, abs=1e-4)
    assert mcnemar_p(30_000, 29_999) == 1
    # Against the normal approximation with continuity correction.
    normal = math.erfc((30_500 - 29_500 - 1) / math.sqrt(60_000) / math.sqrt(2))
    assert mcnemar_p(30_500, 29_500) == pytest.approx(normal, rel=1e-2)
    with pytest.raises(ValueError, match="not counts"):
        mcnemar_p(-1, 3)


def test_discordant_images_are_counted_both_ways():
    assert discordant(np.array([True, True, False, False]), np.array([True, False, True, True])) == (2, 1)


def test_holm_by_hand():
    # Holm's procedure with four tests: 4 x 0.005, 3 x 0.01, then 2 x 0.03 = 0.06, which 1 x 0.04 may not undercut.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-12)
    assert holm([0.5, 0.9, 0.7]) == [1, 1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_class_accuracy_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 3], dtype=np.int64)
    predictions = np.array([0, 0, 0, 1, 1, 0, 3], dtype=np.uint8)
    found = class_accuracy(predictions, labels, 5)
    assert found[[0, 1, 3]].tolist() == [0.75, 0.5, 1.0]
    assert np.isnan(found[[2, 4]]).all()  # classes without images


def test_the_halves_are_balanced_and_disjoint():
    labels = np.arange(60) % 3
    half = choosing_half(labels)
    assert half.sum() == 30
    assert np.bincount(labels[half]).tolist() == np.bincount(labels[~half]).tolist() == [10, 10, 10]


LABELS = np.repeat(np.arange(2), 100)


def right(share_choosing, share_reporting):
    """Images that a network gets right: so many of each half."""
    result = np.zeros(200, dtype=bool)
    half = choosing_half(LABELS)
    for part, share in ((half, share_choosing), (~half, share_reporting)):
        result[np.flatnonzero(part)[: round(share * 100)]] = True
    return result


def test_the_level_is_chosen_on_one_half_and_reported_on_the_other():
    dense = right(0.90, 0.80)
    # 40 % looks fine on the choosing half alone, 60 % on the reporting half alone.
    rows = [[right(0.90, 0.80)], [right(0.895, 0.70)], [right(0.50, 0.80)]]
    choice = choose_level([0, 40, 60], rows, [dense], LABELS, tolerance=0.01)
    assert choice.level == 40
    assert (choice.images, choice.accuracy, choice.dense) == (100, 0.70, 0.80)
    assert choice.difference.value == pytest.approx(-0.10)
    assert choice.difference.low < -0.10 < choice.difference.high
    assert (choice.lost, choice.gained) == (10, 0)


def test_a_lower_level_out_of_tolerance_ends_the_choice():
    dense = right(0.9, 0.9)
    rows = [[right(0.9, 0.9)], [right(0.5, 0.5)], [right(0.9, 0.9)]]
    assert choose_level([0, 20, 40], rows, [dense], LABELS, 0.01).level == 0
    assert choose_level([20, 40], rows[1:], [dense], LABELS, 0.01).level is None


def test_a_loss_of_exactly_the_tolerance_is_within_it():
    assert choose_level([10], [[right(0.89, 0.9)]], [right(0.9, 0.9)], LABELS, 0.01).level == 10
    assert choose_level([10], [[right(0.88, 0.9)]], [right(0.9, 0.9)], LABELS, 0.01).level is None


def test_several_checkpoints_decide_by_their_mean():
    dense = [right(0.9, 0.9), right(0.8, 0.8), right(0.85, 0.85)]
    rows = [[right(0.91, 0.9), right(0.78, 0.79), right(0.85, 0.82)]]
    choice = choose_level([50], rows, dense, LABELS, 0.01)
    assert choice.level == 50
    assert choice.difference.value == pytest.approx(np.mean([0, -0.01, -0.03]))
    spread = np.std([0, -0.01, -0.03], ddof=1)
    half = 4.302652729911275 * spread / math.sqrt(3)
    assert choice.difference.high - choice.difference.value == pytest.approx(half, abs=1e-9)
    assert (choice.lost, choice.gained) == (None, None)


def test_one_image_a_class_cannot_be_halved():
    with pytest.raises(UserError, match="two images a class"):
        choose_level([0], [[np.ones(2, dtype=bool)]], [np.ones(2, dtype=bool)], np.array([0, 1]), 0.01)
