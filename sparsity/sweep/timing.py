"""Latency, throughput and peak memory of inference, each network in a fresh process: the columns of `--measure`."""

import json
import pickle
import re
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.spawn import ProcessContext, ProcessException, spawn

from sparsity.data.images import CIFAR10_STATISTICS, Split, normalise
from sparsity.networks.evaluation import Evaluation
from sparsity.networks.fused import fused
from sparsity.networks.inference import compiled, inference_copy, overwrite_in_place
from sparsity.networks.semi_structured import semi_structured_layers, use_semi_structured
from sparsity.networks.sparse import sparse_network
from sparsity.results.rows import SEMI_STRUCTURED_NOTE, TIMED, Row
from sparsity.results.store import Sweep
from sparsity.sweep.evaluator import PrunedNetwork
from sparsity.sweep.export import thin_network
from sparsity.system.errors import UserError, one_line
from sparsity.system.machine import keep_memory, make_deterministic

BATCHES = (1, 128)  # images: of latency, of throughput
RUNS = 20  # timed, of each batch size; medians count
WARM_UP = 3  # runs before them
SEMI_STRUCTURED = "semi-structured"  # an engine for N:M, beside those that flags name
Figures = dict[str, float | None]  # the columns of TIMED, and base_memory_mb


def time_inference(
    inference: nn.Module, reference: nn.Module | None, image_size: int, engine: str, compiling: bool
) -> Figures:
    """Time an inference copy in a fresh process, on noise [B, 3, S, S], in turns with a `reference` of its precision.

    `engine` runs the first network, dense kernels the reference; with `compiling` both go through `torch.compile`.
    Device, threads and determinism are those of this process. Figures: milliseconds of one image, images a second in
    large batches, their peak memory in MB (10^6 bytes; of the whole process on a CPU, `base_memory_mb` of which it took
    before there was a network; of all that torch allocated on a GPU), and the speed-up over the reference, None without
    one. Raises UserError when the process fails or dies, and where the network cannot be handed to it.
    """
    state = (next(inference.parameters()).device, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            torch.save(inference, folder / "network.pt")
            if reference is not None:
                torch.save(reference, folder / "reference.pt")
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # a class that only this process knows
            why = one_line(error)[:160]
            raise UserError(f"the network cannot be timed in a fresh process ({why}); leave --measure out") from error
        child = _start(folder, image_size, engine, compiling, *state)
        try:
            child.join()
        except ProcessException as error:  # its last line is the reason, after a traceback
            raise UserError(f"timing inference failed: {str(error).strip().splitlines()[-1][:200]}") from error
        finally:
            child.processes[0].kill()
        return json.loads((folder / "figures.json").read_text())


def _start(*task: Any) -> ProcessContext:
    """A fresh process for `_measure`, which ends with this one.

    It does not import the script that runs here, which would take 200 MB and may have no main guard.
    """
    script, handler = sys.modules["__main__"], signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.modules["__main__"] = ModuleType("__main__")  # inherited, as the signal: while it imports, Ctrl-C is for us
    try:
        return spawn(_measure, task, join=False)
    finally:
        sys.modules["__main__"] = script
        signal.signal(signal.SIGINT, handler)


@torch.inference_mode()
def _measure(
    _: int, folder: Path, size: int, engine: str, compiling: bool, device: torch.device, threads: int, repeatable: bool
) -> None:
    """Write the figures of the network in `folder`: memory while it is alone, then times in turns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it: torch has it sent when the parent process is gone
    torch.set_num_threads(threads)
    make_deterministic(repeatable)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    base = _resident_mb("VmRSS") if device.type == "cpu" else None
    noise = torch.randint(0, 256, (BATCHES[-1], 3, size, size), dtype=torch.uint8)
    noise = Split(noise, torch.zeros(len(noise), dtype=torch.int64), *CIFAR10_STATISTICS).to(device)
    contestants = [_load(folder / "network.pt", noise, engine, compiling)]
    dtype = next(contestants[0][0].parameters()).dtype
    batches = [normalise(noise.images[:count], noise.mean, noise.std, dtype) for count in BATCHES]
    peak = _peak_memory(contestants[0][-1], batches[-1])
    keep_memory()  # as in a sweep
    contestants += [_load(path, noise, "dense", compiling) for path in folder.glob("reference.pt")]
    latency, throughput = map(_take_turns, zip(*contestants, strict=True), batches)
    figures = {
        "latency_ms": round(1000 * latency[0], 4),
        "throughput": round(BATCHES[-1] / throughput[0], 3),
        "peak_memory_mb": peak,
        "speedup": round(throughput[1] / throughput[0], 4) if len(throughput) > 1 else None,
        "base_memory_mb": base,
    }
    (folder / "figures.json").write_text(json.dumps(figures))


def _load(path: Path, noise: Split, engine: str, compiling: bool) -> list[nn.Module]:
    """The inference copy in a file of the parent process, as a sweep runs it: a network for each of BATCHES."""
    inference = torch.load(path, map_location=noise.images.device, weights_only=False)
    overwrite_in_place(inference)  # its additions come out of place from the file
    if engine == SEMI_STRUCTURED:
        use_semi_structured(inference)
    if engine == "sparse":
        return [sparse_network(inference, normalise(noise.images[:1], noise.mean, noise.std))] * len(BATCHES)
    if compiling:
        return [compiled(inference, noise, count) for count in BATCHES]
    return [fused(inference, noise)] * len(BATCHES)


def _take_turns(networks: tuple[nn.Module, ...], images: Tensor) -> list[float]:
    """Median seconds of a forward pass of each network, timed A B A B, so that a drift of the machine meets all."""
    times: list[list[float]] = [[] for _ in networks]
    synchronise = getattr(torch, images.device.type).synchronize
    for run in range(WARM_UP + RUNS):
        for network, spent in zip(networks, times, strict=True):
            synchronise()
            started = time.perf_counter()
            network(images)
            synchronise()
            if run >= WARM_UP:
                spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in times]


def _peak_memory(network: nn.Module, images: Tensor) -> float | None:
    """Peak memory in MB while a network runs a few times: resident in this process on a CPU, allocated on a GPU.

    On a GPU it is the peak since the process began, because replays of a CUDA graph allocate nothing.
    """
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now; loading took more
    for _ in range(WARM_UP):
        network(images)
    if images.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6, 3)
    return _resident_mb("VmHWM")


def _resident_mb(key: str) -> float | None:
    """Resident memory of this process in MB, now (VmRSS) or at its peak (VmHWM); None where Linux does not tell it."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return round(int(found[1]) * 1024 / 1e6, 3) if found else None


@dataclass
class Timer:
    """Times each network against its dense one, as the sweep runs it; one of the extras of an evaluator.

    `inference` is the copy that the sweep evaluates in, `compiling` whether it does so through `torch.compile`.
    """

    sweep: Sweep
    inference: fx.GraphModule
    image_size: int
    engine: str
    compiling: bool
    dense: fx.GraphModule | None = field(default=None, init=False)  # the reference, set by `begin`

    def begin(self, checkpoint: str, dense: nn.Module) -> None:
        """Time from now on against `dense`, whose own times go into the JSON unless they are there."""
        self.dense = self.copy(dense)
        figures = self.sweep.header["dense"][checkpoint]
        if "throughput" in figures:
            return
        speed = time_inference(self.dense, None, self.image_size, "dense", self.compiling)
        how = {
            "latency_batch": BATCHES[0],
            "throughput_batch": BATCHES[-1],
            "runs": RUNS,
            "warm_up": WARM_UP,
            "speedup": "throughput over that of the dense network, in turns, in the same process",
            "base_memory_mb": speed["base_memory_mb"],
        }
        self.sweep.record("measurement", how)
        times = {column: speed[column] for column in TIMED if column != "speedup"}
        self.sweep.merge("dense", {checkpoint: figures | times})

    def lacks(self, row: Row) -> bool:
        """Whether a row has no times."""
        return row.throughput is None

    def __call__(self, pruned: PrunedNetwork, row: Row, result: Evaluation) -> tuple[Figures, list[str]]:
        """The columns of TIMED for a pruned network; after filter pruning, of the thin one by dense kernels."""
        if pruned.curve.pattern and self.engine == "dense":
            if layers := semi_structured_layers(self.inference):
                note = f"{SEMI_STRUCTURED_NOTE} in linear layers: {len(layers)}"
                return self.columns(self.inference, SEMI_STRUCTURED), [note]
            return self.columns(self.inference), ["timed by dense kernels"]
        if not pruned.curve.prunes_filters:
            return self.columns(self.inference, self.engine), []
        return self.columns(self.copy(thin_network(pruned.model, pruned.saved.model)[0])), []

    def columns(self, inference: fx.GraphModule, engine: str = "dense") -> Figures:
        """The columns of TIMED for an inference copy, run by `engine` in turns with the dense one."""
        speed = time_inference(inference, self.dense, self.image_size, engine, self.compiling)
        return {column: speed[column] for column in TIMED}

    def copy(self, model: nn.Module) -> nn.Module:
        """An inference copy of `model` in the precision and on the device of the sweep; `model` is moved there."""
        weight = next(self.inference.parameters())
        return inference_copy(model.to(weight.device), weight.dtype)
