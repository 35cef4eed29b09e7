"""Second moments of the inputs of layers, over calibration images."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import Conv, InAttention, Layer, Transposed, own_forward
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


def unfold_problem(layer: Layer) -> str | None:
    """Why `windows` cannot unfold a layer's inputs, if it cannot."""
    if isinstance(layer, Transposed):
        return "transposed convolution"
    if isinstance(layer, nn.Conv3d):
        return "3-d convolution"
    if isinstance(layer, InAttention):
        return "inside MultiheadAttention"
    # A traced copy holds a layer with a forward pass of its own as a bare module.
    return None if isinstance(layer, Layer) and not own_forward(layer) else "a forward pass of its own"


def windows(layer: Layer, inputs: Tensor) -> Tensor:
    """The inputs of each output position: [B, OH, OW, kh, kw, C] of [B, C, H, W]; [B, N, 1, d] of [B, ..., d].

    A view of the padded inputs; a 1-d convolution has OH = kh = 1. Raises ValueError for layers that `unfold_problem`
    names.
    """
    if problem := unfold_problem(layer):
        raise ValueError(f"inputs are not unfolded for this layer: {problem}")
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, 1, inputs.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    seen = F.pad(inputs, _paddings(layer), mode)
    for dim, kernel, stride, dilation in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation, strict=False):
        seen = seen.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    if isinstance(layer, nn.Conv1d):  # [B, C, OL, k]
        seen = seen[:, :, None, :, None]
    return seen.permute(0, 2, 3, 4, 5, 1)  # channels last, as activations lie in memory


def _paddings(layer: Conv) -> list[int]:
    """The padding of a convolution as `F.pad` takes it: before and after, the last dimension first."""
    pairs = []
    for dim in reversed(range(len(layer.kernel_size))):
        both = layer.dilation[dim] * (layer.kernel_size[dim] - 1) if layer.padding == "same" else 0
        pairs += [both // 2, both - both // 2] if isinstance(layer.padding, str) else [layer.padding[dim]] * 2
    return pairs


def input_rows(layer: Layer, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """Unfold a layer's inputs, one row per output position: [N, d] float32; outputs are `rows @ weight_rows(layer).T`.

    For a convolution d is kh * kw * C. With g groups, rows are [g, N, kh * kw * C / g], as `weight_rows`. `positions`
    [B, n] chooses n of the output positions of each image (row-major, 0 to OH * OW - 1), so that N is B * n; without
    it all are taken in order. Errors as from `windows`.
    """
    seen = windows(layer, inputs)
    if positions is not None:
        image = torch.arange(len(seen), device=seen.device)[:, None]
        seen = seen[image, positions // seen.shape[2], positions % seen.shape[2]].unsqueeze(1)
    if groups_of(layer) > 1:
        seen = seen.unflatten(-1, (layer.groups, -1)).movedim(-2, 0)
        return seen.reshape(layer.groups, -1, seen.shape[4:].numel()).float()
    return seen.reshape(-1, seen.shape[3:].numel()).float()


def groups_of(layer: Layer) -> int:
    """The groups of a convolution; 1 for linear layers."""
    return getattr(layer, "groups", 1)


def weight_rows(weight: Tensor, groups: int = 1) -> Tensor:
    """A weight [out, ...] as a matrix [out, d], its columns in the order of `input_rows`; [g, out / g, d] in groups."""
    rows = weight.movedim(1, -1).flatten(1)
    return rows if groups == 1 else rows.unflatten(0, (groups, -1))


def as_weight(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `weight_rows`: values [n, d], [g, n, d] or [d] in the shape of `weight`, [n, C, kh, kw]."""
    return rows.reshape(-1, *weight.movedim(1, -1).shape[1:]).movedim(-1, 1)


def spread(values: Tensor, layer: Layer) -> Tensor:
    """A value of each input, [d], at the weights that read it, [1, C, kh, kw]; of [g, d] in groups [n, C, kh, kw]."""
    groups = groups_of(layer)
    if groups > 1:
        values = values[:, None].expand(-1, layer.out_channels // groups, -1)
    return as_weight(values, layer.weight)


def add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the sum of x x^T over `rows` [N, d] to `total` [d, d], except its lower left quarter; see `symmetric`.

    In groups both have a dimension more, the first one.
    """
    if rows.dim() == 3:
        total.baddbmm_(rows.mT, rows)
        return
    half = len(total) // 2
    total[:half].addmm_(rows[:, :half].T, rows)
    total[half:, half:].addmm_(rows[:, half:].T, rows[:, half:])


def symmetric(total: Tensor) -> Tensor:
    """`total` [d, d] with its lower left quarter filled in, in place, from the upper right one; in groups as it is."""
    half = len(total) // 2
    if total.dim() == 2:
        total[half:, :half] = total[:half, half:].T
    return total


def draw_positions(layer: Layer, inputs: Tensor, calibration: Calibration, *keys: int, images: int) -> Tensor | None:
    """Random positions [B, n] of a batch's images, the same n for every calibration image; None to use all.

    `keys` (of the layer and the batch) seed the draw, with the calibration's seed. `images` is the size of the batch;
    where a layer sees more inputs B than images (attention in windows), n is smaller.
    """
    available = windows(layer, inputs.to("meta")).shape[1:3].numel()
    wanted = max(1, calibration.position_limit * images // len(calibration) // len(inputs))
    if wanted >= available:
        return None
    draw = torch.rand(len(inputs), available, generator=generator(calibration.seed, *keys))
    return draw.argsort(dim=1)[:, :wanted].to(inputs.device)


@torch.no_grad()
def input_moments(
    network: nn.Module, layers: list[str], calibration: Calibration, diagonal: bool = False
) -> dict[str, Tensor]:
    """Second moment of each layer's `input_rows`, the mean of x x^T over positions: name -> [d, d] float32.

    In groups it is [g, d, d]. `network` computes in the calibration's dtype and is in eval mode; with `diagonal` only
    the diagonal [d] is computed. In layers with more than `position_limit` positions a seeded subset is used. The
    inputs of all calls of a layer count.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    batch = 0  # images

    def collect(name: str, number: int, layer: Layer, inputs: tuple[Tensor]) -> None:
        positions = draw_positions(layer, inputs[0], calibration, number, counts[name], images=batch)
        rows = input_rows(layer, inputs[0], positions)
        total = sums.setdefault(name, rows.new_zeros((*rows.shape[:-2], *rows.shape[-1:] * (1 if diagonal else 2))))
        if diagonal:
            total += rows.square().sum(dim=-2)
        else:
            add_moment(total, rows)
        counts[name] += rows.shape[-2]

    handles = [
        network.get_submodule(name).register_forward_pre_hook(partial(collect, name, number))
        for number, name in enumerate(layers)
    ]
    try:
        with exact_products(calibration.dtype):
            for images, _ in calibration.batches():
                batch = len(images)
                network(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total if diagonal else symmetric(total)).div_(counts[name]) for name, total in sums.items()}
