"""Calibration images: drawn from the training split, augmented as in training, for criteria and recoveries."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.data.images import SHIFT, Split, augment, batch_bounds, class_balanced_order, normalise
from sparsity.system.machine import generator

CALIBRATION_BATCH = 128  # BatchNorm is re-estimated on batches of the size that it is usually trained with
POSITION_LIMIT = 32_768  # positions that stand for all of a layer's; seeded, the same number from every image


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a training: shifts of up to `shift` pixels with a `border`, "zeros" or "reflect"; flips."""

    shift: int = SHIFT
    border: str = "zeros"
    flip: bool = True

    def __str__(self) -> str:
        shifts = f"{self.border} {self.shift}" if self.shift else ""
        return ", ".join(filter(None, ("flips" if self.flip else "", shifts))) or "none"

    def __call__(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Augmented copies of uint8 images [B, 3, H, W]; offsets and flips are drawn from `draw`, on the CPU."""
        offsets = torch.randint(0, 2 * self.shift + 1, (len(images), 2), generator=draw)
        flips = (torch.rand(len(images), generator=draw) < 0.5) & self.flip
        return augment(images, offsets, flips, self.shift, self.border)


# Where a checkpoint does not tell its augmentation, the one that fits its BatchNorm statistics best is taken.
AUGMENTATIONS = (
    Augmentation(0, flip=False),
    Augmentation(0),
    *(Augmentation(shift, border) for border in ("zeros", "reflect") for shift in (2, 3, 4)),
)


@dataclass(frozen=True)
class Calibration:
    """Images of the training split, augmented once as in training and then the same for every level.

    `images` holds them as uint8 on the device; their labels served to draw the same number of each class, and only the
    criterion `gradient` reads them again. Networks compute in `dtype`. `augmentation` is that of `images`, for
    recoveries that augment images anew.
    """

    images: Split
    dtype: torch.dtype = torch.float32
    batch_size: int = CALIBRATION_BATCH
    position_limit: int = POSITION_LIMIT
    seed: int = 0
    augmentation: Augmentation = Augmentation()

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, dtype: torch.dtype | None = None, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, C, H, W] and labels [B]; type and size by default those of the calibration."""
        for start, end in batch_bounds(len(self), batch_size or self.batch_size):
            pixels, labels = self.images.images[start:end], self.images.labels[start:end]
            yield normalise(pixels, self.images.mean, self.images.std, dtype or self.dtype), labels


def draw_calibration(
    train: Split,
    count: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    augmentation: Augmentation = Augmentation(),
) -> Calibration:
    """The first `count` images of a class-balanced order of the training split, drawn and augmented by `seed`."""
    chosen = train.take(class_balanced_order(train.labels, seed)[:count])
    images = Split(augmentation(chosen.images, generator(seed, count)), chosen.labels, chosen.mean, chosen.std)
    return Calibration(images.to(device), dtype, seed=seed, augmentation=augmentation)


def augmented_batches(
    split: Split, augmentation: Augmentation, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch over `split`, augmented anew: normalised images [B, C, H, W] in float32, labels [B].

    Order, crops and flips come from (seed, epoch) alone.
    """
    draw = generator(seed, epoch)
    order = torch.randperm(len(split), generator=draw).to(split.labels.device)
    for start, end in batch_bounds(len(split), batch_size):
        chosen = split.take(order[start:end])
        yield normalise(augmentation(chosen.images, draw), split.mean, split.std), chosen.labels
