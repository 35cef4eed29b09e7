"""The layers of a network, in the order in which they run: which may be pruned, and the weights of masked ones."""

import math
from collections import Counter, OrderedDict
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as InAttention  # `out_proj`, of nothing else
from torch.nn.utils import parametrize

from sparsity.system.errors import UserError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
Norm = BatchNorm | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = Conv | Transposed | nn.Linear
WEIGHTS = ("weight", "weight_orig")  # of a layer, and of a masked one
SIMD_BLOCK = 16  # channels, with AVX-512; 8 with AVX2


class Way(NamedTuple):
    """How a network is copied for inference: traced by `torch.fx`, or as it is, for a `reason`; and the strides."""

    traced: bool = True
    channels_last: bool = True
    reason: str = ""


def way_of(model: nn.Module) -> Way:
    """The way of a network, as `choose_way` of networks/inference.py chose it; else the fastest one."""
    return getattr(model, "way", Way())


def set_way(model: nn.Module, way: Way) -> None:
    """Set, in place, how inference copies of `model` are made; without channels_last its images become contiguous."""
    if not way.channels_last and way_of(model).channels_last:
        model.register_forward_pre_hook(_make_contiguous)
    model.way = way


def _make_contiguous(model: nn.Module, images: tuple[Tensor]) -> Tensor:
    return images[0].contiguous()


class Call(NamedTuple):
    """A layer as it runs: its name, and how often each of its weights is used for one image."""

    name: str
    positions: int


