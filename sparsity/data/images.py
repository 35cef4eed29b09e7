"""Images as one uint8 tensor on the device: a fixed order, augmentation and batches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity.system.machine import generator, tensor_hash
from sparsity.system.processes import share

SHIFT = 4  # pixels, of random shifts in the reference
Channels = tuple[float, float, float]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The pair that the reference and most CIFAR-10 repositories use; its std is the mean of per-image deviations.
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True)
class Split:
    """`images` [N, 3, H, W] uint8 and `labels` [N] int64 on one device; `mean`, `std` a channel, of images in 0..1."""

    images: Tensor
    labels: Tensor
    mean: Channels
    std: Channels

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """The images at `indices`, in that order."""
        indices = indices.to(self.labels.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device) -> "Split":
        """The same images on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def hash(self) -> str:
        """SHA-256 over images and labels in their order."""
        return tensor_hash(self.images, self.labels)


def class_balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A fixed order of all images in which any first part holds the classes as evenly as it can: indices [N].

    Each class is shuffled by `seed`; then one image of each class in turn, until the classes run out.
    """
    shuffled = torch.randperm(len(labels), generator=generator(seed))
    # Both sorts are stable, so that the order depends on nothing else.
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts  # where each class begins
    rank = torch.arange(len(labels)) - first[labels[by_class]]
    return by_class[torch.argsort(rank, stable=True)]


def normalise(images: Tensor, mean: Channels, std: Channels, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images [B, 3, H, W] as (x / 255 - mean) / std, computed in float32, channels_last, in `dtype`."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    floats = images.to(memory_format=torch.channels_last).float() * scale + shift
    return floats.to(dtype)


@lru_cache(maxsize=16)
def _scale_and_shift(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """The constants of `normalise` on a device, sent there once, because sending waits for the device."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, -1, 1, 1)
    return scale, shift


def augment(images: Tensor, offsets: Tensor, flips: Tensor, shift: int = SHIFT, border: str = "zeros") -> Tensor:
    """Random crop after a border of `shift` pixels, and horizontal flip, of uint8 images [B, 3, H, W].

    `offsets` [B, 2] are the top and left corner of each crop in the image with its border, 0 to 2 * `shift`; `flips`
    [B] is boolean. The border is black (`border` "zeros", before normalisation) or mirrors the image ("reflect", for a
    `shift` below its side), as in torchvision's RandomCrop followed by RandomHorizontalFlip.
    """
    offsets, flips = offsets.to(images.device), flips.to(images.device)
    image, channel, row, column = (torch.arange(size, device=images.device) for size in images.shape)
    rows = offsets[:, 0, None] + row  # [B, H]
    columns = offsets[:, 1, None] + torch.where(flips[:, None], len(column) - 1 - column, column)  # [B, W]
    if border == "reflect":
        rows, columns = _mirrored(rows - shift, len(row)), _mirrored(columns - shift, len(column))
    else:
        images = F.pad(images, (shift,) * 4)
    return images[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def _mirrored(places: Tensor, side: int) -> Tensor:
    """The places inside an image of `side` pixels that places less than a side beyond its edges mirror."""
    places = places.abs()
    return torch.where(places < side, places, 2 * (side - 1) - places)


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of `side` pixels in each of the normalised `images` [B, C, H, W] to 0, in place: the data's mean.

    `centres` [B, 2] are row and column of pixels of the image; squares are clipped at its border (arXiv 1708.04552).
    """
    inside = []
    for length, centre in zip(images.shape[-2:], centres.unbind(1), strict=True):
        first = centre[:, None] - side // 2
        pixels = torch.arange(length, device=images.device)
        inside.append((pixels >= first) & (pixels < first + side))  # [B, length]
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def batch_bounds(total: int, batch_size: int, least: int = 2) -> list[tuple[int, int]]:
    """Begin and end of each batch; a last one of fewer than `least` images, too few for BatchNorm, joins another."""
    starts = list(range(0, total, batch_size))
    if len(starts) > 1 and total - starts[-1] < least:
        starts.pop()
    return list(zip(starts, [*starts[1:], total], strict=True))


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    cutout: int = 0,
    part: tuple[int, int] = (0, 1),
    shift: int = SHIFT,
    border: str = "zeros",
    size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: normalised, augmented images [B, 3, H, W] (float32, channels_last) and labels [B].

    Order, crops, flips and the squares of `cutout` pixels come from (seed, epoch) alone, so that a resumed run draws
    the same as an undisturbed one. They are drawn on the CPU, the same for every device, and sent there at once. For
    `part`, (rank, number of processes), images are that part of each batch, labels all of it. A last batch of fewer
    than two images a process joins the one before it. `shift` and `border` are those of `augment`. With a `size` other
    than their own, images are resized to it after all else (bilinear, antialiased).
    """
    total = len(split)
    draw = generator(seed, epoch)
    order = torch.randperm(total, generator=draw)
    offsets = torch.randint(0, 2 * shift + 1, (total, 2), generator=draw)
    flips = torch.rand(total, generator=draw) < 0.5
    drawn = [order, offsets, flips]
    if cutout:  # drawn last, so that all else is the same with and without
        sides = split.images.shape[-2:]
        drawn.append(torch.stack([torch.randint(0, side, (total,), generator=draw) for side in sides], dim=1))
    order, offsets, flips, *centres = (tensor.to(split.labels.device) for tensor in drawn)
    for start, end in batch_bounds(total, batch_size, 2 * part[1]):
        begin, stop = (start + place for place in share(end - start, part))
        images = augment(split.images[order[begin:stop]], offsets[begin:stop], flips[begin:stop], shift, border)
        images = normalise(images, split.mean, split.std)
        if cutout:
            cut_out(images, centres[0][begin:stop], cutout)
        if size and size != images.shape[-1]:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        yield images, split.labels[order[start:end]]
