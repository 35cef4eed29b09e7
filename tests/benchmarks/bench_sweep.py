"""Time the evaluation of a pruned ResNet-50: the reference's loop against ours, same images, same checkpoint, one run.

    python tests/benchmarks/bench_sweep.py [--checkpoint FILE] [--images 512] [--repeats 3] [--compile] [--levels 21]

(a) is the loop of the reference study: masks as hooks, BatchNorm apart, float32, NCHW, batches of 128. (b) and (c) are
the inference copy of `sparsity/networks` in float32 and in bfloat16; (d) and (e), with `--compile`, these two through
`torch.compile`. They take turns, and medians are compared. Without a checkpoint the network is untrained, which costs
the same time; agreement is then of no meaning.

Afterwards a sweep of l1 uniform by pruning.py, of levels spread over 0 to 100 %, in the precision that `--precision
auto` takes on this machine: how much of its time, figures apart, is not evaluation.
"""

import argparse
import copy
import io
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import (
    add_network_flags,
    attainable,
    build,
    float32_products,
    forward_flops,
    print_rates,
    seconds,
    set_up,
    take_turns,
    usual_kind,
    write_figures,
)

import pruning
from sparsity.data.images import CIFAR10_STATISTICS, Split, normalise
from sparsity.figures import accuracy
from sparsity.networks.evaluation import default_batch_size, evaluate, evaluate_shared
from sparsity.networks.families import load_network
from sparsity.networks.fused import fused
from sparsity.networks.inference import compiled, inference_copy, refresh
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.sweep import evaluator
from sparsity.system.machine import DTYPES, describe_machine

BATCH = 128
LEVEL = 0.4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a network for images of --image_size (an untrained one)")
    add_network_flags(parser, images=512)
    parser.add_argument("--precision", choices=("both", "fp32", "bf16"), default="both", help="of ours (%(default)s)")
    parser.add_argument("--data_dir", type=Path, help="a folder dataset, for the sweep (1,000 synthetic images)")
    parser.add_argument("--levels", type=int, default=21, help="of the sweep at the end, 0 for none (%(default)s)")
    return parser.parse_args()


@torch.no_grad()
def reference_predictions(model: nn.Module, test: Split) -> torch.Tensor:
    """The reference's evaluation loop: the masked network as it is, float32, NCHW."""
    predicted = []
    with float32_products(tf32=True):  # torch's default for convolutions
        for start in range(0, len(test), BATCH):
            images = normalise(test.images[start : start + BATCH], test.mean, test.std).contiguous()
            predicted.append(model(images).argmax(dim=1))
    return torch.cat(predicted).cpu()


def make_contestants(
    args: argparse.Namespace, dense: nn.Module, masked: nn.Module, test: Split
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, str]]:
    """Name -> the evaluation of each contestant, which gives predictions; and name -> its kind of arithmetic."""
    device, batch_size = test.images.device, default_batch_size(test.images.device)
    works = {"(a) reference loop": lambda: reference_predictions(masked, test)}
    kinds = {"(a) reference loop": usual_kind(device)}
    chosen = [kind for kind in ("fp32", "bf16") if args.precision in ("both", kind)]
    for compiling in (False, True)[: 1 + args.compile]:
        for kind in chosen:
            inference = inference_copy(dense, DTYPES[kind])
            refresh(inference, masked)
            network = compiled(inference, test, batch_size) if compiling else fused(inference, test)
            letter = "bcde"[2 * compiling + (kind == "bf16")]
            name = f"({letter}) ours, {kind}{', compiled' * compiling}"
            works[name] = lambda network=network: evaluate(network, test, batch_size).predictions
            kinds[name] = kind
    return works, kinds


