"""Results as data: the rows of a sweep in CSV, its settings in JSON, its predictions in NPZ."""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from sparsity.results.files import SweepFiles
from sparsity.results.predictions import Arrays, read_npz, write_npz
from sparsity.results.rows import WAYS_OUT, Row, read_rows, row_key, write_rows
from sparsity.results.settings import curve_rank, recorded_names, require_header, require_same
from sparsity.system.errors import UserError, one_line
from sparsity.system.files import write_json
from sparsity.system.methods import Curve

IMAGES = ("calibration_sha256", "training_sha256")  # hashes in the JSON, of images of the training split
# Entries that a later run takes over.
KEPT = (*IMAGES, "commands", "summary", "comparisons", "measurement", "exports", "controls")
RUN = ("command", "machine", "versions")  # entries of the latest run; `commands` lists those of all that measured


class Sweep:
    """The rows of a sweep with their predictions, on disk after every change.

    `header` is the content of the JSON, `labels` [N] the true classes, `layers` the number of weights of each prunable
    layer by name, `zeros` for each row how many of them are zero, [L] in the order of `layers`. What belongs to a row
    is written before the CSV, so a run killed between the two loses that row and nothing else.
    """

    def __init__(self, files: SweepFiles, header: dict[str, Any], labels: np.ndarray, layers: dict[str, int]):
        self.files, self.header, self.labels, self.layers = files, header, labels, layers
        self.rows: dict[str, Row] = {}
        self.predictions: dict[str, np.ndarray] = {}
        self.zeros: dict[str, np.ndarray] = {}
        self.dense: dict[str, np.ndarray] = {}
        self._outdated: set[str] = set()
        self._elsewhere: set[str] = set()  # rows that other files hold

    def begin(self, **hashes: str | None) -> None:
        """Write the JSON, after old rows were set aside as `.old` where none of them is kept.

        `hashes` are `calibration_sha256` and `training_sha256`, each None for a run that reads none of these images.
        Raises UserError, before anything is written, when the rows that are kept were measured with others.
        """
        for key, now in hashes.items():
            if now and self.header.get(key) not in (None, now):
                kind = key.removesuffix("_sha256")
                raise UserError(f"{self.files.csv} holds rows of other {kind} images; {WAYS_OUT}")
        self.header |= {key: now or self.header.get(key) for key, now in hashes.items()}
        if not self.rows:  # rows go before the new settings come, so that a kill in between cannot pair them
            self.files.set_aside()
        write_json(self.files.json, self.header)

    def add_dense(self, checkpoint: str, predictions: np.ndarray, figures: dict[str, Any]) -> None:
        """Keep the predictions [N] of the untouched checkpoint, and its figures."""
        self.dense[checkpoint] = self._compact(predictions)
        self.header["dense"][checkpoint] = figures
        self._credit()
        self._write_predictions()
        write_json(self.files.json, self.header)

    def record(self, key: str, value: Any) -> None:
        """Keep a further entry in the JSON."""
        self.header[key] = value
        write_json(self.files.json, self.header)

    def merge(self, key: str, entries: dict[str, Any]) -> None:
        """Keep further lines of a table in the JSON."""
        table = self.header.get(key, {}) | entries
        if table != self.header.get(key):
            self._credit()
        self.record(key, table)

    def add(self, row: Row, predictions: np.ndarray, zeros: dict[str, int]) -> None:
        """Keep a finished row, its predictions [N], and the zeros of each layer of its network."""
        self._take(row, self._compact(predictions), np.array([zeros[name] for name in self.layers], dtype=np.int64))
        self._sort()
        if self._credit():
            write_json(self.files.json, self.header)  # before the row, which is then never without its command
        self._write_predictions()
        self._write_rows()

    def _credit(self) -> bool:
        """List this run in the JSON's `commands`; returns whether it was not there."""
        return self._add_commands([_run_of(self.header)])

    def _add_commands(self, runs: Iterable[dict[str, Any]]) -> bool:
        """List runs in the JSON's `commands`, each once; returns whether one was new."""
        commands = self.header.setdefault("commands", [])
        new = [run for run in runs if run and run not in commands]
        commands += new
        return bool(new)

    def _take(self, row: Row, predictions: np.ndarray, zeros: np.ndarray) -> None:
        """Keep a row in memory."""
        self.rows[row.key], self.predictions[row.key], self.zeros[row.key] = row, predictions, zeros
        self._outdated.discard(row.key)
        self._elsewhere.discard(row.key)

    def _sort(self) -> None:
        names = list(self.header["checkpoints"])

        def place(row: Row) -> tuple:
            return names.index(row.checkpoint), curve_rank(self.header, row.curve), row.level

        self.rows = {row.key: row for row in sorted(self.rows.values(), key=place)}

    def part(self, number: int) -> "Sweep":
        """This sweep as the process `number` sees it: it knows all rows, and writes new ones to files of its own."""
        part = copy.deepcopy(self)
        part.files, part._elsewhere = replace(self.files, part=number), set(self.rows)
        return part

    def join(self, parts: Iterable["Sweep"]) -> None:
        """Take over the rows and tables of finished parts, and remove the files of all parts."""
        parts = list(parts)
        for part in parts:
            for key, row in part.rows.items():
                self._take(row, part.predictions[key], part.zeros[key])
            self._add_commands(part.header.get("commands", []))
            if exports := {key: entry for key, entry in part.header.get("exports", {}).items() if key in part.rows}:
                self.header["exports"] = self.header.get("exports", {}) | exports
        if parts:
            self._sort()
            self._write_predictions()
            self._write_rows()
            write_json(self.files.json, self.header)
        self.files.drop_parts()

    def fingerprint(self) -> str:
        """A hash of everything that decides the networks of this sweep."""
        parts = [self.header.get(key) for key in ("settings", "data", "checkpoints", *IMAGES)]
        return hashlib.sha256(json.dumps([*parts, self.layers], sort_keys=True).encode()).hexdigest()

    def table(self) -> list[Row]:
        """All rows in their canonical order: checkpoint, curve, level."""
        return list(self.rows.values())

    def has(self, checkpoint: str, curve: Curve, level: float) -> bool:
        """Whether the row of this network is there, with everything that is wanted of it."""
        key = row_key(checkpoint, curve, level)
        return key in self.rows and key not in self._outdated

    @property
    def kept(self) -> int:
        """How many rows are there that are not measured again."""
        return len(self.rows) - len(self._outdated)

    def outdate(self, keys: Iterable[str]) -> None:
        """Have these rows measured again for a further column; until then they stay."""
        self._outdated |= self.rows.keys() & set(keys)

    def curves(self) -> dict[Curve, dict[float, list[Row]]]:
        """Curve -> level -> rows (one for each checkpoint), in the order of the curves, levels ascending.

        Only levels that all checkpoints of a curve have: means over different sets of them could not be compared.
        """
        curves: dict[Curve, dict[float, list[Row]]] = {}
        for row in sorted(self.table(), key=lambda row: (curve_rank(self.header, row.curve), row.level)):
            curves.setdefault(row.curve, {}).setdefault(row.level, []).append(row)
        for curve, levels in curves.items():
            count = len(self.checkpoints_of(curve))
            curves[curve] = {level: rows for level, rows in levels.items() if len(rows) == count}
        return curves

    def checkpoints_of(self, curve: Curve) -> list[str]:
        """The checkpoints that have a row of a curve, in their order."""
        return list(dict.fromkeys(row.checkpoint for row in self.table() if row.curve == curve))

    def correct(self, row: Row) -> np.ndarray:
        """The images that a row's network gets right: boolean [N]."""
        return self.predictions[row.key] == self.labels

    def dense_correct(self, checkpoint: str) -> np.ndarray:
        """The images that the untouched checkpoint gets right: boolean [N]."""
        return self.dense[checkpoint] == self.labels

    def _compact(self, predictions: np.ndarray) -> np.ndarray:
        """Class numbers in the type that they have on disk."""
        few = len(self.header["data"]["classes"]) <= 256
        return np.asarray(predictions).astype(np.uint8 if few else np.uint16)

    def pack(self) -> None:
        """Write the NPZ compressed, once it is complete."""
        self._write_predictions(compress=True)

    def _write_rows(self) -> None:
        write_rows(self.files.csv, (row for key, row in self.rows.items() if key not in self._elsewhere))

    def _write_predictions(self, compress: bool = False) -> None:
        keys = [key for key in self.rows if key not in self._elsewhere]
        tables = [{key: table[key] for key in keys} for table in (self.predictions, self.zeros)]
        write_npz(self.files.npz, Arrays(self.labels, self.layers, *tables, self.dense), compress)


