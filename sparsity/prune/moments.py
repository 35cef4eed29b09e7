"""Calibration images, and what the layers of a network receive when they run on them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import Layer
from sparsity.system.machine import generator


def input_rows(layer: Layer, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """What each output position of a layer sees: [N, d] in float32, so that outputs are `rows @ weight.flatten(1).T`.

    For a convolution `inputs` is [B, C, H, W] and d is C * kh * kw; `positions` [B, n] chooses n of the output
    positions of each image (row-major, 0 to OH * OW - 1), N is then B * n; without it all are taken in order. For a
    linear layer `inputs` is [B, ..., d] and `positions` chooses among the rows of each image. Raises ValueError for a
    grouped convolution and for padding with anything but zeros.
    """
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        if positions is not None:
            rows = rows[torch.arange(len(rows), device=rows.device)[:, None], positions]
        return rows.flatten(0, 1).float()
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError("inputs are unfolded for ungrouped convolutions with plain zero padding only")
    batch = len(inputs)
    height, width = output_size(layer, inputs)
    if positions is None:
        positions = torch.arange(height * width, device=inputs.device).expand(batch, -1)
    (kernel_h, kernel_w), (dilation_h, dilation_w) = layer.kernel_size, layer.dilation
    pad_h, pad_w = layer.padding
    padded = F.pad(inputs, (pad_w, pad_w, pad_h, pad_h)).permute(0, 2, 3, 1)  # [B, H, W, C]
    top, left = positions // width * layer.stride[0], positions % width * layer.stride[1]  # [B, n]
    down = torch.arange(kernel_h, device=inputs.device) * dilation_h
    right = torch.arange(kernel_w, device=inputs.device) * dilation_w
    image = torch.arange(batch, device=inputs.device).view(-1, 1, 1, 1)
    patches = padded[image, top[..., None, None] + down[:, None], left[..., None, None] + right]  # [B, n, kh, kw, C]
    return patches.permute(0, 1, 4, 2, 3).reshape(positions.numel(), -1).float()


def output_size(layer: nn.Conv2d, inputs: Tensor) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    sizes = zip(inputs.shape[-2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    height, width = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in sizes
    )
    return height, width


def draw_positions(layer: Layer, inputs: Tensor, calibration: Calibration, *keys: int) -> Tensor | None:
    """Positions [B, n] of a batch's images, n the same for every image of the calibration; None where all are few.

    `keys` (of the layer and the batch) tell one draw from another.
    """
    if isinstance(layer, nn.Linear):
        available = inputs[0].numel() // inputs.shape[-1]
    else:
        height, width = output_size(layer, inputs)
        available = height * width
    wanted = max(1, calibration.position_limit // len(calibration))
    if wanted >= available:
        return None
    draw = torch.rand(len(inputs), available, generator=generator(calibration.seed, *keys))
    return draw.argsort(dim=1)[:, :wanted].to(inputs.device)


@torch.no_grad()
def input_moments(
    network: nn.Module, layers: list[str], calibration: Calibration, diagonal: bool = False
) -> dict[str, Tensor]:
    """Second moment of what each layer receives, mean of x x^T over positions: name -> [d, d] float32.

    `network` computes in the calibration's dtype and is in eval mode; `diagonal` keeps the diagonal [d] alone. In
    layers with more than `position_limit` positions a seeded subset stands for all.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def collect(name: str, number: int, layer: Layer, inputs: Tensor) -> None:
        rows = input_rows(layer, inputs, draw_positions(layer, inputs, calibration, number, counts[name]))
        moment = rows.square().sum(dim=0) if diagonal else rows.T @ rows
        sums[name] = sums[name] + moment if name in sums else moment
        counts[name] += len(rows)

    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name, number=number: collect(name, number, layer, inputs[0])
        )
        for number, name in enumerate(layers)
    ]
    try:
        for images, _ in calibration.batches():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}
