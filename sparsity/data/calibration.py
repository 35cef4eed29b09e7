"""Calibration images: drawn from the training split, for criteria and recoveries."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsity.data.images import PADDING, Split, augment, batch_bounds, class_balanced_order, normalise
from sparsity.system.machine import generator

CALIBRATION_BATCH = 128  # BatchNorm is re-estimated on batches of the size that it is usually trained with
POSITION_LIMIT = 32_768  # positions that stand for all of a layer's; seeded, the same number from every image


@dataclass(frozen=True)
class Calibration:
    """Images of the training split, augmented once as in training and then the same for every level.

    `images` holds them as uint8 on the device; their labels served to draw the same number of each class, and only the
    criterion `gradient` reads them again. Networks compute in `dtype`.
    """

    images: Split
    dtype: torch.dtype = torch.float32
    batch_size: int = CALIBRATION_BATCH
    position_limit: int = POSITION_LIMIT
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, dtype: torch.dtype | None = None, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [B, C, H, W] and labels [B]; type and size by default those of the calibration."""
        for start, end in batch_bounds(len(self), batch_size or self.batch_size):
            pixels, labels = self.images.images[start:end], self.images.labels[start:end]
            yield normalise(pixels, self.images.mean, self.images.std, dtype or self.dtype), labels


def draw_calibration(train: Split, count: int, seed: int, device: torch.device, dtype: torch.dtype) -> Calibration:
    """The first `count` images of a class-balanced order of the training split, drawn and augmented by `seed`."""
    chosen = train.take(class_balanced_order(train.labels, seed)[:count])
    draw = generator(seed, count)
    offsets = torch.randint(0, 2 * PADDING + 1, (len(chosen), 2), generator=draw)
    flips = torch.rand(len(chosen), generator=draw) < 0.5
    images = Split(augment(chosen.images, offsets, flips), chosen.labels, chosen.mean, chosen.std)
    return Calibration(images.to(device), dtype, seed=seed)
