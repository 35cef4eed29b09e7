"""How sure an accuracy is: intervals, paired differences, means over checkpoints, the level chosen and shown."""

import math
from itertools import takewhile
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np

from sparsity.system.errors import UserError

CONFIDENCE = 0.95
Pairs = list[tuple[np.ndarray, np.ndarray]]  # for each checkpoint, the images [N] that two networks get right


def z_quantile(confidence: float) -> float:
    """Half the width of a two-sided interval of the standard normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


Z = z_quantile(CONFIDENCE)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion, as shares (E. B. Wilson, JASA 22, 1927)."""
    share, more = correct / total, 1 + Z * Z / total
    centre = (share + Z * Z / (2 * total)) / more
    half = Z / more * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    # At 0 and at all the bound is exactly 0 or 1, which rounding would miss.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half


class Estimate(NamedTuple):
    """A value with its 95 % interval, in one unit."""

    value: float
    low: float
    high: float


def discordant(correct: np.ndarray, dense_correct: np.ndarray) -> tuple[int, int]:
    """Numbers of images that only the dense network gets right (lost) and only the other one (gained); boolean [N]."""
    return int(np.sum(dense_correct & ~correct)), int(np.sum(correct & ~dense_correct))


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's test in its exact form (Q. McNemar, Psychometrika 12, 1947): min(1, 2 P(X <= min)).

    X is binomial with one half over the `lost + gained` images of which one network alone is right; without such images
    p is 1. Below the smallest double, about 5e-324, it is 0.
    """
    n, fewer = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    # P = (C(n, fewer) + C(n, fewer - 1) + ...) / 2^n in whole numbers, which neither underflow nor cancel. The terms
    # are shares of the first one in units of 2^-192: adding thousands of numbers of n bits would take a second.
    term = tail = 1 << 192
    for k in range(fewer, 0, -1):
        term = term * k // (n - k + 1)
        tail += term
    return min(1.0, 2 * math.comb(n, fewer) * tail / (1 << (n + 192)))


def class_accuracy(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of the images of each class that are predicted as it, [classes]; nan for a class without images."""
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predictions == labels], minlength=classes)
    return np.divide(right, images, out=np.full(len(images), math.nan), where=images > 0)


def paired_difference(pairs: Pairs, confidence: float = CONFIDENCE) -> Estimate:
    """Accuracy of one network minus that of another, as a share: the mean over checkpoints, with its interval.

    `pairs` has for each checkpoint the images [N] that the two networks get right. For one checkpoint the interval is
    that of Bonett and Price (J. Educ. Behav. Stat. 37, 2012): Wald's for paired proportions after one image was added
    to each of the two discordant counts, so that it has a width even when no image differs; it covers other test
    images. For several, half its width is the root of the sum of two squares: that of the same interval for the means
    over checkpoints, image by image, and that of Student's t over checkpoints; it covers other test images and other
    checkpoints.
    """
    changes = np.array([right.astype(float) - base for right, base in pairs])
    images = np.append(changes.mean(axis=0), (1, -1))
    value, middle = float(changes.mean()), float(images.mean())
    half = z_quantile(confidence) * float(images.std()) / math.sqrt(len(images))
    if len(pairs) > 1:
        over = mean_interval(changes.mean(axis=1).tolist(), confidence)
        middle, half = value, math.hypot(half, over.high - over.value)
    return Estimate(value, max(-1.0, middle - half), min(1.0, middle + half))


def holm_intervals(comparisons: list[Pairs]) -> list[tuple[Estimate, bool]]:
    """The paired difference of each comparison, and whether it differs from 0 by Holm's procedure over all of them.

    The procedure (S. Holm, Scand. J. Stat. 6, 1979) says of no two equally accurate networks that they differ, with
    probability CONFIDENCE. With k comparisons undecided, each interval is taken at 1 - (1 - CONFIDENCE) / k; those
    without 0 are decided, and the rest is taken again. An interval is that of the step that decides it, or of the last
    one: it is without 0 exactly where the two differ.
    """
    found: dict[int, tuple[Estimate, bool]] = {}
    while open_ := [index for index in range(len(comparisons)) if index not in found]:
        confidence = simultaneous(len(open_))
        estimates = {index: paired_difference(comparisons[index], confidence) for index in open_}
        decided = {
            index for index, estimate in estimates.items() if printed(estimate.low) > 0 or printed(estimate.high) < 0
        }
        found |= {index: (estimates[index], index in decided) for index in decided or open_}
    return [found[index] for index in range(len(comparisons))]


