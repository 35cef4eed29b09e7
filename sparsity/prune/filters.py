"""Filters that may be removed by themselves, as no shortcut shares their channels, and masks on them."""

import operator
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from sparsity.networks.layers import BatchNorm, own_forward, sharing, way_of
from sparsity.prune.channel_graph import RELUS, SILENT_CALLS, SILENT_MODULES
from sparsity.prune.masks import apply_masks

ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Branch:
    """Convolutions in a row within one block, each read only by its BatchNorm, an activation and the next convolution.

    All but the last are inner convolutions, whose filters may be removed: no shortcut shares their channels.
    `norms` holds the BatchNorm after each, for the last None where there is none. With `residual` an addition alone
    reads the last BatchNorm, so that the network works without the branch. `followers` holds the depthwise
    convolutions, each with its BatchNorm, between an inner convolution and the next: they lose the same channels.
    In a `plain` branch there are none, and all activations are ReLU.
    """

    convs: tuple[str, ...]
    norms: tuple[str | None, ...]
    residual: bool
    followers: tuple[tuple[tuple[str, str], ...], ...] = ()
    plain: bool = True


def branches(model: nn.Module) -> list[Branch]:
    """The branches of a network with inner convolutions, in the order of execution; none where it is not traced."""
    if not way_of(model).traced:
        return []
    graph = _Graph(model)
    links = {conv: graph.link(conv) for conv in graph.modules if graph.is_conv(conv)}
    found = []
    readers = {link.reader for link in links.values()}
    for first in links:
        chain = [first]
        while links[chain[-1]].reader in links:
            chain.append(links[chain[-1]].reader)
        if len(chain) > 1 and first not in readers:
            inner, last = [links[conv] for conv in chain[:-1]], links[chain[-1]]
            after = _only_user(last.norm)
            residual = after is not None and after.op == "call_function" and after.target in ADDITIONS
            followers = tuple(link.followers for link in inner)
            plain = all(link.plain for link in inner)
            norms = tuple(link.norm and link.norm.target for link in (*inner, last))
            names = tuple(conv.target for conv in chain)
            found.append(Branch(names, norms, residual, followers if any(followers) else (), plain))
    return found


class _Link(NamedTuple):
    """The nodes that read a convolution, one after the other: see `Branch`."""

    norm: fx.Node | None
    followers: tuple[tuple[str, str], ...] = ()
    reader: fx.Node | None = None
    plain: bool = True


class _Graph:
    """The calls of modules in a traced network, and how they follow each other."""

    def __init__(self, model: nn.Module):
        self.model = model
        calls = [node for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
        times = Counter(node.target for node in calls)
        shared = sharing(model)
        self.modules = {node: model.get_submodule(node.target) for node in calls}
        self.once = {node for node in calls if times[node.target] == 1 and node.target not in shared}

    def is_conv(self, node: fx.Node | None) -> bool:
        """Whether a node is an ungrouped convolution that runs once."""
        conv = self.modules.get(node)
        plain = isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros"
        return plain and node in self.once and not own_forward(conv)

    def norm_after(self, node: fx.Node) -> fx.Node | None:
        """The BatchNorm that alone reads a node, and can silence its channels."""
        follower = _only_user(node)
        norm = self.modules.get(follower)
        usable = isinstance(norm, BatchNorm) and norm.affine and norm.track_running_stats and follower in self.once
        return follower if usable else None

    def link(self, conv: fx.Node) -> _Link:
        """From a convolution to the next one of the same block."""
        norm = last = self.norm_after(conv)
        followers, plain, node = [], True, _only_user(norm)
        while last is not None and node is not None:
            module = self.modules.get(node)
            if self._is_depthwise(node) and (own := self.norm_after(node)) is not None:
                followers.append((node.target, own.target))
                last, node, plain = own, _only_user(own), False
            elif isinstance(module, SILENT_MODULES) if module is not None else node.target in SILENT_CALLS:
                plain &= isinstance(module, nn.ReLU) or node.target in RELUS
                node = _only_user(node)
            elif self.is_conv(node) and self._block(node) == self._block(last):
                return _Link(norm, tuple(followers), node, plain)
            else:
                break
        return _Link(norm)

    def _is_depthwise(self, node: fx.Node) -> bool:
        conv = self.modules.get(node)
        depthwise = isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels > 1
        return depthwise and node in self.once and not own_forward(conv)

    def _block(self, node: fx.Node) -> str:
        """The module around a node. A stem that only one shortcut reads is no part of that block.

        A Sequential is no block, because what stands behind it reads its last module.
        """
        name = node.target.rpartition(".")[0]
        while name and isinstance(self.model.get_submodule(name), nn.Sequential):
            name = name.rpartition(".")[0]
        return name


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
        for name, norm, filters in zip(branch.convs, branch.norms, kept, strict=True):
            _mask_filters(model, name, norm, filters, filters[:, None] & read)
            read = filters
        for carried, filters in zip(branch.followers, kept, strict=False):
            for name, norm in carried:
                _mask_filters(model, name, norm, filters, filters[:, None])
    return more


def _mask_filters(model: nn.Module, name: str, norm: str | None, filters: Tensor, mask: Tensor) -> None:
    """Mask a convolution by `mask` [filters, channels], and silence all but the `filters` of its BatchNorm."""
    conv = model.get_submodule(name)
    if not mask.all():
        apply_masks({name: conv}, {name: mask[:, :, None, None].expand_as(conv.weight)})
    for part in () if norm is None else ("weight", "bias"):
        values = getattr(model.get_submodule(norm), part)
        values[~filters.to(values.device)] = 0


def _only_user(node: fx.Node | None) -> fx.Node | None:
    """The node that alone reads the output of `node`."""
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None
