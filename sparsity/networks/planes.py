"""Activations as matrices, so that a convolution is a few products with its weights as sparse matrices.

Scattered zeros in a weight pay only where the product skips them, and torch has such a product for CSR matrices. It
wants activations as one matrix [channels, positions], so a network that uses it keeps them so from the first
convolution to the last instead of converting them at every layer.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Pool = dict[tuple, "Plane"]


Pack = Callable[[Tensor], Tensor]


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
        """Take images [n, C, H, W], n at most the plane's batch; in the places of the others stays what was there."""
        self.image[..., : len(images)].copy_(images.permute(1, 2, 3, 0))
        return self

    def images(self) -> Tensor:
        """[N, C, H, W], channels_last, in memory of its own."""
        return self.image.permute(3, 0, 1, 2).contiguous(memory_format=torch.channels_last)


class PlaneConv(nn.Module):
    """A 1x1 or 3x3 convolution from plane to plane; H and W are divisible by its stride, which pads as is usual.

    With `pack`, which makes a sparse matrix of a dense one, it is a sum of one sparse product a tap; without it the
    usual dense convolution between two conversions. Through `pool` convolutions of one shape share their buffers, which
    then stay in the cache.
    """

    def __init__(self, conv: nn.Conv2d, side: int, batch: int, pool: Pool, pack: Pack | None):
        super().__init__()
        self.conv, self.stride, self.pool = conv, conv.stride[0], pool
        self.taps = taps(conv, pack) if pack else None
        self.key = (*conv.weight.shape, side // self.stride, batch)
        self.output = self._plane("output", conv.out_channels)

    def _plane(self, role: object, channels: int) -> Plane:
        if (role, self.key) not in self.pool:
            self.pool[role, self.key] = Plane(channels, *self.key[-2:])
        return self.pool[role, self.key]

    def forward(self, x: Plane, into: Plane | None = None) -> Plane:
        """Convolve `x` to the layer's own plane or, with `into`, add to what is in that one."""
        return self._by_images(x, into) if self.taps is None else self._by_taps(x, into)

    def _by_images(self, x: Plane, into: Plane | None) -> Plane:
        result = self.conv(x.images())
        if into is None:
            return self.output.load(result)
        into.image.add_(result.permute(1, 2, 3, 0))
        return into

    def _by_taps(self, x: Plane, into: Plane | None) -> Plane:
        out, beta, step, parts = into or self.output, int(into is not None), self.stride, {}
        for down, right, matrix in self.taps:
            part = (down % step, right % step)
            if part not in parts:  # the pixels that this tap meets, at the size of the output
                parts[part] = x if step == 1 else self._plane(part, self.conv.in_channels)
                if step > 1:
                    parts[part].image.copy_(x.image[:, part[0] :: step, part[1] :: step])
            source = parts[part].shifted(down // step, right // step)[: matrix.shape[1]]
            torch.addmm(out.rows, matrix, source, beta=beta, out=out.rows)
            beta = 1
        if self.conv.kernel_size[0] > 1:
            out.pads.zero_()  # what the taps left there came from other rows
        return out


def to_csr(matrix: Tensor) -> Tensor:
    """A dense matrix as CSR."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* support is in beta")
        return matrix.to_sparse_csr()


def taps(conv: nn.Conv2d, pack: Pack) -> list[tuple[int, int, Tensor]]:
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
