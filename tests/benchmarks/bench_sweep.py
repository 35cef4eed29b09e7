"""Time the evaluation of a pruned ResNet-50: the reference's loop against ours, same images, same checkpoint, one run.

    python tests/benchmarks/bench_sweep.py [--checkpoint FILE] [--images 512] [--repeats 3]

(a) is the loop of the reference study: masks as hooks, BatchNorm apart, float32, NCHW, batches of 128. (b) and (c) are
the inference copy of `sparsity.evaluation` in float32 and in bfloat16. The three take turns, and medians are compared.
Without a checkpoint the network is untrained, which costs the same time; agreement is then of no meaning.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import print_rates, seconds, take_turns

import Build_Resnet
from sparsity import checkpoint, runtime
from sparsity.data import CIFAR10_STATISTICS, Split, normalise
from sparsity.evaluation import default_batch_size, evaluate, inference_copy, refresh
from sparsity.flags import apply_threads
from sparsity.masks import prunable_layers, prune_l1_uniform

BATCH = 128
LEVEL = 0.4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a ResNet for 32x32 images (an untrained ResNet-50)")
    parser.add_argument("--images", type=int, default=512, help="random images, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    return parser.parse_args()


@torch.no_grad()
def reference_predictions(model: nn.Module, test: Split) -> torch.Tensor:
    """The reference's evaluation loop: the masked network as it is, float32, NCHW."""
    predicted = []
    for start in range(0, len(test), BATCH):
        images = normalise(test.images[start : start + BATCH], test.mean, test.std).contiguous()
        predicted.append(model(images).argmax(dim=1))
    return torch.cat(predicted).cpu()


def main() -> None:
    args = parse_args()
    device = runtime.resolve_device(args.device)
    threads = apply_threads(args.threads)
    torch.manual_seed(0)
    if args.checkpoint:
        saved = checkpoint.load(args.checkpoint)
        dense = checkpoint.restore(saved, Build_Resnet.build, Build_Resnet.spec_of)
    else:
        dense = Build_Resnet.resnet50().eval()
    masked = copy.deepcopy(dense)
    layers = prunable_layers(masked, torch.zeros(1, 3, 32, 32))
    masking = seconds(lambda: prune_l1_uniform(layers, LEVEL), torch.device("cpu"))
    dense, masked = dense.to(device), masked.to(device)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8)
    test = Split(images, torch.zeros(args.images, dtype=torch.int64), *CIFAR10_STATISTICS).to(device)
    batch_size = default_batch_size(device)
    copies = {name: inference_copy(dense, runtime.dtype_of(name)) for name in ("fp32", "bf16")}
    for inference in copies.values():
        refresh(inference, masked)

    contestants = {"(a) reference loop": lambda: reference_predictions(masked, test)}
    for letter, (name, inference) in zip("bc", copies.items(), strict=True):
        contestants[f"({letter}) ours, {name}"] = lambda network=inference: (
            evaluate(network, test, batch_size).predictions
        )
    predictions = {name: work() for name, work in contestants.items()}  # warm-up
    times = take_turns(contestants, args.repeats, device)

    print(f"{runtime.machine(device)['device']}, {threads} threads, torch {torch.__version__}")
    print(
        f"{args.images} images in batches of {BATCH} (a) and {batch_size} (b, c), {100 * LEVEL:g} % pruned, "
        f"median of {args.repeats}"
    )
    base = predictions["(a) reference loop"]
    alike = {name: 100 * float((found == base).float().mean()) for name, found in predictions.items()}
    print_rates(times, args.images, {name: f", {share:.2f} % predicted alike" for name, share in alike.items()})
    share = 100 * masking / (10_000 * statistics.median(times["(c) ours, bf16"]) / args.images)
    print(f"masks of one level: {masking:.2f} s, {share:.1f} % of a level of 10,000 images in bf16")


if __name__ == "__main__":
    main()
