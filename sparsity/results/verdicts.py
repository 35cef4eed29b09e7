"""Which level of each curve is chosen, whether the other half of the test images shows it, and this in words."""

from typing import Any

import numpy as np

from sparsity.results.rows import MACS_UNIT, Row, comparison_columns, curve_name, points, unit
from sparsity.results.statistics import Pairs, Verdict, halves, judge, mean_change, on
from sparsity.results.store import Sweep
from sparsity.system.flags import level_text
from sparsity.system.methods import Curve

FIGURES = ("accuracy", "dense", "difference", "difference_low", "difference_high", "lost", "gained", "mcnemar_p")


def summarise_all(sweep: Sweep, tolerance: float) -> list[dict[str, Any]]:
    """The chosen level of every curve and whether it is shown, as entries of the JSON in the order of the curves.

    `tolerance` in points. `level` is chosen on one half of the test images; `next_level`, the next one measured, loses
    accuracy there: `next_difference`, in points. All other figures are of the other half, of `images`. `verdict` is
    `shown` where the lower end of the paired interval is above -tolerance, else `not shown`; `none` where no level
    above 0 % was chosen. The intervals hold together, with 95 %, for the `family` curves that chose one. `shown_level`
    is the chosen level if that is shown, else the highest below it up to which every measured level is. `lost`,
    `gained` and `mcnemar_p`, the last not corrected for the number of curves, are None with several checkpoints.
    Raises UserError when there are too few images for two halves.
    """
    curves = {
        curve: {level: paired(sweep, rows) for level, rows in levels.items()}
        for curve, levels in sweep.curves().items()
    }
    choosing, reporting = halves(sweep.labels)
    entries = []
    for curve, verdict in zip(curves, judge(list(curves.values()), sweep.labels, tolerance / 100), strict=True):
        levels, level = curves[curve], verdict.level
        following = min((other for other in levels if level is None or other > level), default=None)
        entry = curve._asdict() | {"tolerance": tolerance, "checkpoints": len(sweep.checkpoints_of(curve))}
        entry |= {"level": level, "next_level": following, "next_difference": None, "images": int(reporting.sum())}
        if following is not None:
            entry["next_difference"] = _percent(mean_change(levels[following], choosing))
        entry |= _report(verdict, [] if level is None else on(levels[level], reporting))
        lowest, what = level == min(filter(None, levels), default=None), unit(curve, sweep.header["settings"])
        entries.append(entry | {"unit": what, "sentence": _sentence(entry, lowest, what)})
    return entries


def paired(sweep: Sweep, rows: list[Row]) -> Pairs:
    """For each row, the images that its network gets right, and those that the untouched checkpoint does."""
    return [(sweep.correct(row), sweep.dense_correct(row.checkpoint)) for row in rows]


def _report(verdict: Verdict, pairs: Pairs) -> dict[str, Any]:
    """The figures of a chosen level on the reporting half, in percent, and its verdict; without one no `pairs`."""
    entry: dict[str, Any] = dict.fromkeys(FIGURES)
    entry |= {"family": verdict.family, "verdict": "none", "shown_level": verdict.shown_level}
    if verdict.level:
        entry["verdict"] = "shown" if verdict.shown else "not shown"
    if pairs:
        accuracies = (np.mean([pair[side].mean() for pair in pairs]) for side in (0, 1))
        entry |= dict(zip(FIGURES, map(_percent, (*accuracies, *verdict.difference)), strict=False))
    if len(pairs) == 1:
        entry |= comparison_columns(*pairs[0])
    return entry


def curve_of(entry: dict[str, Any]) -> Curve:
    """The curve of an entry from `summarise_all`."""
    return Curve(*(entry[name] for name in Curve._fields))


def _percent(share: float) -> float:
    """A share in percent, rounded for JSON."""
    return round(100 * float(share), 6)


