"""Controls: dense networks that are simply smaller, measured as a level of the sweep is, on the same images."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sparsity.data.images import normalise
from sparsity.networks.census import census
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.evaluation import evaluate
from sparsity.networks.families import load_control, network_name
from sparsity.networks.fused import SAMPLE, fused
from sparsity.networks.inference import choose_way, inference_copy
from sparsity.networks.layers import positions_per_image, prunable_layers, unmasked_state
from sparsity.results.rows import Row, read_rows, write_rows
from sparsity.sweep.evaluator import Evaluator, PrunedNetwork
from sparsity.sweep.export import Exporter
from sparsity.sweep.inputs import distinct_names
from sparsity.sweep.timing import Timer
from sparsity.system.errors import UserError, one_line
from sparsity.system.methods import Curve

RECIPE = ("epochs", "optimizer", "batch_size", "learning_rate", "momentum", "weight_decay", "T_max")


def recipe_words(saved: Checkpoint) -> str:
    """How a network was trained, in words; 'unknown' where its file does not tell."""
    if not set(RECIPE) <= saved.settings.keys():
        return "unknown"
    data = saved.data or {}
    told = [f"{name} {saved.settings[name]}" for name in RECIPE]
    return one_line(", ".join([str(data.get("name", data.get("dataset"))), f"{data.get('image_size')} px", *told]))


def require_comparable(paths: list[Path], main: Checkpoint) -> None:
    """UserError unless each control can be read and was trained for the images that `main` is tested on."""
    for path in paths:
        saved, _ = load_control(path, main.model)
        alike = saved.model["num_classes"] == main.model["num_classes"]
        if saved.data and main.data:
            keys = ("image_size", "mean", "std", "classes")
            alike = alike and [saved.data[key] for key in keys] == [main.data[key] for key in keys]
        if not alike:
            raise UserError(f"--controls {path} was trained on other images than {main.path}; compare like with like")


def measure_controls(paths: list[Path], evaluator: Evaluator, main: Checkpoint, dense: nn.Module) -> None:
    """Evaluate each control and write its row to the controls' CSV when it is finished; rows that are there are kept.

    The CSV has the columns of the sweep's: the criterion is `dense`, the allocation names the network, the notes tell
    how it was trained. A control is compared with the first checkpoint `main`, whose network is `dense`: lost and
    gained images, speed-up, and in `macs_ratio` and `compression` how many times smaller it is.
    """
    if not paths:
        return
    sweep, files = evaluator.sweep, [extra.files for extra in evaluator.extras if isinstance(extra, Exporter)]
    timers = [extra for extra in evaluator.extras if isinstance(extra, Timer)]
    evaluator.begin(next(iter(sweep.header["checkpoints"])), dense.to(evaluator.test.images.device))
    rows = {row.key: row for row in read_rows(sweep.files.controls)}
    for name, path in zip(distinct_names(paths), paths, strict=True):
        saved, network = load_control(path, main.model)
        curve = Curve("dense", network_name(saved.model), "none")
        control = PrunedNetwork(saved, name, curve, 0.0, network, [recipe_words(saved)], time.perf_counter())
        row, known = rows.get(control.key), sweep.header.get("controls", {}).get(control.key, {})
        if row is None or known.get("sha256") != saved.sha256:
            row, known = _evaluate(evaluator, control), {"sha256": saved.sha256}
            print(f"control {name}, {curve.allocation}: accuracy {row.accuracy:.2f} %", flush=True)
        for export in files:
            file = export.path(("control", path.stem, saved.sha256[:8]), 0)
            wanted = {"file": str(file), "precision": export.precision}
            if known | wanted != known or not file.is_file():
                about = {"epoch": saved.epoch, "model": saved.model, "data": saved.data}
                export.write(file, {"net": unmasked_state(network, "cpu")} | about)
                row, known = replace(row, file_bytes=file.stat().st_size), known | wanted
        for timer in timers:
            if timer.lacks(row):
                row = replace(row, **timer.columns(timer.copy(network)))
        rows[control.key] = row
        write_rows(sweep.files.controls, rows.values())
        sweep.merge("controls", {control.key: known})


def _evaluate(evaluator: Evaluator, control: PrunedNetwork) -> Row:
    """The row of a control, without its bytes and times."""
    sweep, test, model = evaluator.sweep, evaluator.test, control.model
    example = torch.zeros(1, *test.images.shape[1:])
    layers, positions = prunable_layers(model, example), positions_per_image(model, example)
    choose_way(model, normalise(test.images[:SAMPLE].cpu(), test.mean, test.std))
    inference = inference_copy(model.to(test.images.device), next(evaluator.inference.parameters()).dtype)
    result = evaluate(fused(inference, test), test, evaluator.batch_size)
    main = next(iter(sweep.header["checkpoints"]))
    own = replace(evaluator, inference=inference, positions=positions, layers=tuple(layers))
    row, _ = own.row(replace(control, checkpoint=main), result)
    dense, macs = sweep.header["dense"][main], census(model, {}, positions).macs
    compression, macs_ratio = round(dense["parameters"] / row.parameters, 6), round(dense["macs"] / macs, 6)
    return replace(row, checkpoint=control.checkpoint, compression=compression, macs_ratio=macs_ratio)
