"""Rows: what is written down of one evaluated network, and how it is written."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sparsity.results.statistics import discordant, mcnemar_p, wilson_interval

Curve = tuple[str, str, str]  # criterion, allocation, recover


@dataclass(frozen=True)
class Row:
    """One evaluated network: a line of the CSV. Shares are in percent, `level` as asked, `sparsity` as measured.

    `lost`, `gained` and `mcnemar_p` compare it with the dense network on all test images; `notes` is one line of text.
    The columns of MEASURED are None where nobody asked for them: the size of the exported file in bytes, milliseconds
    of one image, images a second in batches, memory in MB (10^6 bytes), and `speedup`, the throughput over that of the
    dense network in the same run.
    """

    checkpoint: str
    criterion: str
    allocation: str
    recover: str
    level: float
    sparsity: float
    nonzero: int
    parameters: int
    compression: float
    macs_ratio: float
    accuracy: float
    ci_low: float
    ci_high: float
    loss: float
    agreement: float
    seconds: float
    lost: int
    gained: int
    mcnemar_p: float
    notes: str
    file_bytes: int | None = None
    latency_ms: float | None = None
    throughput: float | None = None
    peak_memory_mb: float | None = None
    speedup: float | None = None

    def __post_init__(self):
        if self.notes.splitlines() not in ([], [self.notes]):
            raise ValueError("the notes of a row are one line")

    @property
    def curve(self) -> Curve:
        """The rows that one line of the plot joins, over all checkpoints."""
        return self.criterion, self.allocation, self.recover

    @property
    def key(self) -> str:
        """What tells this row from all others, as one string."""
        return row_key(self.checkpoint, self.curve, self.level)


SPARSE_NOTE = "sparse arithmetic"  # begins the note of rows whose network was run by sparse kernels


ONE_LAYER = "only "  # begins the allocation of rows in which one layer alone is pruned


COLUMNS = tuple(field.name for field in fields(Row))


# Columns that stay empty unless asked for, with their types; tables from before there were any lack them.
TIMED = dict.fromkeys(("latency_ms", "throughput", "peak_memory_mb", "speedup"), float)


MEASURED: dict[str, type] = {"file_bytes": int, **TIMED}


def row_key(checkpoint: str, curve: Curve, level: float) -> str:
    """The identity of a row; levels are compared as text, never as floats with ==."""
    return "|".join((checkpoint, *curve, level_text(level)))


def level_text(level: float) -> str:
    """A level in percent as a person writes it: 40, 99.5."""
    return f"{level:.10g}"


def accuracy_columns(correct: int, total: int) -> dict[str, float]:
    """`accuracy`, `ci_low` and `ci_high` of a row, in percent."""
    low, high = wilson_interval(correct, total)
    return {
        "accuracy": round(100 * correct / total, 6),
        "ci_low": round(100 * low, 6),
        "ci_high": round(100 * high, 6),
    }


def comparison_columns(correct: np.ndarray, dense_correct: np.ndarray) -> dict[str, Any]:
    """`lost`, `gained` and `mcnemar_p` of a row, from the images [N] that it and the dense network get right.

    p keeps six significant digits: as many as the CSV needs to come back the same, and a tiny one stays above 0.
    """
    lost, gained = discordant(correct, dense_correct)
    return {"lost": lost, "gained": gained, "mcnemar_p": float(f"{mcnemar_p(lost, gained):.6g}")}


def points(value: float) -> str:
    """Percentage points in words: '1 point', '0.5 points'."""
    return f"{value:g} point" + ("" if value == 1 else "s")


def curve_name(curve: Curve) -> str:
    """A curve in words: 'l1 uniform', 'l1 global + batchnorm'."""
    criterion, allocation, recover = curve
    return f"{criterion} {allocation}" + ("" if recover == "none" else f" + {recover}")


def parse_row(line: dict[str, str]) -> Row:
    """A row from a line of the CSV, as csv.DictReader gives it; ValueError or TypeError when it is not one."""
    # A line that ends early has None in its last columns, one that is too long has a column None.
    if None in line or None in line.values():
        raise ValueError("a line has another number of columns than the first")
    kinds = {field.name: field.type for field in fields(Row)} | MEASURED
    values = {name: kind(line[name]) for name, kind in kinds.items() if name not in MEASURED or line.get(name)}
    if any(not math.isfinite(values[name]) or values[name] < 0 for name in MEASURED if name in values):
        raise ValueError("a size, time or memory is not a number from 0")
    return Row(**values)
