"""Ten classes of small colour images, drawn from a seed: two shapes in five textures.

They stand in for a real dataset where there is none. Position, size, rotation, colours, phase of the texture, clutter
behind the shape, lighting and noise vary from image to image; the colour is a hint at the class and no more.
"""

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from sparsity.system.machine import derived_seed

SHAPES = ("disc", "cross")
TEXTURES = ("plain", "upright", "level", "checkered", "hollow")  # of stripes: upright, level
SYNTHETIC_CLASSES = [f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES]


def synthetic_images(size: int, train: bool) -> tuple[Tensor, Tensor]:
    """Draw the 4,000 images of the training or the 1,000 of the test split, of `size` pixels a side.

    Returns uint8 images [N, 3, size, size] and int64 labels [N] of SYNTHETIC_CLASSES, each class equally often. The
    same arguments give the same images; the two splits share none.
    """
    count = 4000 if train else 1000
    draw = np.random.default_rng(derived_seed(0, int(train), size))
    labels = np.arange(count) % len(SYNTHETIC_CLASSES)
    images = np.concatenate([_draw_images(draw, part, size) for part in np.array_split(labels, -(-count // 500))])
    return torch.from_numpy(images), torch.from_numpy(labels)


def _draw_images(draw: np.random.Generator, labels: ndarray, size: int) -> ndarray:
    """uint8 images [n, 3, size, size], one for each label."""
    n = len(labels)
    axis = (np.arange(size) + 0.5) / size * 2 - 1  # pixel centres in -1..1
    y, x = axis[None, :, None], axis[None, None, :]  # [1, size, 1], [1, 1, size]
    canvas = np.empty((n, 3, size, size))
    canvas[:] = _colours(draw, draw.uniform(0, 1, n), 0.05, 0.35)[:, :, None, None]
    for _ in range(3):  # clutter: small dots behind the shape
        centre, radius = draw.uniform(-1, 1, (2, n, 1, 1)), draw.uniform(0.08, 0.2, (n, 1, 1))
        dot_colour = draw.uniform(0, 0.8, (n, 3, 1, 1))
        _paint(canvas, np.hypot(x - centre[0], y - centre[1]) - radius, dot_colour)

    centre, angle = draw.uniform(-0.3, 0.3, (2, n, 1, 1)), draw.uniform(-0.2, 0.2, (n, 1, 1))
    u = (x - centre[0]) * np.cos(angle) + (y - centre[1]) * np.sin(angle)
    v = (y - centre[1]) * np.cos(angle) - (x - centre[0]) * np.sin(angle)
    outline, depth = _signed_distance(u, v, draw.uniform(0.5, 0.7, (n, 1, 1)), labels % len(SHAPES))
    # A class prefers a hue, with so wide a spread that neighbours overlap: a hint, not an answer.
    hue = labels / len(SYNTHETIC_CLASSES) + draw.normal(0, 0.15, n)
    first, second = _colours(draw, hue, 0.7, 1.0), _colours(draw, hue + 0.4, 0.5, 0.9)
    in_second = _texture(draw, u, v, outline < -0.4 * depth, labels // len(SHAPES))[:, None]
    _paint(canvas, outline, np.where(in_second, second[:, :, None, None], first[:, :, None, None]))

    slope = draw.uniform(-0.1, 0.1, (2, n, 1, 1))
    canvas += (slope[0] * x + slope[1] * y)[:, None] + draw.normal(0, 0.04, canvas.shape)  # lighting, noise
    return (canvas.clip(0, 1) * 255).astype(np.uint8)


def _colours(draw: np.random.Generator, hue: ndarray, low: float, high: float) -> ndarray:
    """Colours [n, 3] of a hue [n] (0..1 around the circle), of a brightness drawn between `low` and `high`."""
    channels = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] - np.arange(3) / 3))
    return channels * draw.uniform(low, high, (len(hue), 1))


def _signed_distance(u: ndarray, v: ndarray, radius: ndarray, shape: ndarray) -> tuple[ndarray, ndarray]:
    """Distance to each image's outline, negative inside, [n, size, size], and how deep the shape is [n, 1, 1]."""
    a, b = np.abs(u), np.abs(v)
    arm = 0.36 * radius
    disc = np.hypot(u, v) - radius
    cross = np.minimum(np.maximum(a - arm, b - radius), np.maximum(b - arm, a - radius))
    which = shape[:, None, None]
    return np.choose(which, (disc, cross)), np.choose(which, (radius, arm))


def _texture(draw: np.random.Generator, u: ndarray, v: ndarray, inner: ndarray, texture: ndarray) -> ndarray:
    """Where the second colour is painted: boolean [n, size, size]."""
    phase = draw.uniform(0, 1, (2, len(u), 1, 1))
    upright = np.sin(2 * np.pi * (u / 0.5 + phase[0])) > 0
    level = np.sin(2 * np.pi * (v / 0.5 + phase[1])) > 0
    patterns = (np.zeros_like(upright), upright, level, upright ^ level, inner)
    return np.choose(texture[:, None, None], patterns)


def _paint(canvas: ndarray, distance: ndarray, colour: ndarray) -> None:
    """Paint, in place, a colour [n, 3, 1 or size, 1 or size] where `distance` is negative, with soft edges."""
    cover = np.clip(0.5 - distance * canvas.shape[-1] / 2, 0, 1)[:, None]
    canvas += cover * (colour - canvas)
