"""masks"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.utils import prune

from sparsity.networks.layers import Layer


def prune_l1_uniform(layers: dict[str, Layer], amount: float) -> None:
    """Mask, in place, the share `amount` (0.0 to 1.0) of smallest magnitude in the weight of each layer.

    Exactly `round(amount * n)` of a layer's n weights are masked; of equal magnitudes at the threshold, torch's `topk`
    decides which. The layers must not carry a mask already: masks of
    `torch.nn.utils.prune` compound, so that a second call would not give the level that was asked for (ValueError).
    """
    amount = float(amount)  # an int would be read as a count of weights
    _refuse_masked(layers)
    # Selecting is serial within a layer, so layers go side by side, the largest first.
    largest_first = sorted(layers.values(), key=lambda layer: -layer.weight.numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda layer: prune.l1_unstructured(layer, "weight", amount), largest_first):
            pass  # drawing the results raises what a thread raised


def apply_masks(layers: dict[str, Layer], masks: dict[str, Tensor]) -> None:
    """Mask, in place, the weight of each layer by its mask: 0/1 or bool, of the weight's shape, 1 stays.

    Through `torch.nn.utils.prune.custom_from_mask`. Raises ValueError for layers that are masked already, and unless
    `masks` has an entry of the right shape for each layer and no other; nothing has changed then.
    """
    _refuse_masked(layers)
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    if {name: mask.shape for name, mask in masks.items()} != shapes:
        raise ValueError("every layer needs one mask of the shape of its weight, and no other masks may be there")
    for name, layer in layers.items():
        prune.custom_from_mask(layer, "weight", masks[name].to(layer.weight.device))


def _refuse_masked(layers: dict[str, Layer]) -> None:
    for name, layer in layers.items():
        if prune.is_pruned(layer):
            raise ValueError(f"{name} is masked already; every level starts from an unpruned network")
