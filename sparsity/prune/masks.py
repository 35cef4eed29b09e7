"""Masks on weights through `torch.nn.utils.prune`."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsity.networks.layers import Layer, twins


def prune_l1_uniform(layers: dict[str, Layer], sparsity: float) -> None:
    """Mask, in place, the share `sparsity` (0.0 to 1.0) of smallest magnitude in the weight of each layer.

    Exactly `round(sparsity * n)` of a layer's n weights are masked; of equal magnitudes at the threshold, torch's
    `topk` decides. Raises ValueError for layers that are masked already, because masks of torch compound.
    """
    _refuse_masked(layers)
    share = float(sparsity)  # torch reads an int as a count of weights
    # Selecting is serial within a layer, so layers go side by side, the largest first.
    largest_first = sorted(layers.values(), key=lambda layer: -layer.weight.numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda layer: prune.l1_unstructured(layer, "weight", share), largest_first))


def apply_masks(layers: dict[str, Layer], masks: dict[str, Tensor]) -> None:
    """Mask, in place, the weight of each layer by its mask: 0/1 or bool, of the weight's shape, 1 stays.

    Raises ValueError for layers that are masked already; nothing has changed then.
    """
    _refuse_masked(layers)
    for name, layer in layers.items():
        prune.custom_from_mask(layer, "weight", masks[name].to(layer.weight.device))


def mask_twins(model: nn.Module, layers: dict[str, Layer]) -> None:
    """Mask, in place, each layer of `model` that has its weight with one of `layers`, which are masked, as that one."""
    for name, others in twins(model).items():
        if name in layers:
            same = {other: model.get_submodule(other) for other in others}
            apply_masks(same, dict.fromkeys(others, layers[name].weight_mask))


def _refuse_masked(layers: dict[str, Layer]) -> None:
    if masked := [name for name, layer in layers.items() if prune.is_pruned(layer)]:
        raise ValueError(f"{masked[0]} is masked already; every level starts from an unpruned network")
