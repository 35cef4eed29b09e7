"""Image datasets as one uint8 tensor on the device: loading, a fixed order, augmentation and batches."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from sparsity.ranks import ALONE, Ranks, share
from sparsity.runtime import UserError, generator, one_line, tensor_hash
from sparsity.synthetic import SYNTHETIC_CLASSES, synthetic_images

PADDING = 4
Channels = tuple[float, float, float]

# The pair that the reference and most CIFAR-10 repositories use; its std is the mean of per-image deviations.
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100_STATISTICS = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

DATASETS = ("cifar10", "cifar100", "folder", "synthetic")


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


@dataclass(frozen=True)
class Source:
    """Where images come from: a name of DATASETS, the folder that holds them, the side in pixels to bring them to."""

    dataset: str
    data_dir: Path
    image_size: int

    @property
    def name(self) -> str:
        """What outputs are called after: the dataset, or the name of the folder."""
        return (self.data_dir.resolve().name or "folder") if self.dataset == "folder" else self.dataset


def default_image_size(dataset: str) -> int:
    """Side in pixels when none is given: 16 for the synthetic images, which keeps them quick, otherwise 32."""
    return 16 if dataset == "synthetic" else 32


def load_split(
    source: Source, train: bool, statistics: tuple[Channels, Channels] | None = None
) -> tuple[Split, list[str]]:
    """Load the training or the test images, on the CPU, and the names of the classes.

    `statistics` is the (mean, std) that a network was trained with; without it CIFAR has its constants, and the
    others are measured over the images loaded. Raises UserError with what to do.
    """
    load = {"cifar10": _load_cifar, "cifar100": _load_cifar, "folder": _load_folder, "synthetic": _load_synthetic}
    images, labels, classes = load[source.dataset](source, train)
    if statistics is None:
        constants = {"cifar10": CIFAR10_STATISTICS, "cifar100": CIFAR100_STATISTICS}
        statistics = constants.get(source.dataset) or _measure(images)
    return Split(images, labels, *statistics), classes


def class_balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A fixed order of all images in which any first part holds the classes as evenly as it can: indices [N].

    Each class is shuffled by `seed`; then one image of each class in turn, until the classes run out.
    """
    draw = generator(seed)
    shuffled = torch.randperm(len(labels), generator=draw)
    rank = rank_in_class(labels[shuffled])
    # Sorted by rank, then by class; both sorts are stable, so the order depends on nothing else.
    by_class = torch.argsort(labels[shuffled], stable=True)
    return shuffled[by_class[torch.argsort(rank[by_class], stable=True)]]


def rank_in_class(labels: Tensor) -> Tensor:
    """For each image, how many of its class come before it: [N]."""
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
    return rank