@torch.no_grad()
def calls(model: nn.Module, example: Tensor) -> list[Call]:
    """The convolutions and linear layers in the order in which they run on `example` ([B, C, H, W]), in eval mode.

    Beside them stand MultiheadAttention, for its input projection, and its `out_proj`, which runs inside of it.
    """
    found: list[Call] = []

    def record(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        shape = inputs[0].shape if isinstance(module, Transposed) else output.shape  # [B, C, ...] of convolutions
        shape = shape[:-1] if isinstance(module, nn.Linear) else (shape[0], *shape[2:])  # [..., out] of linear layers
        found.append(Call(name, math.prod(shape) // len(example)))

    def record_attention(name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        tokens = math.prod(output[0].shape[:-1]) // len(example)
        found.extend([Call(name, tokens), Call(f"{name}.out_proj", tokens)])

    handles = []  # on each module: TransformerEncoderLayer has a fast path around its layers unless these have hooks
    for name, module in model.named_modules():
        if isinstance(module, Layer | nn.MultiheadAttention):
            hook = record if isinstance(module, Layer) else record_attention
            handles.append(module.register_forward_hook(partial(hook, name)))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def prunable_layers(model: nn.Module, example: Tensor) -> dict[str, Layer]:
    """Name -> layer of every convolution and linear layer that `unprunable` does not name, by `named_modules`."""
    without = unprunable(model, example)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer) and name not in without}


def unprunable(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Name -> reason of every convolution and linear layer whose weight is not pruned by itself.

    The output layer is never pruned. It is the last linear layer that runs on `example` ([B, C, H, W]), whatever its
    name; in a network without linear layers, the last convolution that runs. Of several layers with one weight the
    first is pruned, and the others with it.
    """
    executed = [call.name for call in calls(model, example)]
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}
    heads = [name for name in executed if name in layers and not isinstance(layers[name], InAttention)]
    linear = [name for name in heads if isinstance(layers[name], nn.Linear)]
    output = (linear or heads or [None])[-1]
    reasons = {}
    for name, layer in layers.items():
        if name == output:
            reasons[name] = "output layer"
        elif problem := parametrization(layer):
            reasons[name] = problem
        elif name not in executed:
            reasons[name] = "not called as a layer"
    for first, *others in _owners(model):
        foreign = [name for name, part in (first, *others) if name not in layers or part not in WEIGHTS]
        named = [name for name, _ in (first, *others) if name in layers]
        if foreign or output in named:
            other = foreign[0] if foreign else output
            reasons |= {name: f"its weight is that of {other} too" for name in named if name != output}
        else:
            reasons |= dict.fromkeys(named[1:], f"pruned with {first[0]}, whose weight it has")
    return reasons


def _owners(model: nn.Module) -> list[list[tuple[str, str]]]:
    """The modules that share a parameter, and its name in each, for every shared parameter."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module_name, name))
    return [found for found in owners.values() if len(found) > 1]


def twins(model: nn.Module) -> dict[str, list[str]]:
    """Name of a layer -> the other layers that have the same weight; both masked or not."""
    groups = [[name for name, part in found if part in WEIGHTS] for found in _owners(model)]
    return {first: others for first, *others in filter(None, groups) if others}


def sharing(model: nn.Module) -> set[str]:
    """The names of the layers that share their weight with another layer."""
    return {name for first, others in twins(model).items() for name in (first, *others)}


def parametrization(layer: nn.Module) -> str | None:
    """How the weight of a layer is computed from other parameters, if it is."""
    if parametrize.is_parametrized(layer, "weight"):
        kinds = {type(each).__name__.strip("_") for each in layer.parametrizations.weight}
        return f"parametrized by {', '.join(sorted(kinds))}"
    hooks = [type(hook).__name__ for hook in layer._forward_pre_hooks.values()]
    return next((f"parametrized by a hook, {hook}" for hook in hooks if hook in ("WeightNorm", "SpectralNorm")), None)


def require_plain_weights(model: nn.Module) -> None:
    """UserError, with the way out, where the weight of a layer is computed from other parameters."""
    for name, layer in model.named_modules():
        if isinstance(layer, Layer) and (problem := parametrization(layer)):
            spectral = "spectral_norm" if "Spectral" in problem else "weight_norm"
            remove = "parametrize.remove_parametrizations(layer, 'weight')"
            remove = f"remove_{spectral}(layer)" if "hook" in problem else remove
            way = f"apply torch.nn.utils.{remove} where the network is built, and save it again"
            raise UserError(f"{name} cannot be pruned: it is {problem}; {way}")


def dense_parameters(model: nn.Module) -> dict[str, int]:
    """Name -> size of every parameter that belongs to no convolution, linear layer or normalisation: all stay dense."""
    return {
        f"{module_name}.{name}".lstrip("."): parameter.numel()
        for module_name, module in model.named_modules()
        if not isinstance(module, Layer | Norm)
        for name, parameter in module.named_parameters(recurse=False)
    }


def own_forward(layer: Layer) -> bool:
    """Whether a layer of the user's own class computes something else than its parent class of torch."""
    kind = next(kind for kind in get_args(Layer) if isinstance(layer, kind))
    parts = ("forward", "_conv_forward")
    return any(getattr(type(layer), part, None) is not getattr(kind, part, None) for part in parts)


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


def with_versions(state: dict[str, Tensor], source: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A state dict with the versions of the modules of `source`, which some (MNASNet) ask for in plain PyTorch."""
    state = OrderedDict(state)
    state._metadata = source._metadata
    return state


@torch.no_grad()
def unmasked_state(model: nn.Module, device: str | None = None) -> dict[str, Tensor]:
    """The state dict of a network, masked or not, with effective weights in place of masks; tensors of its own.

    They are on `device`, by default their own, and have the names that the network had before it was masked. A tensor
    that has several names is one here too.
    """
    found = model.state_dict(keep_vars=True)
    state, values = with_versions({}, found), {}
    for name, value in found.items():
        place, _, part = name.rpartition(".")
        if part in ("weight_mask", "weight_orig") and hasattr(layer := model.get_submodule(place), "weight_mask"):
            if part == "weight_mask":
                continue
            name = name.removesuffix("_orig")
            plain = effective_weight(layer)
        else:
            plain = value
        if id(value) not in values:
            values[id(value)] = plain.detach().to(device, copy=True)
        state[name] = values[id(value)]
    return state


def positions_per_image(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Name -> how often each weight of a layer is used for one image, summed over its calls; names as from `calls`.

    These are output positions, of transposed convolutions input positions.
    """
    positions: Counter[str] = Counter()
    for name, count in calls(model, example):
        positions[name] += count
    return dict(positions)


def memory_format(model: nn.Module) -> torch.memory_format:
    """The memory format for gradients: channels_last, the faster one, where nothing speaks against it.

    Contiguous for networks with narrow strided 1x1 convolutions, with 3-d convolutions, whose weights cannot be
    channels_last, and where `set_way` says so.

    In channels_last, oneDNN's gradient of a strided 1x1 convolution with fewer input channels than a SIMD block holds
    writes beyond its workspace: a crash, or wrong gradients (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if conv.kernel_size == (1, 1) and max(conv.stride) > 1]
    narrow = any(conv.in_channels // conv.groups < SIMD_BLOCK for conv in strided)
    deep = any(parameter.dim() == 5 for parameter in model.parameters())
    other = narrow or deep or not way_of(model).channels_last
    return torch.contiguous_format if other else torch.channels_last
