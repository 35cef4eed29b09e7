"""Curves compared with each other: at the same share of weights, and at the same multiply-adds."""

from collections import defaultdict
from statistics import fmean
from typing import Any, NamedTuple

from sparsity.results.rows import column_mean, comparison_columns, curve_name
from sparsity.results.statistics import Pairs, halves, holm_intervals, mean_change, on
from sparsity.results.store import Sweep
from sparsity.results.verdicts import curve_of, paired
from sparsity.system.flags import level_text
from sparsity.system.methods import Curve

SAME_WEIGHTS = 0.5  # points of sparsity by which the "same" share of weights may differ
SAME_MACS = 0.1  # share of the smaller one by which the "same" multiply-adds may differ
AXES = {"weights": "the same share of weights", "macs": "the same multiply-adds"}


class Point(NamedTuple):
    """A measured level of a curve; percent of weights gone and of multiply-adds left, means over checkpoints."""

    curve: Curve
    level: float
    sparsity: float
    macs: float


class Asked(NamedTuple):
    """Two levels to compare: on which of AXES they are the same, and in which part of their names the curves differ."""

    axis: str
    part: str
    first: Point
    second: Point


def measured_points(sweep: Sweep) -> dict[Curve, list[Point]]:
    """Curve -> its measured levels above 0 %, ascending."""
    return {
        curve: [
            Point(curve, level, column_mean(rows, "sparsity"), fmean(100 / row.macs_ratio for row in rows))
            for level, rows in levels.items()
            if level > 0
        ]
        for curve, levels in sweep.curves().items()
    }


def compare_points(sweep: Sweep, asked: list[Asked]) -> list[dict[str, Any]]:
    """Accuracy of the first level of each pair minus that of the second, on the half of the images for reporting.

    Entries of the JSON, in percent and points. Intervals and verdicts are those of `holm_intervals` over all pairs;
    `better` is `first`, `second` or None, where no difference is shown. With one checkpoint `lost` and `gained` count
    the images that only the second and only the first network get right; `mcnemar_p` is exact, and not corrected.
    """
    reporting, curves = halves(sweep.labels)[1], sweep.curves()
    pairs: list[Pairs] = []
    for pair in asked:
        first, second = (paired(sweep, curves[point.curve][point.level]) for point in (pair.first, pair.second))
        pairs.append(on([(one[0], other[0]) for one, other in zip(first, second, strict=True)], reporting))
    compared = zip(asked, pairs, holm_intervals(pairs), strict=True)
    entries = [_entry(pair, images, *found) | {"pairs": len(asked)} for pair, images, found in compared]
    return [entry | {"sentence": _sentence(entry)} for entry in entries]


def _entry(asked: Asked, pairs: Pairs, difference: tuple[float, float, float], differs: bool) -> dict[str, Any]:
    """The JSON entry of a pair."""
    sides = {}
    for side, (name, point) in enumerate((("first", asked.first), ("second", asked.second))):
        accuracy = sum(float(pair[side].mean()) for pair in pairs) / len(pairs)
        figures = {"sparsity": point.sparsity, "macs": point.macs, "accuracy": 100 * accuracy}
        sides[name] = point.curve._asdict() | {"level": point.level} | _rounded(figures)
    names = ("difference", "difference_low", "difference_high")
    entry = {"axis": asked.axis, "part": asked.part, **sides}
    entry |= _rounded(dict(zip(names, (100 * value for value in difference), strict=True)))
    entry |= {"better": ("first" if difference[0] > 0 else "second") if differs else None}
    entry |= {"images": len(pairs[0][0]), "checkpoints": len(pairs)} | dict.fromkeys(("lost", "gained", "mcnemar_p"))
    if len(pairs) == 1:
        entry |= comparison_columns(*pairs[0])
    return entry


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in figures.items()}


def asked_pairs(sweep: Sweep, entries: list[dict[str, Any]]) -> list[Asked]:
    """The pairs that a user asks for: curves that differ in one part of criterion, allocation and recovery.

    Among the curves that have the other two parts in common, the one that goes furthest is compared with each other
    one; of several such groups, the one is taken in which a curve goes furthest. How far a curve goes, its chosen level
    and its accuracy there, is read off the half of the images for choosing. Levels are measured ones; of those that the
    two have in common, by SAME_WEIGHTS or SAME_MACS, the highest up to the chosen level of the first, or else the
    lowest. Allocations are compared on both axes. Pairs without such levels are left out, as are levels at which both
    have no prunable weight left, where there is nothing to compare. `entries` are those of `summarise_all`.
    """
    points, asked = measured_points(sweep), []
    chosen = {curve_of(entry): entry["level"] or 0.0 for entry in entries}
    for part in Curve._fields:
        for axis in AXES if part == "allocation" else ("weights",):
            reach = {curve: _reach(sweep, points[curve], level, axis) for curve, level in chosen.items()}
            group = max(
                _groups(sweep, points, part), key=lambda group: max(reach[curve] for curve in group), default=[]
            )
            best = max(group, key=reach.__getitem__, default=None)
            for other in group:
                if other != best and (pair := _match(points[best], points[other], chosen[best], axis)):
                    asked.append(Asked(axis, part, *pair))
    return asked


