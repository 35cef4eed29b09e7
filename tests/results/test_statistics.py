"""Intervals and tests against published values and exact sums, and the choice of a level."""

import math
from fractions import Fraction

import numpy as np
import pytest

from sparsity.results import statistics
from sparsity.results.statistics import choose_level, choosing_half, holm, mcnemar_p, mean_interval, wilson_interval
from sparsity.system.errors import UserError

Z = 1.959963984540054
T2 = 4.302652729911275  # Student's t of two degrees


def test_wilson_against_published_intervals_and_exactly_at_none_and_at_all():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, total), (low, high) in published.items():
        assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
        assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    for total in range(1, 1000):
        assert wilson_interval(0, total)[0] == 0 < wilson_interval(0, total)[1] < 1
        assert 0 < wilson_interval(total, total)[0] < wilson_interval(total, total)[1] == 1


def test_means_over_checkpoints_have_student_s_interval():
    for degrees, quantile in ((1, 12.706204736432095), (2, T2), (3, 3.182446305284263), (4, 2.7764451051977987)):
        assert statistics.t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-9)
    large = Z + (Z**3 + Z) / (4 * 2_000)  # the first terms of its expansion in powers of 1 / n
    assert statistics.t_quantile(0.975, 2_000) == pytest.approx(large, abs=2e-6)
    assert statistics.mean_and_deviation([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - T2 / math.sqrt(3), 2 + T2 / math.sqrt(3)), abs=1e-9)
    assert mean_interval([5.0]) == pytest.approx((5, math.nan, math.nan), nan_ok=True)  # of one, it is unknown


def test_paired_difference_by_hand_and_of_networks_that_are_always_right_or_wrong():
    correct = np.array([True] * 80 + [False] * 20)
    dense = np.array([True] * 78 + [False] * 2 + [True] * 7 + [False] * 13)
    assert statistics.discordant(correct, dense) == (7, 2)
    p, q = 3 / 102, 8 / 102
    half = Z * math.sqrt((p + q - (p - q) ** 2) / 102)
    assert statistics.paired_difference(correct, dense) == pytest.approx((-0.05, p - q - half, p - q + half), abs=1e-12)
    for right, dense_right in ((1, 1), (0, 0), (0, 1), (1, 0)):  # there is an interval even around these
        found = statistics.paired_difference(np.full(100, bool(right)), np.full(100, bool(dense_right)))
        assert found.value == right - dense_right
        assert -1 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_mcnemar_is_the_exact_sum():
    for lost, gained in ((0, 0), (1, 0), (7, 8), (6, 0), (10, 2), (150, 86), (600, 500), (1200, 1000), (999, 1)):
        n = lost + gained
        exact = min(Fraction(1), Fraction(2 * sum(math.comb(n, k) for k in range(min(lost, gained) + 1)), 2**n))
        assert mcnemar_p(lost, gained) == mcnemar_p(gained, lost) == float(exact)
    assert (mcnemar_p(1000, 0), mcnemar_p(30_000, 29_999)) == (2.0**-999, 1)
    assert mcnemar_p(60_000, 0) == 0  # below the smallest double, without an error
    # Against the normal approximation with continuity correction.
    normal = math.erfc((30_500 - 29_500 - 1) / math.sqrt(60_000) / math.sqrt(2))
    assert mcnemar_p(30_500, 29_500) == pytest.approx(normal, rel=1e-2)


def test_holm_by_hand():
    # Four tests: 4 x 0.005, 3 x 0.01, then 2 x 0.03 = 0.06, which 1 x 0.04 may not undercut.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-12)
    assert holm([0.5, 0.9, 0.7]) == [1, 1, 1]
    assert (holm([0.02, 0.02]), holm([0.04]), holm([])) == ([0.04, 0.04], [0.04], [])


def test_class_accuracy_by_hand():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 3]), np.array([0, 0, 0, 1, 1, 0, 3], dtype=np.uint8)
    found = statistics.class_accuracy(predictions, labels, 5)
    assert found == pytest.approx([0.75, 0.5, math.nan, 1.0, math.nan], nan_ok=True)  # two classes without images


LABELS = np.repeat(np.arange(2), 100)


def right(choosing, reporting):
    """Images [200] that a network gets right: these shares of each half."""
    result, half = np.zeros(200, dtype=bool), choosing_half(LABELS)
    for part, share in ((half, choosing), (~half, reporting)):
        result[np.flatnonzero(part)[: round(share * 100)]] = True
    return result


def test_the_level_is_chosen_on_one_half_and_reported_on_the_other():
    half = choosing_half(np.arange(60) % 3)  # the halves are balanced
    assert np.bincount(np.arange(60)[half] % 3).tolist() == [10, 10, 10]
    # 40 % looks fine on the choosing half alone, 60 % on the reporting half alone.
    rows = [[right(0.90, 0.80)], [right(0.895, 0.70)], [right(0.50, 0.80)]]
    choice = choose_level([0, 40, 60], rows, [right(0.90, 0.80)], LABELS, tolerance=0.01)
    assert (choice.level, choice.images, choice.accuracy, choice.dense) == (40, 100, 0.70, 0.80)
    assert choice.difference.value == pytest.approx(-0.10)
    assert choice.difference.low < -0.10 < choice.difference.high
    assert (choice.lost, choice.gained) == (10, 0)
    with pytest.raises(UserError, match="two images a class"):  # one cannot be halved
        choose_level([0], [[np.ones(2, dtype=bool)]], [np.ones(2, dtype=bool)], np.array([0, 1]), 0.01)


def test_every_lower_level_is_within_tolerance_as_well():
    for shares, level in (
        ([0.9, 0.9, 0.9], 100),
        ([0.9, 0.5, 0.9], 0),  # a lower level out of tolerance ends the choice
        ([0.5, 0.9, 0.9], None),
        ([0.9, 0.89, 0.88], 50),  # a loss of exactly the tolerance is within it
    ):
        rows = [[right(share, 0.9)] for share in shares]
        assert choose_level([0, 50, 100], rows, [right(0.9, 0.9)], LABELS, 0.01).level == level


def test_several_checkpoints_decide_by_their_mean():
    dense = [right(0.9, 0.9), right(0.8, 0.8), right(0.85, 0.85)]
    rows = [[right(0.91, 0.9), right(0.78, 0.79), right(0.85, 0.82)]]
    choice = choose_level([50], rows, dense, LABELS, 0.01)
    mean, half = np.mean([0, -0.01, -0.03]), T2 * np.std([0, -0.01, -0.03], ddof=1) / math.sqrt(3)
    assert choice.difference == pytest.approx((mean, mean - half, mean + half), abs=1e-9)
    assert (choice.level, choice.lost, choice.gained) == (50, None, None)
