"""Arrays of bytes out of a .npz that nobody vouches for: sizes are checked first, and no pickle is ever opened."""

import struct
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from sparsity.system.files import BLOCK

FILE_LIMIT = (1 << 31) - 1  # from here on numpy writes another form of directory


DIRECTORY_LIMIT = 4096


END = struct.Struct("<4s4H2LH")  # the record at the end of a zip file that tells where its directory is


# What damaged bytes raise in the readers of zip and deflate, and in those of this project.
DAMAGED = (ValueError, LookupError, TypeError, OverflowError, EOFError, NotImplementedError, RecursionError)


DAMAGED += (struct.error, zipfile.BadZipFile, zlib.error)


def open_archive(file: BinaryIO, names: tuple[str, ...]) -> zipfile.ZipFile:
    """The archive in an open file that holds exactly these arrays, in this order, as `numpy.savez_compressed` writes.

    Raises one of `DAMAGED` for any other file.
    """
    _require_small_directory(file)
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if [member.filename for member in members] != [f"{name}.npy" for name in names]:
        raise ValueError(f"it does not hold the arrays {', '.join(names)}")
    for member in members:
        if member.flag_bits or member.compress_type != zipfile.ZIP_DEFLATED:
            raise ValueError(f"{member.filename} is encrypted, or not deflated as numpy does it")
    return archive


def read_bytes(archive: zipfile.ZipFile, name: str, lowest: int, highest: int) -> np.ndarray:
    """The array `name`, uint8 of one dimension, of a length between two bounds that are checked before it is read.

    Raises one of `DAMAGED` for any other array, and when the bytes do not fit their checksum.
    """
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        start = file.read(10)
        if start[:8] != b"\x93NUMPY\x01\x00":
            raise ValueError(f"{name} is not an array")
        described = int.from_bytes(start[8:], "little")
        length = member.file_size - len(start) - described
        if not lowest <= length <= highest:
            raise ValueError(f"{name} takes {length} bytes instead of {lowest} to {highest}")
        # Compared as text, because parsing it would mean to evaluate what a stranger wrote.
        expected = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({length},), }}"
        if file.read(described).strip() != expected.encode():
            raise ValueError(f"{name} is not a plain array of {length} bytes")
        return _filled(file, length)


def _filled(file: BinaryIO, length: int) -> np.ndarray:
    """The next bytes, block by block: memory that is never written to is never taken from the system."""
    data = np.empty(length, np.uint8)
    filled = 0
    while filled < length:
        count = file.readinto(data[filled : filled + BLOCK])
        if not count:
            raise EOFError("it ends too early")
        filled += count
    return data


def _require_small_directory(file: BinaryIO) -> None:
    """`zipfile` takes a directory of any size into memory, and searches for it; here it is small and in its place."""
    size = file.seek(0, 2)
    file.seek(max(0, size - END.size - 20))
    tail = file.read()
    if len(tail) < END.size:
        raise ValueError("it is empty or nearly so")
    mark, *_, directory, offset, comment = END.unpack(tail[-END.size :])
    large = tail.startswith(b"PK\x06\x07") or size > FILE_LIMIT or directory > DIRECTORY_LIMIT
    if mark != b"PK\x05\x06" or comment or large or offset + directory + END.size != size:
        raise ValueError("it does not end as a packed network does")
