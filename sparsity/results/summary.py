"""The results of a sweep in words: a table for the screen, one for papers, and one sentence a curve."""

import math
from typing import Any

import numpy as np

from sparsity.results.rows import Row, curve_name, points, six_digits
from sparsity.results.statistics import choose_level, holm, mcnemar_p, mean_and_deviation, mean_interval
from sparsity.results.store import Sweep
from sparsity.system.files import write_atomic
from sparsity.system.flags import level_text
from sparsity.system.methods import ONE_LAYER, Curve

SIGNIFICANT = 0.05
ROUND_LEVELS = (0.0, 20.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 100.0)


def column_mean(rows: list[Row], column: str) -> float:
    """Mean of a column over the checkpoints of a level."""
    return float(np.mean([getattr(row, column) for row in rows]))


def dense_accuracy(sweep: Sweep) -> float:
    """Test accuracy of the unpruned network in percent, mean over checkpoints."""
    return float(np.mean([figures["accuracy"] for figures in sweep.header["dense"].values()]))


def summary_table(sweep: Sweep) -> str:
    """The sweep as a table for the screen; with several checkpoints the mean and the standard deviation over them.

    McNemar's p compares the network with dense on all test images; it is that of one network, and `-` with several.
    """
    spread = "95 % interval" if len({row.checkpoint for row in sweep.table()}) == 1 else "+/- sd"
    lines = [f"pruned %  zeros %  accuracy %  {spread:>15}     loss  agreement %  compression  MACs ratio  McNemar p"]
    for curve, levels in sweep.curves().items():
        lines.append(f"-- {curve_name(curve)} --")
        lines.extend(_table_line(level, rows) for level, rows in levels.items())
    return "\n".join(lines)


def _table_line(level: float, rows: list[Row]) -> str:
    """One level of one curve, mean over its checkpoints."""
    accuracy, deviation = mean_and_deviation([row.accuracy for row in rows])
    interval, p = f"{deviation:.2f}", "-"
    if len(rows) == 1:
        interval, p = f"{rows[0].ci_low:.2f} to {rows[0].ci_high:.2f}", _p_text(rows[0].mcnemar_p).removeprefix("= ")
    columns = ("sparsity", "loss", "agreement", "compression", "macs_ratio")
    sparsity, *rest = (column_mean(rows, name) for name in columns)
    start = f"{level_text(level):>8} {sparsity:>8.2f} {accuracy:>11.2f}  {interval:>15}"
    return start + " {:>8.4f} {:>12.2f} {:>11.2f}x {:>10.2f}x {:>10}".format(*rest, p)


def summarise_all(sweep: Sweep, tolerance: float) -> list[dict[str, Any]]:
    """The chosen level of every curve, as entries of the JSON in the order of the curves.

    `tolerance` in points. With one checkpoint an entry has `lost`, `gained` and McNemar's exact p on the images that
    were not used for choosing, and `p_holm`, corrected over all curves that chose a level. With several the four are
    None, since the interval is over checkpoints then; so is everything of a curve that chose no level. Raises UserError
    when there are too few images for two halves.
    """
    entries = [_entry(sweep, curve, levels, tolerance) for curve, levels in sweep.curves().items()]
    tested = [entry for entry in entries if entry["mcnemar_p"] is not None]
    for entry, adjusted in zip(tested, holm([entry["mcnemar_p"] for entry in tested]), strict=True):
        entry["p_holm"] = six_digits(adjusted)
    for entry in entries:
        entry["sentence"] = _sentence(entry, len(tested))
    return entries


def _entry(sweep: Sweep, curve: Curve, levels: dict[float, list[Row]], tolerance: float) -> dict[str, Any]:
    """The chosen level of a curve without its corrected p and its sentence, which need the other curves."""
    dense = [sweep.dense_correct(name) for name in sweep.checkpoints_of(curve)]
    correct = [[sweep.correct(row) for row in rows] for rows in levels.values()]
    choice = choose_level(list(levels), correct, dense, sweep.labels, tolerance / 100)
    return {
        **curve._asdict(),
        "tolerance": tolerance,
        "checkpoints": len(dense),
        "level": choice.level,
        "images": choice.images,
        "accuracy": _percent(choice.accuracy),
        "dense": _percent(choice.dense),
        "difference": _percent(choice.difference.value),
        "difference_low": _percent(choice.difference.low),
        "difference_high": _percent(choice.difference.high),
        "lost": choice.lost,
        "gained": choice.gained,
        "mcnemar_p": None if choice.lost is None else six_digits(mcnemar_p(choice.lost, choice.gained)),
        "p_holm": None,
    }


def curve_of(entry: dict[str, Any]) -> Curve:
    """The curve of an entry from `summarise_all`."""
    return Curve(*(entry[name] for name in Curve._fields))


def _p_text(p: float) -> str:
    """A p value in words, with its sign: '= 0.0123', '= 1e-30', '< 1e-300'."""
    return "< 1e-300" if p < 1e-300 else f"= {p:.3g}"


def _percent(share: float) -> float | None:
    """A share in percent for JSON, which knows no nan."""
    return None if math.isnan(share) else round(100 * share, 6)


