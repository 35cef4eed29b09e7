"""The channels of a network, followed through its `torch.fx` graph.

Every channel that a layer makes has a number. The numbers are carried through the graph, beside the values: an addition
joins the numbers of both sides, a concatenation strings them together, a depthwise or grouped convolution joins its
outputs with its inputs. Channels that something reads that is not known here have to stay.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsity.networks.layers import Layer, own_forward, parametrization, sharing

RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")
# Modules, functions and methods that leave a channel of zeros a channel of zeros, whatever the other channels hold.
SILENT_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Tanh, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
SILENT_CALLS = (
    *(*RELUS, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.tanh, torch.tanh, "tanh"),
    *(F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
)
# Beside these all that compute each channel by itself; whether a channel of zeros stays one does not matter.
BY_CHANNEL = (*SILENT_MODULES, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Upsample)
BY_CHANNEL_CALLS = (
    *(*SILENT_CALLS, torch.sigmoid, "sigmoid", F.sigmoid, F.hardsigmoid, F.softplus, F.interpolate),
    *(F.adaptive_max_pool2d, "contiguous", "clone", torch.clone),
)
OUTPUTS = "they are outputs of the network"  # why the channels of the output layer stay
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
JOINS = (
    *(operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub),
    *(operator.mul, operator.imul, torch.mul, "mul", "mul_", torch.maximum),
)


class _Value(NamedTuple):
    """The channels of a tensor [B, C, H, W] or [B, C]: their numbers. A `flat` one has k places of each, [B, C * k].

    Of rank 0 is a tensor [..., C] of any rank.
    """

    numbers: tuple[int, ...]
    rank: int
    flat: bool = False


class ChannelGraph:
    """Numbers of the channels of a network; joined ones have the same `root`.

    `outputs` maps convolutions, linear layers, BatchNorm and PReLU to the number of each of their output channels,
    `inputs` ungrouped convolutions and linear layers to that of each of their inputs. `staying` lists numbers of
    channels that have to stay, with the reason.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.parents: list[int] = []
        self.values: dict[fx.Node, _Value | None] = {}  # None: its channels are not known, or it has none
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.staying: list[tuple[tuple[int, ...], str]] = []
        nodes = fx.symbolic_trace(model).graph.nodes
        self.shared = sharing(model)
        read_past = [node.target for node in nodes if node.op == "get_attr"]  # tensors that the graph itself reads
        self.shared |= {name.rpartition(".")[0] for name in read_past}
        for node in nodes:
            if node.op == "output":
                self.keep(node, OUTPUTS)
            else:
                self.values[node] = self.value(node)

    def value(self, node: fx.Node) -> _Value | None:
        """The channels of a node's output, after joining those that it couples."""
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            handler = self.of_module(node, module)
            return handler(node) if handler else self.keep(node, f"read by {type(module).__name__} {node.target}")
        handler = self.of_call(node.target) if node.op.startswith("call") else None
        if handler is not None and (value := handler(node)) is not None:
            return value
        unread = node.op in ("placeholder", "get_attr") or node.target in ("size", "dim") or _is_shape(node)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return None if unread else self.keep(node, f"read by {name}")

    def of_module(self, node: fx.Node, module: nn.Module) -> Callable[[fx.Node], _Value | None] | None:
        """The method below that knows a call of a module."""
        usual = node.target not in self.shared and not (isinstance(module, Layer) and own_forward(module))
        if isinstance(module, nn.Conv2d | nn.Linear) and usual and not parametrization(module):
            return partial(self.layer, module=module)
        slopes = isinstance(module, nn.PReLU) and module.num_parameters > 1
        if (isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) or slopes) and node.target not in self.shared:
            return self.norm
        if isinstance(module, nn.Flatten):
            return self.flatten if (module.start_dim, module.end_dim) == (1, -1) else None
        return self.same if isinstance(module, BY_CHANNEL) else None

    def of_call(self, target: Any) -> Callable[[fx.Node], _Value | None] | None:
        """The method below that knows a call of a function, or of a method of a tensor."""
        idle = getattr(target, "__module__", "") == "torchvision.ops.stochastic_depth"  # in eval mode
        if target in BY_CHANNEL_CALLS or idle:
            return self.same
        table = {operator.getitem: self.slice, torch.cat: self.cat, torch.concat: self.cat, F.pad: self.pad}
        table |= dict.fromkeys(JOINS, self.join) | dict.fromkeys((torch.flatten, "flatten"), self.flatten)
        table |= dict.fromkeys((torch.mean, "mean"), self.mean)
        return (table | {"view": self.view, "reshape": self.view}).get(target)

    # Each of these returns None where it does not know the node; nothing has been joined then.

    def same(self, node: fx.Node) -> _Value | None:
        """Arithmetic on single values, or on the places of a channel, which are the last two axes."""
        module = self.model.get_submodule(node.target) if node.op == "call_module" else None
        pools = isinstance(module, POOLS) or "pool" in str(node.target) or node.target is F.interpolate
        value = self.first(node)
        return self.keep(node, f"read by {node.name}") if value and pools and value.rank != 4 else value

    def layer(self, node: fx.Node, module: nn.Module) -> _Value:
        """A convolution or linear layer: it reads its inputs, and makes channels, the same ones in every call."""
        name, conv, read = node.target, isinstance(module, nn.Conv2d), self.first(node)
        count, groups = (module.in_channels, module.groups) if conv else (module.in_features, 1)
        known = read is not None and read.rank in ((4,) if conv else (0, 2)) and count % len(read.numbers) == 0
        if known and (read.flat or len(read.numbers) == count):
            numbers = tuple(number for number in read.numbers for _ in range(count // len(read.numbers)))
        else:
            numbers = self.fresh(count)
            self.keep(node, f"read by {name}, whose inputs cannot be told")
            self.staying.append((numbers, f"made of inputs of {name} that stay"))
        made = self.outputs.setdefault(name, ())
        if not made:
            made = self.outputs[name] = self.fresh(len(module.weight))
        if groups == 1:
            self.unite(self.inputs.setdefault(name, numbers), numbers)
        for side in (numbers, made) if groups > 1 else ():
            self.unite(side, [made[len(made) // groups * (place * groups // len(side))] for place in range(len(side))])
        return _Value(made, 4 if conv else read.rank if known else 0)

    def norm(self, node: fx.Node) -> _Value | None:
        """BatchNorm, or PReLU with a slope for each channel."""
        value, module = self.first(node), self.model.get_submodule(node.target)
        channels = module.num_parameters if isinstance(module, nn.PReLU) else module.num_features
        if value is None or value.rank == 0 or channels % len(value.numbers):
            return self.keep(node, f"read by {node.target}, whose inputs cannot be told")
        count = channels // len(value.numbers)
        numbers = tuple(number for number in value.numbers for _ in range(count))
        self.unite(self.outputs.setdefault(node.target, numbers), numbers)
        return value

    def join(self, node: fx.Node) -> _Value | None:
        values = [self.values[each] for each in node.all_input_nodes]
        if len(values) == 1:
            return values[0]
        if None in values or len({(len(value.numbers), *value[1:]) for value in values}) > 1:
            return None
        self.unite(values[0].numbers, values[1].numbers)
        return values[0]

    def cat(self, node: fx.Node) -> _Value | None:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        values = [self.values[each] for each in node.args[0]] if isinstance(node.args[0], list | tuple) else [None]
        if dim != 1 or None in values or {value[1:] for value in values} not in ({(4, False)}, {(2, False)}):
            return None
        return _Value(tuple(number for value in values for number in value.numbers), values[0].rank)

    def pad(self, node: fx.Node) -> _Value | None:
        """Zeros before and behind the channels are channels that stay: the code that adds them tells their number."""
        value, pads = self.first(node), node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())
        if value is None or value.rank != 4 or len(pads) > 6 or not all(type(pad) is int and pad >= 0 for pad in pads):
            return None
        before, behind = [self.fresh(count) for count in (*pads[4:], 0, 0)[:2]]
        self.staying.append((before + behind, f"they meet the zeros of {node.name}"))
        return value._replace(numbers=before + value.numbers + behind)

    def slice(self, node: fx.Node) -> _Value | None:
        """Places of every image and channel, as x[:, :, ::2, ::2]."""
        value, index = self.first(node), node.args[1]
        whole = isinstance(index, tuple) and all(isinstance(part, slice) for part in index)
        if value is None:
            return None
        return value if whole and value.rank == 4 and all(part == slice(None) for part in index[:2]) else None

    def flatten(self, node: fx.Node) -> _Value | None:
        value = self.first(node)
        if node.op != "call_module" and [*node.args[1:], *node.kwargs.values()] not in ([1], [1, -1]):
            return None
        return self.flat(value)

    def view(self, node: fx.Node) -> _Value | None:
        """x.view(x.size(0), -1) and its kind are flatten; nothing else is known."""
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
        flattens = len(sizes) == 2 and sizes[1] == -1 and _is_batch_size(sizes[0])
        return self.flat(self.first(node)) if flattens else None

    def flat(self, value: _Value | None) -> _Value | None:
        return value._replace(rank=2, flat=value.flat or value.rank == 4) if value and value.rank else None

    def mean(self, node: fx.Node) -> _Value | None:
        """The mean over all places of a channel."""
        value, dims = self.first(node), node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        places = isinstance(dims, list | tuple) and {dim % 4 for dim in dims} == {2, 3}
        if value is None or value.rank != 4 or not places:
            return None
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        return value if keep else value._replace(rank=2)

    def first(self, node: fx.Node) -> _Value | None:
        """The channels of a node's first input."""
        given = node.args[0] if node.args else node.kwargs.get("input")
        return self.values.get(given) if isinstance(given, fx.Node) else None

    def keep(self, node: fx.Node, reason: str) -> None:
        """Let all channels that a node reads stay."""
        for value in filter(None, map(self.values.get, node.all_input_nodes)):
            self.staying.append((value.numbers, reason))

    def fresh(self, count: int) -> tuple[int, ...]:
        """So many new numbers."""
        numbers = range(len(self.parents), len(self.parents) + count)
        self.parents.extend(numbers)
        return tuple(numbers)

    def root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number

    def unite(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Join the numbers of two tensors, pair by pair."""
        for one, other in zip(first, second, strict=True):
            self.parents[self.root(one)] = self.root(other)


def _is_shape(node: Any) -> bool:
    """Whether a node is tensor.shape."""
    return isinstance(node, fx.Node) and node.target is getattr and node.args[1] == "shape"


def _is_batch_size(size: Any) -> bool:
    """Whether a size is tensor.size(0), tensor.size()[0] or tensor.shape[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target is operator.getitem and size.args[1] == 0:
        return _is_shape(size.args[0]) or getattr(size.args[0], "target", None) == "size"
    return size.target == "size" and size.args[1:] == (0,)
