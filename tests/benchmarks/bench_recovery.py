"""Time, its shares, and memory of both recoveries without labels, on one level of a ResNet-50.

    python tests/benchmarks/bench_recovery.py --checkpoint FILE --data_dir FOLDER [--images 2048] [--level 80]

The level is pruned uniformly by magnitude. Evaluating 2,000 images is timed beside it, for comparison. Each recovery
runs in a process of its own, whose peak memory is shown: decoded training images, the networks and all. The time of
`reconstruction` is split into forward passes of both networks, rows (drawing positions, unfolding inputs), products
(second moments and targets), solver, and BatchNorm statistics. Without a checkpoint the network is untrained and the
images are noise, which costs the same.
"""

import argparse
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import seconds

from sparsity.data.calibration import draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, Split
from sparsity.data.sources import Source, load_split
from sparsity.networks import families
from sparsity.networks.census import census
from sparsity.networks.evaluation import default_batch_size, evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.prune.pruner import Pruner
from sparsity.recover import RECOVERIES, Means, reconstruction
from sparsity.system import machine
from sparsity.system.methods import Curve


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a ResNet for 32x32 images (an untrained ResNet-50)")
    parser.add_argument("--data_dir", type=Path, help="a folder dataset (noise)")
    parser.add_argument("--images", type=int, default=2048, help="calibration images")
    parser.add_argument("--level", type=float, default=80, help="percent of the weights to prune")
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


def split_time(device: torch.device) -> Counter[str]:
    """Seconds of each part of `reconstruction`, filled while recoveries run; its functions are wrapped for good."""
    spent: Counter[str] = Counter()

    def timed(part: str, function: Callable, within: str = "") -> Callable:
        def call(*given):
            results = []
            took = seconds(lambda: results.append(function(*given)), device)
            spent.update({part: took} if not within else {part: took, within: -took})
            return results[0]

        return call

    run = reconstruction._Stream.run

    def stream(self, wanted):
        batches, end = run(self, wanted), object()
        step = timed("forward passes", lambda: next(batches, end), "products")
        while (batch := step()) is not end:
            yield batch

    reconstruction._Stream.run = stream
    reconstruction.draw_positions = timed("rows", reconstruction.draw_positions, "products")
    reconstruction.input_rows = timed("rows", reconstruction.input_rows, "products")
    reconstruction._moments = timed("products", reconstruction._moments)
    reconstruction.refit = timed("solver", reconstruction.refit)
    return spent


def measure(args: argparse.Namespace) -> None:
    """Print the time of one recovery beside that of an evaluation, and the peak memory of this process."""
    device = machine.resolve_device(args.device)
    dtype = machine.DTYPES[machine.resolve_precision(args.precision, device)]
    threads = machine.apply_threads(args.threads)
    torch.manual_seed(0)
    spec = {"arch": "resnet50", "num_classes": 10, "width": 64}
    dense = families.load_network(args.checkpoint)[1] if args.checkpoint else families.build(spec).eval()
    dense.to(device)
    train = training_images(args)
    calibration = draw_calibration(train, args.images, 0, device, dtype)
    test = train.take(torch.arange(min(2000, len(train)))).to(device)
    layers = tuple(prunable_layers(dense, torch.zeros(1, 3, 32, 32, device=device)))
    del train
    means, inference = Means(dense, layers, calibration), inference_copy(dense, dtype)
    means.copy(next(calibration.batches())[0])  # warm-up
    model, notes = Pruner(dense, list(layers)).prune(Curve("l1", "uniform", args.only), args.level)
    parts = split_time(device)
    spent = seconds(lambda: notes.extend(RECOVERIES[args.only](model, means, 0)), device)
    evaluating = seconds(lambda: evaluate(inference, test, default_batch_size(device)), device)
    zeros = census(model, {name: model.get_submodule(name) for name in layers}, {}).zeros
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    print(f"{args.only:15} {spent:7.1f} s a level; {len(test):,} images {evaluating:.1f} s; peak {peak:,.0f} MiB")
    sampled = f"{len(calibration):,} images, at most {calibration.position_limit:,} positions a layer"
    print(" " * 16 + "; ".join([f"{sampled}, {dtype}, {threads} threads, {zeros:,} zeros", *notes]))
    if parts:
        parts["BatchNorm statistics and the rest"] = spent - parts.total()
        shares = (f"{part} {took:.1f} s ({100 * took / spent:.0f} %)" for part, took in parts.most_common())
        print(" " * 16 + ", ".join(shares))


if __name__ == "__main__":
    args = parse_args()
    if args.only:
        measure(args)
    else:
        for recovery in ("batchnorm", "reconstruction"):
            subprocess.run([sys.executable, *sys.argv, "--only", recovery], check=True)
