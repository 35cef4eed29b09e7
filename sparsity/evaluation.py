"""A network prepared for inference, and the one loop that evaluates it."""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from sparsity.data import Split, normalise
from sparsity.masks import Layer, effective_weight
from sparsity.runtime import UserError, one_line

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class Evaluation:
    """What a network said: `predictions` [N] (int64, on the CPU), `correct` and `total` images, mean loss."""

    predictions: Tensor
    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total


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


def default_batch_size(device: torch.device) -> int:
    """Images at a time: on a CPU as many as keep the activations near its caches, on a GPU enough to fill it."""
    return 32 if device.type == "cpu" else 500


def evaluate(
    network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], None] = lambda images: None
) -> Evaluation:
    """Run `network` over every image of `split` in order; correct answers and losses are counted, then divided once.

    `network` maps normalised images [B, C, H, W], in the type of its weights, to logits [B, classes], and is in eval
    mode already. A GPU is waited for once, at the end. `on_batch` is told the number of images after each batch. The
    mean loss is that of cross-entropy, summed in float64.
    """
    return count(*answer(network, split, batch_size, on_batch), split.labels)


def answer(network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """The predicted class of each image [N], and the summed loss of each batch in float64; both on the CPU."""
    dtype = next(network.parameters()).dtype
    predictions, losses = [], []
    with torch.inference_mode():
        for start in range(0, len(split), batch_size):
            images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
            logits = network(normalise(images, split.mean, split.std, dtype)).float()
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            predictions.append(logits.argmax(dim=1))
            on_batch(len(labels))
    if not predictions:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    return torch.cat(predictions).cpu(), torch.stack(losses).cpu().double()  # not every device has float64


def count(predictions: Tensor, losses: Tensor, labels: Tensor) -> Evaluation:
    """The result of what `answer` gave for all images of these `labels` [N]."""
    correct = int((predictions == labels.cpu()).sum())
    return Evaluation(predictions, correct, len(labels), float(losses.sum()) / len(labels))


class CompiledNetwork(nn.Module):
    """An inference copy that runs full batches by `torch.compile`; images [B, C, H, W] to logits. Made by `compiled`.

    The weights are those of `inference` itself, so `refresh` of it is all that another network takes. Batches of any
    other size run by `inference` as it is, so that nothing is compiled twice.
    """

    def __init__(self, inference: fx.GraphModule, batch_size: int):
        super().__init__()
        self.inference, self.batch_size = inference, batch_size
        # On a GPU this mode records CUDA graphs: one launch a batch. They keep the addresses of the weights, not
        # their values.
        self.fast = torch.compile(inference, mode="reduce-overhead", dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], in memory of their own."""
        if len(images) != self.batch_size:
            return self.inference(images)
        if images.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self.fast(images).clone()  # the next replay of a CUDA graph overwrites its outputs


def compiled(inference: fx.GraphModule, split: Split, batch_size: int) -> CompiledNetwork:
    """A compiled network of the weights of `inference`, for `evaluate` with batches of `batch_size` of `split`.

    Compiling takes place here, on the first images, in up to a minute or two; made once, it serves a whole sweep.
    Raises UserError where torch cannot compile (no C++ compiler on a CPU, no Triton on a GPU).
    """
    size = min(batch_size, len(split))
    network = CompiledNetwork(inference, size).eval()
    first = split.take(torch.arange(size))
    try:
        for _ in range(3):  # compiles; warms up; records a CUDA graph
            evaluate(network, first, size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the parent of all that torch raises while it compiles
        raise UserError(f"torch.compile does not work here ({one_line(error)[:160]}); use --compile off") from error
    return network


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
