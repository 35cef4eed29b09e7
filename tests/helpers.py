"""Functions that tests share: runs of the scripts, in this process, in one of their own, or by torchrun."""

import copy
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsity.data.images import Split, normalise
from sparsity.networks.layers import effective_weight, prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.results.rows import COLUMNS, Row, accuracy_columns, comparison_columns
from sparsity.results.statistics import halves

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "1"))  # how often each kind of run is killed


def sweep(out: Path, *flags: object, drawn: bool = False) -> int:
    """Exit status of pruning.py in this process, in float32 with one thread, writing to `out`.

    Figures, four fifths of a small sweep, are `drawn` where a test looks at them.
    """
    import pruning  # here, so that tests of a room run whatever state the scripts are in

    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr("sparsity.figures.accuracy.plot_all", lambda files: None)
        return pruning.main(["--images_dir", str(out), "--precision", "fp32", "--threads", "1", *map(str, flags)])


def export(out: Path, *flags: object) -> int:
    """Exit status of a sweep that writes networks to `out`/files."""
    return sweep(out, "--checkpoint_dir", out / "files", *flags)


def files_of(folder: Path, name: str = "colours_resnet18_pruning") -> Any:
    """The files of a sweep in `folder`."""
    from sparsity.results.files import SweepFiles

    return SweepFiles(folder / name)


def contents(folder: Path) -> dict[Path, bytes]:
    """The bytes of all files below a folder, without locks and what Python compiles."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".pyc"))
    return {path: path.read_bytes() for path in files}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(path: Path) -> list[dict[str, str]]:
    """The lines of a sweep's CSV but for the one column that differs between two runs."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(path)]


def assert_same(expected: Any, found: Any) -> None:
    """Assert that two nested contents of checkpoints are equal to the bit, but for the seconds of epochs."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected.keys() - {"seconds"}:
            assert_same(expected[key], found[key])
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            assert_same(one, other)
    elif torch.is_tensor(expected):
        assert torch.equal(expected, found)
    else:
        assert expected == found


def checkpoints(out: Path) -> dict[str, Any]:
    """Name -> content of the checkpoints that a training wrote below `out`."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted((out / "checkpoints").glob("*.pth"))}


def launch(script: str | Path, *flags: object, processes: int = 1) -> subprocess.Popen:
    """A script as a process of its own, or by torchrun as several."""
    launcher = [sys.executable, "-u"]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / script), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )


def run_to_the_end(script: str | Path, *flags: object, processes: int = 1) -> str:
    """Standard output of a run, which has to succeed."""
    process = launch(script, *flags, processes=processes)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def kill_when(
    process: subprocess.Popen, ready: Callable[[], bool], number: int = signal.SIGKILL, rank: int = -1
) -> str:
    """Send a signal to a run, or to one rank of it, as soon as `ready`, in its middle; returns its standard error."""
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert process.poll() is None  # or nothing was killed
    os.kill(process.pid if rank < 0 else process_of(process, rank), number)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    return err


def process_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process of a rank, as the environment of torchrun's children tells it."""
    for child in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


