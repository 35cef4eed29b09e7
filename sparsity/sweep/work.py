"""How the work of a sweep is dealt to the processes of a run."""

from collections.abc import Iterator
from dataclasses import dataclass

from sparsity.results.rows import Curve
from sparsity.sweep.panel import Panel
from sparsity.system.processes import Ranks


@dataclass(frozen=True)
class Item:
    """A piece of work that does not depend on any other: `levels` (percent) of one curve of a checkpoint.

    `cost` is about how long it takes; only the order of costs counts.
    """

    checkpoint: str
    curve: Curve
    levels: tuple[float, ...]
    cost: float


def work_items(missing: dict[str, Panel], costs: dict[str, float], whole: bool) -> list[Item]:
    """What is to be done, in canonical order: an item a level, or with `whole` an item a curve.

    `missing` is checkpoint -> panel, `costs` the recovery of a curve -> seconds of one level.
    """
    items = []
    for checkpoint, panel in missing.items():
        for curve, levels in panel.items():
            parts = [tuple(levels)] if whole else [(level,) for level in levels]
            items += [Item(checkpoint, curve, part, costs[curve[2]] * len(part)) for part in parts]
    return items


def dealt(items: list[Item], ranks: Ranks) -> Iterator[Item]:
    """The items that fall to this process, each taken when the one before is done: longest first.

    Among equally long ones those come first of which the process has scores at hand: of the same checkpoint and
    curve. A single process takes all, in their order.
    """
    if ranks.size == 1:
        yield from items
        return
    left, last = dict(enumerate(items)), None
    while left:
        longest = max(item.cost for item in left.values())
        equals = [number for number, item in left.items() if item.cost == longest]
        alike = [number for number in equals if last and same_scores(left[number], last)]
        number = (alike or equals)[0]
        item = left.pop(number)
        if ranks.claim(f"item {number}"):
            last = item
            yield item


def same_scores(one: Item, other: Item) -> bool:
    """Whether two items are of one checkpoint, criterion and allocation."""
    return (one.checkpoint, one.curve[:2]) == (other.checkpoint, other.curve[:2])
