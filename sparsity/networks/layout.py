"""The header of a packed file: which tensors it holds, in which form, and the metadata; nothing in it is trusted."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparsity.networks.archive import FILE_LIMIT

VERSION = 1


WORDS = {"fp32": np.dtype(np.uint32), "bf16": np.dtype(np.uint16)}  # what holds the bits of a value


SPARSE = 7  # one weight in so many: from here on gaps are smaller than bits, after deflate


HEADER_LIMIT = 1 << 20  # bytes of JSON


DIMENSIONS = 8


DENSE_LIMIT, DENSE_RATIO = 1 << 30, 1024  # bytes that tensors may take, whichever is more: in all, times the file's


@dataclass(frozen=True)
class Entry:
    """A float tensor in the layout: how many values are not zero, and the smallest magnitude among them, as bits."""

    name: str
    shape: list[int]
    nonzero: int
    least: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        """Whether its zeros are coded as gaps."""
        return SPARSE * self.nonzero < self.size


@dataclass(frozen=True)
class Integer:
    """A whole number in the layout, as BatchNorm's count of batches."""

    name: str
    integer: int


def infinity(dtype: np.dtype) -> int:
    """The magnitude, as bits of a word, from which on there are no finite values."""
    return 0x7F80 << 8 * dtype.itemsize - 16


def header_text(precision: str, layout: list[Entry | Integer], metadata: dict[str, Any]) -> bytes:
    """The JSON that `parse_header` reads.

    Raises TypeError for metadata that is not JSON; ValueError for NaN in it, for keys that are the same as text, for
    tensors that could not be read back, and for more than `HEADER_LIMIT` bytes.
    """
    entries = [asdict(entry) for entry in layout]
    header = _json({"version": VERSION, "precision": precision, "layout": entries, "metadata": metadata})
    if len(header) > HEADER_LIMIT:
        raise ValueError(f"{len(header)} bytes of layout and metadata are more than {HEADER_LIMIT}")
    parse_header(header)
    return header


def parse_header(header: bytes) -> tuple[str, list[Entry | Integer], dict[str, Any]]:
    """Precision, layout and metadata of a header as `header_text` writes it; otherwise one of `archive.DAMAGED`."""
    if not header.startswith(b'{"version":%d,' % VERSION):
        raise ValueError(f"its header is not of version {VERSION}")
    document = json.loads(header)
    # Written again it is the same text: no NaN, no key twice, nothing that another reader takes for something else.
    if list(document) != ["version", "precision", "layout", "metadata"] or _json(document) != header:
        raise ValueError("its header is not as it is written")
    precision, layout, metadata = document["precision"], document["layout"], document["metadata"]
    if precision not in WORDS or not isinstance(layout, list) or not isinstance(metadata, dict):
        raise ValueError("its header lacks the precision, the layout or the metadata")
    entries = [_entry(item, WORDS[precision]) for item in layout]
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("its layout names a tensor twice")
    return precision, entries, metadata


def _entry(item: Any, dtype: np.dtype) -> Entry | Integer:
    """One tensor of the layout, checked in itself; otherwise TypeError or ValueError."""
    entry = Integer(**item) if "integer" in item else Entry(**item)
    if isinstance(entry, Integer):
        sound = type(entry.integer) is int and -(2**63) <= entry.integer < 2**63
    else:
        sound = (
            isinstance(entry.shape, list)
            and len(entry.shape) <= DIMENSIONS
            and all(type(length) is int and 0 <= length < 2**31 for length in entry.shape)
            and type(entry.nonzero) is int
            and 0 <= entry.nonzero <= entry.size
            and type(entry.least) is int
            and 0 <= entry.least < infinity(dtype)
            and (entry.least > 0) == (entry.nonzero > 0)
        )
    if not sound or not isinstance(entry.name, str):
        raise ValueError(f"its layout has a wrong entry for {str(entry.name)[:40]}")
    return entry


def require_bounded(values: int, file_bytes: int) -> None:
    """ValueError when a file is too large, or its float32 values take far more memory than it could account for."""
    if file_bytes > FILE_LIMIT or 4 * values > max(DENSE_LIMIT, DENSE_RATIO * file_bytes):
        raise ValueError(f"{values} values in {file_bytes} bytes are too many")


def _json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
