"""Time and memory of both recoveries without labels, on one level of a ResNet-50.

    python tests/benchmarks/bench_recovery.py --checkpoint FILE --data_dir FOLDER [--images 2048] [--level 80]

The level is cut uniformly by magnitude. Evaluating 2,000 images is timed beside it, as the measure of what is cheap.
Each recovery runs in a process of its own, whose peak memory is the figure shown: decoded training images, the
networks and all. Without a checkpoint the network is untrained and the images are noise, which costs the same.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import seconds

import Build_Resnet
from sparsity.data.calibration import draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, Split
from sparsity.data.sources import Source, load_split
from sparsity.networks import checkpoint, families
from sparsity.networks.evaluation import default_batch_size, evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers, zeros_by_layer
from sparsity.prune.pruner import Pruner
from sparsity.recover import RECOVERIES, Means
from sparsity.system import machine
from sparsity.system.machine import apply_threads


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a ResNet for 32x32 images (an untrained ResNet-50)")
    parser.add_argument("--data_dir", type=Path, help="a folder dataset (noise)")
    parser.add_argument("--images", type=int, default=2048, help="calibration images")
    parser.add_argument("--level", type=float, default=80, help="percent of the weights that go")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--only", choices=("batchnorm", "reconstruction"), help=argparse.SUPPRESS)
    return parser.parse_args()


def training_images(args: argparse.Namespace) -> Split:
    if args.data_dir:
        return load_split(Source("folder", args.data_dir, 32), True, CIFAR10_STATISTICS)[0]
    noise = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8)
    return Split(noise, torch.arange(args.images) % 10, *CIFAR10_STATISTICS)


def measure(args: argparse.Namespace) -> None:
    """One recovery: how long it took beside an evaluation, and the peak memory of this process."""
    device = machine.resolve_device(args.device)
    dtype = machine.dtype_of(machine.resolve_precision(args.precision, device))
    threads = apply_threads(args.threads)
    torch.manual_seed(0)
    spec = {"arch": "resnet50", "num_classes": 10, "width": 64}
    if args.checkpoint:
        dense = families.restore(checkpoint.load(args.checkpoint), Build_Resnet.build, Build_Resnet.spec_of)
    else:
        dense = Build_Resnet.build(spec).eval()
    dense.to(device)
    train = training_images(args)
    calibration = draw_calibration(train, args.images, 0, device, dtype)
    test = train.take(torch.arange(min(2000, len(train)))).to(device)
    layers = tuple(prunable_layers(dense, torch.zeros(1, 3, 32, 32, device=device)))
    del train
    means = Means(dense, layers, calibration)
    inference = inference_copy(dense, dtype)
    means.copy(next(calibration.batches())[0])  # warm-up
    model, _ = Pruner(dense, list(layers), calibration, 0).prune(("l1", "uniform", args.only), args.level)
    notes: list[str] = []
    spent = seconds(lambda: notes.extend(RECOVERIES[args.only](model, means, 0)), device)
    evaluating = seconds(lambda: evaluate(inference, test, default_batch_size(device)), device)
    zeros = sum(zeros_by_layer({name: model.get_submodule(name) for name in layers}).values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    beside = f"evaluating {len(test):,} images {evaluating:.1f} s"
    print(f"{args.only:15} {spent:7.1f} s a level; {beside}; peak {peak:,.0f} MiB")
    sampled = f"{len(calibration):,} images, at most {calibration.position_limit:,} positions a layer"
    kind = str(dtype).removeprefix("torch.")
    print(" " * 16 + "; ".join([f"{sampled}, {kind}, {threads} threads, {zeros:,} zeros", *notes]))


def main() -> None:
    args = parse_args()
    if args.only:
        measure(args)
        return
    for recovery in ("batchnorm", "reconstruction"):
        status = subprocess.run([sys.executable, *sys.argv, "--only", recovery]).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
