"""A network prepared for inference, and the one loop that evaluates it."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from sparsity.networks.layers import BatchNorm, Layer, effective_weight


def inference_copy(
    model: nn.Module, dtype: torch.dtype = torch.float32, fold: bool = True, overwrite: bool = True
) -> fx.GraphModule:
    """A copy of `model` for inference only: masks baked in, BatchNorm folded, channels_last, weights in `dtype`.

    `model` may be masked and stays as it is. The copy is on the same device, in eval mode, without gradients, and
    takes images in `dtype`. `refresh` brings the weights of another network of the same structure into it, so that it
    is made once for a whole sweep. The model must be traceable by `torch.fx`. Without `fold` every BatchNorm stays a
    module under its own name, in float32, as calibration needs it. Without `overwrite` no activation is overwritten
    in place, so that a part of the network can be run again from activations that were kept.
    """
    traced = fx.symbolic_trace(model)
    layers = {node: model.get_submodule(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    calls = [node.target for node in layers]
    folded: dict[str, str | None] = {}
    for node, layer in layers.items():
        if isinstance(layer, Layer) and node.target not in folded:
            batch_norm = _following_batch_norm(node, layers, calls) if fold else None
            folded[node.target] = batch_norm.target if batch_norm else None
            if batch_norm:
                batch_norm.replace_all_uses_with(node)
                traced.graph.erase_node(batch_norm)
    parts = {
        node.target: _bare(layer) if node.target in folded else copy.deepcopy(layer)
        for node, layer in layers.items()
        if node.target not in folded.values()
    }
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            parts[node.target] = _attribute(model, node.target).detach().clone()
    result = fx.GraphModule(parts, traced.graph)
    if overwrite:
        overwrite_in_place(result)
    result.folded = folded
    result.eval().requires_grad_(False)
    result.to(device=next(model.parameters()).device, dtype=dtype, memory_format=torch.channels_last)
    for layer in result.modules():
        if isinstance(layer, BatchNorm):
            layer.float()  # takes activations in `dtype` all the same
    refresh(result, model)
    return result


@torch.no_grad()
def refresh(inference: fx.GraphModule, model: nn.Module) -> None:
    """Copy the present weights of `model` (masked or not) into its inference copy, in place, folding BatchNorm."""
    for name, batch_norm_name in inference.folded.items():
        source, target = model.get_submodule(name), inference.get_submodule(name)
        weight, bias = effective_weight(source), source.bias
        if batch_norm_name:
            bn = model.get_submodule(batch_norm_name)
            fuse = fuse_conv_bn_weights if isinstance(source, nn.Conv2d) else fuse_linear_bn_weights
            weight, bias = fuse(weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        target.weight.copy_(weight)
        if bias is None:
            target.bias.zero_()
        else:
            target.bias.copy_(bias)
    for node in inference.graph.nodes:
        if node.op == "get_attr":
            _attribute(inference, node.target).copy_(_attribute(model, node.target))
    for name, target in inference.named_modules():
        if name and name not in inference.folded and not list(target.children()):
            target.load_state_dict(model.get_submodule(name).state_dict())


def _following_batch_norm(node: fx.Node, layers: dict[fx.Node, nn.Module], calls: list[str]) -> fx.Node | None:
    """The BatchNorm that alone reads the output of `node`, when both run once and it keeps running statistics."""
    follower = next(iter(node.users), None)
    follower_layer = layers.get(follower)
    once = len(node.users) == 1 and calls.count(node.target) == 1
    if not once or not isinstance(follower_layer, BatchNorm) or calls.count(follower.target) != 1:
        return None
    return follower if follower_layer.track_running_stats else None


def overwrite_in_place(network: fx.GraphModule) -> None:
    """Let each addition and each F.relu overwrite what a layer, BatchNorm or addition gives, if nothing else reads it.

    At the widest point of a ResNet this halves the memory that activations take. A network that was saved and loaded
    has its additions out of place again.
    """
    own: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), Layer | BatchNorm):
            own.add(node)
        first = node.args[0] if node.args else None
        if node.op != "call_function" or first not in own or len(first.users) > 1 or first in node.args[1:]:
            continue
        if node.target is operator.add:
            node.target = operator.iadd
            own.add(node)
        elif node.target is F.relu:
            node.kwargs = {"inplace": True}
    network.recompile()


def _bare(layer: Layer) -> Layer:
    """A layer of the same geometry with weights of its own, not yet set, and with a bias to fold into."""
    device = layer.weight.device
    if isinstance(layer, nn.Linear):
        return nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, device=device)
    return nn.utils.skip_init(
        nn.Conv2d,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        device=device,
    )


def _attribute(model: nn.Module, target: str) -> Tensor:
    for part in target.split("."):
        model = getattr(model, part)
    return model
