"""How a level is dealt to the layers: from the scores of all weights and an amount to masks.

Within a layer the lowest scores always go first, so an allocation decides no more than how many weights each layer
loses. To add one: a function that takes a `Ranking` and returns what counts for a number of weights, and an entry in
ALLOCATIONS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsity.system.errors import UserError

BLOCK = 1 << 18  # values looked at together where a temporary copy of a whole layer would count


@dataclass(frozen=True)
class Ranking:
    """Scores of all prunable weights, and for each layer the same values sorted (float32, on the CPU): made by `rank`.

    `squared` says that the scores are squares by nature, as those of `obs`, which LAMP then takes as they are.
    """

    scores: dict[str, Tensor]
    ascending: list[np.ndarray]
    squared: bool = False

    @property
    def sizes(self) -> list[int]:
        """Weights of each layer."""
        return [len(column) for column in self.ascending]


# Weights that each layer loses, of the amount (0.0 to 1.0); and how many of them were swapped to keep a layer alive.
Counts = Callable[[float], tuple[list[int], int]]


@dataclass(frozen=True)
class Allocator:
    """One allocation, prepared for all levels of a sweep: made by `prepare`."""

    ranking: Ranking
    counts: Counts

    def masks(self, amount: float) -> tuple[dict[str, Tensor], int]:
        """Name -> mask (bool, True stays) of the scores' shapes and device; and the number of swapped weights.

        `amount` is the share of weights to mask, 0.0 to 1.0 (ValueError outside). A swap gave a layer that would have
        ended empty its best weight back, in exchange for the worst weight that another one had kept.
        """
        amount = float(amount)
        if not 0 <= amount <= 1:
            raise ValueError(f"an amount is a share from 0.0 to 1.0, not {amount}")
        zeros, swapped = self.counts(amount)
        layers = zip(self.ranking.scores.items(), self.ranking.ascending, zeros, strict=True)
        return {name: _mask(scores, column, count) for (name, scores), column, count in layers}, swapped


def rank(scores: dict[str, Tensor], squared: bool = False) -> Ranking:
    """Sort the scores (name -> finite values of the weight's shape, higher stays) of each layer, once for all levels.

    Only the order of values is taken from the sort, never places, so that the same scores give the same masks
    whatever sorts them. Nothing is copied but the sorted values.
    """
    scores = {name: values.detach().float().contiguous() for name, values in scores.items()}
    return Ranking(scores, [_ascending(values) for values in scores.values()], squared)


def _ascending(values: Tensor) -> np.ndarray:
    """All values in ascending order, on the CPU; a GPU sorts its own, which takes it milliseconds."""
    if values.device.type == "cuda":
        return values.flatten().sort().values.cpu().numpy()
    return np.sort(values.cpu().numpy(), axis=None)


def prepare(name: str, ranking: Ranking) -> Allocator:
    """The allocation `name` of ALLOCATIONS, ready to make masks of `ranking` for one level after another."""
    return Allocator(ranking, ALLOCATIONS[name](ranking))


def uniform(ranking: Ranking) -> Counts:
    """Every layer loses the same share: `round(amount * n)` of its n weights, as in the study."""
    return lambda amount: ([round(amount * size) for size in ranking.sizes], 0)


def global_threshold(ranking: Ranking) -> Counts:
    """One threshold on the scores of the whole network."""
    return _across(ranking.ascending)


def lamp(ranking: Ranking) -> Counts:
    """One threshold on LAMP scores (arXiv 2010.07611): a weight's square over the sum of those that are no smaller.

    Raises UserError for negative scores, whose squares would turn the order of a layer around.
    """
    for name, column in zip(ranking.scores, ranking.ascending, strict=True):
        if len(column) and column[0] < 0:
            raise UserError(f"{name} has negative scores, which lamp cannot square; choose another allocation")
    return _across([_lamp_scores(column, ranking.squared) for column in ranking.ascending])


def erk(ranking: Ranking) -> Counts:
    """Erdos-Renyi-Kernel (arXiv 1911.11134): a layer keeps in proportion to the sum of its weight's dimensions.

    That is a density of (in + out + height + width) / (in * out * height * width), times one factor for all. A layer
    whose share would exceed its size stays dense, and the others share the rest. Fractions are given to the largest
    remainders.
    """
    dimensions = [sum(values.shape) for values in ranking.scores.values()]

    def counts(amount: float) -> tuple[list[int], int]:
        kept = _proportional(sum(ranking.sizes) - _share(amount, ranking.sizes), dimensions, ranking.sizes)
        zeros = [size - count for size, count in zip(ranking.sizes, kept, strict=True)]
        return _keep_alive(zeros, ranking.ascending)

    return counts


# Name -> function that looks at a ranking once and returns what counts for any amount.
ALLOCATIONS: dict[str, Callable[[Ranking], Counts]] = {
    "uniform": uniform,
    "global": global_threshold,
    "lamp": lamp,
    "erk": erk,
}


def _share(amount: float, sizes: list[int]) -> int:
    return round(amount * sum(sizes))


def _across(columns: list[np.ndarray]) -> Counts:
    """Counts by one threshold across the ascending values of all layers."""
    sizes = [len(column) for column in columns]
    return lambda amount: _keep_alive(_lowest(columns, _share(amount, sizes)), columns)


def _lowest(columns: list[np.ndarray], count: int) -> list[int]:
    """How many of the `count` lowest values of ascending columns are in each; of equal ones the first columns' go."""
    if count == 0:
        return [0] * len(columns)
    filled = [column for column in columns if len(column)]
    low = min(_ordinal(column[0]) for column in filled)
    high = max(_ordinal(column[-1]) for column in filled)
    dtype = columns[0].dtype
    # The smallest number that `count` values do not exceed is searched among all numbers of the type, by halving: 32
    # or 64 steps, where a sort across the layers would take another copy of everything.
    while low < high:
        middle = (low + high) // 2
        if sum(_up_to(columns, _number(middle, dtype))) >= count:
            high = middle
        else:
            low = middle + 1
    threshold = _number(low, dtype)
    zeros = [int(np.searchsorted(column, threshold, "left")) for column in columns]
    left = count - sum(zeros)
    for index, end in enumerate(_up_to(columns, threshold)):
        ties = min(left, end - zeros[index])
        zeros[index] += ties
        left -= ties
    return zeros


def _up_to(columns: list[np.ndarray], threshold: np.floating) -> list[int]:
    """How many values of each ascending column are not above `threshold`, which is of their type."""
    return [int(np.searchsorted(column, threshold, "right")) for column in columns]


def _ordinal(number: np.floating) -> int:
    """The place of a float among all floats of its type: an integer that grows with it."""
    bits = int(number.view(f"i{number.itemsize}"))
    return bits if bits >= 0 else bits ^ int(np.iinfo(f"i{number.itemsize}").max)


def _number(ordinal: int, dtype: np.dtype) -> np.floating:
    """The float of type `dtype` at a place that `_ordinal` gave."""
    integer = np.dtype(f"i{dtype.itemsize}")
    return integer.type(ordinal if ordinal >= 0 else ordinal ^ int(np.iinfo(integer).max)).view(dtype)


def _keep_alive(zeros: list[int], columns: list[np.ndarray]) -> tuple[list[int], int]:
    """Give each layer that lost everything one weight back; the worst kept weight elsewhere goes for it.

    Only where as many weights as layers are kept. `columns` holds the ascending values that make one layer's weight
    worse than another's. Returns the new zeros and the number of swaps.
    """
    zeros, sizes = list(zeros), [len(column) for column in columns]
    empty = [index for index, size in enumerate(sizes) if zeros[index] == size and size > 0]
    if sum(sizes) - sum(zeros) < sum(size > 0 for size in sizes):
        return zeros, 0
    for index in empty:
        donors = [other for other, size in enumerate(sizes) if size - zeros[other] >= 2]
        donor = min(donors, key=lambda other: columns[other][zeros[other]])
        zeros[donor] += 1
        zeros[index] -= 1
    return zeros, len(empty)


def _lamp_scores(column: np.ndarray, squared: bool) -> np.ndarray:
    """LAMP scores (float64, ascending) of the ascending scores of one layer; 0 where all that is left is 0."""
    values = column.astype(np.float64)
    if not squared:
        values *= values
    total = 0.0
    # From the largest down, block by block, so that the sums take no second copy of the layer.
    for end in range(len(values), 0, -BLOCK):
        block = values[max(0, end - BLOCK) : end]
        sums = np.cumsum(np.concatenate(([total], block[::-1])))[:0:-1]
        total = sums[0]
        np.divide(block, sums, out=block, where=sums > 0)
    return values


def _proportional(kept: int, weights: list[int], sizes: list[int]) -> list[int]:
    """Deal `kept` out in proportion to `weights`, nobody above its size: whole numbers of exactly that sum."""
    capped: set[int] = set()
    while True:
        free = kept - sum(sizes[index] for index in capped)
        others = [index for index in range(len(sizes)) if index not in capped]
        total = sum(weights[index] for index in others)
        over = {index for index in others if free * weights[index] > total * sizes[index]}
        if not over:
            break
        capped |= over
    shares = list(sizes)
    remainders = {}
    for index in others:
        shares[index], remainders[index] = divmod(free * weights[index], total)  # exact: all are integers
    by_remainder = sorted(others, key=lambda index: -remainders[index])
    for index in by_remainder[: kept - sum(shares)]:
        shares[index] += 1
    return shares


def _mask(scores: Tensor, column: np.ndarray, zeros: int) -> Tensor:
    """True for all but the `zeros` lowest scores; `column` holds them ascending. Of equal ones the first go."""
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = column[zeros - 1]
    mask = scores > float(threshold)
    if zeros < len(column) and column[zeros] == threshold:
        going = zeros - int(np.searchsorted(column, threshold, "left"))
        for values, kept in zip(scores.view(-1).split(BLOCK), mask.view(-1).split(BLOCK), strict=True):
            ties = (values == float(threshold)).nonzero().flatten()
            kept[ties[going:]] = True
            going = max(0, going - len(ties))
    return mask