def normalise(images: Tensor, mean: Channels, std: Channels, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images [B, 3, H, W] as (x / 255 - mean) / std, computed in float32, channels_last, in `dtype`."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    floats = images.to(memory_format=torch.channels_last).float() * scale + shift
    return floats.to(dtype)


@lru_cache(maxsize=16)
def _scale_and_shift(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    """The constants of `normalise` on a device, which are sent there once, as the device is waited for meanwhile."""
    with torch.inference_mode(False):  # or, made first while evaluating, they could not be used in training
        scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, -1, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, -1, 1, 1)
    return scale, shift


def augment(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Random crop with padding 4 and horizontal flip of uint8 images [B, 3, H, W], each image by its own draw.

    `offsets` [B, 2] are the top and left corner of the crop in the padded image, 0 to 8; `flips` [B] is boolean. The
    padding is black (0 before normalisation), as in torchvision's RandomCrop followed by RandomHorizontalFlip.
    """
    batch, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (PADDING,) * 4)
    rows = offsets[:, 0, None].to(device) + torch.arange(height, device=device)  # [B, H]
    columns = torch.arange(width, device=device).expand(batch, width)
    columns = torch.where(flips[:, None].to(device), width - 1 - columns, columns) + offsets[:, 1, None].to(device)
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of `side` pixels in each of the normalised `images` [B, C, H, W] to 0, in place: the data's mean.

    `centres` [B, 2] are row and column, each in the image; what of a square sticks out is lost (DeVries and Taylor,
    arXiv 1708.04552).
    """
    inside = []
    for length, centre in zip(images.shape[-2:], centres.unbind(1), strict=True):
        first = centre[:, None] - side // 2
        pixels = torch.arange(length, device=images.device)
        inside.append((pixels >= first) & (pixels < first + side))  # [B, length]
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def training_batches(
    split: Split, batch_size: int, seed: int, epoch: int, cutout: int = 0, team: Ranks = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch: normalised, augmented images [B, 3, H, W] (float32, channels_last) and labels [B].

    Order, crops, flips and the squares of `cutout` pixels come from (seed, epoch) alone, so that a resumed run draws
    what an uninterrupted one does. They are drawn on the CPU, the same for every device, and sent there at once: a
    batch then waits for nothing. A last batch of a single image joins the one before it: BatchNorm cannot be trained on
    one value a channel.

    Of several processes each gets its part of the images of every batch (`ranks.share`), but all labels; a last batch
    of fewer than two images for each joins the one before it.
    """
    total = len(split)
    draw = generator(seed, epoch)
    order = torch.randperm(total, generator=draw)
    offsets = torch.randint(0, 2 * PADDING + 1, (total, 2), generator=draw)
    flips = torch.rand(total, generator=draw) < 0.5
    drawn = [order, offsets, flips]
    if cutout:  # drawn last, so that all else is the same with and without
        sides = split.images.shape[-2:]
        drawn.append(torch.stack([torch.randint(0, side, (total,), generator=draw) for side in sides], dim=1))
    order, offsets, flips, *centres = (tensor.to(split.labels.device) for tensor in drawn)
    starts = list(range(0, total, batch_size))
    if len(starts) > 1 and total - starts[-1] < 2 * team.size:
        starts.pop()
    for start, end in zip(starts, [*starts[1:], total], strict=True):
        begin, stop = (start + place for place in share(end - start, team.rank, team.size))
        images = augment(split.images[order[begin:stop]], offsets[begin:stop], flips[begin:stop])
        images = normalise(images, split.mean, split.std)
        if cutout:
            cut_out(images, centres[0][begin:stop], cutout)
        yield images, split.labels[order[start:end]]


def _measure(images: Tensor) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel over all pixels, of images scaled to 0..1."""
    sums = squares = torch.zeros(3, dtype=torch.float64)
    for chunk in images.split(1000):
        scaled = chunk.double() / 255
        sums, squares = sums + scaled.sum(dim=(0, 2, 3)), squares + scaled.square().sum(dim=(0, 2, 3))
    count = images.numel() / 3
    mean = sums / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


def _load_synthetic(source: Source, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    images, labels = synthetic_images(source.image_size, train)
    return images, labels, list(SYNTHETIC_CLASSES)


def _load_cifar(source: Source, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[source.dataset]
    root = source.data_dir
    try:
        root.mkdir(parents=True, exist_ok=True)
        loaded = kind(root, train=train, download=True)
    except (OSError, RuntimeError, EOFError) as error:  # no network, a damaged archive, a folder that is read-only
        raise UserError(
            f"{source.dataset} is not in {root} and could not be downloaded ({one_line(error)}): put the archive "
            f"{kind.filename} (md5 {kind.tgz_md5}) into {root} by hand, or use --dataset synthetic"
        ) from error
    images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    if images.shape[-1] != source.image_size:
        print(f"{len(images)} images are resized from {images.shape[-1]} to {source.image_size} pixels")
        size = [source.image_size] * 2
        images = torch.cat([transforms.resize(chunk, size, antialias=True) for chunk in images.split(1000)])
    return images, torch.tensor(loaded.targets), loaded.classes


def _load_folder(source: Source, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    for name in ("train", "test"):
        if not (source.data_dir / name).is_dir():
            raise UserError(
                f"{source.data_dir / name} is not there; --dataset folder reads train/<class>/* and test/<class>/* "
                "below --data_dir"
            )
    wanted, other = ("train", "test") if train else ("test", "train")
    found = _image_folder(source.data_dir / wanted)
    classes = _visible_folders(source.data_dir / other)
    if differing := sorted(set(found.classes) ^ set(classes)):
        raise UserError(
            f"{source.data_dir}/train and test hold different classes ({', '.join(differing[:3])}); make them the same"
        )
    paths = [path for path, _ in found.samples]
    # PIL decodes outside of Python's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda path: _decode(path, source.image_size), paths, chunksize=64)
        progress = tqdm(decoded, f"decoding {wanted}", len(paths), unit="img", disable=None, leave=False)
        images = np.empty((len(paths), source.image_size, source.image_size, 3), dtype=np.uint8)
        resized = 0
        for index, (image, was_resized) in enumerate(progress):
            images[index] = image
            resized += was_resized
    if resized:
        print(f"{resized} of {len(paths)} {wanted} images were resized to {source.image_size} pixels")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets), found.classes


class _VisibleFolders(datasets.ImageFolder):
    """An ImageFolder that takes no class from hidden folders, as editors leave them."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = _visible_folders(Path(directory))
        return names, {name: index for index, name in enumerate(names)}


def _visible_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted as torchvision does."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in (folder.resolve().parent.name, *names):
        if not name.isprintable():  # control characters, and bytes that are not UTF-8
            raise UserError(f"the folder name {name!r} in {str(folder)!r} cannot be printed; rename it")
    return names


def _image_folder(folder: Path) -> datasets.ImageFolder:
    try:
        return _VisibleFolders(str(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({one_line(error)}); every class folder needs images") from error


def _decode(path: str, size: int) -> tuple[np.ndarray, bool]:
    """One image as uint8 [size, size, 3], and whether it had to be resized."""
    try:
        image = datasets.folder.default_loader(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise UserError(f"{path} is not a readable image ({one_line(error)}); mend or remove it") from error
    if image.size == (size, size):
        return np.asarray(image), False
    return np.asarray(transforms.resize(image, [size, size], antialias=True)), True
