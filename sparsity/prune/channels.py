"""Coupled channels: their scores, and masks on them."""

import torch
from torch import Tensor, nn

from sparsity.networks.layers import BatchNorm, Layer
from sparsity.prune.coupling import Coupling
from sparsity.prune.masks import apply_masks


@torch.no_grad()
def mask_channels(model: nn.Module, coupling: Coupling, gone: Tensor) -> None:
    """Prune units of channels, in place; `gone` holds a bool for each unit of `coupling`.

    Filters that make them, and the weights of all layers that read them, are masked through `torch.nn.utils.prune`;
    biases and the weight and bias of BatchNorm become zero.
    """
    for name, (outputs, inputs) in coupling.channels(gone).items():
        layer = model.get_submodule(name)
        if isinstance(layer, Layer):
            mask = torch.ones(layer.weight.shape[:2], dtype=torch.bool)
            if outputs is not None:
                mask[outputs] = False
            if inputs is not None:
                mask[:, inputs] = False
            shape = (*mask.shape, *[1] * (layer.weight.dim() - 2))
            apply_masks({name: layer}, {name: mask.view(shape).expand_as(layer.weight)})
        for part in ("weight", "bias") if isinstance(layer, BatchNorm) else ("bias",):
            value = getattr(layer, part)
            if value is not None and outputs is not None:
                value[outputs.to(value.device)] = 0


@torch.no_grad()
def group_l1(model: nn.Module, coupling: Coupling) -> Tensor:
    """The score of each unit: the L1 norm of each of its filters over the mean of its layer, averaged."""
    sums, counts = torch.zeros(2, coupling.units + 1)
    for name, numbers in coupling.outputs.items():
        layer = model.get_submodule(name)
        if isinstance(layer, Layer):
            norms = layer.weight.abs().flatten(1).sum(dim=1).cpu()
            sums.index_add_(0, numbers % len(sums), norms / norms.mean())
            counts.index_add_(0, numbers % len(sums), torch.ones(len(numbers)))
    return sums[:-1] / counts[:-1]
