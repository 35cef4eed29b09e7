"""Intervals and tests against published values and exact sums, and the choice of a level."""

import math
from fractions import Fraction

import numpy as np
import pytest

from sparsity.results import statistics
from sparsity.results.statistics import (
    choose_level,
    halves,
    holm_intervals,
    judge,
    mcnemar_p,
    mean_interval,
    paired_difference,
    printed,
    simultaneous,
    wilson_interval,
)
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
    assert paired_difference([(correct, dense)]) == pytest.approx((-0.05, p - q - half, p - q + half), abs=1e-12)
    wider = paired_difference([(correct, dense)], 0.99)
    assert (wider.high - wider.low) / (2 * half) == pytest.approx(2.5758293035489004 / Z, abs=1e-9)
    for right, dense_right in ((1, 1), (0, 0), (0, 1), (1, 0)):  # there is an interval even around these
        found = paired_difference([(np.full(100, bool(right)), np.full(100, bool(dense_right)))])
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


def test_several_checkpoints_cover_images_and_checkpoints():
    base = np.ones(100, dtype=bool)
    pairs = [(np.arange(100) >= lost, base) for lost in (2, 4, 9)]
    changes = np.append(np.mean([right.astype(float) - 1 for right, _ in pairs], axis=0), (1, -1))
    over_images = Z * np.std(changes) / math.sqrt(102)
    over_checkpoints = T2 * np.std([0.02, 0.04, 0.09], ddof=1) / math.sqrt(3)
    half = math.hypot(over_images, over_checkpoints)
    assert paired_difference(pairs) == pytest.approx((-0.05, -0.05 - half, -0.05 + half), abs=1e-9)
    alike = paired_difference(pairs[:1] * 2)  # two that lose the same are no proof that all do
    assert alike.high - alike.low > 0.05


def with_lost(lost, images=1000):
    return [(np.arange(images) >= lost, np.ones(images, dtype=bool))]


def test_holm_decides_in_steps_and_an_interval_is_without_0_exactly_where_it_decides():
    assert simultaneous(4) == pytest.approx(0.9875) and simultaneous(0) == simultaneous(1) == 0.95
    single = [paired_difference(with_lost(lost)) for lost in (30, 8, 7, 1)]
    assert [estimate.high < 0 for estimate in single] == [True, True, True, False]
    found = holm_intervals([with_lost(lost) for lost in (30, 8, 7, 1)])
    # At 1 - 0.05/4 only 30 and 8 differ; at 1 - 0.05/2 7 does; then 1 is left alone.
    assert [differs for _, differs in found] == [True, True, True, False]
    confidences = [1 - 0.05 / count for count in (4, 4, 2, 1)]
    expected = [
        paired_difference(with_lost(*pair[:1]), pair[1]) for pair in zip((30, 8, 7, 1), confidences, strict=True)
    ]
    assert [estimate for estimate, _ in found] == expected
    assert [differs for _, differs in holm_intervals([with_lost(7)] * 4)] == [False] * 4  # each alone would
    assert holm_intervals([]) == []


def test_class_accuracy_by_hand():
    labels, predictions = np.array([0, 0, 0, 0, 1, 1, 3]), np.array([0, 0, 0, 1, 1, 0, 3], dtype=np.uint8)
    found = statistics.class_accuracy(predictions, labels, 5)
    assert found == pytest.approx([0.75, 0.5, math.nan, 1.0, math.nan], nan_ok=True)  # two classes without images


LABELS = np.repeat(np.arange(2), 100)
CHOOSING, REPORTING = halves(LABELS)


def right(choosing, reporting):
    """Images [200] that a network gets right: these shares of each half."""
    result = np.zeros(200, dtype=bool)
    for part, share in ((CHOOSING, choosing), (REPORTING, reporting)):
        result[np.flatnonzero(part)[: round(share * 100)]] = True
    return result


def test_the_halves_are_balanced_and_apart():
    choosing, reporting = halves(np.arange(60) % 3)
    assert np.bincount(np.arange(60)[choosing] % 3).tolist() == [10, 10, 10]
    assert (choosing != reporting).all()
    with pytest.raises(UserError, match="two images a class"):  # one cannot be halved
        halves(np.array([0, 1]))


def test_the_level_is_chosen_on_one_half_alone():
    dense = right(0.9, 0.9)
    # 40 % looks fine on the choosing half alone, 60 % on the reporting half alone.
    levels = {0: right(0.9, 0.9), 40: right(0.895, 0.1), 60: right(0.5, 0.9)}
    assert choose_level({level: [(found, dense)] for level, found in levels.items()}, CHOOSING, 0.01) == 40


