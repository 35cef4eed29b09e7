"""Which arithmetic a network is run with: dense kernels, or sparse ones where their zeros are many enough to pay."""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsity.networks.layers import positions_per_image
from sparsity.networks.planes import Plane, PlaneConv, Pool, to_csr
from sparsity.results.rows import SPARSE_NOTE
from sparsity.system.errors import UserError

ENGINES = ("auto", "dense", "sparse")


CHUNK = 32  # images of 32 pixels that are run together; more leave the caches


# Costs in units of a multiply-add of a dense convolution, fitted to what tests/benchmarks/bench_sparse_kernels.py
# measures on two cores with AVX2: within 3 % at 90, 95, 98 and 99 % zeros in every layer.
SPARSE_COST = 7.0  # a multiply-add with a nonzero weight


TAP_COST = 25.0  # an output value of a product, of which a 3x3 convolution has nine


CONVERSION_COST = 200.0  # a value that enters or leaves a dense convolution between two conversions


# Times as fast as dense, by this estimate. Where zeros are uneven it was up to 1.7 times too high.
WORTHWHILE = 1.5


TOLERANCE = 1e-3  # of the largest logit


class SparseNetwork(nn.Module):
    """A network of an inference copy that multiplies by sparse matrices; images [B, C, S, S] to logits.

    Batches are run in chunks of CHUNK images of 32 pixels, fewer larger ones, a single image alone. Made by
    `sparse_network`.
    """

    def __init__(self, inference: fx.GraphModule, size: int, kernels: dict[str, str]):
        super().__init__()
        self.inference, self.size, self.kernels = inference, size, kernels
        self.prepared: dict[int, tuple[fx.GraphModule, Plane]] = {}

    def words(self) -> str:
        """What is sparse about it, for the notes of a row."""
        kernels = list(self.kernels.values())
        return f"{SPARSE_NOTE} in {kernels.count('csr')} of {len(kernels)} convolutions"

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        batch = 1 if len(images) == 1 else max(1, min(CHUNK, CHUNK * 32**2 // self.size**2))
        if batch not in self.prepared:
            channels = next(layer for layer in self.inference.modules() if isinstance(layer, nn.Conv2d)).in_channels
            network = _in_planes(self.inference, self.size, batch, self.kernels)
            self.prepared[batch] = (network, Plane(channels, self.size, batch))
        network, plane = self.prepared[batch]
        return torch.cat([network(plane.load(part))[: len(part)] for part in images.split(batch)])


def run_by(engine: str, inference: fx.GraphModule, sample: Tensor) -> nn.Module:
    """The network to run: `inference` itself, or for 'sparse' and, where it pays, 'auto' a sparse one of its weights.

    `sample` are a few images [B, C, S, S]. 'auto' goes by the zeros of each layer and measured costs, so that the same
    weights always run in the same way. Raises UserError for 'sparse' where that cannot be: other types than float32,
    other devices than the CPU, other layers than those of a ResNet; and should the two disagree on `sample`.
    """
    if engine == "dense" or not require_supported(engine, inference, sample):
        return inference
    kernels, gain = choose_kernels(inference, sample[:1], engine)
    if engine == "sparse":
        return sparse_network(inference, sample, kernels)
    network = SparseNetwork(inference, sample.shape[-1], kernels).eval()
    return network if gain >= WORTHWHILE and disagreement(network, inference, sample) <= TOLERANCE else inference


def require_supported(engine: str, inference: fx.GraphModule, sample: Tensor) -> bool:
    """Whether a network can be run in planes; UserError if not and `engine` is 'sparse'."""
    reason = _unsupported(inference, sample)
    if reason and engine == "sparse":
        raise UserError(f"--engine sparse cannot run this network ({reason}); use --engine dense")
    return not reason


def choose_kernels(inference: fx.GraphModule, image: Tensor, engine: str) -> tuple[dict[str, str], float]:
    """The kernel of each convolution, and how many times as fast as dense the network should then be."""
    positions = positions_per_image(inference, image)
    kernels, dense, chosen = {}, 0.0, 0.0
    for name, layer in inference.named_modules():
        if isinstance(layer, nn.Conv2d):
            by_csr, by_conv = (positions[name] * cost for cost in _costs(layer))
            kernels[name] = "csr" if engine == "sparse" or by_csr <= by_conv else "conv"
            chosen += by_csr if kernels[name] == "csr" else by_conv
            dense += positions[name] * layer.weight.numel()
    return kernels, dense / chosen


def _costs(conv: nn.Conv2d) -> tuple[float, float]:
    """What an output position costs in CSR, and by the dense convolution between two conversions."""
    out_channels, in_channels, height, width = conv.weight.shape
    by_csr = SPARSE_COST * int(torch.count_nonzero(conv.weight)) + TAP_COST * height * width * out_channels
    received = in_channels * conv.stride[0] * conv.stride[1]
    return by_csr, conv.weight.numel() + CONVERSION_COST * (received + out_channels)


def sparse_network(inference: fx.GraphModule, sample: Tensor, kernels: dict[str, str]) -> SparseNetwork:
    """A sparse network with a kernel, csr or conv, for each convolution; UserError if it disagrees on `sample`."""
    network = SparseNetwork(inference, sample.shape[-1], kernels).eval()
    apart = disagreement(network, inference, sample)
    if not apart <= TOLERANCE:
        raise UserError(
            f"sparse and dense arithmetic disagree by {apart:.1e} of the largest output; use --engine dense"
        )
    return network


@torch.inference_mode()
def disagreement(network: nn.Module, inference: fx.GraphModule, sample: Tensor) -> float:
    """Largest difference of both logits on `sample`, in units of the largest logit; nan where one is not finite."""
    expected, found = inference(sample), network(sample)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _unsupported(inference: fx.GraphModule, sample: Tensor) -> str:
    """What of a network cannot be run in planes, in words; empty if nothing."""
    weight = next(inference.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return "sparse products are for float32 on a CPU"
    if sample.shape[-1] != sample.shape[-2]:
        return "images are not square"
    sides = _sides(inference, sample.shape[-1])
    for node in inference.graph.nodes:
        layer = inference.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d):
            if problem := _conv_problem(layer, sides[node.target]):
                return f"{node.target} {problem}"
        elif not (_is_known(node) or isinstance(layer, nn.Linear)):
            return f"{node.name} is no part of a ResNet"
    return ""


def _conv_problem(conv: nn.Conv2d, side: int) -> str:
    size, stride = conv.kernel_size[0], conv.stride[0]
    usual = conv.kernel_size in ((1, 1), (3, 3)) and conv.padding == (size // 2, size // 2) and conv.groups == 1
    usual = usual and conv.dilation == (1, 1) and conv.stride == (stride, stride) and conv.padding_mode == "zeros"
    if not usual:
        return "is neither a 1x1 nor a 3x3 convolution that keeps its size"
    return f"strides over {side} pixels, which {stride} does not divide" if side % stride else ""


def _is_known(node: fx.Node) -> bool:
    """Whether a node is one of those that `_in_planes` makes something of, as the blocks of a ResNet have them."""
    if node.op in ("placeholder", "output"):
        return True
    if node.target is F.relu:
        return len(node.args[0].users) == 1
    if node.target is operator.iadd:
        return node.args[0].op == "call_module" and len(node.args[0].users) == 1
    if node.target is torch.flatten:
        return node.args[0].target is F.avg_pool2d
    return node.target in (F.avg_pool2d, getattr, operator.getitem)  # of pooling over the whole map


def _sides(inference: fx.GraphModule, size: int) -> dict[str, int]:
    """Name -> side of the images that each convolution receives."""
    sides: dict[str, int] = {}
    convs = [(name, layer) for name, layer in inference.named_modules() if isinstance(layer, nn.Conv2d)]
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: sides.update({name: inputs[0].shape[-1]}))
        for name, layer in convs
    ]
    try:
        with torch.inference_mode():
            inference(torch.zeros(1, convs[0][1].in_channels, size, size))
    finally:
        for handle in handles:
            handle.remove()
    return sides


def _in_planes(inference: fx.GraphModule, size: int, batch: int, kernels: dict[str, str]) -> fx.GraphModule:
    """The network from a plane of images to logits.

    An addition becomes the starting value of the convolution before it: accumulating costs no pass of its own.
    """
    network = fx.GraphModule(inference, copy.deepcopy(inference.graph))
    sides, pool = _sides(inference, size), Pool()
    for name, kernel in kernels.items():
        pack = to_csr if kernel == "csr" else None
        network.set_submodule(name, PlaneConv(inference.get_submodule(name), sides[name], batch, pool, pack))
    for node in list(network.graph.nodes):
        if node.target is F.relu:
            node.target, node.kwargs = _relu, {}
        elif node.target is torch.flatten:
            node.target, node.args = _pooled, (node.args[0].args[0],)
        elif node.target is operator.iadd:
            conv, residual = node.args
            node.op, node.target, node.args = "call_module", conv.target, (conv.args[0], residual)
            network.graph.erase_node(conv)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _relu(plane: Plane) -> Plane:
    """In place, on the pixels only: the row of ones and the zeros stay."""
    plane.image.relu_()
    return plane


def _pooled(plane: Plane) -> Tensor:
    """Global average, [N, C]."""
    return plane.image.mean(dim=(1, 2)).t()
