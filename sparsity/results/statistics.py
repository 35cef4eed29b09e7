"""How sure a measured accuracy is: intervals, paired differences, means over checkpoints, the chosen level."""

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

from sparsity.system.errors import UserError


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as shares (E. B. Wilson, JASA 22, 1927)."""
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total} is not a proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At 0 and at all the bound is exactly 0 or 1, which rounding would miss.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return low, high


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, in the unit of what it was made from."""

    value: float
    low: float
    high: float


def discordant(correct: np.ndarray, dense_correct: np.ndarray) -> tuple[int, int]:
    """How many images the dense network alone gets right (lost) and the other alone (gained); both boolean [N]."""
    return int(np.sum(dense_correct & ~correct)), int(np.sum(correct & ~dense_correct))


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's test in its exact form (Q. McNemar, Psychometrika 12, 1947): min(1, 2 P(X <= min)).

    X is binomial with one half over the `lost + gained` images of which one network alone is right; without such images
    p is 1. Below the smallest double, about 5e-324, it is 0. Raises ValueError on negative counts.
    """
    if min(lost, gained) < 0:
        raise ValueError(f"{lost} lost and {gained} gained are not counts of images")
    n, fewer = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    # P = (C(n, fewer) + C(n, fewer - 1) + ...) / 2^n in whole numbers, which neither underflow nor cancel. The terms
    # are shares of the first one in units of 2^-192: adding thousands of numbers of n bits would take a second.
    unit = 192
    term = tail = 1 << unit
    for k in range(fewer, 0, -1):
        term = term * k // (n - k + 1)
        if not term:
            break
        tail += term
    # Dividing whole numbers rounds once, whatever their size.
    return min(1.0, 2 * math.comb(n, fewer) * tail / (1 << (n + unit)))


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p values in the order given, which hold for all tests together (S. Holm, Scand. J. Stat. 6, 1979)."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def class_accuracy(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of the images of each class that are predicted as it, [classes]; nan for a class without images."""
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predictions == labels], minlength=classes)
    return np.divide(right, images, out=np.full(len(images), math.nan), where=images > 0)


def paired_difference(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Share correct of `first` minus that of `second`, both boolean [N] on the same images.

    The interval is that of Bonett and Price (J. Educ. Behav. Stat. 37, 2012): Wald's for paired proportions after
    adding one to each of the two discordant counts, so that it has a width even when no image differs.
    """
    n = len(first)
    lost, gained = discordant(first, second)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Estimate((gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is nan."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a whole number of degrees of freedom, by bisection on its distribution function."""
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"no quantile at probability {probability} with {degrees} degrees of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
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
    term, series = (cosine, cosine) if odd else (1.0, 1.0)
    if degrees == 1:
        series = 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        series += term
    inner = 2 / math.pi * (angle + math.sin(angle) * series) if odd else math.sin(angle) * series
    return 0.5 + inner / 2


def mean_interval(values: list[float], confidence: float = 0.95) -> Estimate:
    """Mean of what was seen on several checkpoints, with Student's t interval over them; nan around one value.

    The interval is mean -+ t deviation / sqrt(n) with n - 1 degrees of freedom ("Student", Biometrika 6, 1908).
    """
    mean, deviation = mean_and_deviation(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def choosing_half(labels: np.ndarray) -> np.ndarray:
    """The fixed, class-balanced half of the test images on which a level is chosen: boolean [N].

    Every second image of each class, in the order given; the other half is for the report.
    """
    half = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        half[np.flatnonzero(labels == label)[::2]] = True
    return half


@dataclass(frozen=True)
class Choice:
    """The highest level within tolerance, and what the images not used for choosing say of it (shares, not percent).

    `level` is None when no level is within tolerance; the other figures are then those of nothing and nan. `lost` and
    `gained` count images, and are None with several checkpoints, which share their images.
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
    several checkpoints their mean decides, and the interval is over checkpoints instead of images.
    """
    choosing = choosing_half(labels)
    reporting = ~choosing
    if not reporting.any():
        raise UserError("two images a class are the least that a level can be chosen and reported on")
    limit = fmean(float(right[choosing].mean()) for right in dense) - tolerance
    chosen = None
    for index, rights in enumerate(correct):
        # Both sides are means of counts; the margin keeps a loss of exactly the tolerance within it.
        if fmean(float(right[choosing].mean()) for right in rights) < limit - 1e-9:
            break
        chosen = index
    if chosen is None:
        return Choice(None, int(reporting.sum()))
    pairs = [(right[reporting], base[reporting]) for right, base in zip(correct[chosen], dense, strict=True)]
    differences = [paired_difference(right, base) for right, base in pairs]
    difference = differences[0] if len(pairs) == 1 else mean_interval([each.value for each in differences])
    lost, gained = discordant(*pairs[0]) if len(pairs) == 1 else (None, None)
    return Choice(
        level=levels[chosen],
        images=int(reporting.sum()),
        accuracy=fmean(float(right.mean()) for right, _ in pairs),
        dense=fmean(float(base.mean()) for _, base in pairs),
        difference=difference,
        lost=lost,
        gained=gained,
    )
