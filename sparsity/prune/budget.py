"""Levels as shares of the multiply-adds: how many weights, or filters, an allocation has to remove for one."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache

from torch import Tensor, nn

from sparsity.networks.census import census
from sparsity.networks.layers import twins
from sparsity.prune.allocation import Allocator


def weight_costs(model: nn.Module, layers: list[str], positions: dict[str, int]) -> dict[str, int]:
    """Name -> multiply-adds of one weight of each layer for an image; those of all layers that share it together."""
    shared = twins(model)
    return {name: sum(positions.get(each, 0) for each in (name, *shared.get(name, ()))) for name in layers}


def ranks(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores of filters as ranks within their layers, 0 to 1: one threshold on them is the same share of each layer."""
    return {name: (values.argsort(stable=True).argsort() + 0.5) / len(values) for name, values in scores.items()}


def weights_share(allocator: Allocator, costs: dict[str, int], wanted: float) -> float:
    """The sparsity at which an allocation removes the share `wanted` of the multiply-adds of its layers."""
    each, sizes = [costs[name] for name in allocator.scores], [len(column) for column in allocator.ascending]

    def removed(count: int) -> int:
        zeros, _ = allocator.counts(count / sum(sizes))
        return sum(zero * cost for zero, cost in zip(zeros, each, strict=True))

    return _nearest(removed, sum(sizes), wanted * removed(sum(sizes))) / sum(sizes)


def filters_share(
    pruned: Callable[[float], nn.Module], filters: int, costs: dict[str, int], wanted: float
) -> tuple[float, float]:
    """The share of `filters` whose removal takes the share `wanted` of the multiply-adds of all layers of `costs`.

    All filters, where they do not suffice. `pruned` gives the masked network without a share of them. Returns also the
    share of multiply-adds that goes.
    """

    @cache
    def removed(count: int) -> int:
        model = pruned(count / filters)
        zeros = census(model, layers_of(model), {}).by_layer
        return sum(zeros[name] * cost for name, cost in costs.items())

    def layers_of(model: nn.Module) -> dict[str, nn.Module]:
        return {name: model.get_submodule(name) for name in costs}

    total = sum(layer.weight.numel() * costs[name] for name, layer in layers_of(pruned(0.0)).items())
    count = _nearest(removed, filters, wanted * total)
    return count / filters, removed(count) / total


def _nearest(removed: Callable[[int], int], most: int, wanted: float) -> int:
    """The count, up to `most`, at which `removed`, which rises with it, comes nearest to `wanted`, by bisection."""
    after = min(bisect_left(range(most + 1), wanted, key=removed), most)
    return min((after, max(0, after - 1)), key=lambda count: abs(removed(count) - wanted))
