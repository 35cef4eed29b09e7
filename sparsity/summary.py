"""What a sweep says, in a table for the screen and in one sentence a curve."""

from typing import Any

import numpy as np

from sparsity.report import Sweep, curve_name, level_text, points
from sparsity.statistics import Choice, choose_level, mean_and_deviation


def summary_table(sweep: Sweep) -> str:
    """The sweep as a table for the screen; with several checkpoints the mean and the standard deviation over them."""
    several = len({row.checkpoint for row in sweep.table()}) > 1
    spread = "+/- sd" if several else "95 % interval"
    lines = [f"pruned %  zeros %  accuracy %  {spread:>15}     loss  agreement %  compression  MACs ratio"]
    for curve, levels in sweep.curves().items():
        lines.append(f"-- {curve_name(curve)} --")
        for level, rows in levels.items():
            accuracy, deviation = mean_and_deviation([row.accuracy for row in rows])
            interval = f"{deviation:.2f}" if several else f"{rows[0].ci_low:.2f} to {rows[0].ci_high:.2f}"
            sparsity, loss, agreement, compression, macs = (
                float(np.mean([getattr(row, name) for row in rows]))
                for name in ("sparsity", "loss", "agreement", "compression", "macs_ratio")
            )
            lines.append(
                f"{level_text(level):>8} {sparsity:>8.2f} {accuracy:>11.2f}  {interval:>15} {loss:>8.4f} "
                f"{agreement:>12.2f} {compression:>11.2f}x {macs:>10.2f}x"
            )
    return "\n".join(lines)


def summarise(sweep: Sweep, curve: tuple[str, str, str], tolerance: float) -> dict[str, Any]:
    """The chosen level of a curve, among the levels that all of its checkpoints have, as an entry of the JSON."""
    names = [name for name in sweep.dense if any(row.checkpoint == name for row in sweep.table() if row.curve == curve)]
    levels = {level: rows for level, rows in sweep.curves()[curve].items() if len(rows) == len(names)}
    by_level = [[sweep.correct(row) for row in rows] for rows in levels.values()]
    dense = [sweep.dense[name] == sweep.labels for name in names]
    choice = choose_level(list(levels), by_level, dense, sweep.labels, tolerance / 100)
    return {
        **dict(zip(("criterion", "allocation", "recover"), curve, strict=True)),
        "tolerance": tolerance,
        "level": choice.level,
        "images": choice.images,
        "accuracy": percent(choice.accuracy),
        "dense": percent(choice.dense),
        "difference": percent(choice.difference.value),
        "difference_low": percent(choice.difference.low),
        "difference_high": percent(choice.difference.high),
        "sentence": sentence(curve, choice, tolerance, len(names)),
    }


def percent(share: float) -> float | None:
    """A share in percent for JSON, which knows no nan."""
    return None if share != share else round(100 * share, 6)


def sentence(curve: tuple[str, str, str], choice: Choice, tolerance: float, checkpoints: int) -> str:
    """The answer in words: the level chosen on one half, and what the other half says of it."""
    name = curve_name(curve)
    if choice.level is None:
        return f"{name}: no measured level stays within {points(tolerance)} of the dense network."
    difference = choice.difference
    over = "" if checkpoints == 1 else f", over {checkpoints} checkpoints"
    return (
        f"{name}: {level_text(choice.level)} % of the weights can go within {points(tolerance)} of dense "
        f"(chosen on half of the test images); on the other {choice.images:,} images {100 * choice.accuracy:.2f} % "
        f"against {100 * choice.dense:.2f} % dense, difference {100 * difference.value:+.2f} points "
        f"(95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}{over})."
    )
