"""What a sweep says: a table for the screen, one for papers, and one sentence a curve."""

from typing import Any

import numpy as np

from sparsity.prune.criteria import FILTER_CRITERIA
from sparsity.results.rows import ONE_LAYER, Curve, Row, curve_name, level_text, points
from sparsity.results.statistics import Choice, choose_level, holm, mcnemar_p, mean_and_deviation, mean_interval
from sparsity.results.store import Sweep
from sparsity.system.files import write_atomic

SIGNIFICANT = 0.05


ROUND_LEVELS = (0.0, 20.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 100.0)


def summary_table(sweep: Sweep) -> str:
    """The sweep as a table for the screen; with several checkpoints the mean and the standard deviation over them.

    McNemar's p compares the network with dense on all test images; it is that of one network, and `-` with several.
    """
    several = len({row.checkpoint for row in sweep.table()}) > 1
    spread = "+/- sd" if several else "95 % interval"
    lines = [f"pruned %  zeros %  accuracy %  {spread:>15}     loss  agreement %  compression  MACs ratio  McNemar p"]
    for curve, levels in sweep.curves().items():
        lines.append(f"-- {curve_name(curve)} --")
        lines.extend(_table_line(level, rows) for level, rows in levels.items())
    return "\n".join(lines)


def _table_line(level: float, rows: list[Row]) -> str:
    """One level of one curve, mean over its checkpoints."""
    accuracy, deviation = mean_and_deviation([row.accuracy for row in rows])
    one = len(rows) == 1
    interval = f"{rows[0].ci_low:.2f} to {rows[0].ci_high:.2f}" if one else f"{deviation:.2f}"
    sparsity, loss, agreement, compression, macs = (
        float(np.mean([getattr(row, name) for row in rows]))
        for name in ("sparsity", "loss", "agreement", "compression", "macs_ratio")
    )
    p = p_text(rows[0].mcnemar_p).removeprefix("= ") if one else "-"
    return (
        f"{level_text(level):>8} {sparsity:>8.2f} {accuracy:>11.2f}  {interval:>15} {loss:>8.4f} "
        f"{agreement:>12.2f} {compression:>11.2f}x {macs:>10.2f}x {p:>10}"
    )


def summarise_all(sweep: Sweep, tolerance: float) -> list[dict[str, Any]]:
    """The chosen level of every curve, as entries of the JSON in the order of the curves.

    `tolerance` in points. With one checkpoint an entry has McNemar's exact p on the images that were not used for
    choosing, and `p_holm`, which is corrected over all curves that chose a level, whatever it is: 0 % with a recovery
    is another network than dense, too. With several checkpoints the four are None, because the interval is over
    checkpoints then, and so is `p_holm` with everything else of a curve that chose no level. Raises UserError when
    there are too few images for two halves.
    """
    entries = [_entry(sweep, curve, tolerance) for curve in sweep.curves()]
    tested = [entry for entry in entries if entry["mcnemar_p"] is not None]
    for entry, adjusted in zip(tested, holm([entry["mcnemar_p"] for entry in tested]), strict=True):
        entry["p_holm"] = significant(adjusted)
    for entry in entries:
        entry["sentence"] = sentence(entry, len(tested))
    return entries


def _entry(sweep: Sweep, curve: Curve, tolerance: float) -> dict[str, Any]:
    """The chosen level of a curve without its corrected p and its sentence, which need the other curves."""
    names, levels = sweep.checkpoints_of(curve), sweep.curves()[curve]
    by_level = [[sweep.correct(row) for row in rows] for rows in levels.values()]
    choice = choose_level(
        list(levels), by_level, [sweep.dense_correct(name) for name in names], sweep.labels, tolerance / 100
    )
    return {
        **dict(zip(("criterion", "allocation", "recover"), curve, strict=True)),
        "tolerance": tolerance,
        "checkpoints": len(names),
        "level": choice.level,
        "images": choice.images,
        "accuracy": percent(choice.accuracy),
        "dense": percent(choice.dense),
        "difference": percent(choice.difference.value),
        "difference_low": percent(choice.difference.low),
        "difference_high": percent(choice.difference.high),
        "lost": choice.lost,
        "gained": choice.gained,
        "mcnemar_p": _choice_p(choice),
        "p_holm": None,
    }


def _choice_p(choice: Choice) -> float | None:
    return None if choice.lost is None else significant(mcnemar_p(choice.lost, choice.gained))


def significant(p: float) -> float:
    """A p value with six significant digits: however small, it does not become 0 by rounding."""
    return float(f"{p:.6g}")


def p_text(p: float) -> str:
    """A p value in words, with its sign: '= 0.0123', '= 1e-30', '< 1e-300'."""
    return "< 1e-300" if p < 1e-300 else f"= {p:.3g}"


def percent(share: float) -> float | None:
    """A share in percent for JSON, which knows no nan."""
    return None if share != share else round(100 * share, 6)


