"""The predictions of a sweep on disk."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsity.system.files import write_atomic

Table = dict[str, np.ndarray]


class Arrays(NamedTuple):
    """The content of an NPZ: `labels` [N], weights of `layers`; by row `predictions` [N] and `zeros` [L]; by checkpoint
    the `dense` predictions [N]."""

    labels: np.ndarray
    layers: dict[str, int]
    predictions: Table
    zeros: Table
    dense: Table


def write_npz(path: Path, arrays: Arrays, compress: bool) -> None:
    """Write the NPZ atomically; `predictions` and `zeros` have the same keys in the same order.

    To compress takes a hundred times as long, a second for 200 rows of 50,000 images.
    """
    images, layers, buffer = len(arrays.labels), arrays.layers, io.BytesIO()
    none = np.empty(0, dtype=np.uint8)  # whole numbers also where there is no row
    (np.savez_compressed if compress else np.savez)(
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
