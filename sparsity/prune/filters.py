"""Whole filters: which may go, masks on them, and the smaller dense network that is left when they are gone."""

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsity.networks.layers import BatchNorm, unmasked_state
from sparsity.prune.masks import apply_masks

RELUS = (F.relu, torch.relu, torch.relu_, nn.functional.relu_)


@dataclass(frozen=True)
class Branch:
    """Convolutions in a row within one module, each read by its BatchNorm, a ReLU and the next one alone.

    `norms` holds the BatchNorm after each convolution, for the last one None where there is none. With `residual` the
    last one's goes into an addition, so that the network goes on without the branch when nothing is left of it.
    """

    convs: tuple[str, ...]
    norms: tuple[str | None, ...]
    residual: bool

    @property
    def inner(self) -> tuple[str, ...]:
        """The convolutions whose filters may be removed: all but the last."""
        return self.convs[:-1]


@dataclass(frozen=True)
class Thin:
    """A smaller network: its `state` dict and the filters left in each inner convolution, `widths`.

    Of the inner channels `removed` are gone, and `dead` stay although their filters are zero: what they emit is not,
    and the convolution that reads them could not make up for it.
    """

    state: dict[str, Tensor]
    widths: dict[str, int]
    removed: int
    dead: int


def branches(model: nn.Module) -> list[Branch]:
    """The branches of a network with inner convolutions, in the order of execution; `model` is traced by torch.fx."""
    graph = fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    nodes = {node.target: node for node in graph.nodes if node.op == "call_module" and calls.count(node.target) == 1}
    convs = {name: node for name, node in nodes.items() if _is_plain_conv(modules[name])}
    norms = {name: _norm_after(node, modules, nodes) for name, node in convs.items()}
    readers = {name: _reader(norms[name], modules, convs) for name in convs}
    found = []
    for name in convs:
        if readers[name] is None or name in readers.values():
            continue
        chain = [name]
        while (reader := readers[chain[-1]]) is not None:
            chain.append(reader)
        last = norms[chain[-1]]
        residual = last is not None and len(last.users) == 1 and _is_addition(next(iter(last.users)))
        names = tuple(norms[conv].target if norms[conv] is not None else None for conv in chain)
        found.append(Branch(tuple(chain), names, residual))
    return found


def inner_convs(model: nn.Module) -> list[str]:
    """The convolutions whose filters may be removed: no shortcut shares their channels."""
    return [name for branch in branches(model) for name in branch.inner]


@torch.no_grad()
def mask_filters(model: nn.Module, keep: dict[str, Tensor]) -> int:
    """Prune whole filters of inner convolutions, in place; `keep` holds for each a boolean [filters], True stays.

    Masked through `torch.nn.utils.prune` are their weights and what the next convolution makes of their channels; the
    weight and bias of their BatchNorm become zero, because a zero filter under a live one still emits a constant. Where
    nothing is left of a convolution in a branch of a residual block, all of the branch goes with it, its last
    BatchNorm too: the block is then its shortcut. Returns how many filters went beyond those of `keep` for that.
    """
    modules, more = dict(model.named_modules()), 0
    for branch in branches(model):
        if not any(name in keep for name in branch.inner):
            continue
        kept = [keep[name].cpu() if name in keep else _all_filters(modules[name]) for name in branch.inner]
        kept.append(_all_filters(modules[branch.convs[-1]]))
        if branch.residual and not all(filters.any() for filters in kept):
            more += sum(int(filters.sum()) for filters in kept[:-1])
            kept = [torch.zeros_like(filters) for filters in kept]
        read = torch.ones(modules[branch.convs[0]].in_channels, dtype=torch.bool)
        for name, norm_name, filters in zip(branch.convs, branch.norms, kept, strict=True):
            conv = modules[name]
            mask = filters[:, None] & read  # [filters, channels]
            if not mask.all():
                apply_masks({name: conv}, {name: mask[:, :, None, None].expand_as(conv.weight)})
            for part in () if norm_name is None else (modules[norm_name].weight, modules[norm_name].bias):
                part[~filters.to(part.device)] = 0
            read = filters
    return more


def _all_filters(conv: nn.Conv2d) -> Tensor:
    return torch.ones(conv.out_channels, dtype=torch.bool)


@torch.no_grad()
def thin(model: nn.Module) -> Thin:
    """The smaller network that gives the same outputs as `model`, masked or not, which stays as it is.

    An inner channel goes where nothing reads it, or where its filter is zero and what it emits after BatchNorm and
    ReLU is zero too, or is a constant that the next convolution, being unpadded, passes on as a constant, which the
    BatchNorm after it absorbs into its mean. A padded convolution sees a constant differently at the border, so there
    it stays. Outputs agree up to the rounding of float32. A branch that ends in a zero BatchNorm goes as a whole;
    elsewhere each convolution keeps one channel or more.
    """
    state = {name: value.cpu() for name, value in unmasked_state(model).items()}
    modules = dict(model.named_modules())
    found = branches(model)
    before = sum(len(state[f"{name}.weight"]) for branch in found for name in branch.inner)
    for branch in found:
        if branch.residual and _adds_nothing(state, branch.norms[-1]):
            _drop(state, branch)
        else:
            while _shrink(state, branch, modules):  # what goes may be all that read another channel
                pass
    widths = {name: len(state.get(f"{name}.weight", ())) for branch in found for name in branch.inner}
    dead = sum(int(_silent(state[f"{name}.weight"]).sum()) for name, count in widths.items() if count)
    return Thin(state, widths, before - sum(widths.values()), dead)