def furthest(sweep: Sweep, entries: list[dict[str, Any]], axis: str) -> Curve:
    """The curve of `entries`, as from `summarise_all`, whose chosen level saves most on one of AXES.

    Of those that save as much, to SAME_WEIGHTS points, the most accurate one, on the half of the images for choosing.
    """
    points, chosen = measured_points(sweep), {curve_of(entry): entry["level"] or 0.0 for entry in entries}
    reach = {curve: _reach(sweep, points[curve], level, axis) for curve, level in chosen.items()}
    most = max(saved for saved, _ in reach.values())
    return max((curve for curve in reach if reach[curve][0] >= most - SAME_WEIGHTS), key=lambda curve: reach[curve][1])


def _reach(sweep: Sweep, points: list[Point], chosen: float, axis: str) -> tuple[float, float]:
    """How far a curve goes: what its chosen level saves, and its change of accuracy there on the choosing half.

    Of a curve without a chosen level, which saves nothing, its lowest level is looked at.
    """
    point = next((point for point in points if point.level == chosen), points[0] if points else None)
    if point is None:
        return -1.0, 0.0
    saved = point.sparsity if axis == "weights" else 100 - point.macs
    rows = sweep.curves()[point.curve][point.level]
    return saved if chosen else 0.0, mean_change(paired(sweep, rows), halves(sweep.labels)[0])


def _groups(sweep: Sweep, points: dict[Curve, list[Point]], part: str) -> list[list[Curve]]:
    """The curves that differ in one part alone, of the same checkpoints: groups of two or more."""
    groups = defaultdict(list)
    for curve in points:
        common = curve._replace(**{part: ""})
        groups[common, curve.prunes_filters, tuple(sweep.checkpoints_of(curve))].append(curve)
    return [group for group in groups.values() if len(group) > 1]


def _match(first: list[Point], second: list[Point], chosen: float, axis: str) -> tuple[Point, Point] | None:
    """Two measured levels that are the same on an axis, or None."""
    gap = _gap_in_weights if axis == "weights" else _gap_in_macs
    limit = SAME_WEIGHTS if axis == "weights" else SAME_MACS
    nearest = [(one, min(second, key=lambda other: gap(one, other))) for one in first if second]
    same = [pair for pair in nearest if gap(*pair) <= limit and min(point.sparsity for point in pair) < 100]
    return max((pair for pair in same if pair[0].level <= chosen), default=min(same, default=None))


def _gap_in_weights(one: Point, other: Point) -> float:
    return abs(one.sparsity - other.sparsity)


def _gap_in_macs(one: Point, other: Point) -> float:
    low, high = sorted((one.macs, other.macs))
    return high / low - 1 if low else float(high > 0)


def _sentence(entry: dict[str, Any]) -> str:
    """A comparison in words, with the scope of its interval."""
    first, second = entry["first"], entry["second"]
    names = [curve_name(curve_of(side)) for side in (first, second)]
    verdict = "no difference is shown"
    if entry["better"]:
        verdict = f"{names[entry['better'] == 'second']} is more accurate"
    scope = f", Holm over {entry['pairs']} pairs" * (entry["pairs"] > 1)
    scope += f", over {entry['checkpoints']} checkpoints" * (entry["checkpoints"] > 1)
    return (
        f"{names[0]} at {level_text(first['level'])} % against {names[1]} at {level_text(second['level'])} %, "
        f"{AXES[entry['axis']]} ({first['sparsity']:.1f} % and {second['sparsity']:.1f} % of the weights gone, "
        f"{first['macs']:.1f} % and {second['macs']:.1f} % of the multiply-adds left): {first['accuracy']:.2f} % "
        f"against {second['accuracy']:.2f} % on the {entry['images']:,} images for reporting, "
        f"difference {entry['difference']:+.2f} points (95 % interval {entry['difference_low']:+.2f} to "
        f"{entry['difference_high']:+.2f}{scope}): {verdict}."
    )


def allocation_sentence(comparisons: list[dict[str, Any]]) -> str:
    """Which allocation serves bytes (the same share of weights) and which arithmetic (the same multiply-adds)."""
    found = [entry for entry in comparisons if entry["part"] == "allocation"]
    if not found:
        return ""
    told = {
        axis: "; ".join(_allocation_words(entry) for entry in found if entry["axis"] == axis)
        or "no two measured levels can be compared"
        for axis in AXES
    }
    return (
        f"Allocations at {AXES['weights']}, for bytes: {told['weights']}. "
        f"At {AXES['macs']}, for arithmetic: {told['macs']}."
    )


def _allocation_words(entry: dict[str, Any]) -> str:
    """The verdict on two allocations in a few words."""
    first, second = entry["first"], entry["second"]
    if entry["better"] == "second":
        first, second = second, first
    names = [f"{side['allocation']} at {level_text(side['level'])} %" for side in (first, second)]
    relation = "is more accurate than" if entry["better"] else "is not shown to differ from"
    return f"{names[0]} {relation} {names[1]}"
