"""Controls: dense networks that are simply smaller, measured as pruned ones are, on the same images."""

import csv
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsity.data.images import Split
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.evaluation import evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import census, positions_per_image
from sparsity.results.rows import MEASURED, accuracy_columns
from sparsity.sweep.export import ExportFiles
from sparsity.sweep.timing import Stopwatch
from sparsity.system.errors import UserError, one_line
from sparsity.system.files import write_csv

PRUNED = 0.01  # share of zeros from which on weights are not those of a training


RECIPE = ("epochs", "optimizer", "batch_size", "learning_rate", "momentum", "weight_decay", "T_max")


@dataclass(frozen=True)
class Control:
    """A line of the controls' table: `macs` for one image, the other columns as in the rows of a sweep.

    `images` tells what accuracy was measured on, and how, `file_kind` the precision and format of the file.
    """

    checkpoint: str
    sha256: str
    images: str
    network: str
    recipe: str
    parameters: int
    macs: int
    accuracy: float
    ci_low: float
    ci_high: float
    file_kind: str = ""
    file_bytes: int | None = None
    latency_ms: float | None = None
    throughput: float | None = None
    peak_memory_mb: float | None = None
    speedup: float | None = None


COLUMNS = tuple(field.name for field in fields(Control))


def recipe_of(saved: Checkpoint) -> str:
    """How a network was trained, in words; 'unknown' where its file does not tell."""
    if not set(RECIPE) <= saved.settings.keys():
        return "unknown"
    data = saved.data or {}
    told = [f"{name} {saved.settings[name]}" for name in RECIPE]
    return one_line(", ".join([str(data.get("name", data.get("dataset"))), f"{data.get('image_size')} px", *told]))


def network_name(spec: dict[str, Any]) -> str:
    """A network in words: 'resnet18', 'resnet50 width 32', with 'thin' where filters were removed."""
    width = "" if spec["width"] == 64 else f" width {spec['width']}"
    return f"{spec['arch']}{width}" + (" thin" if spec.get("widths") else "")


@dataclass(frozen=True)
class ControlBench:
    """What controls are measured with; `files` and `watch` are None where nobody asked for sizes or times."""

    table: Path
    test: Split
    batch_size: int
    dtype: torch.dtype
    files: ExportFiles | None
    watch: Stopwatch | None


def require_comparable(
    paths: list[Path], load: Callable[[Path], tuple[Checkpoint, nn.Module]], main: Checkpoint
) -> None:
    """UserError unless each control can be read, is dense, and was trained for the images that `main` is tested on."""
    hashes: dict[str, Path] = {}
    for path in paths:
        saved, _ = load(path)
        if hashes.setdefault(saved.sha256, path) is not path:
            raise UserError(f"--controls {path} is the same as {hashes[saved.sha256]}; name each one once")
        zeros = sum(int((value == 0).sum()) for value in saved.net.values() if value.dim() > 1)
        if zeros > PRUNED * sum(value.numel() for value in saved.net.values() if value.dim() > 1):
            raise UserError(f"--controls {path} is pruned; a control is a dense network")
        alike = saved.model["num_classes"] == main.model["num_classes"]
        if saved.data and main.data:
            keys = ("image_size", "mean", "std", "classes")
            alike = alike and [saved.data[key] for key in keys] == [main.data[key] for key in keys]
        if not alike:
            raise UserError(f"--controls {path} was trained on other images than {main.path}; compare like with like")


def measure_controls(
    bench: ControlBench, paths: list[Path], load: Callable[[Path], tuple[Checkpoint, nn.Module]]
) -> list[Control]:
    """Measure each checkpoint and write its line when it is finished; complete lines of it are kept, others dropped."""
    there = {control.sha256: control for control in read_controls(bench.table)}
    done: list[Control] = []
    for path in paths:
        saved, network = load(path)
        control = there.get(saved.sha256)
        if control is None or _lacks(bench, control):
            control = _measure(bench, path, saved, network)
            print(f"control {control.network}: accuracy {control.accuracy:.2f} %", flush=True)
        done.append(control)
        write_csv(bench.table, COLUMNS, map(asdict, done))
    return done


def read_controls(table: Path) -> list[Control]:
    """The lines of a table of controls, none where there is no table. Raises UserError when it cannot be read."""
    if not table.exists():
        return []
    try:
        with table.open(newline="") as file:
            return [_parse(line) for line in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(
            f"{table} cannot be read ({one_line(error)[:120]}); remove it, and it is measured again"
        ) from error


def _parse(line: dict[str, str]) -> Control:
    kinds = {field.name: field.type for field in fields(Control)} | MEASURED
    if None in line or None in line.values():
        raise ValueError("a line has another number of columns than the first")
    values = {name: kinds[name](line[name]) for name in COLUMNS if name not in MEASURED or line[name]}
    if not all(math.isfinite(value) for value in values.values() if isinstance(value, int | float)):
        raise ValueError("a figure is not a number")
    return Control(**values)


def _images(bench: ControlBench) -> str:
    return f"{len(bench.test)} {bench.test.hash()[:16]} {bench.dtype}"


def _kind(files: ExportFiles) -> str:
    return f"{files.precision} {files.form}"


def _lacks(bench: ControlBench, control: Control) -> bool:
    if control.images != _images(bench):
        return True
    no_file = bench.files is not None and control.file_kind != _kind(bench.files)
    return no_file or (bench.watch is not None and control.throughput is None)


def _measure(bench: ControlBench, path: Path, saved: Checkpoint, network: nn.Module) -> Control:
    """Accuracy, counts, and as far as wanted bytes and times of one network."""
    size = bench.test.images.shape[-1]
    counts = census(network, {}, positions_per_image(network, torch.zeros(1, 3, size, size)))
    inference = inference_copy(network.to(bench.test.images.device), bench.dtype)
    result = evaluate(inference, bench.test, bench.batch_size)
    measured: dict[str, Any] = {}
    if bench.files:
        file = bench.files.path(("control", path.stem, saved.sha256[:8]), 0)
        bench.files.write(file, {"net": saved.net, "epoch": saved.epoch, "model": saved.model})
        measured |= {"file_kind": _kind(bench.files), "file_bytes": file.stat().st_size}
    if bench.watch:
        measured |= bench.watch.columns(inference)
    return Control(
        path.name,
        saved.sha256,
        _images(bench),
        network_name(saved.model),
        recipe_of(saved),
        counts.parameters,
        counts.macs,
        **accuracy_columns(result.correct, result.total),
        **measured,
    )
