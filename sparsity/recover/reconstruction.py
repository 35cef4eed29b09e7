"""Layer-wise refit of the remaining weights by least squares: no labels, no gradients of the network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.inference import inference_copy, refresh
from sparsity.networks.layers import Layer, effective_weight
from sparsity.prune.moments import draw_positions, input_rows
from sparsity.system.machine import release_memory

DAMPING = 0.01  # share of the mean diagonal of the second moment


ITERATIONS = 60  # of conjugate gradients, at most


RESIDUAL = 1e-3  # of the starting residual, at which they stop


HELD_BYTES = 512 << 20  # of activations that are kept for each of the two networks


@dataclass(frozen=True)
class Moments:
    """Means over positions: `inputs` [d, d] of x x^T and `cross` [out, d] of y x^T, for inputs x and targets y."""

    inputs: Tensor
    cross: Tensor


@dataclass(frozen=True)
class Refit:
    """New weights [out, d], zero outside of the mask, and how many rows kept their masked weights as a fallback."""

    weight: Tensor
    kept_rows: int


def refit(
    weight: Tensor,
    mask: Tensor,
    moments: Moments,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
    residual: float = RESIDUAL,
) -> Refit:
    """Fit the weights [out, d] that `mask` (boolean) leaves, so that outputs come closest to the targets.

    Minimises mean |y - W' x|^2 + lambda |W' - W|^2 over W' with the support of `mask`, where lambda is `damping` times
    the mean diagonal of the second moment: it pulls towards the masked weights, not towards zero. All rows are
    solved at once by conjugate gradients projected on the mask, with the diagonal as preconditioner (Hestenes and
    Stiefel, 1952). They start at the masked weights and lower the sum at every step, so that stopping early is safe.
    A row whose error did not fall, as rounding or a second moment that is not one may have it, keeps its weights.
    """
    start = torch.where(mask, weight, 0)
    diagonal = moments.inputs.diagonal()
    shift = damping * diagonal.mean()
    free = mask & (diagonal > 0)  # an input that is always zero tells nothing of its weight
    inverse = torch.where(free, 1 / (diagonal + shift), 0)
    slope = torch.where(free, moments.cross - start @ moments.inputs, 0)  # [out, d]
    change, left = torch.zeros_like(start), slope.clone()
    direction = inverse * left
    energy = _dot(left, direction)
    enough = residual**2 * energy
    for _ in range(iterations):
        # A row that is done stands still; going on would lead into denormal numbers, which are slow.
        direction = torch.where(energy > enough, direction, 0)
        if not direction.any():
            break
        image = torch.where(free, torch.addmm(shift * direction, direction, moments.inputs), 0)
        step = _ratio(energy, _dot(direction, image))
        change += step * direction
        left -= step * image
        scaled = inverse * left
        before, energy = energy, _dot(left, scaled)
        direction = scaled + _ratio(energy, before) * direction
    # The change of a row's mean squared error, computed without the two errors, whose difference would cancel.
    gain = _dot(change @ moments.inputs, change) - 2 * _dot(change, slope)
    better = torch.isfinite(gain) & (gain <= 0)  # [out, 1]
    kept_rows = int((~better).sum())
    return Refit(torch.where(better & free, start + change, start), kept_rows)


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    layers: list[str],
    calibration: Calibration,
    copies: tuple[fx.GraphModule, fx.GraphModule],
    damping: float = DAMPING,
    on_layer: Callable[[str], None] = lambda name: None,
) -> list[str]:
    """Refit, in place, the remaining weights of the pruned `model`, layer by layer in the order of execution.

    Each layer of `layers` is given what it really receives in the pruned network, whose earlier layers are refitted
    already, and the outputs of `dense` on the same images as targets: min ||W X_dense - W' X_pruned||^2 with the
    support of W' in the mask (layer-wise reconstruction as in arXiv 2208.11580 and AdaPrune, arXiv 2102.08124, here
    with sequential inputs). Biases stay. A layer that has its dense weights and receives what it did before keeps
    them to the bit. `copies` are two of `stream_copy`, whose weights are overwritten. Returns
    what had to be reported: layers and rows that could not be refitted. `on_layer` is told each layer's name when it
    is done.
    """
    for copy, network in zip(copies, (model, dense), strict=True):
        refresh(copy, network)
    pruned, ideal = (_Stream(copy, calibration) for copy in copies)
    waiting = [node for node in pruned.nodes if node.op == "call_module" and node.target in layers]
    calls = [node.target for node in waiting]
    notes, kept_rows = [], 0
    changed = False  # whether the pruned network differs from the dense one so far
    while waiting:
        # Everything that reads what the next layer reads is refitted with it.
        ready = [node for node in waiting if node.args[0] is waiting[0].args[0]]
        waiting = [node for node in waiting if node not in ready]
        refitted = [node for node in ready if changed or not _mask(model.get_submodule(node.target)).all()]
        changed = changed or bool(refitted)
        sums = {}
        for node in refitted:
            original = dense.get_submodule(node.target)
            if calls.count(node.target) == 1 and _can_unfold(original):
                sums[node] = _Sums(original)
            else:
                notes.append(f"{node.target} was not refitted")
        streams = zip(pruned.run(ready[0]), ideal.run(ideal.node(ready[0].name)), strict=True)
        for batch, (ours, theirs) in enumerate(streams):
            for node, total in sums.items():
                received = ours[node.args[0]]
                keys = pruned.nodes.index(node), batch
                positions = draw_positions(total.layer, received, calibration, *keys)
                total.add(received, theirs[ideal.node(node.args[0].name)], positions)
        for node, total in sums.items():
            layer = model.get_submodule(node.target)
            result = refit(effective_weight(layer).flatten(1), _mask(layer), total.moments(), damping)
            kept_rows += result.kept_rows
            _set_weight(layer, result.weight)
            target = copies[0].get_submodule(node.target).weight
            target.copy_(result.weight.view_as(target))
            on_layer(node.target)
        release_memory()  # activations come and go by the gigabyte
    if kept_rows:
        notes.append(f"{kept_rows} rows kept their masked weights")
    return notes


def stream_copy(model: nn.Module, dtype: torch.dtype) -> fx.GraphModule:
    """An unfolded inference copy for `reconstruct`: nothing in place, and every layer as soon as its input is there.

    A shortcut then runs before the branch that it bypasses, and the input of a block is freed after its first layers
    instead of being held until the last.
    """
    copy = inference_copy(model, dtype, fold=False, overwrite=False)
    order = {node: index for index, node in enumerate(copy.graph.nodes)}
    for node in list(copy.graph.nodes):
        if node.op == "call_module" and isinstance(copy.get_submodule(node.target), Layer):
            first = min(node.args[0].users, key=order.__getitem__)
            if first is not node:
                first.prepend(node)
    copy.graph.lint()
    copy.recompile()
    return copy


class _Stream:
    """The calibration images on their way through a network, batch by batch, from one layer to the next.

    What later layers read is kept where it takes no more than HELD_BYTES; otherwise it is computed again from the last
    place where it was kept.
    """

    def __init__(self, network: fx.GraphModule, calibration: Calibration):
        self.interpreter = fx.Interpreter(network)
        self.nodes = list(network.graph.nodes)
        first = next(node for node in self.nodes if node.op == "placeholder")
        batch_size = default_batch_size(calibration.images.images.device)
        self.kept = [{first: images} for images, _ in calibration.batches(batch_size=batch_size)]
        self.start = self.nodes.index(first) + 1

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.nodes if node.name == name)

    def run(self, layer: fx.Node) -> Iterator[dict[fx.Node, Tensor]]:
        """For each batch, the values that `layer` and those after it read, computed up to `layer`."""
        stop, keep = self.nodes.index(layer), None
        for batch, before in enumerate(self.kept):
            values = self.interpreter.env = dict(before)
            for node in self.nodes[self.start : stop]:
                values[node] = self.interpreter.run_node(node)
                for done in self.interpreter.user_to_last_uses.get(node, ()):
                    values.pop(done, None)
            if keep is None:
                size = sum(value.numel() * value.element_size() for value in values.values())
                keep = size * len(self.kept) <= HELD_BYTES
            if keep:
                self.kept[batch] = values
            yield values
        if keep:
            self.start = stop


class _Sums:
    """The moments of a layer's fit, batch after batch; `layer` is that of the dense network."""

    def __init__(self, layer: Layer):
        self.layer, self.weight = layer, layer.weight.flatten(1)
        width = self.weight.shape[1]
        self.inputs = torch.zeros(width, width, device=self.weight.device)
        self.cross = torch.zeros_like(self.weight)
        self.count = 0

    def add(self, received: Tensor, ideal: Tensor, positions: Tensor | None) -> None:
        """One batch of what the layer receives in the pruned network and of what it received in the dense one."""
        rows = input_rows(self.layer, received, positions)  # [N, d]
        targets = input_rows(self.layer, ideal, positions) @ self.weight.T  # [N, out]
        self.inputs.addmm_(rows.T, rows)
        self.cross.addmm_(targets.T, rows)
        self.count += len(rows)

    def moments(self) -> Moments:
        return Moments(self.inputs.div_(self.count), self.cross.div_(self.count))


def _mask(layer: Layer) -> Tensor:
    """The mask of a layer as [out, d], boolean; all true where it has none."""
    mask = getattr(layer, "weight_mask", None)
    return torch.ones_like(layer.weight, dtype=torch.bool).flatten(1) if mask is None else mask.flatten(1) != 0


def _can_unfold(layer: Layer) -> bool:
    return isinstance(layer, nn.Linear) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


def _set_weight(layer: Layer, weight: Tensor) -> None:
    target = layer.weight_orig if hasattr(layer, "weight_orig") else layer.weight
    target.copy_(weight.view_as(target))
    if hasattr(layer, "weight_orig"):
        layer.weight = target * layer.weight_mask  # otherwise stale until the next forward pass


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where there is nothing to divide by: in rows that are done."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=1, keepdim=True)