def open_sweep(
    files: SweepFiles, header: dict[str, Any], labels: np.ndarray, layers: dict[str, int], restart: bool
) -> Sweep:
    """The sweep with the rows that are on disk, none at a restart; nothing is written until `Sweep.begin`.

    `labels` [N], `layers` name -> weights. A checkpoint that has moved keeps the name in `header['checkpoints']` that
    its rows were recorded with, and curves that are there stay in `header['curves']`. Raises UserError when the files
    hold rows measured with other settings, other data, other layers or another checkpoint.
    """
    sweep = Sweep(files, header, labels, layers)
    header.setdefault("dense", {})
    found = read_sweep(files) if files.csv.exists() and not restart else None
    if found is None or not found.rows:
        return sweep
    header["checkpoints"] = recorded_names(found.header["checkpoints"], header["checkpoints"])
    require_same(files.csv, found.header, header, (found.layers, layers))
    known = found.header.get("curves", [])
    if curves := known + [curve for curve in header.get("curves", []) if curve not in known]:
        header["curves"] = curves
    header["dense"] = {name: found.header["dense"][name] for name in found.dense}
    header |= {key: found.header[key] for key in KEPT if key in found.header}
    found.header = header
    return found


def dense_accuracy(sweep: Sweep) -> float:
    """Test accuracy of the unpruned network in percent, mean over checkpoints."""
    return float(np.mean([figures["accuracy"] for figures in sweep.header["dense"].values()]))