def zeros_by_layer(layers: dict[str, torch.nn.Module]) -> dict[str, int]:
    """Name -> zeros of the effective weight of each layer, masked or not."""
    return {name: int((effective_weight(layer) == 0).sum()) for name, layer in layers.items()}


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor, which tell -0.0 from 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def same_bits(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts have the same names in the same order, types, shapes and bits."""
    return list(state) == list(other) and all(
        (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape) and bits(tensor) == bits(other[name])
        for name, tensor in state.items()
    )


LABELS = np.arange(40) % 4


def made_predictions(level: float) -> np.ndarray:
    """Predictions [40] that are right at every third level."""
    return (LABELS + int(level) % 3) % 4


def made_row(
    level: float, checkpoint: str = "one.pth", curve: tuple = ("l1", "uniform", "none"), notes: str = ""
) -> Row:
    """A row of `made_predictions` beside a dense network that gets everything right."""
    right = made_predictions(level) == LABELS
    values = dict.fromkeys(COLUMNS[5:], 1) | {"sparsity": 10.5, "notes": notes}
    values |= accuracy_columns(int(right.sum()), len(LABELS)) | comparison_columns(right, np.ones(40, dtype=bool))
    return Row(checkpoint, *curve, level=level, **values)


def made_sweep(files: Any, rows: list[Row], layers: dict[str, int] | None = None, **header: Any) -> Any:
    """A sweep in memory of these rows of `made_predictions`; a tenth of each layer is zero."""
    from sparsity.results.store import Sweep

    layers, names = layers or {"conv": 1000}, list(dict.fromkeys(row.checkpoint for row in rows))
    dense = {name: {"accuracy": 100.0, "macs": 8_000_000} for name in names}
    head = {"title": "a title", "settings": {}, "data": {"classes": list("abcd")}, "dense": dense}
    sweep = Sweep(files, head | {"checkpoints": {name: {"sha256": name} for name in names}} | header, LABELS, layers)
    sweep.dense = dict.fromkeys(names, LABELS)
    for row in rows:
        sweep.rows[row.key], sweep.predictions[row.key] = row, made_predictions(row.level)
        sweep.zeros[row.key] = np.array(list(layers.values())) // 10
    return sweep


def add_lost(
    sweep: Any,
    level: float,
    lost: int = 0,
    curve: tuple = ("l1", "uniform", "none"),
    checkpoint: str = "one.pth",
    also_lost: int = 0,
    **columns: Any,
) -> None:
    """Add the row of a network that loses `lost` images of each half, of twenty, and `also_lost` of the reporting one.

    The sweep is one in memory; `columns` are further values of the row.
    """
    found = LABELS.copy()
    for part, count in zip(halves(LABELS), (lost, lost + also_lost), strict=True):
        found[np.flatnonzero(part)[:count]] += 1
    found %= 4
    columns |= accuracy_columns(int((found == LABELS).sum()), 40) | comparison_columns(
        found == LABELS, LABELS == LABELS
    )
    row = replace(made_row(level, checkpoint, curve), **columns)
    sweep.rows[row.key], sweep.predictions[row.key] = row, found


def bare_sweep(files: Any, checkpoints: tuple[str, ...] = ("one.pth",)) -> Any:
    """A sweep in memory without rows, of networks that get everything right before pruning."""
    sweep = made_sweep(files, [made_row(0.0, name) for name in checkpoints])
    sweep.rows = {}
    return sweep


def ink(path: Path) -> tuple[int, int, float]:
    """Width and height of a picture, and the share of its pixels that are not white; nothing runs out of its edges."""
    with Image.open(path) as picture:
        dark = (np.asarray(picture.convert("RGB")) < 250).any(axis=2)
    assert not (dark[0].any() or dark[-1].any() or dark[:, 0].any() or dark[:, -1].any())
    return dark.shape[1], dark.shape[0], float(dark.mean())


def line_points(line: Any) -> list[list[float]]:
    """The points of a drawn line, without the nan that break it."""
    return [pair for pair in line.get_xydata().tolist() if pair[0] == pair[0]]


def stub_times(monkeypatch) -> list[tuple[Any, Any]]:
    """Let `--measure` answer at once, by the numbers of weights; returns the pairs of networks that it is asked for."""
    timed = []

    def answer(network, reference, image_size, engine, compiling):
        timed.append((network, reference))
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (network, reference or network)]
        figures = dict.fromkeys(("latency_ms", "throughput", "peak_memory_mb", "base_memory_mb"), float(sizes[0]))
        return figures | {"speedup": sizes[1] / sizes[0] if reference else None}

    monkeypatch.setattr("sparsity.sweep.timing.time_inference", answer)
    return timed


def logits_of(network: torch.nn.Module, split: Split, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The logits [N, classes] of a network in `dtype` on a split, in float32."""
    with torch.no_grad():
        return network(normalise(split.images, split.mean, split.std, dtype)).float()


def masked(model: torch.nn.Module, level: float) -> torch.nn.Module:
    """A copy of a network of which `level` percent of each prunable layer is masked."""
    model = copy.deepcopy(model)
    prune_l1_uniform(prunable_layers(model, torch.zeros(1, 3, 8, 8)), level / 100)
    return model
