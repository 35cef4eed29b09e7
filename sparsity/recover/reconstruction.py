"""Reconstruction: a layer-wise refit of the remaining weights by least squares; no labels, no gradients."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import refresh
from sparsity.networks.layers import Layer, calls, effective_weight, sharing
from sparsity.prune.moments import (
    add_moment,
    as_weight,
    draw_positions,
    exact_products,
    groups_of,
    input_rows,
    symmetric,
    unfold_problem,
    weight_rows,
)
from sparsity.recover.streams import batch_sizes, open_stream
from sparsity.system.errors import by_reason
from sparsity.system.machine import release_memory

DAMPING = 0.01  # share of the mean diagonal of the second moment
ITERATIONS = 20  # of conjugate gradients, at most: within 0.5 % of the fall in error that a ResNet-50 can have
RESIDUAL = 1e-3  # of the starting residual, at which they stop


def refit(weight: Tensor, mask: Tensor, inputs: Tensor, cross: Tensor) -> tuple[Tensor, int]:
    """Fit the weights [out, d] that `mask` (boolean) leaves, so that a layer's outputs come closest to the targets.

    `inputs` [d, d] and `cross` [out, d] are the means of x x^T and y x^T over positions, for inputs x and targets y.
    Returns the new weights, zero outside of the mask, and how many rows kept their masked weights because their error
    did not fall, by rounding or by an `inputs` that is no second moment.

    Minimises mean |y - W' x|^2 + lambda |W' - W|^2 over W' with the support of `mask`, where lambda is DAMPING times
    the mean diagonal of `inputs`: it pulls towards the masked weights, not towards zero. All rows are solved at once by
    conjugate gradients projected on the mask, with the diagonal as preconditioner (Hestenes and Stiefel, 1952). They
    start at the masked weights and lower the sum at every step, so that stopping early is safe. With a dimension more
    in front, that of groups, each group is fitted by itself.
    """
    start = torch.where(mask, weight, 0)
    diagonal, product = inputs.diagonal(), torch.addmm
    mean = diagonal.mean()
    if inputs.dim() == 3:
        diagonal, product = inputs.diagonal(dim1=1, dim2=2)[:, None], torch.baddbmm  # [g, 1, d]
        mean = diagonal.mean(dim=2, keepdim=True)
    shift = DAMPING * mean
    free = mask & (diagonal > 0)  # an input that is always zero does not determine its weight
    inverse = torch.where(free, 1 / (diagonal + shift), 0)
    slope = torch.where(free, cross - start @ inputs, 0)  # [out, d]
    change, left = torch.zeros_like(start), slope.clone()
    direction = inverse * left
    energy = _dot(left, direction)
    enough = RESIDUAL**2 * energy
    for _ in range(ITERATIONS):
        # A row that is done stands still; going on would lead into denormal numbers, which are slow.
        direction = torch.where(energy > enough, direction, 0)
        if not direction.any():
            break
        image = torch.where(free, product(shift * direction, direction, inputs), 0)
        step = _ratio(energy, _dot(direction, image))
        change.addcmul_(step, direction)
        left.addcmul_(step, image, value=-1)
        scaled = inverse * left
        before, energy = energy, _dot(left, scaled)
        direction = scaled + _ratio(energy, before) * direction
    # The change of a row's mean squared error, computed without the two errors, whose difference would cancel.
    gain = _dot(change @ inputs, change) - 2 * _dot(change, slope)
    better = torch.isfinite(gain) & (gain <= 0)  # [out, 1]
    return torch.where(better & free, start + change, start), int((~better).sum())


@torch.no_grad()
@exact_products()
def reconstruct(
    model: nn.Module, dense: nn.Module, layers: Sequence[str], calibration: Calibration, copies: list[nn.Module]
) -> list[str]:
    """Refit, in place, the remaining weights of the pruned `model`, layer by layer in the order of execution.

    The inputs of each layer of `layers` are those in the pruned network, whose earlier layers are refitted already, and
    the targets are the outputs of `dense` on the same images: min ||W X_dense - W' X_pruned||^2 with the support of W'
    in the mask (layer-wise reconstruction as in arXiv 2208.11580 and AdaPrune, arXiv 2102.08124, here with sequential
    inputs), in each group of a grouped convolution by itself. Biases stay. An unpruned layer with the inputs of the
    dense network keeps its weights to the bit. `copies` are two of `stream_copy`, whose weights are overwritten.
    Returns notes on layers and output channels that were not refitted.
    """
    for copy, network in zip(copies, (model, dense), strict=True):
        refresh(copy, network)
    pruned, ideal = (open_stream(copy, calibration) for copy in copies)
    images, _ = next(calibration.batches(torch.float32))
    problems = not_refitted(dense, layers, images[:1])
    kept_rows = 0
    source = None  # the input of the first layer that changed: what other layers read is no longer the dense network's
    for reading in pruned.readings(layers):
        layer, original = model.get_submodule(reading.name), dense.get_submodule(reading.name)
        groups = groups_of(original)
        mask = weight_rows(getattr(layer, "weight_mask", torch.ones_like(layer.weight)), groups) != 0
        if mask.all() and source in (None, reading.source):
            continue
        source = reading.source if source is None else source
        if reading.name in problems:
            continue
        streams = zip(pruned.inputs(reading), ideal.inputs(reading), strict=True)
        moments = _moments(original, streams, calibration, reading.number)
        rows, kept = refit(weight_rows(effective_weight(layer), groups), mask, *moments)
        kept_rows += kept
        for target in (getattr(layer, "weight_orig", layer.weight), copies[0].get_submodule(reading.name).weight):
            target.copy_(as_weight(rows, original.weight))
        release_memory()  # activations come and go by the gigabyte
    changed = any(not mask.all() for name, mask in model.named_buffers() if name.endswith("weight_mask"))
    told = [f"not refitted: {', '.join(names)} ({reason})" for reason, names in by_reason(problems).items() if changed]
    return told + [f"{kept_rows} output channels kept their masked weights"] * (kept_rows > 0)


def not_refitted(model: nn.Module, layers: Sequence[str], example: Tensor) -> dict[str, str]:
    """Name -> reason of each of `layers` whose weights `reconstruct` leaves as they are; `example` is [1, C, H, W]."""
    times = Counter(call.name for call in calls(model, example))
    shared = sharing(model)
    reasons = {}
    for name in layers:
        if problem := unfold_problem(model.get_submodule(name)):
            reasons[name] = problem
        elif name in shared:
            reasons[name] = "has its weight with another layer"
        elif times[name] != 1:
            reasons[name] = f"runs {times[name]} times"
    return reasons


def _moments(
    layer: Layer, streams: Iterable[tuple[Tensor, Tensor]], calibration: Calibration, number: int
) -> tuple[Tensor, Tensor]:
    """The means over positions of x x^T [d, d] and y x^T [out, d], for `refit`; those of each group in groups.

    Each batch of `streams` is the input of the layer in the pruned network, of which the rows x are taken, and in the
    dense one, whose `layer` makes the targets y of it. `number` is that of the layer, for the draw of positions.
    """
    weight, count = weight_rows(layer.weight, groups_of(layer)), 0  # [out, d], or [g, out / g, d]
    inputs = weight.new_zeros(*weight.shape[:-2], weight.shape[-1], weight.shape[-1])
    cross, sizes = torch.zeros_like(weight), batch_sizes(calibration)
    with exact_products(calibration.dtype):
        for batch, (received, targeted) in enumerate(streams):
            positions = draw_positions(layer, received, calibration, number, batch, images=sizes[batch])
            rows = input_rows(layer, received, positions)  # [N, d]
            targets = input_rows(layer, targeted, positions) @ weight.mT  # [N, out]
            add_moment(inputs, rows)
            (cross.addmm_ if cross.dim() == 2 else cross.baddbmm_)(targets.mT, rows)
            count += rows.shape[-2]
    return symmetric(inputs).div_(count), cross.div_(count)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 in rows that are done, where below is 0."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=-1, keepdim=True)
