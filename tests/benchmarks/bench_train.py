"""Time training steps of a ResNet-50: the usual float32 loop against ours, same images, same run.

    python tests/benchmarks/bench_train.py [--images 256] [--batch_size 128] [--repeats 3] [--compile] [--reference]

(a) is eager PyTorch in float32 and NCHW, on images that are normalised and augmented already. (b) is ours, with
augmentation, channels_last, and the precision of `--precision auto`; (c), with `--compile`, the same compiled.
(d), with `--reference`, is the reference study's loop: float32 without TF32, batches of 60, PIL images transformed in a
loader, and a second pass over the training images for their accuracy, whose time counts. They take turns, and medians
are compared. The share of the peak counts three times the operations of a forward pass an image.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[2]))

import timing

from sparsity.data.images import CIFAR10_STATISTICS, Split, normalise, training_batches
from sparsity.networks.inference import CompiledNetwork
from sparsity.networks.layers import memory_format
from sparsity.system import machine
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import make_optimizer

REFERENCE, REFERENCE_BATCH = "(d) reference, PIL, 2 passes", 60


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    timing.add_network_flags(parser, images=256)
    parser.add_argument("--batch_size", type=int, default=128, help="images a step of (a), (b) and (c) (%(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of ours (%(default)s)")
    parser.add_argument("--reference", action="store_true", help="the reference study's loop too")
    return parser.parse_args()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer("sgd", model, 0.01, 0.9, 5e-4)


def our_epoch(args: argparse.Namespace, model: nn.Module, split: Split, precision: str, compiling: bool) -> Callable:
    """One epoch of run.py's training of a copy of `model`, to be called."""
    ours = copy.deepcopy(model).to(split.labels.device, memory_format=memory_format(model))
    optimizer, dtype = optimizer_of(ours), machine.DTYPES[precision]
    step = CompiledNetwork(ours, args.batch_size) if compiling else ours
    batches = partial(training_batches, split, args.batch_size, 0, 1)
    return lambda: train_one_epoch(ours, batches(), optimizer, dtype, 1, forward=step)


def plain_epoch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """One pass of the loop that everybody writes first."""
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def usual_epoch(model: nn.Module, images: Tensor, labels: Tensor, optimizer, batch_size: int) -> None:
    """An epoch in float32 with torch's default for convolutions, of images that are ready."""
    with timing.float32_products(tf32=True):
        plain_epoch(model, zip(images.split(batch_size), labels.split(batch_size), strict=True), optimizer)


class PilImages(Dataset):
    """Images as torchvision's datasets hand them out: PIL, transformed one by one."""

    def __init__(self, split: Split):
        self.pixels, self.labels = split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels.tolist()
        crop, flip = transforms.RandomCrop(split.images.shape[-1], padding=4), transforms.RandomHorizontalFlip()
        normalised = transforms.Normalize(split.mean, split.std)
        self.transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalised])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def reference_epoch(model: nn.Module, loader: DataLoader, optimizer, device: torch.device) -> float:
    """One epoch of the reference study, with its second pass; returns the training accuracy in percent."""
    with timing.float32_products(tf32=False):
        plain_epoch(model, ((inputs.to(device), targets.to(device)) for inputs, targets in loader), optimizer)
        model.eval()
        with torch.no_grad():
            hits = (model(inputs.to(device)).argmax(dim=1) == targets.to(device) for inputs, targets in loader)
            correct = sum(int(hit.sum()) for hit in hits)
    return 100 * correct / len(loader.dataset)


def make_contestants(
    args: argparse.Namespace, split: Split, device: torch.device
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Name -> one epoch of each contestant, all from the same weights; and name -> its kind of arithmetic."""
    start, precision = timing.build(args), machine.resolve_precision(args.precision, device)
    on_device = split.to(device)
    ready = normalise(on_device.images, split.mean, split.std).contiguous()
    usual = copy.deepcopy(start).to(device)
    optimizer = optimizer_of(usual)
    works: dict[str, Callable[[], object]] = {}
    works["(a) float32, NCHW"] = lambda: usual_epoch(usual, ready, on_device.labels, optimizer, args.batch_size)
    kinds = {"(a) float32, NCHW": timing.usual_kind(device)}
    for letter, compiling in [("b", False), ("c", True)][: 1 + args.compile]:
        name = f"({letter}) ours, {precision}{', compiled' * compiling}"
        works[name], kinds[name] = our_epoch(args, start, on_device, precision, compiling), precision
    if args.reference:
        reference = copy.deepcopy(start).to(device)
        loader, theirs = DataLoader(PilImages(split), REFERENCE_BATCH, shuffle=True), optimizer_of(reference)
        works[REFERENCE], kinds[REFERENCE] = lambda: reference_epoch(reference, loader, theirs, device), "fp32"
    return works, kinds


def main() -> None:
    args = parse_args()
    device, threads = timing.set_up(args)
    images = torch.randint(0, 256, (args.images, 3, args.image_size, args.image_size), dtype=torch.uint8)
    split = Split(images, torch.arange(args.images) % 10, *CIFAR10_STATISTICS)
    contestants, kinds = make_contestants(args, split, device)
    peaks = {kind: timing.attainable(device, kind) for kind in dict.fromkeys(kinds.values())}
    first = {name: timing.seconds(work, device) for name, work in contestants.items()}  # warm-up, and compiling
    times = timing.take_turns(contestants, args.repeats, device)
    later = {kind: timing.attainable(device, kind) for kind in peaks}
    peaks = {kind: max(peak, later[kind], key=lambda peak: peak.flops) for kind, peak in peaks.items()}
    print(f"{machine.describe_machine(device)['device']}, {threads} threads, torch {torch.__version__}")
    images = f"{args.images} images of {args.image_size} pixels an epoch"
    batches = f"batches of {args.batch_size}" + f" ({REFERENCE_BATCH} in d)" * args.reference
    print(f"training {args.arch} of width {args.width}: {images}, in {batches}, median of {args.repeats}")
    remarks = {name: f"; first epoch {spent:.1f} s" for name, spent in first.items()}
    flops = 3 * timing.forward_flops(timing.build(args), args.image_size)
    figures = timing.print_rates(times, args.images, flops, kinds, peaks, remarks)
    figures = {name: figure | {"first_epoch_seconds": first[name]} for name, figure in figures.items()}
    about = {"images": args.images, "batch_size": args.batch_size, "contestants": figures}
    timing.write_figures(args.json, device, about)


if __name__ == "__main__":
    main()
