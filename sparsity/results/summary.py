"""The results of a sweep in tables: one for the screen, one for papers, one of layers."""

import math

import numpy as np

from sparsity.results.rows import Row, column_mean, curve_name
from sparsity.results.statistics import mean_and_deviation, mean_interval
from sparsity.results.store import Sweep, dense_accuracy
from sparsity.results.verdicts import curve_of, rule_text, scope_text, verdict_text
from sparsity.system.flags import level_text
from sparsity.system.methods import ONE_LAYER

ROUND_LEVELS = (0.0, 20.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 100.0)


def _p_text(p: float) -> str:
    """A p value in words: '0.0123', '1e-30', '< 1e-300'."""
    return "< 1e-300" if p < 1e-300 else f"{p:.3g}"


def _ratio_text(ratio: float) -> str:
    """How much smaller a network is than dense: '2.50x'."""
    return f"{ratio:.2f}x" if math.isfinite(ratio) else "none left"


def summary_table(sweep: Sweep) -> str:
    """The sweep as a table for the screen; with several checkpoints the mean and the standard deviation over them.

    McNemar's p compares the network with dense on all test images, not corrected for the number of rows; it is that of
    one network, and `-` with several.
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
        interval, p = f"{rows[0].ci_low:.2f} to {rows[0].ci_high:.2f}", _p_text(rows[0].mcnemar_p)
    columns = ("sparsity", "loss", "agreement", "compression", "macs_ratio")
    sparsity, loss, agreement, *ratios = (column_mean(rows, name) for name in columns)
    compression, macs = map(_ratio_text, ratios)
    start = f"{level_text(level):>8} {sparsity:>8.2f} {accuracy:>11.2f}  {interval:>15}"
    return f"{start} {loss:>8.4f} {agreement:>12.2f} {compression:>12} {macs:>11} {p:>10}"


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


def markdown_table(sweep: Sweep) -> str:
    """Accuracy in percent as a Markdown table for papers: one row per curve, one column per level, ten at most.

    The last column is the chosen level of each curve, where levels were chosen.
    """
    curves, title = sweep.curves(), " / ".join(sweep.header.get("title", "").splitlines())
    levels = _columns(sorted({level for found in curves.values() for level in found}))
    chosen = {
        curve_of(entry): f"{level_text(entry['level'])} %, {entry['verdict']}" if verdict_text(entry) else "none"
        for entry in sweep.header.get("summary", [])
    }
    table = [["curve", *(f"{level_text(level)} %" for level in levels), "chosen"]]
    for curve, found in curves.items():
        cells = (_accuracy_cell(found[level]) if level in found else "" for level in levels)
        table.append([curve_name(curve).replace("|", r"\|"), *cells, chosen.get(curve, "")])
    head, *body = (f"| {' | '.join(cells)} |" for cells in table)
    lines = [title.replace("|", r"\|"), "", head, "|---" * len(table[0]) + "|", *body, ""]
    words = [f"Test accuracy in percent on {len(sweep.labels):,} images; {_spread_words(sweep)}"]
    words += [f"Dense: {dense_accuracy(sweep):.2f}.", rule_text(sweep.header.get("summary", []))]
    if len({tuple(found) for found in curves.values()}) > 1:
        words.append("Curves were measured at different levels; each level chosen is one of its own curve.")
    return "\n".join([*lines, " ".join(filter(None, [*words, scope_text(sweep)])) + "\n"])


def _columns(levels: list[float]) -> list[float]:
    """All of up to ten ascending levels; of more the round ones, or where fewer than five are, ten evenly spread."""
    if len(levels) <= 10:
        return levels
    found = [level for level in levels if level in ROUND_LEVELS]
    spread = np.linspace(0, len(levels) - 1, 10).round().astype(int)
    return found if len(found) > 4 else [levels[index] for index in spread]


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
