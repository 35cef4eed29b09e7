"""Counts over a network, masked or not: weights, zeros, multiply-adds."""

from dataclasses import dataclass

import torch
from torch import nn

from sparsity.networks.layers import WEIGHTS, Layer, effective_weight


@dataclass(frozen=True)
class Census:
    """Counts over a network: `prunable` and `zeros` of the weights of prunable layers, the others of everything.

    `by_layer` maps each prunable layer to the zeros of its weight, also where that counts as another layer's.
    """

    prunable: int
    zeros: int
    parameters: int
    nonzero: int
    macs: int
    macs_remaining: int
    by_layer: dict[str, int]

    @property
    def sparsity(self) -> float:
        """Measured share of zeros in the prunable weights, percent."""
        return 100 * self.zeros / self.prunable

    @property
    def compression(self) -> float:
        """All parameters over the nonzero ones; infinite when nothing is left."""
        return self.parameters / self.nonzero if self.nonzero else float("inf")

    @property
    def macs_ratio(self) -> float:
        """Multiply-adds of the dense network over those with nonzero weights; infinite when none is left."""
        return self.macs / self.macs_remaining if self.macs_remaining else float("inf")


@torch.no_grad()
def census(model: nn.Module, layers: dict[str, Layer], positions: dict[str, int]) -> Census:
    """Count weights, zeros and multiply-adds of a network, masked or not; a weight of several layers counts once.

    `layers` as from `prunable_layers`, `positions` as from `positions_per_image` (of the dense network).
    """
    parameters = nonzero = macs = macs_remaining = prunable = zeros = 0
    owned = [
        (module_name, module, tensor, name)
        for module_name, module in model.named_modules()
        for name, tensor in module.named_parameters(recurse=False)
    ]
    values = (effective_weight(module) if name in WEIGHTS else tensor for _, module, tensor, name in owned)
    counts = torch.stack([torch.count_nonzero(value) for value in values]).tolist()  # a GPU is waited for once
    seen: set[int] = set()
    by_layer: dict[str, int] = {}
    for (module_name, _, tensor, name), kept in zip(owned, counts, strict=True):
        if module_name in positions and name in (*WEIGHTS, "in_proj_weight"):
            macs += positions[module_name] * tensor.numel()
            macs_remaining += positions[module_name] * kept
        if name in WEIGHTS and module_name in layers:
            by_layer[module_name] = tensor.numel() - kept
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        parameters += tensor.numel()
        nonzero += kept
        if name in WEIGHTS and module_name in layers:
            prunable += tensor.numel()
            zeros += tensor.numel() - kept
    return Census(prunable, zeros, parameters, nonzero, macs, macs_remaining, by_layer)
