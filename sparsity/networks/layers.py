"""Which weights may be pruned, masks on them through `torch.nn.utils.prune`, and what a masked network really holds."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsity.system.errors import UserError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


Layer = nn.Conv2d | nn.Linear


@contextmanager
def _recording(model: nn.Module, hook) -> Iterator[None]:
    """Call `hook(name, layer, output)` after every convolution and linear layer that runs inside the block."""
    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: hook(name, layer, output))
        for name, layer in model.named_modules()
        if isinstance(layer, Layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run_once(model: nn.Module, example: Tensor, hook) -> None:
    """One forward pass in eval mode, with the modes of all modules put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _recording(model, hook):
            model(example)
    finally:
        for module, mode in modes.items():
            module.training = mode


def prunable_layers(model: nn.Module, example: Tensor) -> dict[str, Layer]:
    """Name -> layer of every convolution and every hidden linear layer, in the order of `named_modules`.

    The output layer is never among them. It is the last linear layer that runs on `example` ([B, C, H, W]), whatever
    its name; in a network without linear layers, the last convolution that runs.
    """
    executed: list[tuple[str, Layer]] = []
    _run_once(model, example, lambda name, layer, _: executed.append((name, layer)))
    linear = [name for name, layer in executed if isinstance(layer, nn.Linear)]
    output = (linear or [name for name, _ in executed] or [None])[-1]
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer) and name != output}


def exclude(layers: dict[str, Layer], patterns: list[str]) -> dict[str, Layer]:
    """The layers that no pattern names, in their order; the others stay dense.

    A pattern is a glob (`*`, `?`, `[...]`) on names of parameters, as `layer1.*.conv1.weight`, or of layers, as
    `layer1.0.conv1`. Raises UserError for a pattern that names none of `layers`, and where no layer is left.
    """
    kept = dict(layers)
    for pattern in patterns:
        named = [name for name in layers if fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)]
        if not named:
            few = ", ".join(f"{name}.weight" for name in list(layers)[:3])
            raise UserError(f"--exclude {pattern} names no prunable weight; there are {len(layers)}, such as {few}")
        for name in named:
            kept.pop(name, None)
    if patterns and not kept:
        raise UserError(f"--exclude {' '.join(patterns)} leaves no layer to prune; name fewer")
    return kept


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
    """Counts over a network; `prunable` and `zeros` over the weights of prunable layers, the others over everything."""

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
    positions: dict[str, int] = {}

    def add(name: str, layer: Layer, output: Tensor) -> None:
        # A convolution's output is [B, out, H, W], a linear layer's [B, ..., out].
        count = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else output[0].numel() // layer.out_features
        positions[name] = positions.get(name, 0) + count

    _run_once(model, example, add)
    return positions


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


SIMD_BLOCK = 16  # channels, with AVX-512; 8 with AVX2


def memory_format(model: nn.Module) -> torch.memory_format:
    """The format to take gradients in: channels_last, the faster one, but for networks with narrow shortcuts.

    In channels_last, oneDNN's gradient of a strided 1x1 convolution with fewer input channels than a SIMD block holds
    writes beyond its workspace: a crash, or wrong gradients (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if conv.kernel_size == (1, 1) and max(conv.stride) > 1]
    narrow = any(conv.in_channels // conv.groups < SIMD_BLOCK for conv in strided)
    return torch.contiguous_format if narrow else torch.channels_last
