"""Time the evaluation of a pruned ResNet-50: the reference's loop against ours, same images, same checkpoint, one run.

    python tests/benchmarks/bench_sweep.py [--checkpoint FILE] [--images 512] [--repeats 3] [--compile] [--levels 3]

(a) is the loop of the reference study: masks as hooks, BatchNorm apart, float32, NCHW, batches of 128. (b) and (c) are
the inference copy of `sparsity/networks` in float32 and in bfloat16; (d) and (e), with `--compile`, these two through
`torch.compile`. They take turns, and medians are compared. Without a checkpoint the network is untrained, which costs
the same time; agreement is then of no meaning.

Afterwards whole levels of l1 uniform, spread over 0 to 100 %, as pruning.py makes them: prune, count, refresh,
evaluate, in the precision that `--precision auto` takes on this machine, compiled where `--compile` is given. Files are
not part of it.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
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

from sparsity.data.images import CIFAR10_STATISTICS, Split, normalise
from sparsity.networks.census import census
from sparsity.networks.evaluation import default_batch_size, evaluate
from sparsity.networks.families import load_network
from sparsity.networks.inference import compiled, inference_copy, refresh
from sparsity.networks.layers import positions_per_image, prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import Pruner
from sparsity.system.machine import DTYPES, describe_machine, resolve_precision
from sparsity.system.methods import Curve

BATCH = 128
LEVEL = 0.4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a network for images of --image_size (an untrained one)")
    add_network_flags(parser, images=512)
    parser.add_argument("--precision", choices=("both", "fp32", "bf16"), default="both", help="of ours (%(default)s)")
    parser.add_argument("--levels", type=int, default=3, help="whole levels at the end (%(default)s)")
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
            network = compiled(inference, test, batch_size) if compiling else inference
            letter = "bcde"[2 * compiling + (kind == "bf16")]
            name = f"({letter}) ours, {kind}{', compiled' * compiling}"
            works[name] = lambda network=network: evaluate(network, test, batch_size).predictions
            kinds[name] = kind
    return works, kinds


def whole_levels(args: argparse.Namespace, dense: nn.Module, test: Split) -> dict[str, Any]:
    """Seconds of `--levels` levels, and how many of them were not evaluation."""
    device = test.images.device
    precision = args.precision if args.precision != "both" else resolve_precision("auto", device)
    batch_size = default_batch_size(device)
    example = torch.zeros(1, 3, args.image_size, args.image_size, device=device)
    names, positions = list(prunable_layers(dense, example)), positions_per_image(dense, example)
    inference = inference_copy(dense, DTYPES[precision])
    networks: list[nn.Module] = [inference]
    compiling = seconds(lambda: networks.append(compiled(inference, test, batch_size)), device) if args.compile else 0.0
    evaluate(networks[-1], test.take(torch.arange(min(batch_size, len(test)))), batch_size)  # warm-up
    evaluating: list[float] = []

    def levels() -> None:
        pruner = Pruner(dense, names, None, 0)
        for index in range(args.levels):
            model, _ = pruner.prune(Curve("l1", "uniform", "none"), 100 * index / max(1, args.levels - 1))
            layers = {name: model.get_submodule(name) for name in names}
            census(model, layers, positions)
            refresh(inference, model)
            evaluating.append(seconds(lambda: evaluate(networks[-1], test, batch_size), device))

    total = seconds(levels, device)
    return {
        "levels": args.levels,
        "precision": precision,
        "seconds": total,
        "seconds_outside_evaluation": total - sum(evaluating),
        "seconds_of_compiling": compiling,
    }


def print_levels(levels: dict[str, Any], images: int) -> None:
    total, outside = levels["seconds"], levels["seconds_outside_evaluation"]
    print(
        f"{levels['levels']} whole levels of {images:,} images in {levels['precision']}: {total:.2f} s, of which "
        f"{outside:.2f} s outside evaluation ({100 * outside / total:.1f} %); compiling before them "
        f"{levels['seconds_of_compiling']:.1f} s"
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
    levels = whole_levels(args, dense, test) if args.levels else None
    if levels:
        print_levels(levels, args.images)
    write_figures(args.json, device, {"images": args.images, "contestants": figures, "whole_levels": levels})


if __name__ == "__main__":
    main()
