"""Time training steps of a ResNet-50: the usual float32 loop against ours, same images, same run.

    python tests/benchmarks/bench_train.py [--images 256] [--repeats 3]

(a) is eager PyTorch in float32 and NCHW, on images that are normalised and augmented already. (b) is
`sparsity.training` with augmentation, channels_last, and the precision that `--precision auto` takes on this machine.
The two take turns, and medians are compared.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import print_rates, take_turns

import Build_Resnet
from sparsity import runtime
from sparsity.data import CIFAR10_STATISTICS, Split, normalise, training_batches
from sparsity.flags import apply_threads
from sparsity.training import make_optimizer, train_one_epoch

BATCH = 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="images an epoch, a multiple of 128")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each contestant; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--precision", default="auto", help="of ours: auto, fp32, bf16")
    return parser.parse_args()


def usual_epoch(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer) -> None:
    """One pass of the loop that everybody writes first."""
    model.train()
    for inputs, targets in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()


def main() -> None:
    args = parse_args()
    device = runtime.resolve_device(args.device)
    precision = runtime.resolve_precision(args.precision, device)
    threads = apply_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.arange(args.images) % 10, *CIFAR10_STATISTICS).to(device)
    ready = normalise(split.images, split.mean, split.std).contiguous()
    usual = Build_Resnet.resnet50().to(device)
    ours = Build_Resnet.resnet50().to(device, memory_format=torch.channels_last)
    optimizers = [make_optimizer("sgd", model, 0.01, 0.9, 5e-4) for model in (usual, ours)]
    dtype = runtime.dtype_of(precision)
    contestants = {
        "(a) float32, NCHW": lambda: usual_epoch(usual, ready, split.labels, optimizers[0]),
        f"(b) ours, {precision}": lambda: train_one_epoch(
            ours, training_batches(split, BATCH, 0, 1), optimizers[1], dtype, 1
        ),
    }
    for work in contestants.values():
        work()  # warm-up
    times = take_turns(contestants, args.repeats, device)

    print(f"{runtime.machine(device)['device']}, {threads} threads, torch {torch.__version__}")
    print(f"{args.images} images of 32 pixels in batches of {BATCH}, median of {args.repeats}")
    print_rates(times, args.images)


if __name__ == "__main__":
    main()
