"""Results as data: the rows of a sweep in CSV, its settings in JSON, its predictions in NPZ."""

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sparsity.runtime import UserError, one_line, write_atomic, write_json
from sparsity.statistics import wilson_interval


@dataclass(frozen=True)
class Row:
    """One evaluated network: a line of the CSV. Shares are in percent, `level` as asked, `sparsity` as measured."""

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

    @property
    def curve(self) -> tuple[str, str, str]:
        """The rows that one line of the plot joins, over all checkpoints."""
        return self.criterion, self.allocation, self.recover

    @property
    def key(self) -> str:
        """What tells this row from all others, as one string."""
        return row_key(self.checkpoint, self.curve, self.level)


WAYS_OUT = "measure again with --restart, or choose another --name"
COLUMNS = tuple(field.name for field in fields(Row))


def row_key(checkpoint: str, curve: tuple[str, str, str], level: float) -> str:
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


def points(value: float) -> str:
    """Percentage points in words: '1 point', '0.5 points'."""
    return f"{value:g} point" + ("" if value == 1 else "s")


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep, which share a stem."""

    stem: Path

    def with_suffix(self, suffix: str) -> Path:
        """The file of the sweep with this ending, dot included."""
        return self.stem.with_name(self.stem.name + suffix)

    @property
    def csv(self) -> Path:
        return self.with_suffix(".csv")

    @property
    def json(self) -> Path:
        return self.with_suffix(".json")

    @property
    def npz(self) -> Path:
        return self.with_suffix(".npz")

    @property
    def png(self) -> Path:
        return self.with_suffix(".png")


class Sweep:
    """The rows of a sweep with their predictions, on disk after every change.

    `header` is the content of the JSON. A row counts only when it is in the CSV and its predictions in the NPZ; the NPZ
    is written first, so a run killed between the two loses that row and nothing else.
    """

    def __init__(self, files: SweepFiles, header: dict[str, Any], labels: np.ndarray):
        self.files, self.header, self.labels = files, header, labels
        self.rows: dict[str, Row] = {}
        self.predictions: dict[str, np.ndarray] = {}
        self.dense: dict[str, np.ndarray] = {}

    def add_dense(self, checkpoint: str, predictions: np.ndarray, figures: dict[str, Any]) -> None:
        """Keep what the untouched checkpoint predicted, and its figures."""
        self.dense[checkpoint] = self._compact(predictions)
        self.header["dense"][checkpoint] = figures
        self._write_predictions()
        write_json(self.files.json, self.header)

    def add(self, row: Row, predictions: np.ndarray) -> None:
        """Keep a finished row and its predictions [N]."""
        self.rows[row.key] = row
        self.predictions[row.key] = self._compact(predictions)
        self._sort()
        self._write_predictions()
        write_csv(self.files.csv, COLUMNS, (asdict(row) | {"level": level_text(row.level)} for row in self.table()))

    def finish(self, summary: list[dict[str, Any]]) -> None:
        """Add the summary to the JSON."""
        self.header["summary"] = summary
        write_json(self.files.json, self.header)

    def table(self) -> list[Row]:
        """All rows in their canonical order: checkpoint, curve, level."""
        return list(self.rows.values())

    def curves(self) -> dict[tuple[str, str, str], dict[float, list[Row]]]:
        """Curve -> level -> rows (one for each checkpoint), levels ascending."""
        curves: dict[tuple[str, str, str], dict[float, list[Row]]] = {}
        for row in sorted(self.table(), key=lambda row: row.level):
            curves.setdefault(row.curve, {}).setdefault(row.level, []).append(row)
        return curves

    def correct(self, row: Row) -> np.ndarray:
        """The images that a row's network gets right: boolean [N]."""
        return self.predictions[row.key] == self.labels

    def _compact(self, predictions: np.ndarray) -> np.ndarray:
        few = len(self.header["data"]["classes"]) <= 256
        return np.asarray(predictions).astype(np.uint8 if few else np.uint16)

    def _sort(self) -> None:
        order = {name: index for index, name in enumerate(self.header["checkpoints"])}
        rows = sorted(self.rows.values(), key=lambda row: (order[row.checkpoint], row.curve, row.level))
        self.rows = {row.key: row for row in rows}

    def _write_predictions(self) -> None:
        shape = (0, len(self.labels))
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            rows=np.array(list(self.rows), dtype=np.str_),
            predictions=np.array([self.predictions[key] for key in self.rows]).reshape(-1, shape[1]),
            dense_checkpoints=np.array(list(self.dense), dtype=np.str_),
            dense_predictions=np.array(list(self.dense.values())).reshape(-1, shape[1]),
            labels=self.labels,
        )
        write_atomic(self.files.npz, buffer.getbuffer())


def open_sweep(files: SweepFiles, header: dict[str, Any], labels: np.ndarray, restart: bool) -> Sweep:
    """Begin a sweep, or go on with the rows that are there; the JSON is on disk when this returns.

    A checkpoint that has moved keeps the name in `header['checkpoints']` that its rows were recorded with.
    Raises UserError when the files hold rows measured with other settings, other data or another checkpoint.
    """
    sweep = Sweep(files, header, labels)
    header.setdefault("dense", {})
    if not restart and files.csv.exists():
        found = read_sweep(files)
        if found.rows:
            header["checkpoints"] = _recorded_names(found.header["checkpoints"], header["checkpoints"])
            _require_same(files, found.header, header)
            if not np.array_equal(found.labels, labels):
                raise UserError(f"{files.npz} holds other labels than the test images; {WAYS_OUT}")
            sweep.rows, sweep.predictions, sweep.dense = found.rows, found.predictions, found.dense
            header["dense"] = {name: found.header["dense"][name] for name in found.dense}
            sweep._sort()
            write_json(files.json, header)
            return sweep
    # Rows go before the new settings come, so that a kill in between cannot pair them.
    for path in (files.csv, files.npz):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path} cannot be replaced ({error.strerror}); remove it, or use another --name"
            ) from error
    write_json(files.json, header)
    return sweep


