"""Inference copies: masks baked in, BatchNorm folded, channels_last; and such a copy through `torch.compile`."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from sparsity.data.images import Split, normalise
from sparsity.networks.layers import BatchNorm, Layer, effective_weight
from sparsity.system.errors import UserError, one_line


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
            parts[node.target] = operator.attrgetter(node.target)(model).detach().clone()
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
        target.bias.copy_(torch.zeros_like(target.bias) if bias is None else bias)
    for node in inference.graph.nodes:
        if node.op == "get_attr":
            read = operator.attrgetter(node.target)
            read(inference).copy_(read(model))
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
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return nn.utils.skip_init(nn.Conv2d, device=device, **{name: getattr(layer, name) for name in names})


class CompiledNetwork(nn.Module):
    """A network that runs full batches by `torch.compile`, which compiles in the first call; images to logits.

    The weights are those of `network` itself, whose changes (`refresh`, an optimizer's step) are changes here. Batches
    of another size than `batch_size` run by `network` as it is, so that nothing is compiled twice.
    """

    def __init__(self, network: nn.Module, batch_size: int):
        super().__init__()
        self.network, self.batch_size = network, batch_size
        # On a GPU this mode records CUDA graphs: one launch a batch. They keep the addresses of the weights, not
        # their values.
        self.fast = torch.compile(network, mode="reduce-overhead", dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W], in memory of their own."""
        if len(images) != self.batch_size:
            return self.network(images)
        if images.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self.fast(images).clone()  # the next replay of a CUDA graph overwrites its outputs


@torch.inference_mode()
def compiled(inference: fx.GraphModule, split: Split, batch_size: int) -> CompiledNetwork:
    """A compiled network of the weights of `inference`, for batches of `batch_size` images of `split`.

    It is compiled here, on the first images, in up to a minute or two; made once, it serves a whole sweep. Raises
    UserError where torch cannot compile (no C++ compiler on a CPU, no Triton on a GPU).
    """
    images = normalise(split.images[:batch_size], split.mean, split.std, next(inference.parameters()).dtype)
    network = CompiledNetwork(inference, len(images)).eval()
    try:
        for _ in range(3):  # compiles; warms up; records a CUDA graph
            network(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the parent of all that torch raises while it compiles
        raise UserError(f"torch.compile does not work here ({one_line(error)[:160]}); use --compile off") from error
    return network
