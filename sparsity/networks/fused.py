"""A faster graph of the same weights on a CPU: a convolution, what is added to it and its ReLU run as one kernel."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsity.data.images import Split, normalise
from sparsity.networks.outputs import distance

SAMPLE = 8  # images on which outputs are compared: of fused and sparse kernels, of copies with their network
KERNELS = torch.ops.mkldnn  # oneDNN's, which torch.compile calls on a CPU


@torch.inference_mode()
def fused(inference: nn.Module, split: Split) -> nn.Module:
    """An inference copy with convolution, addition and ReLU fused; `inference` itself where that is not possible.

    The weights are those of `inference`, whose changes (`refresh`) are changes here. It is not possible for a copy that
    is no graph or on a GPU, that has nothing to fuse, or whose fused graph fails or gives other logits on a few images
    of `split`. In bfloat16 logits differ by rounding, which a fused kernel does once, after the ReLU. Unlike a ReLU of
    its own it may make 0 of nan.
    """
    here = split.images.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not here or not isinstance(inference, fx.GraphModule):
        return inference
    graph = copy.deepcopy(inference.graph)
    if sum(_fuse(node, graph, inference) for node in list(graph.nodes)) == 0:
        return inference
    network = fx.GraphModule(inference, graph).eval()
    dtype = next(inference.parameters()).dtype
    images = normalise(split.images[:SAMPLE], split.mean, split.std, dtype)
    expected = inference(images)
    try:
        found = network.forward(images)  # a graph that is called prints its errors
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # this processor lacks a kernel, or shapes do not fit
        return inference
    return network if distance(found, expected) <= torch.finfo(dtype).eps ** 0.5 else inference  # not nan


def _fuse(node: fx.Node, graph: fx.Graph, network: nn.Module) -> bool:
    """Replace a ReLU and what it alone reads, a convolution or the sum of one and something else, in place.

    Nothing runs between the two or three, which could overwrite what the kernel reads.
    """
    if not _is_relu(node, network) or node.prev is not node.args[0]:
        return False
    source, other = node.prev, None
    convolution = source
    if _is_sum(source, network) and source.prev in source.args:
        convolution = source.prev
        (other,) = (term for term in source.args if term is not convolution)
    if not _is_convolution(convolution, network):
        return False
    layer, images = network.get_submodule(convolution.target), convolution.args[0]
    with graph.inserting_before(node):
        weights = [graph.get_attr(f"{convolution.target}.{name}") for name in ("weight", "bias")]
        geometry = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        if other is None:
            arguments = (images, *weights, *geometry, "relu", [], "")
            kernel = graph.call_function(KERNELS._convolution_pointwise.default, arguments)
        else:
            arguments = (images, other, *weights, *geometry, "add", 1.0, "relu", [], "")
            kernel = graph.call_function(KERNELS._convolution_pointwise.binary, arguments)
    node.replace_all_uses_with(kernel)
    for unused in dict.fromkeys((node, source, convolution)):
        graph.erase_node(unused)
    return True


def _is_relu(node: fx.Node, network: nn.Module) -> bool:
    if not node.args:  # it may be given by name
        return False
    if node.op == "call_module":
        return type(network.get_submodule(node.target)) is nn.ReLU
    return node.target in {"call_function": (F.relu, torch.relu), "call_method": ("relu", "relu_")}.get(node.op, ())


def _is_convolution(node: object, network: nn.Module) -> bool:
    """Whether a node is a two-dimensional convolution that nothing else reads and that a kernel can do."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) > 1 or not node.args:
        return False
    layer = network.get_submodule(node.target)
    usual = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return usual and layer.bias is not None and not layer._forward_hooks and not layer._forward_pre_hooks


def _is_sum(node: fx.Node, network: nn.Module) -> bool:
    """Whether a node is the plain sum of two different tensors that nothing else reads.

    An addition in place counts only where its first term is the output of a convolution.
    """
    if node.op != "call_function" or len(node.users) > 1 or node.kwargs:
        return False
    terms = {term for term in node.args if isinstance(term, fx.Node)}
    plus = node.target in (operator.add, torch.add)
    plus = plus or (node.target is operator.iadd and _is_convolution(node.args[0], network))
    return plus and len(terms) == len(node.args) == 2