def _sentence(entry: dict[str, Any], tests: int) -> str:
    """The level chosen on one half of the images and its accuracy on the other; `tests` curves are corrected for."""
    curve, within = curve_of(entry), points(entry["tolerance"])
    if entry["level"] is None:
        return f"{curve_name(curve)}: no measured level stays within {within} of the dense network."
    over = "" if entry["checkpoints"] == 1 else f", over {entry['checkpoints']} checkpoints"
    return (
        f"{curve_name(curve)}: {level_text(entry['level'])} % of the "
        f"{'inner filters' if curve.prunes_filters else 'weights'} can go within {within} of dense "
        f"(chosen on half of the test images); on the other {entry['images']:,} images {entry['accuracy']:.2f} % "
        f"against {entry['dense']:.2f} % dense, difference {entry['difference']:+.2f} points "
        f"(95 % interval {entry['difference_low']:+.2f} to {entry['difference_high']:+.2f}{over}"
        f"{_test_words(entry, tests)})."
    )


def _test_words(entry: dict[str, Any], tests: int) -> str:
    """McNemar's test of an entry; a large p is no evidence that nothing is lost, and is not called so."""
    if entry["mcnemar_p"] is None:
        return ""
    p, adjusted = entry["mcnemar_p"], entry["p_holm"]
    corrected = "" if tests == 1 else f", Holm-corrected over {tests} curves {_p_text(adjusted).removeprefix('= ')}"
    caution = "" if adjusted <= SIGNIFICANT else ": these images do not show whether the two differ"
    return f"; McNemar p {_p_text(p)}{corrected}{caution}"


def sensitivity_table(sweep: Sweep, most: int = 10) -> str:
    """The layers that cost most accuracy at their highest level, of a sweep that prunes one layer at a time."""
    costs = []
    for curve, levels in sweep.curves().items():
        level, rows = max(levels.items())
        dense = float(np.mean([sweep.header["dense"][row.checkpoint]["accuracy"] for row in rows]))
        costs.append((column_mean(rows, "accuracy") - dense, curve.allocation.removeprefix(ONE_LAYER), level))
    lines = [f"the layers that suffer most (of {len(costs)})  pruned %  change in points"]
    lines += [f"{name:<40} {level_text(level):>8}  {change:>+16.2f}" for change, name, level in sorted(costs)[:most]]
    return "\n".join(lines)


def write_markdown(sweep: Sweep) -> None:
    """Write `markdown_table` to the sweep's .md, atomically."""
    write_atomic(sweep.files.with_suffix(".md"), markdown_table(sweep))


def markdown_table(sweep: Sweep) -> str:
    """Accuracy in percent as a Markdown table for papers: a row a curve, a column a level, ten levels at most.

    The last column is the chosen level, if `Sweep.finish` has been given one.
    """
    curves, title = sweep.curves(), " / ".join(sweep.header.get("title", "").splitlines())
    levels = _columns(sorted({level for found in curves.values() for level in found}))
    chosen = {
        curve_of(entry): "none" if entry["level"] is None else f"{level_text(entry['level'])} %"
        for entry in sweep.header.get("summary", [])
    }
    table = [["curve", *(f"{level_text(level)} %" for level in levels), "chosen"]]
    for curve, found in curves.items():
        cells = (_accuracy_cell(found[level]) if level in found else "" for level in levels)
        table.append([curve_name(curve).replace("|", r"\|"), *cells, chosen.get(curve, "")])
    head, *body = (f"| {' | '.join(cells)} |" for cells in table)
    lines = [title.replace("|", r"\|"), "", head, "|---" * len(table[0]) + "|", *body, ""]
    words = f"Test accuracy in percent on {len(sweep.labels):,} images; {_spread_words(sweep)}"
    return "\n".join([*lines, f"{words} Dense: {dense_accuracy(sweep):.2f}.\n"])


def _columns(levels: list[float]) -> list[float]:
    """All of up to ten ascending levels; of more the round ones, or where these are few, ten evenly spread."""
    if len(levels) <= 10:
        return levels
    found = [level for level in levels if level in ROUND_LEVELS]
    spread = np.linspace(0, len(levels) - 1, 10).round().astype(int)
    return found if len(found) > 1 else [levels[index] for index in spread]


def _accuracy_cell(rows: list[Row]) -> str:
    """Mean accuracy and the half width of its 95 % interval: Wilson's for one network, Student's t over several."""
    interval = mean_interval([row.accuracy for row in rows])
    high, low = (interval.high, interval.low) if len(rows) > 1 else (rows[0].ci_high, rows[0].ci_low)
    return f"{interval.value:.2f} ± {(high - low) / 2:.2f}"


def _spread_words(sweep: Sweep) -> str:
    counts = {len(sweep.checkpoints_of(curve)) for curve in sweep.curves()}
    kinds = ["Wilson's for one checkpoint"] * (1 in counts)
    if several := sorted(counts - {1}):
        kinds.append(f"Student's t over {' or '.join(map(str, several))} checkpoints for their mean")
    return f"± is half the width of the 95 % interval ({', '.join(kinds)})."
