"""Inference copies: masks baked in, BatchNorm folded, channels_last; and such a copy through `torch.compile`."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from sparsity.data.images import Split, normalise
from sparsity.networks.layers import (
    BatchNorm,
    Conv,
    Layer,
    Way,
    effective_weight,
    own_forward,
    parametrization,
    set_way,
    way_of,
)
from sparsity.networks.outputs import TOLERANCE, distance
from sparsity.system.errors import UserError, described, one_line

# The fastest first.
WAYS = (Way(), Way(channels_last=False), Way(traced=False, channels_last=False))


@torch.no_grad()
def choose_way(model: nn.Module, images: Tensor) -> Way:
    """Choose the fastest way of which a copy gives the outputs of `model` on `images`, make it the network's.

    `images` [B, C, H, W] are normalised, in float32. Later copies of the network, by `copy.deepcopy` too, are made the
    same way. Raises UserError where not even a copy of the network as it is gives its outputs.
    """
    expected, reason = model.eval()(images.contiguous()), ""
    for way in WAYS:
        set_way(model, way if way.traced else way._replace(reason=reason))
        try:
            trial = inference_copy(model)
            found = (trial.forward if way.traced else trial)(images)  # a graph that is called prints its errors
            apart = distance(found, expected)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the network is anybody's
            reason = described(error)
            continue
        if apart <= TOLERANCE:  # not nan
            return way_of(model)
        reason = f"its outputs differ by {apart:.1e} of the largest"
    raise UserError(f"the network cannot be pruned, because even a plain copy of it fails ({reason})")


@torch.no_grad()
def precision_problem(model: nn.Module, images: Tensor, dtype: torch.dtype) -> str | None:
    """Why a copy of `model` in `dtype` cannot run on `images` (normalised, float32), in words; None where it can."""
    copied = inference_copy(model, dtype)
    try:
        (copied.forward if way_of(model).traced else copied)(images.to(dtype))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tensors of another type than its weights, most often
        return one_line(error)[:120]
    return None


def inference_copy(
    model: nn.Module, dtype: torch.dtype = torch.float32, fold: bool = True, overwrite: bool = True
) -> nn.Module:
    """A copy of `model` for inference only: masks baked in, BatchNorm folded, channels_last, weights in `dtype`.

    `model` may be masked and stays as it is. The copy is on the same device, in eval mode, without gradients, and
    takes images in `dtype`. `refresh` brings the weights of another network of the same structure into it, so that it
    is made once for a whole sweep. It is a `fx.GraphModule`; where `way_of(model)` says otherwise, a module of the
    network's own class without anything folded. Without `fold` every BatchNorm stays a module under its own name, in
    float32, as calibration needs it. Without `overwrite` no activation is overwritten in place that was not before, so
    that a part of the network can be run again from activations that were kept.
    """
    way, result = way_of(model), _plain_copy(model)
    result.folded = {}
    if way.traced:
        result = _traced(result, fold)
        if overwrite:
            overwrite_in_place(result)
        if not way.channels_last:
            _make_contiguous(result)
    result.eval().requires_grad_(False).to(dtype)
    if way.channels_last and not any(parameter.dim() == 5 for parameter in result.parameters()):
        result.to(memory_format=torch.channels_last)
    for layer in result.modules():
        if isinstance(layer, BatchNorm):
            layer.float()  # takes activations in `dtype` all the same
    refresh(result, model)
    return result


@torch.no_grad()
def refresh(inference: nn.Module, model: nn.Module) -> None:
    """Copy the present weights of `model` (masked or not) into its inference copy, in place, folding BatchNorm."""
    for name, batch_norm_name in inference.folded.items():
        source, target = model.get_submodule(name), inference.get_submodule(name)
        weight, bias = effective_weight(source), source.bias
        if batch_norm_name:
            bn = model.get_submodule(batch_norm_name)
            fuse = fuse_linear_bn_weights if isinstance(source, nn.Linear) else fuse_conv_bn_weights
            weight, bias = fuse(weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
        target.weight.copy_(weight)
        target.bias.copy_(torch.zeros_like(target.bias) if bias is None else bias)
    for name, target in [*inference.named_parameters(), *inference.named_buffers()]:
        place, _, part = name.rpartition(".")
        if place not in inference.folded and not part.startswith("_tensor_constant"):  # of the trace alone
            owner = model.get_submodule(place)
            masked = part == "weight" and isinstance(owner, Layer)
            target.copy_(effective_weight(owner) if masked else getattr(owner, part))


@torch.no_grad()
def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a network, masked or not, with the effective weights in place of masks."""
    # Under a mask `weight` may have a history of gradients, which cannot be copied.
    masked = [layer for layer in model.modules() if hasattr(layer, "weight_mask")]
    plain = copy.deepcopy(model, {id(layer.weight): effective_weight(layer).detach() for layer in masked})
    for layer in plain.modules():
        if hasattr(layer, "weight_mask"):
            prune.remove(layer, "weight")
    return plain


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Also layers of the user's own class that compute as their parent does."""
        return super().is_leaf_module(module, name) or (isinstance(module, Layer) and not own_forward(module))


def _traced(plain: nn.Module, fold: bool) -> fx.GraphModule:
    """The graph of a network, with its modules and tensors; `folded` maps each layer to the BatchNorm folded into it.

    Layers have a bias to fold into.
    """
    graph = _Tracer().trace(plain.eval())
    layers = {node: plain.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = [node.target for node in layers]
    folded: dict[str, str | None] = {}
    for node, layer in layers.items():
        usual = isinstance(layer, Conv | nn.Linear) and not own_forward(layer) and not parametrization(layer)
        if not usual or node.target in folded:
            continue
        batch_norm = _following_batch_norm(node, layers, calls) if fold else None
        folded[node.target] = batch_norm.target if batch_norm else None
        if batch_norm:
            batch_norm.replace_all_uses_with(node)
            graph.erase_node(batch_norm)
            layer.weight = nn.Parameter(layer.weight.detach().clone())  # another layer may have had it too
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    result = fx.GraphModule(plain, graph)
    result.folded = folded
    return result


def _make_contiguous(network: fx.GraphModule) -> None:
    """Let a graph begin by making its images contiguous, as `Tensor.view` may need it, in place."""
    images = next(iter(network.graph.nodes))
    with network.graph.inserting_after(images):
        ordered = network.graph.call_method("contiguous", (images,))
    images.replace_all_uses_with(ordered, lambda node: node is not ordered)
    network.recompile()


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
        if not isinstance(first, fx.Node):
            continue
        if node.op != "call_function" or first not in own or len(first.users) > 1 or first in node.args[1:]:
            continue
        if node.target is operator.add:
            node.target = operator.iadd
            own.add(node)
        elif node.target is F.relu:
            node.kwargs = {"inplace": True}
    network.recompile()


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
