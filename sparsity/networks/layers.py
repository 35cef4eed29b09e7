"""The layers of a network that may be pruned, the weights that a masked one computes with, and counts of both."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sparsity.system.errors import UserError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Layer = nn.Conv2d | nn.Linear
SIMD_BLOCK = 16  # channels, with AVX-512; 8 with AVX2


@torch.no_grad()
def _calls(model: nn.Module, example: Tensor) -> list[tuple[str, torch.Size]]:
    """Name and output's shape of each convolution and linear layer as they run on `example`, in eval mode."""
    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, Layer)}
    calls: list[tuple[str, torch.Size]] = []

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        if module in names:
            calls.append((names[module], output.shape))

    training = model.training
    with register_module_forward_hook(record):
        model.eval()(example)
    model.train(training)
    return calls


def prunable_layers(model: nn.Module, example: Tensor) -> dict[str, Layer]:
    """Name -> layer of every convolution and every hidden linear layer, in the order of `named_modules`.

    The output layer is never among them. It is the last linear layer that runs on `example` ([B, C, H, W]), whatever
    its name; in a network without linear layers, the last convolution that runs.
    """
    executed = [name for name, _ in _calls(model, example)]
    linear = [name for name in executed if isinstance(model.get_submodule(name), nn.Linear)]
    output = (linear or executed or [None])[-1]
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer) and name != output}


def exclude(layers: dict[str, Layer], patterns: list[str]) -> dict[str, Layer]:
    """The layers that no pattern of `--exclude` names, in their order; the others stay dense.

    A pattern is a glob (`*`, `?`, `[...]`) on names of parameters, as `layer1.*.conv1.weight`, or of layers, as
    `layer1.0.conv1`. Raises UserError for a pattern that names none of `layers`, and where no layer is left.
    """
    excluded: set[str] = set()
    for pattern in patterns:
        named = {name for name in layers if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)}
        if not named:
            few = ", ".join(f"{name}.weight" for name in list(layers)[:3])
            raise UserError(f"--exclude {pattern} names no prunable weight; there are {len(layers)}, such as {few}")
        excluded |= named
    if patterns and len(excluded) == len(layers):
        raise UserError(f"--exclude {' '.join(patterns)} leaves no layer to prune; name fewer")
    return {name: layer for name, layer in layers.items() if name not in excluded}


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that the layer computes with: `weight_orig * weight_mask` under a mask, else `weight`.

    `layer.weight` itself is stale under a mask between an optimizer step, a load or a move and the next forward pass.
    """
    mask = getattr(layer, "weight_mask", None)
    return layer.weight if mask is None else layer.weight_orig * mask


@torch.no_grad()
def unmasked_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, masked or not, with effective weights in place of masks; tensors of its own.

    They stay on their device, and have the names that the network had before it was masked.
    """
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith(".weight_mask"):
            continue
        if name.endswith(".weight_orig"):
            name = name.removesuffix("_orig")
            value = effective_weight(model.get_submodule(name.removesuffix(".weight")))
        state[name] = value.detach().clone()
    return state


@torch.no_grad()
def zeros_by_layer(layers: dict[str, Layer]) -> dict[str, int]:
    """Name -> zeros in the effective weight of each layer, masked or not."""
    kept = _count_nonzero(effective_weight(layer) for layer in layers.values())
    return {name: layer.weight.numel() - count for (name, layer), count in zip(layers.items(), kept, strict=True)}


def _count_nonzero(tensors: Iterable[Tensor]) -> list[int]:
    """How many values of each tensor are not zero; a GPU is waited for once, not once a tensor."""
    counts = [torch.count_nonzero(tensor) for tensor in tensors]
    return torch.stack(counts).tolist() if counts else []


@dataclass(frozen=True)
class Census:
    """Counts over a network: `prunable` and `zeros` of the weights of prunable layers, the others of everything."""

    prunable: int
    zeros: int
    parameters: int
    nonzero: int
    macs: int
    macs_remaining: int

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


def positions_per_image(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Name -> how often each weight of a layer is used for one image: output positions, summed over its calls."""
    positions: Counter[str] = Counter()
    for name, shape in _calls(model, example):
        # A convolution's output is [B, out, H, W], a linear layer's [B, ..., out].
        linear = isinstance(model.get_submodule(name), nn.Linear)
        positions[name] += math.prod(shape[1:-1] if linear else shape[2:])
    return dict(positions)


@torch.no_grad()
def census(model: nn.Module, layers: dict[str, Layer], positions: dict[str, int]) -> Census:
    """Count weights, zeros and multiply-adds of a network, masked or not.

    `layers` as from `prunable_layers`, `positions` as from `positions_per_image` (of the dense network).
    """
    parameters = nonzero = macs = macs_remaining = prunable = zeros = 0
    owned = [
        (module_name, module, tensor, name in ("weight", "weight_orig"))
        for module_name, module in model.named_modules()
        for name, tensor in module.named_parameters(recurse=False)
    ]
    counts = _count_nonzero(effective_weight(module) if is_weight else tensor for _, module, tensor, is_weight in owned)
    for (module_name, _, tensor, is_weight), kept in zip(owned, counts, strict=True):
        parameters += tensor.numel()
        nonzero += kept
        if is_weight and module_name in positions:
            macs += positions[module_name] * tensor.numel()
            macs_remaining += positions[module_name] * kept
        if is_weight and module_name in layers:
            prunable += tensor.numel()
            zeros += tensor.numel() - kept
    return Census(prunable, zeros, parameters, nonzero, macs, macs_remaining)


def memory_format(model: nn.Module) -> torch.memory_format:
    """The memory format for gradients: channels_last, the faster one, except for networks with narrow shortcuts.

    In channels_last, oneDNN's gradient of a strided 1x1 convolution with fewer input channels than a SIMD block holds
    writes beyond its workspace: a crash, or wrong gradients (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if conv.kernel_size == (1, 1) and max(conv.stride) > 1]
    narrow = any(conv.in_channels // conv.groups < SIMD_BLOCK for conv in strided)
    return torch.contiguous_format if narrow else torch.channels_last
