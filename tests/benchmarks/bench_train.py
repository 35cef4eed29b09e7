"""Time training steps of a ResNet-50: the usual float32 loop against ours, same images, same run.

    python tests/benchmarks/bench_train.py [--images 256] [--batch_size 128] [--repeats 3] [--compile] [--reference]

(a) is eager PyTorch in float32 and NCHW, on images that are normalised and augmented already. (b) is
`sparsity.training` with augmentation, channels_last, and the precision that `--precision auto` takes on this machine;
(c), with `--compile`, the same compiled, as by `--compile on` of run.py. (d), with `--reference`, is the loop of the
reference study: float32 without TF32, batches of 60, PIL images transformed in a loader without workers, and a second
pass over the training images for their accuracy, whose time counts. They take turns, and medians are compared. The
share of the peak counts three times the operations of a forward pass for each training image, whatever else is done.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

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

from sparsity.data.images import CIFAR10_STATISTICS, Split, normalise, training_batches
from sparsity.networks.layers import memory_format
from sparsity.system import machine
from sparsity.training.epoch import step_function, train_one_epoch
from sparsity.training.optimizer import make_optimizer

REFERENCE_BATCH = 60


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_network_flags(parser, images=256)
    parser.add_argument("--batch_size", type=int, default=128, help="images a step of (a), (b) and (c) (%(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of ours (%(default)s)")
    parser.add_argument("--reference", action="store_true", help="the reference study's loop too")
    return parser.parse_args()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer("sgd", model, 0.01, 0.9, 5e-4)


def usual_epoch(model: nn.Module, images: Tensor, labels: Tensor, optimizer, batch_size: int) -> None:
    """One pass of the loop that everybody writes first."""
    model.train()
    with float32_products(tf32=True):  # torch's default for convolutions
        for inputs, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()


class PilImages(Dataset):
    """Images as torchvision's datasets hand them out: PIL, transformed one by one."""

    def __init__(self, split: Split):
        self.pixels, self.labels = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(split.images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(split.mean, split.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def reference_epoch(model: nn.Module, loader: DataLoader, optimizer, device: torch.device) -> float:
    """One epoch of the reference study, with its second pass; returns the training accuracy in percent."""
    with float32_products(tf32=False):
        model.train()
        for inputs, targets in loader:
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for inputs, targets in loader:
                correct += int((model(inputs.to(device)).argmax(dim=1) == targets.to(device)).sum())
    return 100 * correct / len(loader.dataset)


def make_contestants(
    args: argparse.Namespace, split: Split, device: torch.device
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Name -> one epoch of each contestant, all from the same weights; and name -> its kind of arithmetic."""
    start, precision = build(args), machine.resolve_precision(args.precision, device)
    on_device = split.to(device)
    ready = normalise(on_device.images, split.mean, split.std).contiguous()
    usual = copy.deepcopy(start).to(device)
    optimizer = optimizer_of(usual)
    name = "(a) float32, NCHW"
    works: dict[str, Callable[[], object]] = {
        name: lambda: usual_epoch(usual, ready, on_device.labels, optimizer, args.batch_size)
    }
    kinds = {name: usual_kind(device)}
    for letter, compiling in [("b", False), ("c", True)][: 1 + args.compile]:
        ours = copy.deepcopy(start).to(device, memory_format=memory_format(start))
        mine, step = optimizer_of(ours), step_function(ours, compiling, args.batch_size)
        name = f"({letter}) ours, {precision}{', compiled' * compiling}"
        kinds[name] = precision
        works[name] = lambda model=ours, step=step, optimizer=mine: train_one_epoch(
            model,
            training_batches(on_device, args.batch_size, 0, 1),
            optimizer,
            machine.dtype_of(precision),
            1,
            forward=step,
        )
    if args.reference:
        reference = copy.deepcopy(start).to(device)
        loader, theirs = DataLoader(PilImages(split), REFERENCE_BATCH, shuffle=True), optimizer_of(reference)
        works["(d) reference, PIL, 2 passes"] = lambda: reference_epoch(reference, loader, theirs, device)
        kinds["(d) reference, PIL, 2 passes"] = "fp32"
    return works, kinds


def main() -> None:
    args = parse_args()
    device, threads = set_up(args)
    images = torch.randint(0, 256, (args.images, 3, args.image_size, args.image_size), dtype=torch.uint8)
    split = Split(images, torch.arange(args.images) % 10, *CIFAR10_STATISTICS)
    contestants, kinds = make_contestants(args, split, device)
    peaks = {kind: attainable(device, kind) for kind in dict.fromkeys(kinds.values())}
    first = {name: seconds(work, device) for name, work in contestants.items()}  # warm-up, and compiling
    times = take_turns(contestants, args.repeats, device)
    peaks = {kind: max(peak, attainable(device, kind), key=lambda peak: peak.flops) for kind, peak in peaks.items()}

    print(f"{machine.machine(device)['device']}, {threads} threads, torch {torch.__version__}")
    batches = f"{args.batch_size}" + f" ({REFERENCE_BATCH} in d)" * args.reference
    print(
        f"training {args.arch} of width {args.width}: {args.images} images of {args.image_size} pixels an epoch, in "
        f"batches of {batches}, median of {args.repeats}"
    )
    remarks = {name: f"; first epoch {spent:.1f} s" for name, spent in first.items()}
    figures = print_rates(times, args.images, 3 * forward_flops(build(args), args.image_size), kinds, peaks, remarks)
    for name, spent in first.items():
        figures[name]["first_epoch_seconds"] = spent
    write_figures(args.json, device, {"images": args.images, "batch_size": args.batch_size, "contestants": figures})


if __name__ == "__main__":
    main()
