"""Sparse arithmetic: a ResNet whose convolutions multiply by CSR matrices, which skip the zeros of the weights.

torch's CSR product wants activations as one matrix [channels, positions], so the network keeps them so, in planes, from
the first convolution to the last instead of converting them at every layer. It pays where zeros are many: `--measure`
tells how much.
"""

import copy
import operator
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sparsity.networks.outputs import TOLERANCE, distance
from sparsity.system.errors import UserError, described

CHUNK = 32  # images of 32 pixels that are run together; more leave the caches
Pack = Callable[[Tensor], Tensor]  # a dense matrix to a sparse one


class Plane:
    """Activations as one matrix [C + 1, H * (W + 1) * N], H = W = `side`, between margins of zeros.

    The images of a batch stand innermost, so that the neighbours of all pixels are one shifted view. The column of
    zeros ends a row of pixels and begins the next, and serves 3x3 taps as padding on both sides. The last row is one
    at pixels and zero elsewhere: a bias is the weight of that row, and costs no pass of its own.
    """

    def __init__(self, channels: int, side: int, batch: int):
        self.side, self.batch, self.columns = side, batch, side * (side + 1) * batch
        self.margin = (side + 2) * batch
        self.whole = torch.zeros(channels + 1, self.columns + 2 * self.margin)
        pixels = self.shifted(0, 0).unflatten(1, (side, side + 1, batch))
        pixels[-1, :, :-1] = 1
        self.rows = self.shifted(0, 0)[:-1]  # [C, H * (W + 1) * N]
        self.image, self.pads = pixels[:-1, :, :-1], pixels[:-1, :, -1]  # [C, H, W, N], [C, H, N]

    def shifted(self, down: int, right: int) -> Tensor:
        """A view [C + 1, columns] in which the neighbour so many pixels away stands at the place of each pixel."""
        start = self.margin + (down * (self.side + 1) + right) * self.batch
        return self.whole[:, start : start + self.columns]

    def load(self, images: Tensor) -> "Plane":
        """Copy images [n, C, H, W] into the first n of its N places; the other places keep their content."""
        self.image[..., : len(images)].copy_(images.permute(1, 2, 3, 0))
        return self

    def images(self) -> Tensor:
        """[N, C, H, W], channels_last, in memory of its own."""
        return self.image.permute(3, 0, 1, 2).contiguous(memory_format=torch.channels_last)


