"""Rows: one line of the CSV for each evaluated network."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sparsity.results.statistics import discordant, mcnemar_p, wilson_interval
from sparsity.system.errors import UserError, one_line
from sparsity.system.files import read_csv, write_csv
from sparsity.system.flags import level_text
from sparsity.system.methods import Curve

WAYS_OUT = "replace all rows with --restart, or choose another --name"
SPARSE_NOTE = "sparse arithmetic"  # the note of rows whose network was run by sparse kernels
SEMI_STRUCTURED_NOTE = "semi-structured kernels"  # begins that of rows that were timed by them

MACS_UNIT = "multiply-adds"


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

    @property
    def curve(self) -> Curve:
        """The curve of the plot that this row is a point of, over all checkpoints."""
        return Curve(self.criterion, self.allocation, self.recover)

    @property
    def key(self) -> str:
        """The identity of this row: `row_key`."""
        return row_key(self.checkpoint, self.curve, self.level)


COLUMNS = tuple(field.name for field in fields(Row))
TIMED = ("latency_ms", "throughput", "peak_memory_mb", "speedup")
MEASURED = ("file_bytes", *TIMED)  # columns that stay empty unless asked for


def row_key(checkpoint: str, curve: Curve, level: float) -> str:
    """The identity of a row; levels are compared as text, never as floats with ==."""
    return "|".join((checkpoint, *curve, level_text(level)))


def accuracy_columns(correct: int, total: int) -> dict[str, float]:
    """`accuracy`, `ci_low` and `ci_high` of a row, in percent."""
    low, high = wilson_interval(correct, total)
    return {"accuracy": round(100 * correct / total, 6), "ci_low": round(100 * low, 6), "ci_high": round(100 * high, 6)}


def comparison_columns(correct: np.ndarray, base_correct: np.ndarray) -> dict[str, Any]:
    """`lost`, `gained` and `mcnemar_p` of a network against a base, from the images [N] that the two get right."""
    lost, gained = discordant(correct, base_correct)
    p = float(f"{mcnemar_p(lost, gained):.6g}")  # significant digits: however small, it does not become 0
    return {"lost": lost, "gained": gained, "mcnemar_p": p}


def points(value: float) -> str:
    """Percentage points in words: '1 point', '0.5 points'."""
    return f"{value:g} point" + ("" if value == 1 else "s")


def curve_name(curve: Curve) -> str:
    """A curve in words: 'l1 uniform', 'l1 global + batchnorm'."""
    criterion, allocation, recover = curve
    return f"{criterion} {allocation}" + ("" if recover == "none" else f" + {recover}")


def unit(curve: Curve, settings: dict[str, Any]) -> str:
    """The unit of a level of a curve: it is a share of these."""
    if curve.pattern:
        return f"weights in groups of {curve.pattern[1]} inputs"
    if settings.get("budget") == "macs":
        return MACS_UNIT
    filters = "channels" if settings.get("couple") else "inner filters"
    return filters if curve.prunes_filters else "weights"


def column_mean(rows: list[Row], column: str) -> float:
    """Mean of a column over the checkpoints of a level."""
    return float(np.mean([getattr(row, column) for row in rows]))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows atomically as CSV."""
    write_csv(path, COLUMNS, (asdict(row) | {"level": level_text(row.level)} for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV, none where there is no file. Raises UserError when it cannot be read."""
    if not path.exists():
        return []
    try:
        return [_parse(line) for line in read_csv(path)]
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)[:120]}); {WAYS_OUT}") from error


def _parse(line: dict[str, str]) -> Row:
    """A row from a line of the CSV, as csv.DictReader gives it."""
    # A line that ends early has None in its last columns, one that is too long has a column None.
    if None in line or None in line.values():
        raise ValueError("a line has another number of columns than the first")
    kinds = {field.name: field.type for field in fields(Row)} | dict.fromkeys(TIMED, float) | {"file_bytes": int}
    return Row(**{name: kind(line[name]) for name, kind in kinds.items() if name not in MEASURED or line[name]})
