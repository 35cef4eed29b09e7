"""Results as data: the rows of a sweep in CSV, its settings in JSON, its predictions in NPZ."""

import csv
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from sparsity.results.files import SweepFiles, set_aside
from sparsity.results.header import WAYS_OUT, checked_header, curve_rank, joined_curves, recorded_names, require_same
from sparsity.results.rows import (
    COLUMNS,
    MEASURED,
    Curve,
    Row,
    accuracy_columns,
    comparison_columns,
    level_text,
    parse_row,
    row_key,
)
from sparsity.system.errors import UserError, one_line
from sparsity.system.files import write_atomic, write_csv, write_json

IMAGES = ("calibration_sha256", "training_sha256")  # hashes in the JSON, of what a sweep reads of the training split


class Sweep:
    """The rows of a sweep with their predictions, on disk after every change.

    `header` is the content of the JSON, `labels` [N] the true classes, `layers` the number of weights of each prunable
    layer by name, `zeros` for each row how many of them are zero, [L] in the order of `layers`. A row counts only when
    it is in the CSV and its predictions in the NPZ; the NPZ is written first, so a run killed between the two loses
    that row and nothing else.
    """

    def __init__(self, files: SweepFiles, header: dict[str, Any], labels: np.ndarray, layers: dict[str, int]):
        self.files, self.header, self.labels, self.layers = files, header, labels, layers
        self.rows: dict[str, Row] = {}
        self.predictions: dict[str, np.ndarray] = {}
        self.zeros: dict[str, np.ndarray] = {}
        self.dense: dict[str, np.ndarray] = {}
        self._outdated: set[str] = set()
        self._lock = threading.RLock()  # rows may come from another thread

    def write_header(self) -> None:
        """Bring the JSON up to date."""
        with self._lock:
            write_json(self.files.json, self.header)

    def add_dense(self, checkpoint: str, predictions: np.ndarray, figures: dict[str, Any]) -> None:
        """Keep what the untouched checkpoint predicted, and its figures."""
        self.dense[checkpoint] = self.compact(predictions)
        self.header["dense"][checkpoint] = figures
        self._write_predictions()
        self.write_header()

    def record(self, key: str, value: Any) -> None:
        """Keep something more in the JSON."""
        self.header[key] = value
        self.write_header()

    def merge(self, key: str, entries: dict[str, Any]) -> None:
        """Keep more entries of something that the JSON holds as a table."""
        with self._lock:
            self.record(key, self.header.get(key, {}) | entries)

    def record_images(self, **hashes: str | None) -> None:
        """Keep the hashes of `calibration_sha256` and `training_sha256`, each None for a run that reads none of them.

        The JSON is on disk when this returns. Raises UserError, before anything is written, when rows were measured
        with others.
        """
        for key, now in hashes.items():
            there = self.header.get(key)
            if now and there and now != there:
                kind = key.removesuffix("_sha256")
                raise UserError(f"{self.files.csv} holds rows of other {kind} images; {WAYS_OUT}")
        for key, now in hashes.items():
            self.header[key] = now or self.header.get(key)
        self.write_header()

    def add(self, row: Row, predictions: np.ndarray, zeros: dict[str, int]) -> None:
        """Keep a finished row, its predictions [N], and how many weights of each layer are zero in its network."""
        if zeros.keys() != self.layers.keys():
            raise ValueError("the zeros of a row are counted in other layers than those of the sweep")
        with self._lock:
            self.zeros[row.key] = np.array([zeros[name] for name in self.layers], dtype=np.int64)
            self.predictions[row.key] = self.compact(predictions)
            self.rows[row.key] = row
            self._outdated.discard(row.key)
            self._sort()
            self._write_predictions()
            write_csv(self.files.csv, COLUMNS, (asdict(row) | {"level": level_text(row.level)} for row in self.table()))

    def fingerprint(self) -> str:
        """A hash of everything that decides what a network of this sweep is."""
        parts = [self.header[key] for key in ("settings", "data", "checkpoints")]
        images = [self.header.get(key) for key in IMAGES]
        text = json.dumps([*parts, self.layers, images], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def drop_old(self) -> None:
        """Remove what `open_sweep` set aside at a restart; the new rows are complete."""
        for path in self.files.data:
            set_aside(path).unlink(missing_ok=True)

    def finish(self, summary: list[dict[str, Any]]) -> None:
        """Add the summary to the JSON."""
        self.header["summary"] = summary
        self.write_header()

    def table(self) -> list[Row]:
        """All rows in their canonical order: checkpoint, curve, level."""
        return list(self.rows.values())

    def has(self, checkpoint: str, curve: Curve, level: float) -> bool:
        """Whether the row of this network is there, with all that is wanted of it."""
        key = row_key(checkpoint, curve, level)
        return key in self.rows and key not in self._outdated

    @property
    def kept(self) -> int:
        """How many rows are there that are not measured again."""
        return len(self.rows) - len(self._outdated)

    @property
    def outdated(self) -> frozenset[str]:
        """The keys of the rows that are there and are measured again."""
        return frozenset(self._outdated)

    def outdate(self, keys: Iterable[str]) -> None:
        """Have these rows measured again, because something more is wanted of them; until then they stay."""
        self._outdated |= self.rows.keys() & set(keys)

    def curves(self) -> dict[Curve, dict[float, list[Row]]]:
        """Curve -> level -> rows (one for each checkpoint), in the order of the curves, levels ascending.

        Only levels that all checkpoints of a curve have: means over different sets of them could not be compared.
        Table, plots and summary all start from here.
        """
        curves: dict[Curve, dict[float, list[Row]]] = {}
        for row in sorted(self.table(), key=lambda row: (curve_rank(self.header, row.curve), row.level)):
            curves.setdefault(row.curve, {}).setdefault(row.level, []).append(row)
        return {curve: self._complete(curve, levels) for curve, levels in curves.items()}

    def checkpoints_of(self, curve: Curve) -> list[str]:
        """The checkpoints that have a row of a curve, in their order."""
        return list(dict.fromkeys(row.checkpoint for row in self.table() if row.curve == curve))

    def _complete(self, curve: Curve, levels: dict[float, list[Row]]) -> dict[float, list[Row]]:
        count = len(self.checkpoints_of(curve))
        return {level: rows for level, rows in levels.items() if len(rows) == count}

    def correct(self, row: Row) -> np.ndarray:
        """The images that a row's network gets right: boolean [N]."""
        return self.predictions[row.key] == self.labels

    def dense_correct(self, checkpoint: str) -> np.ndarray:
        """The images that the untouched checkpoint gets right: boolean [N]."""
        return self.dense[checkpoint] == self.labels

    def compact(self, predictions: np.ndarray) -> np.ndarray:
        """Class numbers in the type that they have on disk."""
        few = len(self.header["data"]["classes"]) <= 256
        return np.asarray(predictions).astype(np.uint8 if few else np.uint16)

    def _sort(self) -> None:
        order = {name: index for index, name in enumerate(self.header["checkpoints"])}
        rows = sorted(
            self.rows.values(), key=lambda row: (order[row.checkpoint], curve_rank(self.header, row.curve), row.level)
        )
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
            layer_names=np.array(list(self.layers), dtype=np.str_),
            layer_weights=np.array(list(self.layers.values()), dtype=np.int64),
            layer_zeros=np.array([self.zeros[key] for key in self.rows], dtype=np.int64).reshape(-1, len(self.layers)),
        )
        write_atomic(self.files.npz, buffer.getbuffer())


