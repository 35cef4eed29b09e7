"""One level: count and evaluate a pruned network, and build its row."""

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsity.data.images import Split, normalise
from sparsity.networks.census import census
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.evaluation import Evaluation, evaluate, evaluate_shared
from sparsity.networks.fused import SAMPLE
from sparsity.networks.inference import refresh
from sparsity.networks.layers import way_of
from sparsity.networks.sparse import SparseNetwork, sparse_network
from sparsity.results.rows import MEASURED, SPARSE_NOTE, Row, accuracy_columns, comparison_columns, curve_name, row_key
from sparsity.results.store import Sweep
from sparsity.system.errors import UserError
from sparsity.system.flags import level_text
from sparsity.system.methods import Curve

UNTRACED_NOTE = "not traced by torch.fx: evaluated without folding BatchNorm"


@dataclass(frozen=True)
class PrunedNetwork:
    """A network to be evaluated: `model` is masked, `saved` is its checkpoint, named `checkpoint` in the rows.

    `notes` holds the reports of pruning and recovery; work on the level began at `started` (perf_counter).
    """

    saved: Checkpoint
    checkpoint: str
    curve: Curve
    level: float
    model: nn.Module
    notes: list[str]
    started: float

    @property
    def key(self) -> str:
        """The key of its row."""
        return row_key(self.checkpoint, self.curve, self.level)