def sentence(entry: dict[str, Any], tests: int) -> str:
    """The answer in words: the level chosen on one half, and what the other half says of it.

    `entry` as from `summarise_all`, `tests` the number of curves that its p is corrected over.
    """
    name = curve_name((entry["criterion"], entry["allocation"], entry["recover"]))
    within = points(entry["tolerance"])
    if entry["level"] is None:
        return f"{name}: no measured level stays within {within} of the dense network."
    over = "" if entry["checkpoints"] == 1 else f", over {entry['checkpoints']} checkpoints"
    return (
        f"{name}: {level_text(entry['level'])} % of the {_unit(entry['criterion'])} can go within {within} of dense "
        f"(chosen on half of the test images); on the other {entry['images']:,} images {entry['accuracy']:.2f} % "
        f"against {entry['dense']:.2f} % dense, difference {entry['difference']:+.2f} points "
        f"(95 % interval {entry['difference_low']:+.2f} to {entry['difference_high']:+.2f}{over}"
        f"{_test_words(entry, tests)})."
    )


def _unit(criterion: str) -> str:
    """What a level is a share of."""
    return "inner filters" if criterion in FILTER_CRITERIA else "weights"


def _test_words(entry: dict[str, Any], tests: int) -> str:
    """McNemar's test of an entry; a large p is no evidence that nothing is lost, and is not called so."""
    if entry["mcnemar_p"] is None:
        return ""
    p, adjusted = entry["mcnemar_p"], entry["p_holm"]
    corrected = "" if tests == 1 else f", Holm-corrected over {tests} curves {p_text(adjusted).removeprefix('= ')}"
    caution = "" if adjusted <= SIGNIFICANT else ": these images do not show whether the two differ"
    return f"; McNemar p {p_text(p)}{corrected}{caution}"


def sensitivity_table(sweep: Sweep, most: int = 10) -> str:
    """Of a sweep that prunes one layer at a time, the layers whose pruning costs most at the highest level."""
    costs = []
    for curve, levels in sweep.curves().items():
        rows = levels[max(levels)]
        dense = [sweep.header["dense"][row.checkpoint]["accuracy"] for row in rows]
        change = float(np.mean([row.accuracy for row in rows])) - float(np.mean(dense))
        costs.append((change, curve[1].removeprefix(ONE_LAYER), max(levels)))
    lines = [f"the layers that suffer most (of {len(costs)})  pruned %  change in points"]
    for change, name, level in sorted(costs)[:most]:
        lines.append(f"{name:<40} {level_text(level):>8}  {change:>+16.2f}")
    return "\n".join(lines)


def markdown_table(sweep: Sweep) -> str:
    """Accuracy in percent as a Markdown table for papers: a row a curve, a column a level, ten levels at most.

    The last column is the chosen level, if `Sweep.finish` has been given one.
    """
    curves = sweep.curves()
    levels = _columns(sorted({level for found in curves.values() for level in found}))
    lines = [
        " / ".join(_cell(line) for line in sweep.header.get("title", "").splitlines()),
        "",
        "| curve | " + " | ".join(f"{level_text(level)} %" for level in levels) + " | chosen |",
        "|---" * (len(levels) + 2) + "|",
    ]
    for curve, found in curves.items():
        cells = [_accuracy_cell(found[level]) if level in found else "" for level in levels]
        lines.append("| " + " | ".join([_cell(curve_name(curve)), *cells, _chosen(sweep, curve)]) + " |")
    dense = [100 * float(sweep.dense_correct(name).mean()) for name in sweep.dense]
    lines += ["", f"Test accuracy in percent on {len(sweep.labels):,} images; {_spread_words(sweep)}"]
    if dense:
        lines[-1] += f" Dense: {np.mean(dense):.2f}."
    return "\n".join(lines) + "\n"


def write_markdown(sweep: Sweep) -> None:
    """Write `markdown_table` to the sweep's .md, atomically."""
    write_atomic(sweep.files.with_suffix(".md"), markdown_table(sweep))


def _columns(levels: list[float]) -> list[float]:
    """All of up to ten ascending levels; of more the round ones, or where these are few, ten evenly spread."""
    if len(levels) <= 10:
        return levels
    found = [level for level in levels if level in ROUND_LEVELS]
    if len(found) > 1:
        return found
    return [levels[index] for index in np.unique(np.linspace(0, len(levels) - 1, 10).round().astype(int))]


def _accuracy_cell(rows: list[Row]) -> str:
    """Mean accuracy and the half width of its 95 % interval: Wilson's for one network, Student's t over several."""
    interval = mean_interval([row.accuracy for row in rows])
    high, low = (interval.high, interval.low) if len(rows) > 1 else (rows[0].ci_high, rows[0].ci_low)
    return f"{interval.value:.2f} ± {(high - low) / 2:.2f}"


def _spread_words(sweep: Sweep) -> str:
    counts = {len(sweep.checkpoints_of(curve)) for curve in sweep.curves()}
    kinds = []
    if 1 in counts:
        kinds.append("Wilson's for one checkpoint")
    if several := sorted(counts - {1}):
        kinds.append(f"Student's t over {' or '.join(map(str, several))} checkpoints for their mean")
    return f"± is half the width of the 95 % interval ({', '.join(kinds)})."


def _chosen(sweep: Sweep, curve: Curve) -> str:
    for entry in sweep.header.get("summary", []):
        if (entry["criterion"], entry["allocation"], entry["recover"]) == curve:
            return "none" if entry["level"] is None else f"{level_text(entry['level'])} %"
    return ""


def _cell(text: str) -> str:
    """Text that a table of Markdown keeps in one cell."""
    return text.replace("|", r"\|")