def simultaneous(count: int) -> float:
    """The confidence at which `count` intervals hold together with probability CONFIDENCE or more (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, count)


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is nan."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t at a probability from one half, by bisection on its distribution function."""
    low, high = 0.0, 1.0
    while _t_distribution(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_distribution(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_distribution(t: float, degrees: int) -> float:
    """P(T <= t): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    series = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        series += term
    inner = 2 / math.pi * (angle + math.sin(angle) * series) if odd else math.sin(angle) * series
    return 0.5 + inner / 2


def mean_interval(values: list[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean over checkpoints with Student's t interval (Biometrika 6, 1908), which is nan around one value."""
    (mean, deviation), n = mean_and_deviation(values), len(values)
    half = t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two fixed, class-balanced halves of the test images, boolean [N]: one to choose on, the other to report on.

    Every second image of each class, in the order given, is for choosing. Raises UserError where no class has two.
    """
    choosing = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        choosing[np.flatnonzero(labels == label)[::2]] = True
    if choosing.all():
        raise UserError("two images a class are the least that a level can be chosen and reported on")
    return choosing, ~choosing


def choose_level(levels: dict[float, Pairs], choosing: np.ndarray, tolerance: float) -> float | None:
    """The highest level within `tolerance` (a share) of dense, on the images `choosing` (boolean [N]); None if none is.

    `levels` ascend; their pairs are the pruned and the dense network of each checkpoint, and the mean over checkpoints
    decides. A level counts only when every lower one of `levels` is within tolerance as well.
    """
    limit = -tolerance - 1e-9  # the margin keeps a loss of exactly the tolerance within
    passed = takewhile(lambda level: mean_change(levels[level], choosing) >= limit, levels)
    return max(passed, default=None)


def mean_change(pairs: Pairs, part: np.ndarray) -> float:
    """Accuracy of the first networks minus that of the second ones on the images `part`, mean over checkpoints."""
    return fmean(float(right[part].mean()) - float(base[part].mean()) for right, base in pairs)


def printed(share: float) -> float:
    """A share in percent with the two digits that are printed: verdicts go by them, so that they fit the figures."""
    return round(100 * share, 2)


class Verdict(NamedTuple):
    """The level chosen of a curve, None where none is, and whether the other half of the images shows it.

    `difference` to dense is that on the reporting half, nan without a level; its interval is one of `family` that hold
    together. `shown`: the interval lies above the tolerance. `shown_level` is the chosen level if that is shown, else
    the highest one below it up to which every measured level is, or None.
    """

    level: float | None
    difference: Estimate
    family: int
    shown: bool
    shown_level: float | None


def judge(curves: list[dict[float, Pairs]], labels: np.ndarray, tolerance: float) -> list[Verdict]:
    """Choose a level of each curve within `tolerance` (a share) on one half of the images, and judge it on the other.

    A curve is its ascending levels with their pairs, pruned and dense. The family is the curves that chose a level
    above 0 %: which ones, does not depend on the reporting half. Lower levels are tested upwards, up to the first that
    is not shown, an order that needs no correction for their number. With this second test, "shown" is said of a level
    whose true loss is the tolerance or more in at most 5 % of the sweeps: 2.5 % for each test, shared by the family.
    """
    choosing, reporting = halves(labels)
    chosen = [choose_level(levels, choosing, tolerance) for levels in curves]
    family, verdicts = sum(bool(level) for level in chosen), []
    confidence = simultaneous(family)

    def difference(pairs: Pairs) -> Estimate:
        return paired_difference(on(pairs, reporting), confidence)

    def is_shown(estimate: Estimate) -> bool:
        return printed(estimate.low) > -100 * tolerance

    for levels, level in zip(curves, chosen, strict=True):
        estimate = Estimate(math.nan, math.nan, math.nan) if level is None else difference(levels[level])
        shown = bool(level) and is_shown(estimate)
        lower = [other for other in levels if level and 0 < other < level]
        below = takewhile(lambda other, levels=levels: is_shown(difference(levels[other])), lower)
        verdicts.append(Verdict(level, estimate, family, shown, level if shown else max(below, default=None)))
    return verdicts


def on(pairs: Pairs, part: np.ndarray) -> Pairs:
    """The pairs on some of the images, boolean [N]."""
    return [(right[part], base[part]) for right, base in pairs]
