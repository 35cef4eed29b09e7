"""Learning rate and image size in the course of a training, as plain numbers; torch-free."""

import math


def cosine_factor(epoch: int, t_max: int, warmup: int = 0) -> float:
    """The share of the highest learning rate in `epoch` (from 0): a half cosine down in `t_max` epochs, up in the next.

    Before it come `warmup` epochs at 1, 2, ... of warmup + 1 parts.
    """
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (epoch - warmup) / t_max)) / 2


def linear_factor(place: float, warmup_share: float) -> float:
    """The share of the highest learning rate at `place` of a training, from 0 (its start) to 1 (its end) and beyond.

    It rises linearly from 0 over the first `warmup_share` of the training, then falls linearly to 0.
    """
    if place < warmup_share:
        return place / warmup_share
    return max(0.0, (1 - place) / (1 - warmup_share))


def image_sizes(start_size: int, image_size: int, epochs: int) -> list[int]:
    """The side in pixels of the training images in each of `epochs`: progressive resizing in steps of 4 pixels.

    From `start_size` (0: always `image_size`) it grows over the first 60 % of the epochs, equally long at each size,
    to `image_size`, at which at least the last epoch trains.
    """
    smaller = list(range(start_size, image_size, 4)) if start_size else []
    stages = [epoch * len(smaller) * 5 // (3 * epochs) for epoch in range(epochs - 1)]
    return [*(smaller[stage] if stage < len(smaller) else image_size for stage in stages), image_size]