def open_sweep(
    files: SweepFiles, header: dict[str, Any], labels: np.ndarray, layers: dict[str, int], restart: bool
) -> Sweep:
    """Begin a sweep, or go on with the rows that are there.

    The JSON of a new one is on disk when this returns; that of an old one stays until `record_images`. At a restart
    the old files are set aside as `.old` until `drop_old`.

    `labels` [N], `layers` name -> weights. A checkpoint that has moved keeps the name in `header['checkpoints']` that
    its rows were recorded with, and curves that are there stay in `header['curves']`. Raises UserError when the files
    hold rows measured with other settings, other data, other layers or another checkpoint.
    """
    sweep = Sweep(files, header, labels, layers)
    header.setdefault("dense", {})
    if not restart and files.csv.exists():
        found = read_sweep(files)
        if found.rows:
            header["checkpoints"] = recorded_names(found.header["checkpoints"], header["checkpoints"])
            require_same(files.csv, found.header, header, (found.layers, layers))
            if not np.array_equal(found.labels, labels):
                raise UserError(f"{files.npz} holds other labels than the test images; {WAYS_OUT}")
            sweep.rows, sweep.predictions, sweep.dense = found.rows, found.predictions, found.dense
            sweep.layers, sweep.zeros = found.layers, found.zeros
            if curves := joined_curves(found.header, header):
                header["curves"] = curves
            header["dense"] = {name: found.header["dense"][name] for name in found.dense}
            for key in (*IMAGES, "summary", "measurement", "exports"):
                if key in found.header:
                    header[key] = found.header[key]
            sweep._sort()
            return sweep
    # Rows go before the new settings come, so that a kill in between cannot pair them.
    for path in files.data:
        try:
            if restart and path.exists():
                path.replace(set_aside(path))
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path} cannot be replaced ({error.strerror}); remove it, or use another --name"
            ) from error
    write_json(files.json, header)
    return sweep


