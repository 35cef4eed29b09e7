"""files"""

import csv
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsity.system.errors import UserError
from sparsity.system.processes import is_running

BLOCK = 1 << 20


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename, fsync of the folder.

    Raises UserError (no space, no permission); what was at `path` is then still there.
    """
    if isinstance(data, str):
        data = data.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _remove_leftovers(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _remove_leftovers(path: Path) -> None:
    """Remove half-written files of processes that were killed while they wrote `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = leftover.name.split(".")[-2]
        if process.isdecimal() and not is_running(int(process)):
            leftover.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, where a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically, readable by a person."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def prepare_folder(folder: Path, flag: str, needed_bytes: int = 0) -> None:
    """Create a folder that outputs go to, and check now that it can be written to and has room.

    Raises UserError that names `flag`, so that hours of work are not lost to a typing error.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to ({error.strerror or error}); choose another") from error
    if free < needed_bytes:
        need, have = needed_bytes / 1e6, free / 1e6
        raise UserError(f"{flag} {folder} has {have:.0f} MB free and {need:.0f} MB are needed; make room or move it")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows atomically as CSV with a header line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue())