def _shrink(state: dict[str, Tensor], branch: Branch, modules: dict[str, nn.Module]) -> bool:
    """Remove channels of a branch from `state`, in place, where outputs stay the same; whether any went."""
    gone = 0
    for index, name in enumerate(branch.inner):
        reader, reader_norm = branch.convs[index + 1], branch.norms[index + 1]
        weight, following = state[f"{name}.weight"], state[f"{reader}.weight"]
        constant = _constant(state, name, branch.norms[index], modules)
        unread = ~following.any(dim=(0, 2, 3))
        absorbed = _silent(weight) & ~unread & (constant > 0)
        if modules[reader].padding not in ((0, 0), "valid") or reader_norm is None:
            removable, absorbed = unread | _silent(weight) & (constant == 0), torch.zeros_like(absorbed)
        else:
            removable = unread | _silent(weight)
        if removable.all():
            removable[0] = absorbed[0] = False  # a convolution has one channel or more
        if absorbed.any():
            passed = following[:, absorbed].double().sum(dim=(2, 3)) @ constant[absorbed]
            state[f"{reader_norm}.running_mean"] -= passed.float()
        _slice(state, branch, index, ~removable)
        gone += int(removable.sum())
    return gone > 0


def _slice(state: dict[str, Tensor], branch: Branch, index: int, kept: Tensor) -> None:
    """Keep, in place, the channels `kept` (boolean) between an inner convolution of a branch and its reader."""
    name, norm, reader = branch.convs[index], branch.norms[index], branch.convs[index + 1]
    for key in (f"{name}.weight", f"{name}.bias", *(f"{norm}.{part}" for part in _NORM_PARTS)):
        if key in state:
            state[key] = state[key][kept]
    state[f"{reader}.weight"] = state[f"{reader}.weight"][:, kept]


_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def _drop(state: dict[str, Tensor], branch: Branch) -> None:
    """Remove, in place, all that a branch consists of."""
    for name in (*branch.convs, *branch.norms):
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]


def _silent(weight: Tensor) -> Tensor:
    """The filters [filters] of a convolution that are zero."""
    return ~weight.flatten(1).any(dim=1)


def _constant(state: dict[str, Tensor], conv: str, norm: str, modules: dict[str, nn.Module]) -> Tensor:
    """What each channel of an inner convolution emits after ReLU if its filter is zero: [filters], float64."""
    weight, bias, mean, variance = (state[f"{norm}.{part}"].double() for part in _NORM_PARTS)
    received = state[f"{conv}.bias"].double() if f"{conv}.bias" in state else 0.0
    return (bias + weight * (received - mean) / (variance + modules[norm].eps).sqrt()).relu()


def _adds_nothing(state: dict[str, Tensor], norm: str) -> bool:
    """Whether a BatchNorm gives zero whatever it receives."""
    return not state[f"{norm}.weight"].any() and not state[f"{norm}.bias"].any()


def _is_plain_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def _norm_after(node: fx.Node, modules: dict[str, nn.Module], nodes: dict[str, fx.Node]) -> fx.Node | None:
    """The BatchNorm that alone reads a convolution, with weights and statistics of its own."""
    follower = next(iter(node.users), None)
    if len(node.users) != 1 or follower.op != "call_module" or nodes.get(follower.target) is not follower:
        return None
    module = modules[follower.target]
    return follower if isinstance(module, BatchNorm) and module.affine and module.track_running_stats else None


def _reader(norm: fx.Node | None, modules: dict[str, nn.Module], convs: dict[str, fx.Node]) -> str | None:
    """The convolution that alone reads a BatchNorm, through a ReLU."""
    if norm is None or len(norm.users) != 1:
        return None
    relu = next(iter(norm.users))
    reader = next(iter(relu.users), None)
    if not _is_relu(relu, modules) or len(relu.users) != 1 or reader.op != "call_module":
        return None
    # A stem that is read by one shortcut alone is no part of that block: who builds the network could not make it thin.
    same_block = reader.target.rpartition(".")[0] == norm.target.rpartition(".")[0]
    return reader.target if convs.get(reader.target) is reader and same_block else None


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], nn.ReLU)
    return (node.op == "call_function" and node.target in RELUS) or (node.op == "call_method" and node.target == "relu")


def _is_addition(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