def read_sweep(files: SweepFiles) -> Sweep:
    """Read a sweep's files. Raises UserError when one is not readable or does not fit the others.

    Predictions without a row are dropped: the NPZ is written first, so a kill in between leaves one such.
    """
    if not files.json.exists():
        raise UserError(f"{files.csv} has no {files.json.name} beside it that tells its settings; {WAYS_OUT}")
    damaged = files.json
    try:
        header = checked_header(json.loads(files.json.read_text()))
        damaged = files.npz
        with np.load(files.npz, allow_pickle=False) as arrays:
            layers = dict(zip(arrays["layer_names"].tolist(), arrays["layer_weights"].tolist(), strict=True))
            sweep = Sweep(files, header, arrays["labels"], layers)
            keys = arrays["rows"].tolist()
            predictions = dict(zip(keys, arrays["predictions"], strict=True))
            zeros = dict(zip(keys, arrays["layer_zeros"], strict=True))
            _require_counts(layers, arrays["layer_weights"], arrays["layer_zeros"])
            dense = dict(zip(arrays["dense_checkpoints"].tolist(), arrays["dense_predictions"], strict=True))
        damaged = files.csv
        with files.csv.open(newline="") as file:
            reader = csv.DictReader(file)
            if missing := set(COLUMNS) - set(MEASURED) - set(reader.fieldnames or ()):
                raise ValueError(f"no column {min(missing)}")
            rows = [parse_row(line) for line in reader]
        sweep.rows = {row.key: row for row in rows}
        sweep.predictions = {key: predictions[key] for key in sweep.rows}
        sweep.zeros = {key: zeros[key] for key in sweep.rows}
        sweep.dense = {name: dense[name] for name in header["dense"] if name in dense}
        _require_consistent(sweep)
        sweep._sort()
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


def _require_counts(layers: dict[str, int], weights: np.ndarray, zeros: np.ndarray) -> None:
    """Layers of distinct names, counts [L] above 0, and zeros [rows, L] from 0 to them; otherwise ValueError."""
    if weights.dtype.kind not in "iu" or zeros.dtype.kind not in "iu" or zeros.ndim != 2:
        raise ValueError("its layers are not counted in whole numbers")
    if not len(layers) == len(weights) == zeros.shape[1] or not all(isinstance(name, str) for name in layers):
        raise ValueError("its layers and their counts do not fit each other")
    if (weights <= 0).any() or (zeros < 0).any() or (zeros > weights).any():
        raise ValueError("a layer has fewer than no zeros, or more than weights")


def _require_consistent(sweep: Sweep) -> None:
    """Every row's checkpoint is known, and its figures follow from its predictions and zeros; otherwise ValueError."""
    arrays = [sweep.labels, *sweep.predictions.values(), *sweep.dense.values()]
    if any(array.shape != sweep.labels.shape or array.dtype.kind not in "iu" for array in arrays):
        raise ValueError("its arrays are not class numbers of the same images")
    for row in sweep.table():
        if row.checkpoint not in sweep.header["checkpoints"]:
            raise ValueError(f"a row belongs to the unknown checkpoint {row.checkpoint}")
        if row.checkpoint not in sweep.dense:
            raise ValueError(f"the predictions of the untouched {row.checkpoint} are missing")
        correct, level = sweep.correct(row), level_text(row.level)
        if asdict(row) != asdict(row) | accuracy_columns(int(correct.sum()), len(sweep.labels)):
            raise ValueError(f"accuracy and predictions disagree at level {level}")
        if asdict(row) != asdict(row) | comparison_columns(correct, sweep.dense_correct(row.checkpoint)):
            raise ValueError(f"the comparison with dense and the predictions disagree at level {level}")
        share = 100 * int(sweep.zeros[row.key].sum()) / max(1, sum(sweep.layers.values()))
        if not abs(share - row.sparsity) <= 1e-6:  # what rounding to six digits leaves; also refuses nan
            raise ValueError(f"sparsity and zeros disagree at level {level}")
