"""N:M masks: of every M consecutive inputs of a weight, the N with the highest scores stay."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsity.networks.layers import Layer, Transposed
from sparsity.system.errors import UserError
from sparsity.system.methods import Curve


def group_masks(layers: dict[str, Layer], scores: dict[str, Tensor], kept: int, size: int) -> dict[str, Tensor]:
    """Name -> mask (bool, True stays) of each layer whose inputs are a multiple of `size`, exact in every group.

    A group is `size` consecutive input features of a linear layer, or input channels of a convolution at one output
    channel and kernel position. The `kept` highest scores of each stay; of equal scores the first go.
    """
    masks = {}
    for name, layer in layers.items():
        if fits(layer, size):
            inputs = 0 if isinstance(layer, Transposed) else 1
            groups = scores[name].movedim(inputs, -1).unflatten(-1, (-1, size))
            lowest = groups.argsort(dim=-1, stable=True)[..., : size - kept]
            mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, lowest, False)
            masks[name] = mask.flatten(-2).movedim(-1, inputs).contiguous()
    return masks


def fits(layer: Layer, size: int) -> bool:
    """Whether the inputs of each group of channels of a layer are a multiple of `size`."""
    inputs = layer.weight.shape[1]
    if isinstance(layer, Transposed):
        inputs = layer.in_channels // layer.groups
    return inputs % size == 0


def require_groups(layers: dict[str, Layer], curves: Iterable[Curve]) -> None:
    """UserError where no layer has inputs in groups of the M of an allocation N:M."""
    for curve in curves:
        if curve.pattern and not any(fits(layer, curve.pattern[1]) for layer in layers.values()):
            needed = f"inputs in multiples of {curve.pattern[1]}, as --allocation {curve.allocation} needs"
            raise UserError(f"no layer has {needed}; use another allocation, or exclude less")
