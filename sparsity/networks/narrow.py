"""Thin networks: a network as its class builds it, made narrower in place, as its file tells."""

from typing import Any

import torch
from torch import Tensor, nn

from sparsity.networks.layers import BatchNorm

Narrowed = nn.Conv2d | nn.Linear | nn.PReLU | BatchNorm  # modules whose channels may be fewer
PARTS = ("weight", "bias", "running_mean", "running_var")  # tensors with an entry for each channel


def narrow(model: nn.Module, state: dict[str, Tensor], widths: Any) -> nn.Module:
    """Make each layer of `model` as narrow as its tensors in `state`, in place, for these to be loaded; returns it.

    `widths` maps every layer with fewer filters than its class says to their number; it is what a file holds. Values
    are left as they are, cut to size on the device of the model. Raises ValueError where `widths` names other layers or
    numbers than the tensors have, and where a tensor is larger than the network's, or its kernel another one.
    """
    if not isinstance(widths, dict):
        raise ValueError(f"widths is a {type(widths).__name__}, not a dictionary")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Narrowed)}
    for name, count in widths.items():
        if name not in layers or isinstance(layers[name], nn.PReLU | BatchNorm):
            raise ValueError(f"widths names {str(name)[:40]!r}, which is no convolution or linear layer of the network")
        full, weight = len(layers[name].weight), state.get(f"{name}.weight")
        if type(count) is not int or not 1 <= count <= full:
            raise ValueError(f"the width of {name} is {count!r}, not a whole number from 1 to {full}")
        if weight is None or weight.shape[:1] != (count,):
            raise ValueError(f"the width of {name} is {count}, but not that of its weight")
    for name, layer in layers.items():
        for part in PARTS:
            own, found = getattr(layer, part, None), state.get(f"{name}.{part}")
            if own is not None and found is not None and own.shape != found.shape:
                _cut(layer, part, f"{name}.{part}", found.shape)
        _set_sizes(layer, name)
    return model


@torch.no_grad()
def _cut(layer: nn.Module, part: str, name: str, shape: torch.Size) -> None:
    """Cut a tensor of a layer to a `shape`, in place; ValueError where that is none of a narrower layer."""
    own = getattr(layer, part)
    alike = len(shape) == own.dim() and shape[2:] == own.shape[2:]
    if not alike or not all(0 < count <= full for count, full in zip(shape, own.shape, strict=True)):
        raise ValueError(f"{name} has the shape {list(shape)}, which is no part of {list(own.shape)}")
    cut = own[tuple(slice(count) for count in shape)].clone()
    setattr(layer, part, nn.Parameter(cut, own.requires_grad) if isinstance(own, nn.Parameter) else cut)


def _set_sizes(layer: nn.Module, name: str) -> None:
    """Let a layer's sizes be those of its tensors; ValueError where its groups are no whole ones any more."""
    if isinstance(layer, BatchNorm):
        kept = next((getattr(layer, part) for part in PARTS if getattr(layer, part) is not None), None)
        layer.num_features = layer.num_features if kept is None else len(kept)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:  # every group has the filters that it had
        filters, inputs = layer.weight.shape[:2]
        groups, rest = divmod(filters * layer.groups, layer.out_channels) if layer.groups > 1 else (1, 0)
        if rest:
            raise ValueError(f"{name} has {filters} filters, which are no whole groups")
        layer.groups, layer.out_channels, layer.in_channels = groups, filters, groups * inputs