def _recorded_names(there: dict[str, dict], now: dict[str, dict]) -> dict[str, dict]:
    """The checkpoints of now, each under the name that its rows are recorded with: the hash tells which is which."""
    recorded = {entry["sha256"]: name for name, entry in there.items()}
    hashes = {entry["sha256"] for entry in now.values()}
    names = {}
    for name, entry in now.items():
        # The name may belong to rows of another file that is swept as well, under a new name.
        taken = name in there and there[name]["sha256"] in hashes - {entry["sha256"]}
        fresh = f"{name} ({entry['sha256'][:8]})" if taken else name
        names[recorded.get(entry["sha256"], fresh)] = entry
    return names


def read_sweep(files: SweepFiles) -> Sweep:
    """Read a sweep's files. Raises UserError when one is not readable or does not fit the others.

    Predictions without a row are dropped: the NPZ is written first, so a kill in between leaves one such.
    """
    if not files.json.exists():
        raise UserError(f"{files.csv} has no {files.json.name} beside it that tells its settings; {WAYS_OUT}")
    damaged = files.json
    try:
        header = _checked_header(json.loads(files.json.read_text()))
        damaged = files.npz
        with np.load(files.npz, allow_pickle=False) as arrays:
            sweep = Sweep(files, header, arrays["labels"])
            predictions = dict(zip(arrays["rows"].tolist(), arrays["predictions"], strict=True))
            dense = dict(zip(arrays["dense_checkpoints"].tolist(), arrays["dense_predictions"], strict=True))
        damaged = files.csv
        with files.csv.open(newline="") as file:
            reader = csv.DictReader(file)
            if missing := set(COLUMNS) - set(reader.fieldnames or ()):
                raise ValueError(f"no column {min(missing)}")
            rows = [_parse_row(line) for line in reader]
        sweep.rows = {row.key: row for row in rows}
        sweep.predictions = {key: predictions[key] for key in sweep.rows}
        sweep.dense = {name: dense[name] for name in header["dense"] if name in dense}
        _require_consistent(sweep)
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        EOFError,
        RecursionError,
        csv.Error,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(f"{damaged} cannot be read ({one_line(error)[:120]}); {WAYS_OUT}") from error
    return sweep


def _checked_header(header: Any) -> dict[str, Any]:
    """The content of a sweep's JSON, if its parts are what they should be; otherwise ValueError."""
    parts = ("settings", "data", "checkpoints", "dense")
    if not isinstance(header, dict) or not all(isinstance(header.get(part), dict) for part in parts):
        raise ValueError(f"one of {', '.join(parts)} is missing")
    entries = [*header["checkpoints"].values(), *header["dense"].values()]
    if not all(isinstance(entry, dict) for entry in entries) or not isinstance(header["data"].get("classes"), list):
        raise ValueError("an entry is not what it should be")
    if not all(isinstance(entry.get("sha256"), str) for entry in header["checkpoints"].values()):
        raise ValueError("a checkpoint has no hash")
    if not all(math.isfinite(figures["accuracy"]) for figures in header["dense"].values()):
        raise ValueError("an accuracy is not a number")
    return header


def _require_consistent(sweep: Sweep) -> None:
    """Every row's accuracy is that of its predictions, and its checkpoint is known; otherwise ValueError."""
    arrays = [sweep.labels, *sweep.predictions.values(), *sweep.dense.values()]
    if any(array.shape != sweep.labels.shape or array.dtype.kind not in "iu" for array in arrays):
        raise ValueError("its arrays are not class numbers of the same images")
    for row in sweep.table():
        if row.checkpoint not in sweep.header["checkpoints"]:
            raise ValueError(f"a row belongs to the unknown checkpoint {row.checkpoint}")
        if asdict(row) != asdict(row) | accuracy_columns(int(sweep.correct(row).sum()), len(sweep.labels)):
            raise ValueError(f"accuracy and predictions disagree at level {level_text(row.level)}")


def _parse_row(line: dict[str, str]) -> Row:
    return Row(**{field.name: field.type(line[field.name]) for field in fields(Row)})


def _require_same(files: SweepFiles, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Same settings and data, and every checkpoint there is among those of now: more may be added, none replaced."""
    differing = []
    for part in ("settings", "data"):
        for key in sorted(there[part].keys() | now[part].keys()):
            old, new = there[part].get(key), now[part].get(key)
            if old != new:
                differing.append(f"{key} ({_short(old)} there, {_short(new)} now)")
    for name, entry in there["checkpoints"].items():
        if name not in now["checkpoints"]:
            differing.append(f"checkpoint ({name} there, {', '.join(now['checkpoints'])} now)")
        elif entry["sha256"] != now["checkpoints"][name]["sha256"]:
            differing.append(f"checkpoint ({name} has changed since)")
    if differing:
        raise UserError(
            f"{files.csv} holds rows of another run: {'; '.join(differing)}. Measure everything again with --restart, "
            "or keep both with another --name"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows atomically as CSV with a header line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue())


def curve_name(curve: tuple[str, str, str]) -> str:
    """A curve in words: 'l1 uniform', 'l1 global + batchnorm'."""
    criterion, allocation, recover = curve
    return f"{criterion} {allocation}" + ("" if recover == "none" else f" + {recover}")
