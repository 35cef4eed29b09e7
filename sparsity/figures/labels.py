"""Names written beside what they name, where they cover least."""

from collections.abc import Sequence
from itertools import islice, pairwise, permutations
from typing import NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text

from sparsity.figures.style import QUIET, alone, literal

SPACING = 3.0  # pixels between the points that stand for a line
MOST_ORDERS = 24  # in which labels are placed one after the other, to keep the best
# Where a label stands beside its point: the share of its width and height that lies left of and below the point.
SIDES = np.array([(0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1), (0, 0), (1, 0), (0, 1), (1, 1)])


class Label(NamedTuple):
    """A text and the points [N, 2], in pixels, of which it may stand beside any."""

    text: str
    colour: str
    points: np.ndarray


class Place:
    """What is drawn in axes, in pixels. The figure has to be laid out, by `Figure.draw_without_rendering`."""

    def __init__(self, axes: Axes):
        self.axes, self.frame = axes, axes.bbox.extents
        lines = [self.inside(_along(line.get_transform().transform(line.get_xydata()))) for line in axes.get_lines()]
        self.points = np.concatenate([np.empty((0, 2)), *lines])
        self.texts = [text.get_window_extent().extents for text in axes.texts]

    def inside(self, points: np.ndarray) -> np.ndarray:
        """The points [N, 2] inside the axes."""
        return points[((points >= self.frame[:2] - 1) & (points <= self.frame[2:] + 1)).all(axis=1)]

    def costs(self, boxes: np.ndarray) -> np.ndarray:
        """How bad boxes [N, (left, bottom, right, top)] are: out of the axes, over texts, over lines, near lines."""
        cost = 20.0 * _covered(boxes, self.points, 4) + _covered(boxes, self.points, 12)
        out = np.concatenate([self.frame[:2] - boxes[:, :2], boxes[:, 2:] - self.frame[2:]], axis=1).max(axis=1)
        return cost + 1e6 * (out > -3) + sum(1e4 * _overlap(boxes, other) for other in self.texts)

    def write(self, text: str, colour: str, fontsize: float) -> Text:
        """A text with a white border, at no place yet."""
        look = {"color": colour, "fontsize": fontsize, "ha": "left", "va": "bottom"}
        border = [patheffects.withStroke(linewidth=2.5, foreground="white")]
        return self.axes.text(0, 0, literal(text), transform=None, path_effects=border, **look)

    def put(self, text: Text, box: np.ndarray) -> None:
        """Put a text of `write` into a box."""
        text.set_transform(self.axes.transAxes)
        text.set_position(self.axes.transAxes.inverted().transform(box[:2]))


def name_lines_directly(axes: Axes, names: dict[Line2D, str]) -> None:
    """Write the name of each line beside it, in its colour; a line of which the axes show nothing goes without."""
    place, labels = Place(axes), []
    for line, name in names.items():
        corners = line.get_xydata()
        single = alone(corners.sum(axis=1))
        if not single[np.isfinite(corners).all(axis=1)].all():
            corners = np.where(single[:, None], np.nan, corners)  # a point of its own stands for no line
        labels.append(Label(name, line.get_color(), place.inside(_along(axes.transData.transform(corners)))[::2]))
    place_labels(place, labels)


def place_labels(place: Place, labels: Sequence[Label], fontsize: float = 9) -> None:
    """Write each label beside the one of its points where all together cover least of lines and texts."""
    labels = [label for label in labels if len(label.points)]
    texts = [place.write(label.text, label.colour, fontsize) for label in labels]
    boxes, costs = [], []
    for label, text in zip(labels, texts, strict=True):
        size = text.get_window_extent().size
        corners = (label.points[:, None] - SIDES * size + 7 * (1 - 2 * SIDES)).reshape(-1, 2)
        boxes.append(np.concatenate([corners, corners + size], axis=1))
        own = _covered(boxes[-1], label.points, 12)  # its own line may be near, the others should not
        costs.append(place.costs(boxes[-1]) - own)
    found = [_choose(boxes, costs, order) for order in islice(permutations(range(len(labels))), MOST_ORDERS)]
    _, chosen = min(found, key=lambda pair: pair[0])
    for index, text in enumerate(texts):
        place.put(text, boxes[index][chosen[index]])


def _choose(boxes: list[np.ndarray], costs: list[np.ndarray], order: Sequence[int]) -> tuple[float, dict[int, int]]:
    """The best box of each label in turn, off the boxes taken before: their cost, and label -> number of its box."""
    total, chosen = 0.0, {}
    for index in order:
        cost = costs[index] + sum(1e4 * _overlap(boxes[index], boxes[other][box]) for other, box in chosen.items())
        chosen[index] = int(np.argmin(cost))
        total += cost[chosen[index]]
    return total, chosen


def point_out(axes: Axes, point: np.ndarray, words: str) -> None:
    """Write words where they cover least, near a point in data coordinates, with a line that leads to it."""
    place, target = Place(axes), axes.transData.transform(point)
    text = place.write(words, "black", 9)
    size = text.get_window_extent().size
    grid = [np.linspace(place.frame[i], max(place.frame[i], place.frame[i + 2] - size[i]), 40) for i in (0, 1)]
    corners = np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 2)
    boxes = np.concatenate([corners, corners + size], axis=1)
    nearest = np.clip(target, boxes[:, :2], boxes[:, 2:])
    distance = np.hypot(*(nearest - target).T)
    best = np.argmin(place.costs(boxes) + 0.5 * distance + 1e3 * (distance < 25))
    place.put(text, boxes[best])
    ends = axes.transData.inverted().transform([target + (nearest[best] - target) * 8 / distance[best], nearest[best]])
    axes.plot(*ends.T, color=QUIET, linewidth=0.8)


def _overlap(boxes: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Which of the boxes [N, 4] come nearer than 2 pixels to another box: boolean [N]."""
    return np.concatenate([other[:2] - boxes[:, 2:], boxes[:, :2] - other[2:]], axis=1).max(axis=1) < 2


def _covered(boxes: np.ndarray, points: np.ndarray, room: float) -> np.ndarray:
    """How many of the points [P, 2] lie in each of the boxes [N, 4], made larger by `room` at each side."""
    left, bottom, right, top = boxes.T[:, :, None]
    x, y = points.T
    inside = (x > left - room) & (x < right + room) & (y > bottom - room) & (y < top + room)
    return inside.sum(axis=1)


def _along(corners: np.ndarray) -> np.ndarray:
    """Points [N, 2] every SPACING pixels along a line through corners, which breaks at nan."""
    parts = [corners]
    for one, other in pairwise(corners):
        if np.isfinite([one, other]).all():
            parts.append(np.linspace(one, other, min(500, 2 + int(np.hypot(*(other - one)) / SPACING))))
    points = np.concatenate(parts)
    return points[np.isfinite(points).all(axis=1)]
