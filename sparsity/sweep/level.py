"""What every network of a sweep is measured with, and one measurement: from a masked network to its row."""

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from sparsity.data.images import Split, normalise
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.evaluation import Evaluation, evaluate, evaluate_shared
from sparsity.networks.inference import refresh
from sparsity.networks.layers import census, zeros_by_layer
from sparsity.networks.sparse import SparseNetwork, run_by
from sparsity.prune.criteria import FILTER_CRITERIA
from sparsity.results.rows import (
    MEASURED,
    Curve,
    Row,
    accuracy_columns,
    comparison_columns,
    curve_name,
    level_text,
    row_key,
)
from sparsity.results.store import Sweep
from sparsity.system.errors import UserError
from sparsity.system.processes import Ranks

SAMPLE = 8  # images that sparse arithmetic is held against dense on


@dataclass(frozen=True)
class Pruned:
    """A network to be measured: `model` is masked, `layers` names its prunable layers, `saved` is what it was made of.

    `notes` is what had to be reported so far; work on it began at `started` (perf_counter).
    """

    checkpoint: str
    curve: Curve
    level: float
    model: nn.Module
    layers: tuple[str, ...]
    saved: Checkpoint
    notes: list[str]
    started: float

    @property
    def key(self) -> str:
        """The key of its row."""
        return row_key(self.checkpoint, self.curve, self.level)


class Extra(Protocol):
    """Something more that is measured of every network, for columns of MEASURED."""

    def begin(self, checkpoint: str, dense: nn.Module) -> None:
        """From now on networks are made of this checkpoint, whose dense network has been evaluated."""

    def lacks(self, row: Row) -> bool:
        """Whether a row that is there was measured without it, although it is wanted."""

    def __call__(self, pruned: Pruned, row: Row, result: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """The values of the columns for a network whose row is given otherwise, and what has to be reported."""


@dataclass(frozen=True)
class Bench:
    """`inference` is the copy that networks are evaluated in, `positions` is as from `positions_per_image`."""

    sweep: Sweep
    inference: fx.GraphModule
    test: Split
    positions: dict[str, int]
    batch_size: int
    bar: tqdm
    engine: str = "dense"  # of engine.ENGINES
    extras: tuple[Extra, ...] = ()
    fast: nn.Module | None = None  # what runs `inference` where that is compiled

    @property
    def network(self) -> nn.Module:
        """What runs a dense network whose weights are in `inference`."""
        return self.fast or self.inference


def measure_dense(bench: Bench, name: str, dense: nn.Module, team: Ranks) -> None:
    """Evaluate an untouched checkpoint, all processes together, and write down what it predicts.

    UserError when it gives no finite outputs.
    """
    refresh(bench.inference, dense)
    result = evaluate_shared(team, bench.network, bench.test, bench.batch_size, bench.bar.update)
    if not torch.isfinite(torch.tensor(result.loss)):
        raise UserError(f"{name} gives outputs that are not finite; its weights are damaged")
    counts = census(dense, {}, bench.positions)
    figures = {"accuracy": result.accuracy, "loss": result.loss, "macs": counts.macs, "parameters": counts.parameters}
    bench.sweep.add_dense(name, result.predictions.numpy(), figures)


def measure(bench: Bench, pruned: Pruned) -> None:
    """Count and evaluate a pruned network, and write its row down."""
    sweep, model, level = bench.sweep, pruned.model, pruned.level
    prunable = {layer: model.get_submodule(layer) for layer in pruned.layers}
    counts, zeros = census(model, prunable, bench.positions), zeros_by_layer(prunable)
    empty = sum(zeros[layer] == sweep.layers[layer] for layer in pruned.layers)
    notes = list(pruned.notes)
    if empty and level < 100:
        notes.append(f"{empty} layer{'s' * (empty > 1)} without weights")
    refresh(bench.inference, model)
    # What is left without whole filters is a dense network.
    engine = "dense" if pruned.curve[0] in FILTER_CRITERIA else bench.engine
    network = run_by(engine, bench.inference, few_images(bench))
    if isinstance(network, SparseNetwork):
        notes.append(network.words())
    elif network is bench.inference:
        network = bench.network
    result = evaluate(network, bench.test, bench.batch_size, bench.bar.update)
    predictions = result.predictions.numpy()
    row = Row(
        pruned.checkpoint,
        *pruned.curve,
        level=level,
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
        **_kept_columns(sweep.rows.get(pruned.key)),
    )
    for extra in bench.extras:
        columns, more = extra(pruned, row, result)
        row = replace(row, notes="; ".join(filter(None, [row.notes, *more])), **columns)
    sweep.add(row, predictions, zeros)
    tell(bench, row)


def tell(bench: Bench, row: Row) -> None:
    """Say what was found."""
    said = f"{level_text(row.level):>5} % pruned, {curve_name(row.curve)}: accuracy {row.accuracy:6.2f} %"
    bench.bar.write(f"{said}, {row.seconds:.1f} s" + (f" ({row.notes})" if row.notes else ""))


def tell_distant(bench: Bench, row: Row) -> None:
    """Say what another process found."""
    bench.bar.update(len(bench.test))
    tell(bench, row)


def few_images(bench: Bench) -> Tensor:
    """The first test images as the network takes them, to try an engine on."""
    test = bench.test
    return normalise(test.images[:SAMPLE], test.mean, test.std, next(bench.inference.parameters()).dtype)


def outdate(sweep: Sweep, extras: tuple[Extra, ...]) -> None:
    """Have the rows measured again that lack something which is wanted now."""
    sweep.outdate(row.key for row in sweep.table() if any(extra.lacks(row) for extra in extras))


def _kept_columns(row: Row | None) -> dict[str, Any]:
    """What was measured of a row before, which is not lost because it is measured again for something else."""
    return {name: getattr(row, name) for name in MEASURED} if row else {}
