"""Packed checkpoints: the mask, the nonzero values and the metadata of a network in one small .npz.

A file holds four arrays of bytes, deflated by `numpy.savez_compressed`; reading it runs no code:

    header   JSON: version, precision, layout (name, shape, counts of every tensor), metadata
    bits     the masks of all tensors but the very sparse ones, joined: one bit per weight, 1 where it is not zero
    gaps     the masks of very sparse tensors: the zeros before each nonzero weight, a byte each; 255: as many and more
    values   the nonzero values [bytes of a value, values]: the highest byte of each, then the second one, ...

Deflate finds little but the exponents to compress. So a value is stored as its magnitude, less the smallest one of the
tensor (pruning by magnitude leaves none below a threshold), followed by the sign.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.lib.npyio import NpzFile
from torch import Tensor

VERSION = 1
WORDS = {"fp32": np.dtype(np.uint32), "bf16": np.dtype(np.uint16)}  # hold the bits of a value
INFINITY = {"fp32": 0x7F800000, "bf16": 0x7F80}  # as bits; those of all finite magnitudes are below
SPARSE = 7  # gaps where fewer than one weight in so many is left: then they deflate better than bits
ESCAPE = 255
WHOLE = {"int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8}
WHOLE |= {"uint8": torch.uint8, "bool": torch.bool}  # buffers; they stand in the header
HEADER_LIMIT = 1 << 20  # bytes
VALUES_LIMIT = 1 << 29  # floats in a file, 2 GiB in memory: nine times a ResNet-152


@dataclass(frozen=True)
class Entry:
    """A float tensor in the layout; `least` is the smallest magnitude, as bits, of its `nonzero` values."""

    name: str
    shape: list[int]
    nonzero: int
    least: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        """Whether the mask is stored as gaps."""
        return SPARSE * self.nonzero < self.size


def pack(state: dict[str, Tensor], metadata: dict[str, Any], precision: str = "fp32") -> memoryview:
    """Return the bytes of a packed file, from which `unpack` makes `stored(state, precision)` and `metadata`.

    `state` holds float32 tensors and a few whole numbers; `metadata` is JSON (tuples become lists, keys text). Raises
    ValueError for other tensors, for NaN and infinities (also those that rounding to bf16 makes) and for more than
    `unpack` reads; TypeError for metadata that is not JSON; KeyError for a precision other than 'fp32' and 'bf16'.
    """
    layout, arrays = _encode(state, precision)
    document = {"version": VERSION, "precision": precision, "layout": layout, "metadata": metadata}
    header = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(header) > HEADER_LIMIT:
        raise ValueError(f"{len(header)} bytes of layout and metadata are more than {HEADER_LIMIT}")
    _entries(layout)  # refuses what `unpack` would refuse
    buffer = BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(header, np.uint8), **arrays)
    return buffer.getbuffer()


def unpack(data: bytes | memoryview) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict (floats as float32, on the CPU, in the order of packing) and metadata of a packed file.

    Sizes are checked before memory is taken, and the checksums of the zip on reading. Damaged bytes raise ValueError,
    zlib.error, or nearly any other exception of the readers of zip, .npy and JSON.
    """
    with NpzFile(BytesIO(data), allow_pickle=False) as arrays:
        header = json.loads(_read_array(arrays, "header", 0, HEADER_LIMIT).tobytes())
        if header["version"] != VERSION:
            raise ValueError(f"it is of version {header['version']}, not {VERSION}")
        layout, precision = header["layout"], header["precision"]
        entries = _entries(layout)
        masks = _read_masks(arrays, entries)
        counts, width = [entry.nonzero for entry in entries], WORDS[precision].itemsize
        values = _read_array(arrays, "values", width * sum(counts), width * sum(counts)).reshape(width, -1)
    parts = iter(np.split(values, np.cumsum(counts, dtype=int), axis=1))
    floats = (_tensor(entry, next(masks[entry.sparse]), next(parts), precision) for entry in entries)
    state = {item["name"]: _integers(item) if "integer" in item else next(floats) for item in layout}
    return state, header["metadata"]


