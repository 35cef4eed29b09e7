"""The predictions of a sweep on disk: the NPZ, and a journal of the rows that were finished after it was written.

The journal has a line a row and is only ever appended to, so that a row costs the same however many there are.
"""

import base64
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsity.system.files import append_line, write_atomic

Table = dict[str, np.ndarray]


class Arrays(NamedTuple):
    """The content of an NPZ: `labels` [N], weights of `layers`; by row `predictions` [N] and `zeros` [L]; by checkpoint
    the `dense` predictions [N]."""

    labels: np.ndarray
    layers: dict[str, int]
    predictions: Table
    zeros: Table
    dense: Table


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write the NPZ atomically; `predictions` and `zeros` have the same keys in the same order."""
    images, layers, buffer = len(arrays.labels), arrays.layers, io.BytesIO()
    none = np.empty(0, dtype=np.uint8)  # whole numbers also where there is no row
    np.savez_compressed(
        buffer,
        rows=np.array(list(arrays.predictions), dtype=np.str_),
        predictions=np.concatenate([none, *arrays.predictions.values()]).reshape(-1, images),
        dense_checkpoints=np.array(list(arrays.dense), dtype=np.str_),
        dense_predictions=np.concatenate([none, *arrays.dense.values()]).reshape(-1, images),
        labels=arrays.labels,
        layer_names=np.array(list(layers), dtype=np.str_),
        layer_weights=np.array(list(layers.values()), dtype=np.int64),
        layer_zeros=np.array(list(arrays.zeros.values()), dtype=np.int64).reshape(-1, len(layers)),
    )
    write_atomic(path, buffer.getbuffer())


def read_npz(path: Path) -> Arrays:
    """Read an NPZ; raises one of a dozen kinds of exceptions where it is damaged."""
    with np.load(path, allow_pickle=False) as arrays:
        names, weights, labels = arrays["layer_names"].tolist(), arrays["layer_weights"].tolist(), arrays["labels"]
        predictions = _table(arrays, "rows", "predictions", len(labels))
        zeros = _table(arrays, "rows", "layer_zeros", len(names))
        dense = _table(arrays, "dense_checkpoints", "dense_predictions", len(labels))
    return Arrays(labels, dict(zip(names, weights, strict=True)), predictions, zeros, dense)


def _table(arrays: Mapping[str, np.ndarray], keys: str, values: str, width: int) -> Table:
    """Key -> its line of the array `values`; ValueError unless that holds whole numbers, [keys, width]."""
    names, table = arrays[keys].tolist(), arrays[values]
    if table.shape != (len(names), width) or table.dtype.kind not in "iu":
        raise ValueError("its arrays do not fit each other")
    return dict(zip(names, table, strict=True))


def append_row(path: Path, key: str, predictions: np.ndarray, zeros: np.ndarray) -> None:
    """Append the predictions [N] (uint8 or uint16) and zeros [L] of a row to a journal; they are then on the disk."""
    values = base64.b64encode(predictions.tobytes()).decode()
    text = json.dumps({"row": key, "type": predictions.dtype.name, "predictions": values, "zeros": zeros.tolist()})
    append_line(path, f"{zlib.crc32(text.encode()):08x} {text}")


def read_journal(path: Path, images: int, layers: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Key, predictions [images] and zeros [layers] of each row, in the order in which they were finished.

    A last line without an end, as a kill leaves it, is passed over. Raises ValueError for lines that are damaged.
    """
    for line in path.read_bytes().split(b"\n")[:-1]:
        checksum, _, text = line.partition(b" ")
        if f"{zlib.crc32(text):08x}".encode() != checksum:
            raise ValueError("a line has another checksum")
        row = json.loads(text)
        predictions = np.frombuffer(base64.b64decode(row["predictions"]), np.dtype(row["type"]))
        zeros = np.array(row["zeros"], dtype=np.int64)
        if (predictions.shape, zeros.shape, predictions.dtype.kind) != ((images,), (layers,), "u"):
            raise ValueError("a line does not fit the images or layers")
        yield row["row"], predictions, zeros
