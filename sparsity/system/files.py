"""Files: written whole or not at all, folders checked before long work, one sweep at a time on its files."""

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsity.system.errors import UserError


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename, fsync of the folder.

    Raises UserError (no space, no permission); what was at `path` is then still there.
    """
    if isinstance(data, str):
        data = data.encode()
    temporary = path.with_name(f".{path.name}.tmp")  # the next write of this path replaces one that a kill left
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _sync_folder(path: Path) -> None:
    """Have the name of a file, new or replaced, on the disk."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, where a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: dict) -> None:
    """Write JSON atomically, readable by a person."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows atomically as CSV with a header line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file with a header line."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `path` for this process inside the block; UserError where another process holds it.

    The system lets go of the lock of a process that was killed. On Windows, which has no such locks, nothing is held.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            reason = f"another run is writing to the files of {path.stem.lstrip('.')}"
            raise UserError(f"{reason}; wait for it, or use another --name") from error
        yield  # the empty file stays: who removes it lets two others hold it
