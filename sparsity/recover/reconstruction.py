"""Reconstruction: a layer-wise refit of the remaining weights by least squares; no labels, no gradients."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.inference import inference_copy, refresh
from sparsity.networks.layers import Layer, effective_weight
from sparsity.prune.moments import (
    add_moment,
    as_weight,
    can_unfold,
    draw_positions,
    exact_products,
    input_rows,
    symmetric,
    weight_rows,
)
from sparsity.system.machine import release_memory

DAMPING = 0.01  # share of the mean diagonal of the second moment
ITERATIONS = 20  # of conjugate gradients, at most: within 0.5 % of the fall in error that a ResNet-50 can have
RESIDUAL = 1e-3  # of the starting residual, at which they stop
HELD_BYTES = 1 << 30  # of activations that are kept for each of the two networks


def refit(weight: Tensor, mask: Tensor, inputs: Tensor, cross: Tensor) -> tuple[Tensor, int]:
    """Fit the weights [out, d] that `mask` (boolean) leaves, so that a layer's outputs come closest to the targets.

    `inputs` [d, d] and `cross` [out, d] are the means of x x^T and y x^T over positions, for inputs x and targets y.
    Returns the new weights, zero outside of the mask, and how many rows kept their masked weights because their error
    did not fall, by rounding or by an `inputs` that is no second moment.

    Minimises mean |y - W' x|^2 + lambda |W' - W|^2 over W' with the support of `mask`, where lambda is DAMPING times
    the mean diagonal of `inputs`: it pulls towards the masked weights, not towards zero. All rows are solved at once by
    conjugate gradients projected on the mask, with the diagonal as preconditioner (Hestenes and Stiefel, 1952). They
    start at the masked weights and lower the sum at every step, so that stopping early is safe.
    """
    start = torch.where(mask, weight, 0)
    diagonal = inputs.diagonal()
    shift = DAMPING * diagonal.mean()
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
        image = torch.where(free, torch.addmm(shift * direction, direction, inputs), 0)
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
    model: nn.Module, dense: nn.Module, layers: Sequence[str], calibration: Calibration, copies: list[fx.GraphModule]
) -> list[str]:
    """Refit, in place, the remaining weights of the pruned `model`, layer by layer in the order of execution.

    The inputs of each layer of `layers` are those in the pruned network, whose earlier layers are refitted already, and
    the targets are the outputs of `dense` on the same images: min ||W X_dense - W' X_pruned||^2 with the support of W'
    in the mask (layer-wise reconstruction as in arXiv 2208.11580 and AdaPrune, arXiv 2102.08124, here with sequential
    inputs). Biases stay. An unpruned layer with the inputs of the dense network keeps its weights to the bit. `copies`
    are two of `stream_copy`, whose weights are overwritten. Returns notes on layers and rows that were not refitted.
    """
    for copy, network in zip(copies, (model, dense), strict=True):
        refresh(copy, network)
    pruned, ideal = (_Stream(copy, calibration) for copy in copies)
    calls = [node for node in pruned.nodes if node.op == "call_module" and node.target in layers]
    times = Counter(node.target for node in calls)
    notes, kept_rows = [], 0
    source = None  # the input of the first layer that changed: what other layers read is no longer the dense network's
    for node in calls:
        layer, original = model.get_submodule(node.target), dense.get_submodule(node.target)
        mask = weight_rows(getattr(layer, "weight_mask", torch.ones_like(layer.weight))) != 0
        if mask.all() and source in (None, node.args[0]):
            continue
        source = source or node.args[0]
        if times[node.target] > 1 or not can_unfold(original):
            notes.append(f"{node.target} was not refitted")
            continue
        read = pruned.nodes.index(node.args[0])
        streams = zip(pruned.run(read), ideal.run(read), strict=True)
        moments = _moments(original, streams, calibration, pruned.nodes.index(node))
        rows, kept = refit(weight_rows(effective_weight(layer)), mask, *moments)
        kept_rows += kept
        for target in (getattr(layer, "weight_orig", layer.weight), copies[0].get_submodule(node.target).weight):
            target.copy_(as_weight(rows, original.weight))
        release_memory()  # activations come and go by the gigabyte
    return notes + [f"{kept_rows} rows kept their masked weights"] * (kept_rows > 0)


def stream_copy(model: nn.Module, dtype: torch.dtype) -> fx.GraphModule:
    """An unfolded inference copy for `reconstruct`: nothing in place, every layer as soon as its input is computed.

    A shortcut then runs before the branch that it bypasses, and the input of a block is freed after its first layers
    instead of being held until the last.
    """
    copy = inference_copy(model, dtype, fold=False, overwrite=False)
    for node in list(copy.graph.nodes):
        if node.op == "call_module" and isinstance(copy.get_submodule(node.target), Layer):
            first = next(iter(node.args[0].users))
            if first is not node:
                first.prepend(node)
    copy.recompile()
    return copy


class _Stream:
    """The activations of the calibration images in a network, batch by batch, from one layer's input to the next.

    Activations that later layers read are kept where they take no more than HELD_BYTES for all images; otherwise they
    are computed again from the last place where they were kept, or from the images.
    """

    def __init__(self, network: fx.GraphModule, calibration: Calibration):
        self.interpreter, self.calibration = fx.Interpreter(network), calibration
        self.nodes, self.start = list(network.graph.nodes), 1  # the first node is that of the images
        self.kept: list[dict[fx.Node, Tensor]] = []  # by batch: activations that the nodes from `start` on read

    def run(self, wanted: int) -> Iterator[Tensor]:
        """The output of the node `wanted`, counted from 0, for each batch."""
        stop, output = max(self.start, wanted + 1), self.nodes[wanted]
        batch_size = default_batch_size(self.calibration.images.images.device)
        images = ({self.nodes[0]: images} for images, _ in self.calibration.batches(batch_size=batch_size))
        for batch, values in enumerate(self.kept or images):
            values = self.interpreter.env = dict(values)
            for node in self.nodes[self.start : stop]:
                values[node] = self.interpreter.run_node(node)
                for done in self.interpreter.user_to_last_uses.get(node, ()):
                    values.pop(done, None)
            if batch == 0:
                size = sum(value.numel() * value.element_size() for value in values.values())
                keep = size * len(self.calibration) <= HELD_BYTES * len(values[output])
            if keep:
                self.kept[batch : batch + 1] = [values]  # replaces the activations before, if these were kept
            yield values[output]
        self.start = stop if keep else self.start


def _moments(
    layer: Layer, streams: Iterable[tuple[Tensor, Tensor]], calibration: Calibration, number: int
) -> tuple[Tensor, Tensor]:
    """The means over positions of x x^T [d, d] and y x^T [out, d], for `refit`.

    Each batch of `streams` is the input of the layer in the pruned network, of which the rows x are taken, and in the
    dense one, whose `layer` makes the targets y of it. `number` is that of the layer, for the draw of positions.
    """
    weight, count = weight_rows(layer.weight), 0
    inputs, cross = weight.new_zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight)
    with exact_products(calibration.dtype):
        for batch, (received, targeted) in enumerate(streams):
            positions = draw_positions(layer, received, calibration, number, batch)
            rows = input_rows(layer, received, positions)  # [N, d]
            targets = input_rows(layer, targeted, positions) @ weight.T  # [N, out]
            add_moment(inputs, rows)
            cross.addmm_(targets.T, rows)
            count += len(rows)
    return symmetric(inputs).div_(count), cross.div_(count)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 in rows that are done, where below is 0."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=1, keepdim=True)
