"""Where images come from: CIFAR by torchvision, folders of images, and synthetic ones, loaded as a Split."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from sparsity.data.images import CIFAR10_STATISTICS, CIFAR100_STATISTICS, Channels, Split
from sparsity.data.synthetic import SYNTHETIC_CLASSES, synthetic_images
from sparsity.system.errors import UserError, one_line

DATASETS = ("cifar10", "cifar100", "folder", "synthetic")


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
