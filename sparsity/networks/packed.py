"""Packed checkpoints: where a network is not zero, and its values, in one small .npz that no code is run to read.

The arrays of a file, all of bytes and deflated by `numpy.savez_compressed`:

    header   JSON: version, precision, layout (name, shape, counts of every tensor), metadata
    bits     one bit a weight, 1 where it is not zero, of the tensors that are not very sparse, one after the other
    gaps     for very sparse tensors the zeros before each nonzero weight, one byte each; 255 is "255 zeros, and more"
    values   the nonzero values, first the highest bytes of all, then the second ones, ...

What compresses in a value is its exponent, so its bits are turned: magnitude first, sign last, and of the magnitude the
smallest of the tensor is taken off, for pruning leaves nothing below a threshold.
"""

import math
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sparsity.networks.archive import DAMAGED, open_archive, read_bytes
from sparsity.networks.layout import (
    HEADER_LIMIT,
    WORDS,
    Entry,
    Integer,
    header_text,
    infinity,
    parse_header,
    require_bounded,
)
from sparsity.system.errors import UserError, one_line

ARRAYS = ("header", "bits", "gaps", "values")


ESCAPE = 255


def pack(state: dict[str, Tensor], metadata: dict[str, Any], precision: str = "fp32") -> memoryview:
    """The bytes of a packed file, from which `unpack` makes what `stored` returns, and `metadata`.

    `state` holds float32 tensors and int64 scalars; `metadata` what JSON can say (tuples become lists, keys text).
    Raises ValueError for other tensors, for NaN and infinities (also those that rounding to bf16 makes), and for what
    would be too large to be read back; TypeError for metadata of other types; KeyError for another precision.
    """
    layout, arrays = _coded(state, precision)
    header = header_text(precision, layout, metadata)
    buffer = BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(header, np.uint8), **arrays)
    require_bounded(sum(entry.size for entry in layout if isinstance(entry, Entry)), buffer.tell())
    return buffer.getbuffer()


def unpack(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict (floats as float32, on the CPU, in the order of packing) and the metadata of a packed file.

    Every size is checked before anything of that size is allocated. Raises UserError, one line that names the file,
    for whatever `pack` would not have written; a file is read as a whole or not at all.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is not there, or not a file; name a packed network")
    try:
        with path.open("rb") as file:
            return _read(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or one_line(error)})") from error
    except DAMAGED as error:  # damaged bytes surface as any of these from the readers of zip, deflate and JSON
        reason = one_line(error)[:120] or type(error).__name__
        raise UserError(f"{path} is damaged, cut short or not a packed network ({reason}); pack it again") from error


def stored(state: dict[str, Tensor], precision: str = "fp32") -> dict[str, Tensor]:
    """What a file of this precision gives back of `state`, in memory of its own; errors as those of `pack`.

    'fp32' keeps every bit, except that -0.0 becomes 0.0; 'bf16' rounds to the nearest bfloat16, ties to even.
    """
    result = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            result[name] = _floats(_words(name, tensor, precision), list(tensor.shape))
        else:
            result[name] = torch.tensor(_whole_number(name, tensor))
    return result


def entropy_bits(zeros: int, total: int, value_bits: int = 32) -> float:
    """Bits a weight that cannot be undercut if zeros fall anywhere and values are random: mask entropy plus values.

    The yardstick of a packed size: `zeros` of `total` weights (above 0), `value_bits` for each of the others.
    """
    shares = [zeros / total, 1 - zeros / total]
    return value_bits * shares[1] - sum(share * math.log2(share) for share in shares if share > 0)


def _coded(state: dict[str, Tensor], precision: str) -> tuple[list[Entry | Integer], dict[str, np.ndarray]]:
    """The layout of a network, and the arrays of a file but the header."""
    layout: list[Entry | Integer] = []
    masks: dict[bool, list[np.ndarray]] = {False: [], True: []}  # sparse or not -> masks
    planes = [np.empty((WORDS[precision].itemsize, 0), np.uint8)]
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            layout.append(Integer(name, _whole_number(name, tensor)))
            continue
        mask, least, values = _split(name, _words(name, tensor, precision))
        entry = Entry(name, list(tensor.shape), values.shape[1], least)
        layout.append(entry)
        masks[entry.sparse].append(mask)
        planes.append(values)
    return layout, {
        "bits": np.packbits(_joined(masks[False])),
        "gaps": _gaps(_joined(masks[True])),
        "values": np.concatenate(planes, axis=1).reshape(-1),
    }


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
    if words.dtype == np.uint16:
        words = words.astype(np.uint32) << 16
    return torch.from_numpy(words.view(np.float32).reshape(shape))


def _whole_number(name: str, tensor: Tensor) -> int:
    if tensor.dtype != torch.int64 or tensor.dim():
        raise ValueError(f"{name} is neither a float tensor nor a single int64")
    return int(tensor)