def test_every_lower_level_is_within_tolerance_as_well():
    for shares, level in (
        ([0.9, 0.9, 0.9], 100),
        ([0.9, 0.5, 0.9], 0),  # a lower level out of tolerance ends the choice
        ([0.5, 0.9, 0.9], None),
        ([0.9, 0.89, 0.88], 50),  # a loss of exactly the tolerance is within it
    ):
        levels = {at: [(right(share, 0.9), right(0.9, 0.9))] for at, share in zip((0, 50, 100), shares, strict=True)}
        assert choose_level(levels, CHOOSING, 0.01) == level
    assert choose_level({}, CHOOSING, 0.01) is None


def test_several_checkpoints_decide_by_their_mean():
    dense = [right(0.9, 0.9), right(0.8, 0.8), right(0.85, 0.85)]
    for last, level in ((0.85, 50), (0.82, None)):
        found = [right(0.91, 0.9), right(0.78, 0.79), right(last, 0.82)]
        assert choose_level({50: list(zip(found, dense, strict=True))}, CHOOSING, 0.01) == level


def curve(**losses):
    """Levels that lose so many of the 100 images of each half, (choosing, reporting), against a dense network."""
    shares = {float(name[1:]): pair for name, pair in losses.items()}
    return {level: [(right(*(1 - lost / 100 for lost in pair)), right(1, 1))] for level, pair in shares.items()}


def test_a_chosen_level_is_judged_on_the_other_half_and_else_the_levels_below_it():
    def found(*curves, tolerance=0.08):
        return [(verdict.level, verdict.shown, verdict.shown_level) for verdict in judge(curves, LABELS, tolerance)]

    # One image lost of 100: the interval reaches to about -0.044, seven lost: to -0.133.
    assert found(curve(_0=(0, 0), _5=(1, 1))) == [(5, True, 5)]
    assert found(curve(_5=(1, 1), _9=(5, 7), _20=(50, 1))) == [(9, False, 5)]
    assert found(curve(_5=(1, 1), _9=(5, 7), _12=(1, 1), _20=(8, 7))) == [(20, False, 5)]  # 9 % ends the order
    assert found(curve(_0=(0, 0), _9=(5, 7))) == [(9, False, None)]  # 0 % is not shown instead
    assert found(curve(_0=(0, 0), _5=(9, 0))) == [(0, False, None)]
    assert found(curve(_5=(9, 0)), {}) == [(None, False, None)] * 2
    assert math.isnan(judge([{}], LABELS, 0.08)[0].difference.low)


def test_the_interval_and_the_verdict_are_corrected_for_the_curves_that_chose_a_level_above_0():
    one, others = curve(_5=(1, 2)), [curve(_0=(0, 0), _5=(9, 9)), curve(_5=(9, 9))]
    difference = paired_difference([(right(0.99, 0.98)[REPORTING], right(1, 1)[REPORTING])])
    tolerance = 0.0001 - printed(difference.low) / 100  # which the interval just stays within
    (alone, *_), (among, *_) = judge([one, *others], LABELS, tolerance), judge([one] * 3, LABELS, tolerance)
    assert (alone.family, alone.difference, alone.shown) == (1, difference, True)
    assert (among.family, among.shown) == (3, False) and among.difference.low < difference.low
    for loss in (0.0001, -0.0001):  # verdicts go by the digits that are printed
        (verdict,) = judge([one], LABELS, -printed(difference.low) / 100 + loss)
        assert verdict.shown == (loss > 0)


@pytest.mark.parametrize("losses", [(0.01, 0.01, 0.01), (0.002, 0.008, 0.01)])
def test_a_level_that_loses_the_tolerance_is_called_shown_in_at_most_one_of_twenty_sweeps(losses):
    """Simulated sweeps of four curves with these true losses, and of one with none of it, which is shown mostly."""
    draw, labels, sweeps = np.random.default_rng(0), np.zeros(2000, dtype=int), 200

    def simulated(dense, losses):
        chance = draw.random(len(dense))
        return {
            level: [(np.where(dense, chance > (0.01 + loss) / 0.9, chance < 0.01 / 0.1), dense)]
            for level, loss in enumerate(losses, 1)
        }

    wrong = right_ = 0
    for _ in range(sweeps):
        dense = draw.random(len(labels)) < 0.9
        verdicts = judge([simulated(dense, losses) for _ in range(4)], labels, 0.01)
        wrong += any(verdict.shown_level and losses[verdict.shown_level - 1] >= 0.01 for verdict in verdicts)
        right_ += judge([simulated(dense, [0.0])], labels, 0.01)[0].shown
    assert 0 < wrong <= 0.05 * sweeps and 0.3 * sweeps < right_
