"""Latency, throughput and peak memory of inference, each network in a process of its own that does nothing else."""

import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, fx, nn

from sparsity.networks.inference import overwrite_in_place
from sparsity.networks.sparse import run_by
from sparsity.system.errors import UserError, one_line
from sparsity.system.machine import machine

LATENCY_BATCH = 1


THROUGHPUT_BATCH = 128


RUNS = 20  # timed, of each batch size; medians count


WARM_UP = 3  # runs before them


MEGABYTE = 10**6


@dataclass(frozen=True)
class Speed:
    """What inference takes: milliseconds for one image, images a second in large batches, memory in MB (10^6 bytes).

    Memory is the peak while large batches run, of the whole process on a CPU (`base_memory_mb` of which it took before
    there was a network) and of what torch allocated on a GPU. `speedup` is the throughput over that of the reference
    network, timed in turns with it; None without one.
    """

    latency_ms: float
    throughput: float
    peak_memory_mb: float | None
    base_memory_mb: float | None
    speedup: float | None


def time_inference(
    network: nn.Module,
    reference: nn.Module | None,
    image_size: int,
    threads: int,
    device: torch.device,
    engine: str = "dense",
) -> Speed:
    """Time an inference copy (see `evaluation.inference_copy`) in a fresh process, on made images [B, 3, S, S].

    It is run by `engine` (of engine.ENGINES), and the reference by dense kernels. Both networks are in eval mode and in
    one precision, which images are made in. Raises UserError when the process ends without an answer.
    """
    blobs = [_serialised(part) for part in (network, reference) if part is not None]
    words = [str(len(blobs)), str(image_size), str(threads), str(device), engine, str(os.getpid())]
    root = str(Path(__file__).parents[2])
    process = subprocess.run(
        [sys.executable, "-m", "sparsity.sweep.measure", *words],
        input=b"".join(blobs),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))},
    )
    if process.returncode:
        lines = process.stderr.decode(errors="replace").strip().splitlines() or ["no message; out of memory?"]
        raise UserError(f"timing inference failed with status {process.returncode}: {one_line(lines[-1])[:200]}")
    return Speed(**json.loads(process.stdout.decode().splitlines()[-1]))


def describe_measurement(engine: str, device: torch.device) -> dict[str, Any]:
    """What a sweep's JSON tells of how its times were taken; precision and versions stand there already."""
    return {
        "engine": engine,
        "machine": machine(device),
        "latency_batch": LATENCY_BATCH,
        "throughput_batch": THROUGHPUT_BATCH,
        "runs": RUNS,
        "warm_up": WARM_UP,
        "speedup": "throughput over that of the dense network, in turns, in the same process",
    }


def _serialised(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network, buffer)
    return len(buffer.getbuffer()).to_bytes(8, "big") + buffer.getvalue()


def _received(stream: BinaryIO, device: torch.device) -> nn.Module:
    """A network that the parent process sent. Only ever from the pipe to the parent, so that its pickle is trusted."""
    size = int.from_bytes(stream.read(8), "big")
    network = torch.load(io.BytesIO(stream.read(size)), map_location=device, weights_only=False)
    if isinstance(network, fx.GraphModule):
        overwrite_in_place(network)
    return network


@torch.inference_mode()
def _answer(
    stream: BinaryIO, networks: int, image_size: int, threads: int, device: torch.device, engine: str, parent: int
) -> Speed:
    """The work of the process: memory with the first network alone, then the times of all in turns."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    base = _resident_mb("VmRSS") if device.type == "cpu" else None
    network = _received(stream, device)
    few, many = (_images(network, count, image_size, device) for count in (LATENCY_BATCH, THROUGHPUT_BATCH))
    contestants = [network if engine == "dense" else run_by(engine, network, few)]
    peak = _peak_memory(lambda: _run(contestants[0], many, parent), device)
    contestants += [_received(stream, device) for _ in range(networks - 1)]
    latency, throughput = (_take_turns(contestants, images, device, parent) for images in (few, many))
    return Speed(
        latency_ms=round(1000 * latency[0], 4),
        throughput=round(THROUGHPUT_BATCH / throughput[0], 3),
        peak_memory_mb=peak,
        base_memory_mb=base,
        speedup=round(throughput[1] / throughput[0], 4) if networks > 1 else None,
    )


def _images(network: nn.Module, count: int, size: int, device: torch.device) -> Tensor:
    """Noise [count, 3, size, size], channels_last, in the type of the network's weights."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(device, next(network.parameters()).dtype, memory_format=torch.channels_last)


def _take_turns(networks: list[nn.Module], images: Tensor, device: torch.device, parent: int) -> list[float]:
    """Median seconds of a forward pass of each network, timed A B A B, so that a drift of the machine meets all."""
    times: list[list[float]] = [[] for _ in networks]
    for run in range(WARM_UP + RUNS):
        for network, spent in zip(networks, times, strict=True):
            _synchronise(device)
            started = time.perf_counter()
            _run(network, images, parent)
            _synchronise(device)
            if run >= WARM_UP:
                spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in times]


def _run(network: nn.Module, images: Tensor, parent: int) -> None:
    if os.getppid() != parent:  # it was killed, and nobody waits for the answer
        sys.exit(1)
    network(images)


def _peak_memory(work: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory in MB while `work` runs a few times: resident in this process on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now; loading took more
    for _ in range(WARM_UP):
        work()
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / MEGABYTE, 3)
    return _resident_mb("VmHWM")


def _resident_mb(field: str) -> float | None:
    """Resident memory of this process in MB, now (VmRSS) or at its peak (VmHWM); None where that is not told."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return round(int(line.split()[1]) * 1024 / MEGABYTE, 3)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def main(words: list[str]) -> None:
    """Answer the process that runs `time_inference`: figures as JSON on stdout."""
    networks, image_size, threads, device, engine, parent = words
    numbers = int(networks), int(image_size), int(threads)
    speed = _answer(sys.stdin.buffer, *numbers, torch.device(device), engine, int(parent))
    print(json.dumps(asdict(speed)))


if __name__ == "__main__":
    main(sys.argv[1:])