def stored(state: dict[str, Tensor], precision: str = "fp32") -> dict[str, Tensor]:
    """Return a copy of `state` as a packed file of this precision gives it back; errors as those of `pack`.

    'fp32' keeps every bit, except that -0.0 becomes 0.0; 'bf16' rounds to the nearest bfloat16, ties to even.
    """

    def back(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return _floats(_words(name, tensor, precision), list(tensor.shape))
        return _integers(_whole(name, tensor))

    return share(state, back)


def share(state: dict[str, Tensor], function: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Return `state` with `function` of each name and tensor; a tensor with several names stays one."""
    results: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) not in results:
            results[id(tensor)] = function(name, tensor)
    return {name: results[id(tensor)] for name, tensor in state.items()}


def entropy_bits(zeros: int, total: int, value_bits: int = 32) -> float:
    """Return the entropy in bits a weight of a random mask with `zeros` of `total` (above 0), and of random values.

    The yardstick of a packed size: each weight that is not zero takes `value_bits`.
    """
    shares = [zeros / total, 1 - zeros / total]
    return value_bits * shares[1] - sum(share * math.log2(share) for share in shares if share > 0)


def _encode(state: dict[str, Tensor], precision: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The layout of a file, and its arrays without the header."""
    layout, values = [], [np.empty((WORDS[precision].itemsize, 0), np.uint8)]
    masks = {False: [np.empty(0, bool)], True: [np.empty(0, bool)]}  # those of the sparse tensors: True
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            layout.append(_whole(name, tensor))
            continue
        entry, mask, value_bytes = _encode_tensor(name, tensor, precision)
        layout.append(asdict(entry))
        masks[entry.sparse].append(mask)
        values.append(value_bytes)
    return layout, {
        "bits": np.packbits(np.concatenate(masks[False])),
        "gaps": _gaps(np.concatenate(masks[True])),
        "values": np.concatenate(values, axis=1).reshape(-1),
    }


def _entries(layout: list[dict[str, Any]]) -> list[Entry]:
    """The float tensors of a layout; ValueError where they would take more memory than a network does."""
    entries = [Entry(**item) for item in layout if "integer" not in item]
    numbers = [number for entry in entries for number in (*entry.shape, entry.nonzero)]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("its shapes are not made of whole numbers")
    if max(sum(entry.size for entry in entries), sum(entry.nonzero for entry in entries)) > VALUES_LIMIT:
        raise ValueError(f"it has too many values, more than {VALUES_LIMIT}")
    return entries


def _words(name: str, tensor: Tensor, precision: str) -> np.ndarray:
    """The bits of every value, flat, as unsigned words of the precision; -0.0 as 0.0."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} is of type {tensor.dtype}; only float32 is packed")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or Inf, which are not packed")
    words = tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint32)
    if precision == "bf16":  # by hand, because processors that do it themselves drop denormal numbers
        words = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(words << 1, words, words.dtype.type(0))


def _floats(words: np.ndarray, shape: list[int]) -> Tensor:
    """The float32 tensor of words of either precision."""
    if words.dtype == np.uint16:
        words = words.astype(np.uint32) << 16
    return torch.from_numpy(words.view(np.float32).reshape(shape))


def _whole(name: str, tensor: Tensor) -> dict[str, Any]:
    """The layout's entry of a tensor of whole numbers."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in WHOLE or not tensor.numel():
        raise ValueError(f"{name} holds neither floats nor whole numbers")
    return {"name": name, "integer": tensor.tolist()} | ({} if dtype == "int64" else {"dtype": dtype})


def _integers(item: dict[str, Any]) -> Tensor:
    """The tensor of an entry of `_whole`."""
    return torch.tensor(item["integer"], dtype=WHOLE[item.get("dtype", "int64")])


def _encode_tensor(name: str, tensor: Tensor, precision: str) -> tuple[Entry, np.ndarray, np.ndarray]:
    """The layout's entry of a tensor, its mask, flat, and its nonzero values as bytes [bytes of a value, nonzero]."""
    words = _words(name, tensor, precision)
    sign = 8 * words.itemsize - 1  # the place of its bit
    mask = words != 0
    kept = words[mask]
    magnitudes = kept & (1 << sign) - 1
    if magnitudes.max(initial=0) >= INFINITY[precision]:
        raise ValueError(f"{name} holds values beyond bfloat16")
    least = int(magnitudes.min()) if len(kept) else 0
    turned = (magnitudes - least) << 1 | kept >> sign
    value_bytes = turned.astype(turned.dtype.newbyteorder(">")).view(np.uint8).reshape(-1, turned.itemsize).T
    return Entry(name, list(tensor.shape), len(kept), least), mask, value_bytes


def _tensor(entry: Entry, mask: np.ndarray, value_bytes: np.ndarray, precision: str) -> Tensor:
    """The tensor of an entry, the reverse of `_encode_tensor`."""
    dtype = WORDS[precision]
    turned = np.ascontiguousarray(value_bytes.T).view(dtype.newbyteorder(">")).reshape(-1).astype(dtype)
    tensor = np.zeros(entry.size, dtype)
    tensor[mask] = (turned >> 1) + entry.least | turned << 8 * dtype.itemsize - 1
    return _floats(tensor, entry.shape)


def _gaps(mask: np.ndarray) -> np.ndarray:
    """The number of zeros before each nonzero weight, as bytes."""
    distances = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    escapes, rest = np.divmod(distances, ESCAPE)
    gaps = np.full(len(rest) + escapes.sum(), ESCAPE, np.uint8)
    gaps[np.cumsum(escapes + 1) - 1] = rest
    return gaps


def _read_array(arrays: NpzFile, name: str, lowest: int, highest: int) -> np.ndarray:
    """A flat array of bytes; ValueError, before it is read, for another one or a length outside of the bounds."""
    member = f"{name}.npy"
    with arrays.zip.open(member) as file:
        known = npy.read_magic(file) == (1, 0)
        shape, _, dtype = npy.read_array_header_1_0(file)
        whole = file.tell() + math.prod(shape) == arrays.zip.getinfo(member).file_size  # or its checksum is not read
    if not known or dtype != np.uint8 or len(shape) != 1 or not whole or not lowest <= shape[0] <= highest:
        raise ValueError(f"{name} is no array of {lowest} to {highest} bytes")
    return arrays[member]


def _read_masks(arrays: NpzFile, entries: list[Entry]) -> dict[bool, Iterator[np.ndarray]]:
    """The flat masks of all tensors, in their order: False -> of those stored as bits, True -> as gaps."""
    sizes = {kind: [entry.size for entry in entries if entry.sparse is kind] for kind in (False, True)}
    length = -(-sum(sizes[False]) // 8)
    bits = np.unpackbits(_read_array(arrays, "bits", length, length), count=sum(sizes[False])).view(bool)
    count, total = sum(entry.nonzero for entry in entries if entry.sparse), sum(sizes[True])
    gaps = _read_array(arrays, "gaps", count, count + total // ESCAPE)
    ends = gaps != ESCAPE
    scattered = np.zeros(total, bool)
    scattered[np.cumsum(gaps.astype(np.int64) + ends)[ends] - 1] = True
    flat = {False: bits, True: scattered}
    return {kind: iter(np.split(flat[kind], np.cumsum(sizes[kind], dtype=int))) for kind in flat}
