"""Allocations: from the scores of all weights and a sparsity to the zeros of each layer, and to masks.

Within a layer the lowest scores always go first, so an allocation only decides how many weights each layer loses. A new
one is a function from an `Allocator` to `Counts`, with an entry in ALLOCATIONS here and in `system/methods.py`.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from sparsity.system.errors import UserError

# Sparsity (0.0 to 1.0) -> zeros of each layer, and how many of them were swapped to keep a layer alive.
Counts = Callable[[float], tuple[list[int], int]]


class Allocator:
    """Masks of any sparsity by the allocation `name` of `scores`, which are sorted here, once for all levels.

    `scores` maps layers to finite values of the weight's shape, higher stays; `squared` marks values that are squares
    already, as those of `obs`, which LAMP does not square again. `ascending` holds each layer's values sorted (float32,
    on the CPU). Masks are made from them, never from the order of indices, so that they do not depend on the sort.
    """

    def __init__(self, name: str, scores: dict[str, Tensor], squared: bool = False):
        self.scores = {layer: values.detach().float().contiguous() for layer, values in scores.items()}
        self.ascending = [np.sort(values.cpu().numpy(), axis=None) for values in self.scores.values()]
        self.squared = squared
        self.counts = ALLOCATIONS[name](self)

    def masks(self, sparsity: float) -> tuple[dict[str, Tensor], int]:
        """Name -> mask (bool, True stays) of the scores' shape and device; and the number of swapped weights.

        `sparsity` is the share of weights to mask, 0.0 to 1.0. A swap gives a layer that would be empty its best weight
        back, in exchange for the worst weight that another layer had kept.
        """
        zeros, swapped = self.counts(sparsity)
        layers = zip(self.scores.items(), self.ascending, zeros, strict=True)
        return {name: _mask(scores, column, count) for (name, scores), column, count in layers}, swapped

    def tied(self, sparsity: float) -> list[str]:
        """The layers of which only some of the weights of equal score are masked at `sparsity`."""
        layers = zip(self.scores, self.ascending, self.counts(sparsity)[0], strict=True)
        return [name for name, column, n in layers if 0 < n < len(column) and column[n - 1] == column[n]]


def uniform(allocator: Allocator) -> Counts:
    """The same sparsity in every layer: `round(sparsity * n)` of its n weights, as in the study."""
    return lambda sparsity: ([round(sparsity * len(column)) for column in allocator.ascending], 0)


def global_threshold(allocator: Allocator) -> Counts:
    """One threshold on the scores of the whole network."""
    return _across(allocator.ascending)


def lamp(allocator: Allocator) -> Counts:
    """One threshold on LAMP scores (arXiv 2010.07611): a weight's square over the sum of those that are no smaller.

    They are 0 where that sum is. Raises UserError for negative scores, whose squares would turn the order around.
    """
    columns = []
    for column in allocator.ascending:
        if column[0] < 0:
            raise UserError("lamp cannot square the criterion's negative scores; choose another allocation")
        values = column.astype(np.float64)
        if not allocator.squared:
            values *= values
        sums = np.cumsum(values[::-1])[::-1]
        columns.append(np.divide(values, sums, out=values, where=sums > 0))
    return _across(columns)


def erk(allocator: Allocator) -> Counts:
    """Erdos-Renyi-Kernel (arXiv 1911.11134): a layer keeps in proportion to the sum of its weight's dimensions.

    That is a density of (in + out + height + width) / (in * out * height * width), times one factor for all layers. A
    layer whose share would exceed its size stays dense, and the others share the rest. Fractions of weights go to the
    largest remainders.
    """
    shares = [sum(values.shape) for values in allocator.scores.values()]
    sizes = [len(column) for column in allocator.ascending]
    by_density = sorted(range(len(sizes)), key=lambda index: sizes[index] / shares[index])  # the first to be full first

    def counts(sparsity: float) -> tuple[list[int], int]:
        kept = free = sum(sizes) - round(sparsity * sum(sizes))
        total, others, zeros, remainders = sum(shares), list(by_density), [0] * len(sizes), {}
        while free * shares[others[0]] > total * sizes[others[0]]:
            full = others.pop(0)
            free, total = free - sizes[full], total - shares[full]
        for index in sorted(others):
            count, remainders[index] = divmod(free * shares[index], total)  # exact: all are integers
            zeros[index] = sizes[index] - count
        for index in sorted(remainders, key=remainders.get, reverse=True)[: kept - sum(sizes) + sum(zeros)]:
            zeros[index] -= 1
        return _keep_alive(zeros, allocator.ascending)

    return counts


ALLOCATIONS = {"uniform": uniform, "global": global_threshold, "lamp": lamp, "erk": erk}


def _across(columns: list[np.ndarray]) -> Counts:
    """Counts by one threshold across the ascending values of all layers; of equal values the first layers' go."""
    everything = np.concatenate(columns)
    everything.sort()

    def counts(sparsity: float) -> tuple[list[int], int]:
        count = round(sparsity * len(everything))
        threshold = everything[count - 1] if count else -math.inf
        zeros = [int(np.searchsorted(column, threshold, "left")) for column in columns]
        for index, column in enumerate(columns):
            ties = int(np.searchsorted(column, threshold, "right")) - zeros[index]
            zeros[index] += min(ties, count - sum(zeros))
        return _keep_alive(zeros, columns)

    return counts


def _keep_alive(zeros: list[int], columns: list[np.ndarray]) -> tuple[list[int], int]:
    """Give each layer that lost everything one weight back; the worst kept weight elsewhere goes for it.

    Only where as many weights as layers are kept. `columns` holds each layer's ascending values, which decide whose
    weight is the worst. Changes `zeros` in place; returns it and the number of swaps.
    """
    sizes = [len(column) for column in columns]
    if sum(sizes) - sum(zeros) < len(sizes):
        return zeros, 0
    empty = [index for index, size in enumerate(sizes) if zeros[index] == size]
    for index in empty:
        donors = [other for other, size in enumerate(sizes) if size - zeros[other] >= 2]
        zeros[min(donors, key=lambda other: columns[other][zeros[other]])] += 1
        zeros[index] -= 1
    return zeros, len(empty)


def _mask(scores: Tensor, column: np.ndarray, zeros: int) -> Tensor:
    """True for all but the `zeros` lowest scores; `column` holds them ascending. Of equal scores the first go."""
    threshold = float(column[zeros - 1]) if zeros else -math.inf
    mask = scores > threshold
    if zeros < len(column) and column[zeros] == threshold:
        ties = (scores == threshold).flatten().nonzero().flatten()
        mask.view(-1)[ties[zeros - int(np.searchsorted(column, column[zeros], "left")) :]] = True
    return mask