def _sign(dtype: np.dtype) -> int:
    """The place of the sign in a word, which is the number of bits of the magnitude."""
    return 8 * dtype.itemsize - 1


def _split(name: str, words: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
    """Where words are not zero, the smallest magnitude there, and the bytes of the turned words [bytes, nonzero]."""
    mask = words != 0
    kept = words[mask]
    magnitudes = kept & (1 << _sign(words.dtype)) - 1
    if magnitudes.max(initial=0) >= infinity(words.dtype):
        raise ValueError(f"{name} holds values beyond bfloat16")
    least = int(magnitudes.min()) if len(kept) else 0
    turned = (magnitudes - least) << 1 | kept >> _sign(words.dtype)
    shifts = range(_sign(words.dtype) - 7, -1, -8)
    return mask, least, np.stack([(turned >> shift).astype(np.uint8) for shift in shifts])


def _joined(masks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, bool), *masks])


def _gaps(mask: np.ndarray) -> np.ndarray:
    """The number of zeros before each nonzero, as bytes."""
    distances = np.diff(np.flatnonzero(mask), prepend=-1) - 1
    escapes, rest = np.divmod(distances, ESCAPE)
    stream = np.full(len(rest) + escapes.sum(), ESCAPE, np.uint8)
    stream[np.cumsum(escapes + 1) - 1] = rest
    return stream


def _positions(gaps: np.ndarray) -> np.ndarray:
    """Where the nonzero weights are, from the zeros before each; ValueError for a stream that ends within a gap."""
    ends = gaps != ESCAPE
    if len(gaps) and not ends[-1]:
        raise ValueError("its last gap has no end")
    return np.cumsum(gaps.astype(np.int64) + ends)[ends] - 1


def _read(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with open_archive(file, ARRAYS) as archive:
        precision, layout, metadata = parse_header(read_bytes(archive, "header", 2, HEADER_LIMIT).tobytes())
        floats = [entry for entry in layout if isinstance(entry, Entry)]
        require_bounded(sum(entry.size for entry in floats), file.seek(0, 2))
        masks = _read_masks(archive, floats)
        width = WORDS[precision].itemsize
        count = sum(entry.nonzero for entry in floats)
        planes = read_bytes(archive, "values", width * count, width * count).reshape(width, count)
    state, start = {}, 0
    for entry in layout:
        if isinstance(entry, Integer):
            state[entry.name] = torch.tensor(entry.integer)
            continue
        stop = start + entry.nonzero
        state[entry.name] = _tensor(entry, masks[entry.name], planes[:, start:stop], WORDS[precision])
        start = stop
    return state, metadata


def _read_masks(archive: zipfile.ZipFile, floats: list[Entry]) -> dict[str, np.ndarray]:
    """Name -> where a tensor is not zero, flat; ValueError unless these are as many places as its entry says."""
    dense, sparse = ([entry for entry in floats if entry.sparse is kind] for kind in (False, True))
    length = sum(entry.size for entry in dense)
    whole_bytes = -(-length // 8)
    bits = np.unpackbits(read_bytes(archive, "bits", whole_bytes, whole_bytes)).view(bool)
    if bits[length:].any():
        raise ValueError("bits are set behind the last weight")
    total, count = (sum(getattr(entry, key) for entry in sparse) for key in ("size", "nonzero"))
    positions = _positions(read_bytes(archive, "gaps", count, count + total // ESCAPE))
    if len(positions) != count or (count and positions[-1] >= total):
        raise ValueError("its gaps do not fit the number of weights")
    scattered = np.zeros(total, bool)
    scattered[positions] = True
    masks = {}
    for entries, flat in ((dense, bits), (sparse, scattered)):
        start = 0
        for entry in entries:
            masks[entry.name] = flat[start : start + entry.size]
            start += entry.size
            if np.count_nonzero(masks[entry.name]) != entry.nonzero:
                raise ValueError(f"{entry.name} has not as many values as places for them")
    return masks


def _tensor(entry: Entry, mask: np.ndarray, planes: np.ndarray, dtype: np.dtype) -> Tensor:
    """The tensor of an entry, the reverse of `_split`."""
    words = np.zeros(entry.nonzero, dtype)
    for plane in planes:
        words <<= 8
        words |= plane
    signs = words << _sign(dtype)
    words >>= 1
    if entry.nonzero and (words.min() > 0 or entry.least + int(words.max()) >= infinity(dtype)):
        raise ValueError(f"{entry.name} holds NaN, Inf, or nothing as small as it says")
    words += dtype.type(entry.least)
    words |= signs
    tensor = np.zeros(entry.size, dtype)
    tensor[mask] = words
    return _floats(tensor, entry.shape)
