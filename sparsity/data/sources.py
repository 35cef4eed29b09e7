"""Where images come from: CIFAR by torchvision, folders of images, and synthetic ones, loaded as a Split."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sparsity.data.images import CIFAR10_STATISTICS, CIFAR100_STATISTICS, Channels, Split
from sparsity.data.synthetic import SYNTHETIC_CLASSES, synthetic_images
from sparsity.system import processes
from sparsity.system.errors import UserError, one_line

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision
Pick = Callable[[Tensor], Tensor]  # from labels [N] to the numbers of the images that are wanted


@dataclass(frozen=True)
class Source:
    """Where images come from: a name of `flags.DATASETS`, the folder that holds them, the side in pixels."""

    dataset: str
    data_dir: Path
    image_size: int

    @property
    def name(self) -> str:
        """The first part of the names of outputs: the dataset, or the name of the folder."""
        return (self.data_dir.resolve().name or "folder") if self.dataset == "folder" else self.dataset


def load_split(
    source: Source, train: bool, statistics: tuple[Channels, Channels] | None = None, pick: Pick | None = None
) -> tuple[Split, list[str]]:
    """Load the training or the test images, on the CPU, and the names of the classes.

    `pick` chooses and orders the images; without it all come in the order of the source. `statistics` is the (mean,
    std) that a network was trained with; without it CIFAR has its constants, and the others are measured over the
    images loaded. Raises UserError with what to do.
    """
    if source.dataset == "folder":
        images, labels, classes = _load_folder(source, train, pick)
    else:
        images, labels, classes = (_load_synthetic if source.dataset == "synthetic" else _load_cifar)(source, train)
        if pick:
            chosen = pick(labels)
            images, labels = images[chosen], labels[chosen]
    constants = {"cifar10": CIFAR10_STATISTICS, "cifar100": CIFAR100_STATISTICS}
    return Split(images, labels, *(statistics or constants.get(source.dataset) or _measure(images))), classes


def _measure(images: Tensor) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel over all pixels, of images scaled to 0..1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = [channel.flatten().bincount(minlength=256).double() for channel in images.unbind(1)]
    means = [float(count @ values / count.sum()) for count in counts]
    variances = [float(n @ (values - mean).square() / n.sum()) for n, mean in zip(counts, means, strict=True)]
    return tuple(round(mean, 4) for mean in means), tuple(round(max(v**0.5, 1e-3), 4) for v in variances)


def _load_synthetic(source: Source, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    return *synthetic_images(source.image_size, train), list(SYNTHETIC_CLASSES)


def _load_cifar(source: Source, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    from torchvision import datasets  # here, as it takes a second and a half

    kind, root = datasets.CIFAR100 if source.dataset == "cifar100" else datasets.CIFAR10, source.data_dir
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
        from torchvision.transforms.v2 import functional as transforms

        print(f"{len(images)} images are resized from {images.shape[-1]} to {source.image_size} pixels")
        size = [source.image_size] * 2
        images = torch.cat([transforms.resize(chunk, size, antialias=True) for chunk in images.split(1000)])
    return images, torch.tensor(loaded.targets), loaded.classes


def _load_folder(source: Source, train: bool, pick: Pick | None) -> tuple[Tensor, Tensor, list[str]]:
    classes, others = (_class_folders(source.data_dir / name) for name in ("train", "test"))
    if differing := sorted({*classes} ^ {*others}):
        raise UserError(
            f"{source.data_dir}/train and test hold different classes ({', '.join(differing[:3])}); make them the same"
        )
    folder = source.data_dir / ("train" if train else "test")
    files = [_image_files(folder / name) for name in classes]
    if not all(files) or not files:
        empty = next((name for name, found in zip(classes, files, strict=True) if not found), "")
        raise UserError(f"{folder / empty} holds none ({' '.join(IMAGE_ENDINGS)}); every class folder needs images")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(found) for found in files]))
    paths = [path for found in files for path in found]
    if pick:
        chosen = pick(labels)
        paths, labels = [paths[number] for number in chosen.tolist()], labels[chosen]
    # PIL decodes outside of Python's lock, so threads help.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda path: read_image(path, source.image_size), paths, chunksize=64)
        silent = None if processes.first() else True  # where None, unless stderr is a terminal
        progress = tqdm(decoded, f"decoding {folder.name}", len(paths), unit="img", disable=silent, leave=False)
        images = np.empty((len(paths), source.image_size, source.image_size, 3), dtype=np.uint8)
        resized = 0
        for index, (image, was_resized) in enumerate(progress):
            images[index] = image
            resized += was_resized
    if resized:
        print(f"{resized} of {len(paths)} {folder.name} images were resized to {source.image_size} pixels")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, classes


def _class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted as torchvision does; hidden ones, as editors leave them, are no classes."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not there; --dataset folder reads train/CLASS/* and test/CLASS/* of --data_dir")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    """The image files below a class folder, in torchvision's order."""
    places = sorted(os.walk(folder, followlinks=True))
    files = (f"{place}/{name}" for place, _, names in places for name in sorted(names))
    return [path for path in files if path.lower().endswith(IMAGE_ENDINGS)]


def read_image(path: str, size: int) -> tuple[np.ndarray, bool]:
    """An image file as uint8 [size, size, 3], and whether it had to be resized; UserError where it is none."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise UserError(f"{path} is not a readable image ({one_line(error)}); mend or remove it") from error
    if image.size == (size, size):
        return np.asarray(image), False
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)), True
