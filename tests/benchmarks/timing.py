"""What the benchmarks share: flags, timing in turns, what networks cost and machines attain."""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import Build_Resnet
from sparsity.system import errors, files, machine
from sparsity.system.machine import apply_threads

# Operations a second of dense products that convolutions come near to, where a datasheet's figure is out of reach.
ATTAINABLE = {("H100 80GB HBM3", "bf16"): 790e12, ("H200", "bf16"): 790e12}
PRODUCT_SIZES = {"cuda": 8192, "cpu": 2048}  # of the matrices that are multiplied to find out otherwise
SLOW_SIZE = 1024  # of bfloat16 on a CPU that may have no instructions for it


class Peak(NamedTuple):
    """Operations a second that a machine attains in one kind of arithmetic, and where the figure is from."""

    flops: float
    words: str


def add_network_flags(parser: argparse.ArgumentParser, images: int) -> None:
    """Flags of benchmarks that run a network on random images, `images` of them by default."""
    parser.add_argument("--images", type=int, default=images, help="random ones, a multiple of the batch (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each; the median counts (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--arch", choices=tuple(Build_Resnet.ARCHITECTURES), default="resnet50", help="(%(default)s)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (%(default)s)")
    parser.add_argument("--image_size", type=int, default=32, help="side in pixels (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile too")
    parser.add_argument("--json", type=Path, help="where the figures go as well")


def set_up(args: argparse.Namespace) -> tuple[torch.device, int]:
    """Device and number of threads as the flags ask for; seeds, and sets CUDA up as our scripts do."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    return machine.resolve_device(args.device), apply_threads(args.threads)


def build(args: argparse.Namespace) -> nn.Module:
    """An untrained network as the flags ask for."""
    return Build_Resnet.build({"arch": args.arch, "num_classes": 10, "width": args.width})


def forward_flops(model: nn.Module, image_size: int) -> int:
    """Floating-point operations of a network for one image, forward; training takes three times as many."""
    shapes = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        shapes(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Usual settings inside the block: whether CUDA may round to TF32 is said, and convolutions are not tried out."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark = tf32, tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark = before


def attainable(device: torch.device, kind: str) -> Peak:
    """What `device` attains in fp32, tf32 or bf16: a known figure, or the best of a few matrix products now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for (part, known), flops in ATTAINABLE.items():
        if part in name and kind == known:
            return Peak(flops, f"{flops / 1e12:,.0f} TFLOP/s attainable by this GPU in {kind}")
    size = SLOW_SIZE if (device.type, kind) == ("cpu", "bf16") else PRODUCT_SIZES[device.type]
    matrix = torch.rand(size, size, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    with float32_products(kind == "tf32"):
        matrix @ matrix  # warm-up
        flops = 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(10))
    return Peak(
        flops, f"{flops / 1e12:,.3g} TFLOP/s by the best of 20 products of {size} x {size} in {kind}, before and after"
    )


def usual_kind(device: torch.device) -> str:
    """The arithmetic of float32 networks when nobody says anything: CUDA rounds what enters convolutions."""
    return "tf32" if device.type == "cuda" else "fp32"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, with the device synchronised on both sides."""
    synchronise = getattr(torch, device.type).synchronize
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def take_turns(
    contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every contestant, `repeats` times A B C A B C, so that a drift of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            times[name].append(seconds(work, device))
    return times


def print_rates(
    times: dict[str, list[float]],
    images: int,
    flops: float,
    kinds: dict[str, str],
    peaks: dict[str, Peak],
    remarks: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Print and return, for each contestant, images a second by the median run and the range over the runs.

    And the ratio to the first contestant, and the share of the peak of its own kind of arithmetic, at `flops` an image.
    """
    base = statistics.median(next(iter(times.values())))
    figures = {}
    for name, runs in times.items():
        median = statistics.median(runs)
        rate, low, high = (images / value for value in (median, max(runs), min(runs)))
        share = 100 * rate * flops / peaks[kinds[name]].flops
        print(
            f"{name:28} {rate:9.1f} images/s ({low:.1f} to {high:.1f}) {base / median:6.2f}x, "
            f"{share:.1f} % of the {kinds[name]} peak{remarks.get(name, '')}"
        )
        figures[name] = {"images_per_second": rate, "low": low, "high": high, "ratio": base / median, "share": share}
    for peak in {kinds[name]: peaks[kinds[name]] for name in times}.values():
        print(f"peak: {peak.words}")
    print(f"{flops / 1e9:.3g} GFLOP an image")
    return figures


def write_figures(path: Path | None, device: torch.device, figures: dict[str, Any]) -> None:
    """Keep figures as JSON, where a path is given, with the command, the versions and the machine they came from."""
    if path:
        about = {
            "command": errors.command_line(sys.argv[0], sys.argv[1:]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": machine.versions(),
            "machine": machine.describe_machine(device),
        }
        files.write_json(path, about | figures)