def whole_sweep(args: argparse.Namespace, dense: nn.Module) -> dict[str, Any]:
    """Seconds of a sweep by pruning.py, by the clock and of this process, and those of evaluating and drawing."""
    spent: dict[str, tuple[float, float]] = {}

    def timed(part: str, function: Callable) -> Callable:
        def call(*given: Any, **named: Any) -> Any:
            before = time.perf_counter(), time.process_time()
            result = function(*given, **named)
            after, known = (time.perf_counter(), time.process_time()), spent.get(part, (0.0, 0.0))
            spent[part] = tuple(old + end - start for old, end, start in zip(known, after, before, strict=True))
            return result

        return call

    evaluator.evaluate, evaluator.evaluate_shared = (timed("evaluating", each) for each in (evaluate, evaluate_shared))
    accuracy.plot_all = timed("drawing", accuracy.plot_all)
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        path = Path(folder) / "network.pth"
        torch.save({"net": dense.state_dict(), "epoch": 0}, path)
        levels = ",".join(f"{100 * index / (args.levels - 1):.10g}" for index in range(args.levels))
        images = ["--dataset", "folder", "--data_dir", args.data_dir] if args.data_dir else ["--dataset", "synthetic"]
        images += ["--image_size", args.image_size, "--max_test_images", args.images]
        flags = ["--checkpoint", path, "--images_dir", folder, "--levels", levels, *images, "--device", args.device]
        flags += ["--precision", "auto" if args.precision == "both" else args.precision]
        flags += ["--compile", "on" if args.compile else "off"]
        assert timed("all", pruning.main)([str(flag) for flag in flags]) == 0
    return {"levels": args.levels} | {part: {"clock": both[0], "process": both[1]} for part, both in spent.items()}


def print_sweep(sweep: dict[str, Any], images: int) -> None:
    told = []
    for kind in ("clock", "process"):
        total = sweep["all"][kind] - sweep["drawing"][kind]
        outside = total - sweep["evaluating"][kind]
        told.append(f"{total:.1f} s, of which {outside:.1f} s ({100 * outside / total:.1f} %) outside evaluation")
    drawing = f"{sweep['drawing']['clock']:.1f} s and {sweep['drawing']['process']:.1f} s"
    print(
        f"a sweep of {sweep['levels']} levels of {images:,} images, without imports: by the clock {told[0]}; of the "
        f"processor {told[1]}; figures {drawing}"
    )


def main() -> None:
    args = parse_args()
    device, threads = set_up(args)
    dense = load_network(args.checkpoint)[1] if args.checkpoint else build(args).eval()
    masked = copy.deepcopy(dense)
    layers = prunable_layers(masked, torch.zeros(1, 3, args.image_size, args.image_size))
    masking = seconds(lambda: prune_l1_uniform(layers, LEVEL), torch.device("cpu"))
    dense, masked = dense.to(device), masked.to(device)
    images = torch.randint(0, 256, (args.images, 3, args.image_size, args.image_size), dtype=torch.uint8)
    test = Split(images, torch.zeros(args.images, dtype=torch.int64), *CIFAR10_STATISTICS).to(device)
    contestants, kinds = make_contestants(args, dense, masked, test)
    peaks = {kind: attainable(device, kind) for kind in dict.fromkeys(kinds.values())}
    predictions = {name: work() for name, work in contestants.items()}  # warm-up
    times = take_turns(contestants, args.repeats, device)
    peaks = {kind: max(peak, attainable(device, kind), key=lambda peak: peak.flops) for kind, peak in peaks.items()}

    print(f"{describe_machine(device)['device']}, {threads} threads, torch {torch.__version__}")
    print(
        f"{args.images} images in batches of {BATCH} (a) and {default_batch_size(device)} (others), "
        f"{100 * LEVEL:g} % pruned, median of {args.repeats}"
    )
    base = predictions["(a) reference loop"]
    alike = {name: 100 * float((found == base).float().mean()) for name, found in predictions.items()}
    remarks = {name: f", {share:.2f} % predicted alike" for name, share in alike.items()}
    figures = print_rates(times, args.images, forward_flops(dense, args.image_size), kinds, peaks, remarks)
    last = list(times)[-1]
    share = 100 * masking / (10_000 * statistics.median(times[last]) / args.images)
    print(f"masks of one level on the CPU: {masking:.2f} s, {share:.1f} % of a level of 10,000 images by {last}")
    sweep = whole_sweep(args, dense) if args.levels > 1 else None
    if sweep:
        print_sweep(sweep, args.images)
    write_figures(args.json, device, {"images": args.images, "contestants": figures, "sweep": sweep})


if __name__ == "__main__":
    main()