def _run_of(header: dict[str, Any]) -> dict[str, Any]:
    """The latest run of a JSON: its command, machine (with threads and number of processes) and versions."""
    return {key: header[key] for key in RUN if key in header}


def join_parts(files: SweepFiles, restart: bool = False) -> None:
    """Take over the rows of parts that a run of several processes left when it was killed.

    UserError where they cannot be read; at a restart, which does without them, they are removed instead.
    """
    try:
        if parts := [read_sweep(part) for part in files.parts()]:
            first = parts[0]
            main = read_sweep(files) if files.csv.exists() else Sweep(files, first.header, first.labels, first.layers)
            main.dense = first.dense | main.dense
            main.join(parts)
    except UserError:
        if not restart:
            raise
        files.drop_parts()


def read_sweep(files: SweepFiles) -> Sweep:
    """Read a sweep's files. Raises UserError when one is not readable or does not fit the others.

    Predictions without a row are dropped: they are written first, so a kill in between leaves some of one row.
    """
    if not files.json.exists():
        raise UserError(f"{files.csv} has no {files.json.name} beside it that tells its settings; {WAYS_OUT}")
    rows, damaged = {row.key: row for row in read_rows(files.csv)}, files.json
    try:
        header = json.loads(files.json.read_text())
        require_header(header)
        damaged = files.npz
        labels, layers, predictions, zeros, dense = read_npz(files.npz)
        sweep = Sweep(files, header, labels, layers)
        sweep.rows = rows
        sweep.predictions, sweep.zeros = {key: predictions[key] for key in rows}, {key: zeros[key] for key in rows}
        sweep.dense = {name: dense[name] for name in header["dense"]}
        sweep._sort()
    except Exception as error:  # the readers of JSON, zip, deflate and npy raise a dozen kinds
        reason = one_line(error)[:120] or type(error).__name__
        raise UserError(f"{damaged} cannot be read ({reason}); {WAYS_OUT}") from error
    return sweep
