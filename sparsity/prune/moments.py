"""Second moments of the inputs of layers, over calibration images."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import Layer
from sparsity.system.machine import generator


@contextmanager
def exact_products(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside the block, products of float32 matrices are exact for values of `dtype` and summed in float32.

    With bfloat16 they run in bfloat16 (TF32 on a GPU) where the hardware can, several times as fast, and other values
    are rounded.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def can_unfold(layer: Layer) -> bool:
    """Whether `windows` can unfold a layer's inputs: linear layers, ungrouped convolutions with zero padding."""
    return isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def windows(layer: Layer, inputs: Tensor) -> Tensor:
    """The inputs of each output position: [B, OH, OW, kh, kw, C] of [B, C, H, W]; [B, N, 1, d] of [B, ..., d].

    A view of the padded inputs. Raises ValueError for layers that `can_unfold` refuses.
    """
    if not can_unfold(layer):
        raise ValueError("inputs are unfolded for ungrouped convolutions with plain zero padding only")
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
    pad_h, pad_w = layer.padding
    seen = F.pad(inputs, (pad_w, pad_w, pad_h, pad_h))
    for dim, kernel, stride, dilation in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation, strict=True):
        seen = seen.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return seen.permute(0, 2, 3, 4, 5, 1)  # channels last, as activations lie in memory


def input_rows(layer: Layer, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """Unfold a layer's inputs, one row an output position: [N, d] float32; outputs are `rows @ weight_rows(weight).T`.

    For a convolution d is kh * kw * C. `positions` [B, n] chooses n of the output positions of each image (row-major,
    0 to OH * OW - 1), so that N is B * n; without it all are taken in order. Errors as from `windows`.
    """
    seen = windows(layer, inputs)
    size = seen.shape[3:].numel()
    if positions is not None:
        image = torch.arange(len(seen), device=seen.device)[:, None]
        seen = seen[image, positions // seen.shape[2], positions % seen.shape[2]]
    return seen.reshape(-1, size).float()


def weight_rows(weight: Tensor) -> Tensor:
    """A weight [out, ...] as a matrix [out, d], its columns in the order of `input_rows`."""
    return weight.movedim(1, -1).flatten(1)


def as_weight(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `weight_rows`: values [n, d] or [d] in the shape of `weight`, [n, C, kh, kw] or [n, d]."""
    return rows.reshape(-1, *weight.movedim(1, -1).shape[1:]).movedim(-1, 1)


def add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the sum of x x^T over `rows` [N, d] to `total` [d, d], except its lower left quarter; see `symmetric`."""
    half = len(total) // 2
    total[:half].addmm_(rows[:, :half].T, rows)
    total[half:, half:].addmm_(rows[:, half:].T, rows[:, half:])


def symmetric(total: Tensor) -> Tensor:
    """`total` [d, d] with its lower left quarter filled in, in place, from the upper right one."""
    half = len(total) // 2
    total[half:, :half] = total[:half, half:].T
    return total


def draw_positions(layer: Layer, inputs: Tensor, calibration: Calibration, *keys: int) -> Tensor | None:
    """Random positions [B, n] of a batch's images, the same n for every calibration image; None to use all.

    `keys` (of the layer and the batch) seed the draw, with the calibration's seed.
    """
    available = windows(layer, inputs.to("meta")).shape[1:3].numel()
    wanted = max(1, calibration.position_limit // len(calibration))
    if wanted >= available:
        return None
    draw = torch.rand(len(inputs), available, generator=generator(calibration.seed, *keys))
    return draw.argsort(dim=1)[:, :wanted].to(inputs.device)


@torch.no_grad()
def input_moments(
    network: nn.Module, layers: list[str], calibration: Calibration, diagonal: bool = False
) -> dict[str, Tensor]:
    """Second moment of each layer's `input_rows`, the mean of x x^T over positions: name -> [d, d] float32.

    `network` computes in the calibration's dtype and is in eval mode; with `diagonal` only the diagonal [d] is
    computed. In layers with more than `position_limit` positions a seeded subset is used.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def collect(name: str, number: int, layer: Layer, inputs: tuple[Tensor]) -> None:
        rows = input_rows(layer, inputs[0], draw_positions(layer, inputs[0], calibration, number, counts[name]))
        size = rows.shape[1]
        total = sums.setdefault(name, rows.new_zeros(size if diagonal else (size, size)))
        if diagonal:
            total += rows.square().sum(dim=0)
        else:
            add_moment(total, rows)
        counts[name] += len(rows)

    handles = [
        network.get_submodule(name).register_forward_pre_hook(partial(collect, name, number))
        for number, name in enumerate(layers)
    ]
    try:
        with exact_products(calibration.dtype):
            for images, _ in calibration.batches():
                network(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total if diagonal else symmetric(total)).div_(counts[name]) for name, total in sums.items()}
