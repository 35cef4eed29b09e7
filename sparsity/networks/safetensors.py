"""The safetensors format: eight bytes that hold the length of a JSON header, the header, the tensors one after another.

The header maps each name to `dtype`, `shape` and `data_offsets`, begin and end within the tensors' bytes, which are
little-endian and in C order (https://huggingface.co/docs/safetensors). Its entry `__metadata__` maps text to text; the
metadata of this project stands there as JSON under one key. Reading runs no code.
"""

import json
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, that of the format
SHAPE_LIMIT = 32, 1 << 40  # dimensions, and length of one
KEY = "sparsity_checkpoint"


def pack(state: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """Return the bytes of a file from which `unpack` makes `state`, to the bit, and `metadata`.

    Tensors lie in the file by falling size of their values, so that each is aligned. Raises ValueError for a dtype
    that is not of the format, TypeError for metadata that is not JSON.
    """
    for name, tensor in state.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{name} is of type {tensor.dtype}, which is not written to safetensors files")
    text = {"format": "pt", KEY: json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))}
    header: dict[str, Any] = {"__metadata__": text} | dict.fromkeys(state)
    body = bytearray()
    for name, tensor in sorted(state.items(), key=lambda item: -item[1].itemsize):
        begin = len(body)
        body += tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        span = {"shape": list(tensor.shape), "data_offsets": [begin, len(body)]}
        header[name] = {"dtype": NAMES[tensor.dtype]} | span
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return b"".join((len(encoded).to_bytes(8, "little"), encoded, body))


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, on the CPU, in the order of its header, and the metadata of this project, if any.

    All is checked before a tensor is made, and no more memory is taken than the file has bytes. Raises ValueError that
    says what is wrong, RecursionError for a header that is nested too deep.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, HEADER_LIMIT):
        raise ValueError(f"its header of {length:,} bytes is longer than the file or than {HEADER_LIMIT:,}")
    header = json.loads(str(data[8 : 8 + length], "utf-8"), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = _metadata(header.pop("__metadata__", {}))
    for name, entry in header.items():
        _check_entry(name, entry)
    _check_spans([tuple(entry["data_offsets"]) for entry in header.values()], len(data) - 8 - length)
    return {name: _tensor(entry, data, 8 + length) for name, entry in header.items()}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError where it names a key twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names a key twice")
    return found


def _metadata(told: Any) -> dict[str, Any]:
    """The metadata that `pack` wrote; empty in files of other code."""
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise ValueError("its __metadata__ does not map text to text")
    found = json.loads(told.get(KEY, "{}"))
    if not isinstance(found, dict):
        raise ValueError(f"its {KEY} is not a JSON object")
    return found


def _check_entry(name: str, entry: Any) -> None:
    """ValueError unless an entry of the header describes a tensor whose bytes are as many as its shape takes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks dtype, shape or data_offsets, or has more")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of the unknown dtype {str(entry['dtype'])[:20]}")
    for key, most in (("shape", SHAPE_LIMIT[0]), ("data_offsets", 2)):
        numbers = entry[key]
        if not isinstance(numbers, list) or len(numbers) > most or not all(_is_length(number) for number in numbers):
            raise ValueError(f"the {key} of {name} is no list of at most {most} plausible whole numbers")
    size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    if len(entry["data_offsets"]) != 2 or entry["data_offsets"][1] - entry["data_offsets"][0] != size:
        raise ValueError(f"{name} is of another size than its data_offsets")


def _is_length(number: Any) -> bool:
    return type(number) is int and 0 <= number <= SHAPE_LIMIT[1]


def _check_spans(spans: list[tuple[int, int]], total: int) -> None:
    """ValueError unless the spans cover all of `total` bytes, each byte once."""
    ends = [(0, 0), *sorted(spans), (total, total)]
    if any(after[0] != before[1] for before, after in pairwise(ends)):
        raise ValueError("its tensors overlap, leave holes, or reach beyond the file")


def _tensor(entry: dict[str, Any], data: bytes, start: int) -> Tensor:
    """The tensor of an entry, copied, because `data` cannot be written to; offsets count from `start`."""
    first, last = (start + offset for offset in entry["data_offsets"])
    if first == last:
        return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    return torch.frombuffer(bytearray(data[first:last]), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
