"""How sure a measured accuracy is: intervals, paired differences, means over checkpoints, the chosen level."""

import math
from itertools import takewhile
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np

from sparsity.system.errors import UserError

UPPER = 0.975  # the probability below the upper end of a two-sided 95 % interval
Z = NormalDist().inv_cdf(UPPER)


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


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p values in the order given, which hold for all tests together (S. Holm, Scand. J. Stat. 6, 1979)."""
    order, adjusted = np.argsort(p_values, kind="stable"), np.empty(len(p_values))
    raised = np.arange(len(p_values), 0, -1) * np.array(p_values)[order]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(raised))
    return adjusted.tolist()


def class_accuracy(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of the images of each class that are predicted as it, [classes]; nan for a class without images."""
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predictions == labels], minlength=classes)
    return np.divide(right, images, out=np.full(len(images), math.nan), where=images > 0)


def paired_difference(correct: np.ndarray, dense_correct: np.ndarray) -> Estimate:
    """Accuracy of a network minus that of the dense one, as a share, from the images [N] that each gets right.

    The interval is that of Bonett and Price (J. Educ. Behav. Stat. 37, 2012): Wald's for paired proportions after
    adding one to each of the two discordant counts, so that it has a width even when no image differs.
    """
    n = len(correct)
    lost, gained = discordant(correct, dense_correct)
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Estimate((gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


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


def mean_interval(values: list[float]) -> Estimate:
    """Mean over checkpoints with Student's t interval (Biometrika 6, 1908), which is nan around one value."""
    (mean, deviation), n = mean_and_deviation(values), len(values)
    half = t_quantile(UPPER, n - 1) * deviation / math.sqrt(n) if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def choosing_half(labels: np.ndarray) -> np.ndarray:
    """The fixed, class-balanced half of the test images on which a level is chosen: boolean [N].

    Every second image of each class, in the order given; the other half is for the report.
    """
    half = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        half[np.flatnonzero(labels == label)[::2]] = True
    return half


class Choice(NamedTuple):
    """The highest level within tolerance, with its figures on the `images` not used for choosing (shares, not percent).

    `level` is None when no level is within tolerance, and the shares are nan. `lost` and `gained` count images; they
    are None with several checkpoints, which share their images.
    """

    level: float | None
    images: int
    accuracy: float = math.nan
    dense: float = math.nan
    difference: Estimate = Estimate(math.nan, math.nan, math.nan)
    lost: int | None = None
    gained: int | None = None


def choose_level(
    levels: list[float], correct: list[list[np.ndarray]], dense: list[np.ndarray], labels: np.ndarray, tolerance: float
) -> Choice:
    """Choose on one half of the images the highest level within `tolerance` (a share) of dense, report on the other.

    `levels` ascend; `correct[i][c]` is boolean [N], the images that checkpoint c gets right at level i, and `dense[c]`
    those that it gets right unpruned. A level counts only when every lower one is within tolerance as well. With
    several checkpoints their mean decides, and the interval is over checkpoints instead of images. Raises UserError
    where no class has two images, one for each half.
    """
    choosing = choosing_half(labels)
    reporting = ~choosing
    if not reporting.any():
        raise UserError("two images a class are the least that a level can be chosen and reported on")

    def accuracy_of(rights: list[np.ndarray], part: np.ndarray) -> float:
        return fmean(float(right[part].mean()) for right in rights)

    limit = accuracy_of(dense, choosing) - tolerance - 1e-9  # the margin keeps a loss of exactly the tolerance within
    count = sum(1 for _ in takewhile(lambda rights: accuracy_of(rights, choosing) >= limit, correct))
    images = int(reporting.sum())
    if not count:
        return Choice(None, images)
    level, rights = levels[count - 1], correct[count - 1]
    accuracies = accuracy_of(rights, reporting), accuracy_of(dense, reporting)
    pairs = [(right[reporting], base[reporting]) for right, base in zip(rights, dense, strict=True)]
    if len(pairs) == 1:
        return Choice(level, images, *accuracies, paired_difference(*pairs[0]), *discordant(*pairs[0]))
    return Choice(level, images, *accuracies, mean_interval([paired_difference(*pair).value for pair in pairs]))