class Extra(Protocol):
    """A further measurement of every network, for columns of MEASURED: export and timing."""

    def begin(self, checkpoint: str, dense: nn.Module) -> None:
        """Take networks of this checkpoint from now on; its dense network has been evaluated."""

    def lacks(self, row: Row) -> bool:
        """Whether a row that is on disk lacks this measurement although it is wanted."""

    def __call__(self, pruned: PrunedNetwork, row: Row, result: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """The values of the columns, and notes, for a network whose other columns are in `row`."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates every network of a sweep on the same images, and adds its row.

    `inference` is the copy that takes their weights, `network` runs these by dense kernels; `positions` is as from
    `positions_per_image`, `layers` names the prunable layers.
    """

    sweep: Sweep
    inference: nn.Module
    network: nn.Module
    test: Split
    positions: dict[str, int]
    layers: tuple[str, ...]
    batch_size: int
    engine: str
    extras: tuple[Extra, ...]
    bar: tqdm

    def begin(self, name: str, dense: nn.Module) -> None:
        """Take networks of the checkpoint `name` from now on."""
        for extra in self.extras:
            extra.begin(name, dense)

    def add_dense(self, name: str, dense: nn.Module) -> None:
        """Evaluate an untouched checkpoint, all processes together; UserError when its outputs are not finite."""
        result = evaluate_shared(self._refreshed(dense), self.test, self.batch_size, self.bar.update)
        if not torch.isfinite(torch.tensor(result.loss)):
            raise UserError(f"{name} gives outputs that are not finite; its weights are damaged")
        counts = census(dense, {}, self.positions)
        figures = {
            "accuracy": result.accuracy,
            "loss": result.loss,
            "macs": counts.macs,
            "parameters": counts.parameters,
        }
        self.sweep.add_dense(name, result.predictions.numpy(), figures)

    def add(self, pruned: PrunedNetwork) -> None:
        """Count and evaluate a pruned network, add its row, and print it."""
        network = self._kernels(pruned.curve, self._refreshed(pruned.model))
        if network is self.network and _is_dense(pruned):
            result = self._dense_result(pruned.checkpoint)
        else:
            result = evaluate(network, self.test, self.batch_size, self.bar.update)
        row, zeros = self.row(pruned, result)
        if isinstance(network, SparseNetwork):
            row = _with_notes(row, [SPARSE_NOTE])
        measured: dict[str, Any] = {}
        for extra in self.extras:
            columns, notes = extra(pruned, row, result)
            row, measured = replace(_with_notes(row, notes), **columns), measured | columns
        if before := self.sweep.rows.get(pruned.key):  # notes of an earlier export stay
            begun = [note.split()[:1] for note in row.notes.split("; ")]
            begun += [["file"], ["dead"]] if measured.get("file_bytes") else []  # of a file that is written anew
            row = _with_notes(row, [note for note in before.notes.split("; ") if note.split()[:1] not in begun])
        self.sweep.add(row, result.predictions.numpy(), zeros)
        said = f"{level_text(row.level):>5} % pruned, {curve_name(row.curve)}: accuracy {row.accuracy:6.2f} %"
        self.bar.write(f"{said}, {row.seconds:.1f} s" + (f" ({row.notes})" if row.notes else ""))

    def _dense_result(self, checkpoint: str) -> Evaluation:
        """The answers of an untouched checkpoint, which were evaluated before."""
        self.bar.update(len(self.test))
        predictions = torch.from_numpy(self.sweep.dense[checkpoint]).long()
        correct = int(self.sweep.dense_correct(checkpoint).sum())
        return Evaluation(predictions, correct, len(predictions), self.sweep.header["dense"][checkpoint]["loss"])

    def _refreshed(self, model: nn.Module) -> nn.Module:
        """What runs the weights of `model` by dense kernels: `network`, unless outputs are not finite.

        Fused kernels might hide that.
        """
        refresh(self.inference, model)
        with torch.inference_mode():
            return self.network if self.inference(self._few()).isfinite().all() else self.inference

    def _kernels(self, curve: Curve, dense: nn.Module) -> nn.Module:
        """The network that runs the weights in `inference`, by sparse kernels where these are asked for."""
        if self.engine == "sparse" and not curve.prunes_filters:  # without filters, a network is dense and smaller
            return sparse_network(self.inference, self._few())
        return dense

    def _few(self) -> Tensor:
        """A few test images, as the networks take them."""
        dtype = next(self.inference.parameters()).dtype
        return normalise(self.test.images[:SAMPLE], self.test.mean, self.test.std, dtype)

    def row(self, pruned: PrunedNetwork, result: Evaluation) -> tuple[Row, dict[str, int]]:
        """The row of a pruned network without its further measurements, and the zeros of each layer."""
        sweep, predictions = self.sweep, result.predictions.numpy()
        prunable = {name: pruned.model.get_submodule(name) for name in self.layers}
        counts = census(pruned.model, prunable, self.positions)
        empty = sum(counts.by_layer[name] == layer.weight.numel() for name, layer in prunable.items())
        notes = list(pruned.notes)
        if empty and pruned.level < 100:
            notes.append(f"{empty} layer{'s' * (empty > 1)} without weights")
        if not way_of(pruned.model).traced:
            notes.append(UNTRACED_NOTE)
        before = sweep.rows.get(pruned.key)  # its measurements are kept when it is evaluated again for another one
        row = Row(
            pruned.checkpoint,
            *pruned.curve,
            level=pruned.level,
            sparsity=round(counts.sparsity, 6),
            nonzero=counts.nonzero,
            parameters=counts.parameters,
            compression=round(counts.compression, 6),
            macs_ratio=round(counts.macs_ratio, 6),
            **accuracy_columns(result.correct, result.total),
            loss=round(result.loss, 6),
            agreement=round(100 * float((predictions == sweep.dense[pruned.checkpoint]).mean()), 6),
            seconds=round(time.perf_counter() - pruned.started, 3),
            **comparison_columns(predictions == sweep.labels, sweep.dense_correct(pruned.checkpoint)),
            notes="; ".join(notes),
            **({name: getattr(before, name) for name in MEASURED} if before else {}),
        )
        return row, counts.by_layer


def _is_dense(pruned: PrunedNetwork) -> bool:
    """Whether a network is the untouched checkpoint: its masks remove nothing, and nothing is recovered."""
    masks = (buffer for name, buffer in pruned.model.named_buffers() if name.endswith("_mask"))
    return pruned.curve.recover == "none" and all(bool(mask.all()) for mask in masks)


def _with_notes(row: Row, notes: list[str]) -> Row:
    return replace(row, notes="; ".join(filter(None, [row.notes, *notes])))
