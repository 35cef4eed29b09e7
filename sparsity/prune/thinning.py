"""The smaller dense network that gives the outputs of a masked one."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsity.networks.layers import Layer, unmasked_state
from sparsity.networks.narrow import PARTS
from sparsity.prune.coupling import Coupling, couple
from sparsity.prune.filters import Branch, branches


@dataclass(frozen=True)
class Thin:
    """A smaller network: its `state` dict, and in `widths` the filters left in each layer that has fewer than before.

    `removed` counts the filters that are gone, without those of grouped convolutions, `dead` the zero ones of inner
    convolutions that stay: they emit a constant, which a padded convolution cannot absorb.
    """

    state: dict[str, Tensor]
    widths: dict[str, int]
    removed: int
    dead: int


@torch.no_grad()
def thin(model: nn.Module) -> Thin:
    """The smaller network that gives the same outputs as `model`, masked or not, which stays as it is.

    Channels that go together (`couple`) are removed where no layer reads them any more. Of inner convolutions whose
    branch is plain, a channel goes also where its filter is zero and it emits zero after BatchNorm and ReLU, and where
    it emits a constant to an unpadded convolution, whose BatchNorm absorbs the constant into its mean. A padded
    convolution sees a constant differently at the border, so there the channel stays. Outputs agree up to the rounding
    of float32. Each layer keeps one channel or more. The state is on the CPU.
    """
    state, coupling, found = unmasked_state(model, "cpu"), couple(model), branches(model)
    _cut(state, coupling, _unread(state, coupling))
    for branch in found:
        while branch.plain and _shrink(state, branch, model):  # a channel that goes may have been all that read another
            pass
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}
    widths = {name: len(state[f"{name}.weight"]) for name in layers}
    widths = {name: count for name, count in widths.items() if count < len(layers[name].weight)}
    whole = [name for name in widths if getattr(layers[name], "groups", 1) == 1]
    removed = sum(len(layers[name].weight) - widths[name] for name in whole)
    dead = sum(int(_silent(state[f"{name}.weight"]).sum()) for branch in found for name in branch.convs[:-1])
    return Thin(state, widths, removed, dead)


def _unread(state: dict[str, Tensor], coupling: Coupling) -> Tensor:
    """The units of channels that no layer reads, a bool for each; but one in each layer, which cannot be empty."""
    gone, before = torch.zeros(coupling.units, dtype=torch.bool), None
    while before is None or not torch.equal(gone, before):  # what goes may have been all that read another one
        before, read = gone, torch.zeros(coupling.units + 1, dtype=torch.bool)  # the last one stands for -1
        for name, numbers in coupling.inputs.items():
            kept = ~torch.cat([gone, gone.new_zeros(1)])[coupling.outputs[name]]
            read[numbers[state[f"{name}.weight"][kept].transpose(0, 1).flatten(1).any(dim=1)]] = True
        gone = ~read[:-1]
    for numbers in coupling.outputs.values():
        if (numbers >= 0).all() and gone[numbers].all():
            gone[numbers[0]] = False
    return gone


def _cut(state: dict[str, Tensor], coupling: Coupling, gone: Tensor) -> None:
    """Remove units of channels from a state dict, in place; a tensor that has several names stays one."""
    cut: dict[int, Tensor] = {}
    for name, (outputs, inputs) in coupling.channels(gone).items():
        for part in PARTS:
            if (value := state.get(f"{name}.{part}")) is not None:
                cut[id(value)] = value[~outputs] if inputs is None or part != "weight" else value[~outputs][:, ~inputs]
    state.update({name: cut[id(value)] for name, value in state.items() if id(value) in cut})


def _shrink(state: dict[str, Tensor], branch: Branch, model: nn.Module) -> bool:
    """Remove channels of a branch from `state`, in place, where outputs stay the same; returns whether any went."""
    shrunk = False
    for (name, norm), (reader, reader_norm) in pairwise(zip(branch.convs, branch.norms, strict=True)):
        silent, following = _silent(state[f"{name}.weight"]), state[f"{reader}.weight"]
        unread = ~following.any(dim=(0, 2, 3))
        constant = _constant(state, name, norm, model.get_submodule(norm).eps)
        removable, absorbed = unread | silent & (constant == 0), silent & ~unread & (constant > 0)
        if reader_norm is not None and model.get_submodule(reader).padding in ((0, 0), "valid"):
            removable |= absorbed
        if removable.all():
            removable[0] = False  # a convolution has one channel or more
        absorbed &= removable
        if absorbed.any():
            passed = following[:, absorbed].double().sum(dim=(2, 3)) @ constant[absorbed]
            state[f"{reader_norm}.running_mean"] -= passed.float()
        for key in (f"{name}.weight", f"{name}.bias", *(f"{norm}.{part}" for part in PARTS)):
            if key in state:
                state[key] = state[key][~removable]
        state[f"{reader}.weight"] = following[:, ~removable]
        shrunk |= bool(removable.any())
    return shrunk


def _silent(weight: Tensor) -> Tensor:
    """The filters [filters] of a convolution that are zero."""
    return ~weight.flatten(1).any(dim=1)


def _constant(state: dict[str, Tensor], conv: str, norm: str, eps: float) -> Tensor:
    """The constant each channel of an inner convolution emits after ReLU if its filter is zero: [filters], float64."""
    weight, bias, mean, variance = (state[f"{norm}.{part}"].double() for part in PARTS)
    received = state[f"{conv}.bias"].double() if f"{conv}.bias" in state else 0.0
    return (bias + weight * (received - mean) / (variance + eps).sqrt()).relu()