def _sentence(entry: dict[str, Any], lowest: bool, unit: str) -> str:
    """The chosen level of an entry in its unit, the `lowest` measured above 0 % or not, and whether it is shown."""
    curve, within, half = curve_of(entry), points(entry["tolerance"]), "on half of the test images"
    if not entry["level"]:
        return f"{curve_name(curve)}: no measured level above 0 % chosen; {_obstacle(entry)} (tolerance {within})."
    after = "highest measured"
    if entry["next_level"] is not None:
        after = f"next measured: {level_text(entry['next_level'])} %, loses {-entry['next_difference']:.2f} points"
    others = "lowest measured" if lowest else "like every lower level measured"
    corrected = f", simultaneous over {entry['family']} curves" * (entry["family"] > 1)
    corrected += f", over {entry['checkpoints']} checkpoints" * (entry["checkpoints"] > 1)
    shown = "" if entry["verdict"] == "shown" or lowest else "; nor is the lowest level measured"
    if entry["shown_level"] not in (None, entry["level"]):
        shown = f"; shown up to {level_text(entry['shown_level'])} %"
    return (
        f"{curve_name(curve)}: chosen level {level_text(entry['level'])} % of the {unit} removed, within {within} of "
        f"dense {half} ({others}; {after}). {verdict_text(entry).capitalize()} on the other "
        f"{entry['images']:,} images: {entry['accuracy']:.2f} % against {entry['dense']:.2f} % dense, "
        f"difference {entry['difference']:+.2f} points (95 % interval "
        f"{entry['difference_low']:+.2f} to {entry['difference_high']:+.2f}{corrected}){shown}."
    )


def _obstacle(entry: dict[str, Any]) -> str:
    """Why no level above 0 % was chosen."""
    if entry["next_level"] is None:
        return "no other was measured" if entry["level"] == 0 else "no level was measured of every checkpoint"
    which = "lowest" if entry["level"] is None else "lowest above 0 %"
    loss = f"loses {-entry['next_difference']:.2f} points on half of the test images"
    return f"the {which}, {level_text(entry['next_level'])} %, {loss}"


def verdict_text(entry: dict[str, Any]) -> str:
    """'shown within 1 point' or 'not shown within 1 point'; empty for an entry that has no verdict."""
    return "" if entry["verdict"] == "none" else f"{entry['verdict']} within {points(entry['tolerance'])}"


def label_text(entry: dict[str, Any]) -> str:
    """The chosen level of an entry in three lines for a figure, with the figures of the reporting half."""
    if not verdict_text(entry):
        return ""
    what = f" of the {MACS_UNIT}" * (entry.get("unit") == MACS_UNIT)  # where the x axis shows weights as well
    return (
        f"{level_text(entry['level'])} %{what} pruned: {entry['accuracy']:.1f} %, dense {entry['dense']:.1f} %\n"
        f"on the {entry['images']:,} reporting images;\n{verdict_text(entry)}"
    )


def scope_text(sweep: Sweep) -> str:
    """How many checkpoints and seeds there are, and what intervals of differences cover, for captions."""
    counts = sorted({len(sweep.checkpoints_of(curve)) for curve in sweep.curves()})
    if counts in ([], [1]):
        return "One checkpoint, one seed: intervals cover other test images, not another training or another seed."
    single = "; those of one checkpoint cover other test images only" if counts[0] == 1 else ""
    return (
        f"Means over {' or '.join(str(count) for count in counts if count > 1)} checkpoints, one seed of pruning each: "
        f"intervals of differences cover other checkpoints and other test images{single}."
    )


def rule_text(entries: list[dict[str, Any]]) -> str:
    """How the levels of these entries were chosen, and when one is called shown."""
    if not entries:
        return ""
    within, family = points(entries[0]["tolerance"]), entries[0]["family"]
    together = f" (simultaneous over {family} curves)" if family > 1 else ""
    return (
        f"Chosen: the highest measured level that, like every lower measured level, is within {within} of dense on one "
        f"half of the test images. Shown: on the other half the lower end of the paired 95 % interval{together} is "
        f"above -{within}."
    )
