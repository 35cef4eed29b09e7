"""Filter pruning: which filters may be removed, masks on them, and the smaller dense network without them."""

import operator
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsity.networks.layers import BatchNorm, effective_weight, unmasked_state, way_of
from sparsity.prune.masks import apply_masks

RELUS = (F.relu, torch.relu, torch.relu_, "relu")
ADDITIONS = (operator.add, operator.iadd, torch.add)
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Branch:
    """Convolutions in a row within one module, each read only by its BatchNorm, a ReLU and the next convolution.

    All but the last are inner convolutions, whose filters may be removed: no shortcut shares their channels.
    `norms` holds the BatchNorm after each, for the last None where there is none. With `residual` an addition alone
    reads the last BatchNorm, so that the network works without the branch.
    """

    convs: tuple[str, ...]
    norms: tuple[str | None, ...]
    residual: bool


@dataclass(frozen=True)
class Thin:
    """A smaller network: its `state` dict and the filters left in each inner convolution, `widths`.

    `removed` counts the inner channels that are gone, `dead` those that stay although their filters are zero: they
    emit a constant, which a padded convolution cannot absorb.
    """

    state: dict[str, Tensor]
    widths: dict[str, int]
    removed: int
    dead: int


def branches(model: nn.Module) -> list[Branch]:
    """The branches of a network with inner convolutions, in the order of execution; none where it is not traced."""
    if not way_of(model).traced:
        return []
    calls = [node for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    modules = {node: model.get_submodule(node.target) for node in calls}
    once = {node: module for node, module in modules.items() if times[node.target] == 1}
    norms: dict[fx.Node, fx.Node | None] = {}
    for node, module in once.items():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
            norm = once.get(_only_user(node))
            usable = isinstance(norm, BatchNorm) and norm.affine and norm.track_running_stats
            norms[node] = _only_user(node) if usable else None
    readers = {conv: _reader(norm, modules) for conv, norm in norms.items()}
    found = []
    for first in norms:
        chain = [first]
        while readers[chain[-1]] in norms:
            chain.append(readers[chain[-1]])
        if len(chain) > 1 and first not in readers.values():
            after = _only_user(norms[chain[-1]])
            residual = after is not None and after.op == "call_function" and after.target in ADDITIONS
            names = tuple(norms[conv] and norms[conv].target for conv in chain)
            found.append(Branch(tuple(conv.target for conv in chain), names, residual))
    return found


def inner_convs(model: nn.Module) -> list[str]:
    """The inner convolutions of all branches."""
    return [name for branch in branches(model) for name in branch.convs[:-1]]


@torch.no_grad()
def mask_filters(model: nn.Module, keep: dict[str, Tensor]) -> int:
    """Prune whole filters of inner convolutions, in place; `keep` maps each to a boolean [filters], True stays.

    Their weights and the weights of the next convolution on their channels are masked through `torch.nn.utils.prune`;
    the weight and bias of their BatchNorm become zero, because a zero filter under a live BatchNorm emits a constant.
    Where a convolution in a branch of a residual block is emptied, the whole branch goes with it, its last BatchNorm
    too: the block is then its shortcut. Returns how many filters beyond those of `keep` went for that.
    """
    more = 0
    for branch in branches(model):
        convs = [model.get_submodule(name) for name in branch.convs]
        every = [torch.ones(conv.out_channels, dtype=torch.bool) for conv in convs]
        kept = [keep.get(name, filters).cpu() for name, filters in zip(branch.convs, every, strict=True)]
        if branch.residual and not all(filters.any() for filters in kept):
            more += sum(int(filters.sum()) for filters in kept[:-1])
            kept = [torch.zeros_like(filters) for filters in kept]
        read = torch.ones(convs[0].in_channels, dtype=torch.bool)
        for conv, name, norm, filters in zip(convs, branch.convs, branch.norms, kept, strict=True):
            mask = filters[:, None] & read  # [filters, channels]
            if not mask.all():
                apply_masks({name: conv}, {name: mask[:, :, None, None].expand_as(conv.weight)})
            for part in () if norm is None else ("weight", "bias"):
                values = getattr(model.get_submodule(norm), part)
                values[~filters.to(values.device)] = 0
            read = filters
    return more


@torch.no_grad()
def thin(model: nn.Module) -> Thin:
    """The smaller network that gives the same outputs as `model`, masked or not, which stays as it is.

    An inner channel is removed where nothing reads it; where its filter is zero and it emits zero after BatchNorm and
    ReLU; and where it emits a constant to an unpadded convolution, whose BatchNorm absorbs the constant into its mean.
    A padded convolution sees a constant differently at the border, so there the channel stays. Outputs agree up to the
    rounding of float32. A branch that ends in a zero BatchNorm is removed whole; elsewhere each convolution keeps one
    channel or more. The state is on the CPU.
    """
    state = unmasked_state(model, "cpu")
    found = branches(model)
    before = {name: len(state[f"{name}.weight"]) for branch in found for name in branch.convs[:-1]}
    for branch in found:
        if branch.residual and not any(state[f"{branch.norms[-1]}.{part}"].any() for part in ("weight", "bias")):
            gone = branch.convs + branch.norms
            state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in gone}
        else:
            while _shrink(state, branch, model):  # a channel that goes may have been all that read another one
                pass
    widths = {name: len(state.get(f"{name}.weight", ())) for name in before}
    dead = sum(int(_silent(state[f"{name}.weight"]).sum()) for name, count in widths.items() if count)
    return Thin(state, widths, sum(before.values()) - sum(widths.values()), dead)


def dead_filters(model: nn.Module) -> int:
    """The number of filters of inner convolutions of `model`, masked or not, that are zero."""
    return sum(int(_silent(effective_weight(model.get_submodule(name))).sum()) for name in inner_convs(model))


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
        for key in (f"{name}.weight", f"{name}.bias", *(f"{norm}.{part}" for part in NORM_PARTS)):
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
    weight, bias, mean, variance = (state[f"{norm}.{part}"].double() for part in NORM_PARTS)
    received = state[f"{conv}.bias"].double() if f"{conv}.bias" in state else 0.0
    return (bias + weight * (received - mean) / (variance + eps).sqrt()).relu()


def _only_user(node: fx.Node | None) -> fx.Node | None:
    """The node that alone reads the output of `node`."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _reader(norm: fx.Node | None, modules: dict[fx.Node, nn.Module]) -> fx.Node | None:
    """The layer that alone reads a BatchNorm, through a ReLU, in the same block."""
    relu = _only_user(norm)
    reader = _only_user(relu)
    if reader not in modules or not (isinstance(modules[relu], nn.ReLU) if relu in modules else relu.target in RELUS):
        return None
    # A stem that only one shortcut reads is no part of that block: the network could not be built thin.
    return reader if reader.target.rpartition(".")[0] == norm.target.rpartition(".")[0] else None