def to_csr(matrix: Tensor) -> Tensor:
    """A dense matrix as CSR."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* support is in beta")
        return matrix.to_sparse_csr()


class PlaneConv(nn.Module):
    """A 1x1 or 3x3 convolution from plane to plane, as a sum of one sparse product a tap.

    H and W are divisible by its stride. `pack` makes a sparse matrix of a dense one. Convolutions of one shape share
    their buffers through `pool`, which then stay in the cache.
    """

    def __init__(self, conv: nn.Conv2d, side: int, batch: int, pool: dict[tuple, Plane], pack: Pack = to_csr):
        super().__init__()
        self.taps, self.stride, self.pool = _taps(conv, pack), conv.stride[0], pool
        self.in_channels, self.padded = conv.in_channels, conv.padding[0] > 0
        self.key = (*conv.weight.shape, side // self.stride, batch)
        self.output = self._plane("output", conv.out_channels)

    def _plane(self, role: object, channels: int) -> Plane:
        if (role, self.key) not in self.pool:
            self.pool[role, self.key] = Plane(channels, *self.key[-2:])
        return self.pool[role, self.key]

    def forward(self, x: Plane, into: Plane | None = None) -> Plane:
        """Convolve `x` to the layer's own plane or, with `into`, add to the content of that one."""
        out, beta, step, parts = into or self.output, int(into is not None), self.stride, {}
        for down, right, matrix in self.taps:
            part = (down % step, right % step)
            if part not in parts:  # the pixels that this tap meets, at the size of the output
                parts[part] = x if step == 1 else self._plane(part, self.in_channels)
                if step > 1:
                    parts[part].image.copy_(x.image[:, part[0] :: step, part[1] :: step])
            source = parts[part].shifted(down // step, right // step)[: matrix.shape[1]]
            torch.addmm(out.rows, matrix, source, beta=beta, out=out.rows)
            beta = 1
        if self.padded:
            out.pads.zero_()  # the taps added pixels of other rows there
        return out


def _taps(conv: nn.Conv2d, pack: Pack) -> list[tuple[int, int, Tensor]]:
    """(down, right, matrix) of each tap with weights; first the middle one, always there, which carries the bias."""
    reach = conv.kernel_size[0] // 2
    places = [(down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)]
    found = []
    for down, right in sorted(places, key=lambda place: place != (0, 0)):
        matrix = conv.weight.detach()[:, :, down + reach, right + reach].contiguous()
        if (down, right) == (0, 0) and conv.bias is not None:
            matrix = torch.cat([matrix, conv.bias.detach()[:, None]], dim=1)
        if not found or matrix.any():
            found.append((down, right, pack(matrix)))
    return found


class SparseNetwork(nn.Module):
    """A network with the weights of an inference copy, every convolution sparse; images [B, C, S, S] to logits.

    Batches are run in chunks of CHUNK images of 32 pixels, fewer larger ones, a single image alone. Made by
    `sparse_network`.
    """

    def __init__(self, inference: fx.GraphModule):
        super().__init__()
        self.inference = inference
        self.prepared: dict[tuple[int, int], tuple[fx.GraphModule, Plane]] = {}  # by chunk and size

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes]."""
        count, channels, size, _ = images.shape
        chunk = 1 if count == 1 else max(1, min(CHUNK, CHUNK * 32**2 // size**2))
        if (chunk, size) not in self.prepared:
            network = _in_planes(self.inference, channels, size, chunk)
            self.prepared[chunk, size] = network, Plane(channels, size, chunk)
        network, plane = self.prepared[chunk, size]
        return torch.cat([network(plane.load(part))[: len(part)] for part in images.split(chunk)])


@torch.inference_mode()
def sparse_network(inference: fx.GraphModule, sample: Tensor) -> SparseNetwork:
    """A sparse network with the weights of an inference copy that `require_supported` has passed.

    Raises UserError unless both give the same logits for `sample`, a few images [B, C, S, S].
    """
    network = SparseNetwork(inference).eval()
    expected, found = inference(sample), network(sample)
    apart = distance(found, expected)
    if not apart <= TOLERANCE:  # also nan
        raise UserError(
            f"sparse and dense arithmetic disagree by {apart:.1e} of the largest output; use --engine dense"
        )
    return network


def require_supported(inference: nn.Module, sample: Tensor) -> None:
    """UserError unless sparse kernels can run the network on `sample`: in float32 on a CPU, with layers of a ResNet."""
    if not isinstance(inference, fx.GraphModule):
        raise UserError("--engine sparse needs a network that torch.fx can trace; use --engine dense")
    weight = next(inference.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise UserError("--engine sparse is for float32 on a CPU; use --engine dense, or --precision fp32 on a CPU")
    try:
        sparse_network(inference, sample)
    except UserError:
        raise
    except Exception as error:  # planes fail in many ways on other layers
        raise UserError(f"--engine sparse cannot run this network ({described(error)}); use --engine dense") from error


def _in_planes(inference: fx.GraphModule, channels: int, size: int, batch: int) -> fx.GraphModule:
    """The network from a plane of images to logits.

    An addition becomes the starting value of the convolution before it: accumulating costs no pass of its own.
    """
    network, pool = fx.GraphModule(inference, copy.deepcopy(inference.graph)), {}
    ShapeProp(inference).propagate(torch.zeros(1, channels, size, size))
    for node in inference.graph.nodes:
        layer = inference.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d):
            side = node.args[0].meta["tensor_meta"].shape[-1]
            network.set_submodule(node.target, PlaneConv(layer, side, batch, pool))
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
