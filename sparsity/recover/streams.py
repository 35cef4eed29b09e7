"""The inputs of layers over all calibration images, from one layer to the next in the order in which they run."""

import inspect
import operator
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from sparsity.data.calibration import Calibration
from sparsity.data.images import batch_bounds
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import InAttention, Layer, Norm, calls

HELD_BYTES = 1 << 30  # of activations that are kept for each of the two networks
ARITHMETIC = (operator.add, operator.sub, operator.mul, torch.add, torch.mul, torch.cat)  # give memory of their own
OUT_OF_PLACE = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}


class Reading(NamedTuple):
    """A call of a layer: its `source` is the same where two layers read the same input, `number` that of the call."""

    name: str
    source: Any
    number: int


def stream_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An unfolded inference copy for `open_stream`: nothing in place, every layer as soon as its input is computed.

    A shortcut then runs before the branch that it bypasses, and the input of a block is freed after its first layers
    instead of being held until the last. A network that cannot be run in parts (`in_parts`) stays as it is.
    """
    copy = inference_copy(model, dtype, fold=False, overwrite=False)
    copy.in_parts = isinstance(copy, fx.GraphModule) and _layers_are_nodes(copy) and _put_out_of_place(copy)
    if copy.in_parts:
        for node in list(copy.graph.nodes):
            if node.op == "call_module" and isinstance(copy.get_submodule(node.target), Layer):
                first = next(iter(node.args[0].users))
                if first is not node:
                    first.prepend(node)
        copy.recompile()
    return copy


def batches(calibration: Calibration) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of the calibration images that streams run."""
    return calibration.batches(batch_size=default_batch_size(calibration.images.images.device))


def batch_sizes(calibration: Calibration) -> list[int]:
    """The number of images in each of `batches`."""
    bounds = batch_bounds(len(calibration), default_batch_size(calibration.images.images.device))
    return [end - start for start, end in bounds]


def open_stream(network: nn.Module, calibration: Calibration) -> "GraphStream | HookStream":
    """The inputs of the layers of a `stream_copy`."""
    return (GraphStream if network.in_parts else HookStream)(network, calibration)


class GraphStream:
    """The activations of the calibration images in a traced network, batch by batch, one layer's input to the next.

    Activations that later layers read are kept where they take no more than HELD_BYTES for all images; otherwise they
    are computed again from the last place where they were kept, or from the images.
    """

    def __init__(self, network: fx.GraphModule, calibration: Calibration):
        self.interpreter, self.calibration = fx.Interpreter(network), calibration
        self.nodes, self.start = list(network.graph.nodes), 1  # the first node is that of the images
        self.kept: list[dict[fx.Node, Tensor]] = []  # by batch: activations that the nodes from `start` on read

    def readings(self, layers: Collection[str]) -> list[Reading]:
        """The calls of `layers`, in the order of execution."""
        found = [(number, node) for number, node in enumerate(self.nodes) if node.op == "call_module"]
        return [Reading(node.target, node.args[0], number) for number, node in found if node.target in layers]

    def inputs(self, reading: Reading) -> Iterator[Tensor]:
        """The input of a call, for each batch."""
        output = self.nodes[reading.number].args[0]  # the reading may be that of a twin of this network
        stop = max(self.start, self.nodes.index(output) + 1)
        images = ({self.nodes[0]: images} for images, _ in batches(self.calibration))
        for batch, values in enumerate(self.kept or images):
            values = self.interpreter.env = dict(values)
            for node in self.nodes[self.start : stop]:
                values[node] = self.interpreter.run_node(node)
                for done in self.interpreter.user_to_last_uses.get(node, ()):
                    values.pop(done, None)
            if batch == 0:
                tensors = [value for value in tree_leaves(values) if torch.is_tensor(value)]
                size = sum(value.numel() * value.element_size() for value in tensors)
                keep = size * len(self.calibration) <= HELD_BYTES * batch_sizes(self.calibration)[0]
            if keep:
                self.kept[batch : batch + 1] = [values]  # replaces the activations before, if these were kept
            yield values[output]
        self.start = stop if keep else self.start


class HookStream:
    """The same for a network that cannot be run in parts: it runs again for every layer, up to that layer."""

    def __init__(self, network: nn.Module, calibration: Calibration):
        self.network, self.calibration = network, calibration

    def readings(self, layers: Collection[str]) -> list[Reading]:
        """The calls of `layers`, in the order of execution; every one has an input of its own."""
        images, _ = next(batches(self.calibration))
        names = [call.name for call in calls(self.network, images[:1])]
        return [Reading(name, number, number) for number, name in enumerate(names) if name in layers]

    def inputs(self, reading: Reading) -> Iterator[Tensor]:
        """The input of a call, for each batch."""
        layer, seen = self.network.get_submodule(reading.name), []

        def stop(layer: nn.Module, inputs: tuple[Tensor]) -> None:
            seen.append(inputs[0])
            raise _Reached

        for images, _ in batches(self.calibration):
            with layer.register_forward_pre_hook(stop), suppress(_Reached):
                self.network(images)
            yield seen.pop()


class _Reached(BaseException):
    """Ends a forward pass at the layer whose input is wanted; no `except Exception` of the network stops it."""


def _layers_are_nodes(network: fx.GraphModule) -> bool:
    """Whether each layer is called by the graph, with its input first, and none inside a larger module of torch."""
    called = [node for node in network.graph.nodes if node.op == "call_module"]
    names = {node.target for node in called}
    layers = {name for name, module in network.named_modules() if isinstance(module, Layer)}
    inside = [name for name in layers - names if not isinstance(network.get_submodule(name), InAttention)]
    return not inside and all(node.args for node in called if node.target in layers)


def _put_out_of_place(network: fx.GraphModule) -> bool:
    """Let no node overwrite its input, in place; False where that could change what the network computes.

    It changes nothing where a layer, a normalisation or arithmetic gave the input and nothing else reads it.
    """
    own: set[fx.Node] = set()
    for node in network.graph.nodes:
        module = network.get_submodule(node.target) if node.op == "call_module" else None
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        overwrites = _overwrites(node, module, name)
        if overwrites and (node.args[:1] == () or node.args[0] not in own or len(node.args[0].users) > 1):
            return False
        if overwrites and module is not None:
            module.inplace = False
        elif overwrites and node.target in OUT_OF_PLACE:
            node.target = OUT_OF_PLACE[node.target]
        elif overwrites and node.op == "call_method":
            node.target = name.removesuffix("_")
        elif overwrites and "inplace" in node.kwargs:
            node.kwargs = node.kwargs | {"inplace": False}
        elif overwrites:
            return False
        if overwrites or isinstance(module, Layer | Norm) or node.target in ARITHMETIC:
            own.add(node)
    network.recompile()
    return True


def _overwrites(node: fx.Node, module: nn.Module | None, name: str) -> bool:
    """Whether a node writes into its first input."""
    if module is not None:
        return bool(getattr(module, "inplace", False)) and not isinstance(module, _DropoutNd)  # which does nothing here
    if node.op not in ("call_method", "call_function"):
        return False
    named = name.endswith("_") and not name.endswith("__")
    return named or node.target in (*OUT_OF_PLACE, operator.setitem) or _inplace(node)


def _inplace(node: fx.Node) -> bool:
    """Whether a function is called with `inplace`, by name or by place."""
    try:
        return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace", False))
    except (TypeError, ValueError):  # a method, or a function without a signature: it has no such argument
        return bool(node.kwargs.get("inplace", False))
