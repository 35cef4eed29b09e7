"""What every network of a sweep is measured with, and one measurement: from a masked network to its row."""

import time
from dataclasses import dataclass

import torch
from torch import fx, nn
from tqdm import tqdm

from sparsity import runtime
from sparsity.data import Split
from sparsity.evaluation import evaluate, refresh
from sparsity.header import Curve
from sparsity.masks import census, zeros_by_layer
from sparsity.report import Sweep
from sparsity.rows import Row, accuracy_columns, comparison_columns, curve_name, level_text


@dataclass(frozen=True)
class Bench:
    """`inference` is the copy that networks are evaluated in, `positions` is as from `positions_per_image`."""

    sweep: Sweep
    inference: fx.GraphModule
    test: Split
    positions: dict[str, int]
    batch_size: int
    bar: tqdm


def measure_dense(bench: Bench, name: str, dense: nn.Module) -> None:
    """Evaluate an untouched checkpoint and write down what it predicts; UserError when it gives no finite outputs."""
    refresh(bench.inference, dense)
    result = evaluate(bench.inference, bench.test, bench.batch_size, bench.bar.update)
    if not torch.isfinite(torch.tensor(result.loss)):
        raise runtime.UserError(f"{name} gives outputs that are not finite; its weights are damaged")
    bench.sweep.add_dense(name, result.predictions.numpy(), {"accuracy": result.accuracy, "loss": result.loss})


def measure(
    bench: Bench,
    name: str,
    curve: Curve,
    level: float,
    model: nn.Module,
    layers: tuple[str, ...],
    notes: list[str],
    started: float,
) -> None:
    """Count and evaluate a pruned network, and write its row down; its time runs from `started` (perf_counter)."""
    sweep, prunable = bench.sweep, {layer: model.get_submodule(layer) for layer in layers}
    counts, zeros = census(model, prunable, bench.positions), zeros_by_layer(prunable)
    empty = sum(zeros[layer] == sweep.layers[layer] for layer in layers)
    if empty and level < 100:
        notes = [*notes, f"{empty} layer{'s' * (empty > 1)} without weights"]
    refresh(bench.inference, model)
    result = evaluate(bench.inference, bench.test, bench.batch_size, bench.bar.update)
    predictions = result.predictions.numpy()
    row = Row(
        name,
        *curve,
        level=level,
        sparsity=round(counts.sparsity, 6),
        nonzero=counts.nonzero,
        parameters=counts.parameters,
        compression=round(counts.compression, 6),
        macs_ratio=round(counts.macs_ratio, 6),
        **accuracy_columns(result.correct, result.total),
        loss=round(result.loss, 6),
        agreement=round(100 * float((predictions == sweep.dense[name]).mean()), 6),
        seconds=round(time.perf_counter() - started, 3),
        **comparison_columns(predictions == sweep.labels, sweep.dense_correct(name)),
        notes="; ".join(notes),
    )
    sweep.add(row, predictions, zeros)
    said = f"{level_text(level):>5} % pruned, {curve_name(curve)}: accuracy {row.accuracy:6.2f} %, {row.seconds:.1f} s"
    bench.bar.write(said + (f" ({row.notes})" if row.notes else ""))
