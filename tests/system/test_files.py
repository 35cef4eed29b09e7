"""Files are written whole or not at all, and by one run at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from sparsity.system import files
from sparsity.system.errors import UserError

FULL = Path("/dev/full")


def test_files_are_written_whole_or_not_at_all_without_litter(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    (tmp_path / ".file.tmp").write_text("left half written by a process that was killed")
    files.write_atomic(path, "old")
    other.write_text("old")
    assert path.stat().st_mode == other.stat().st_mode  # ordinary permissions
    with pytest.raises(TypeError):
        files.write_atomic(path, 5)
    assert path.read_text() == "old"
    with path.open() as reader:  # whoever has the old file open keeps it whole
        files.write_atomic(path, "new")
        assert (reader.read(), path.read_text()) == ("old", "new")
    assert set(tmp_path.iterdir()) == {path, other}
    with pytest.raises(UserError, match="cannot write"):
        files.write_atomic(tmp_path / "none" / "file", "new")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_user_error(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    real = os.fsync

    def full(descriptor):
        with FULL.open("wb") as file:  # the real error of a full disk
            file.write(b"x")
            file.flush()
            real(file.fileno())

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_csv_and_json_come_back(tmp_path):
    rows = [{"a": "1", "b": "x,y"}, {"a": "2", "b": 'q"\n'}]
    files.write_csv(tmp_path / "t.csv", ("a", "b"), rows)
    assert files.read_csv(tmp_path / "t.csv") == rows
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "t.json", {"nan": float("nan")})


def test_hashes_see_every_byte(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert files.file_hash(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_lock_is_held_by_one_process_and_goes_with_it(tmp_path):
    path = tmp_path / "sweep.lock"
    code = (
        "import sys, pathlib, time; from sparsity.system.files import lock; "
        "held = lock(pathlib.Path(sys.argv[1])); held.__enter__(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is writing to the files of sweep; wait"), files.lock(path):
        raise AssertionError
    other.kill()
    other.wait()
    with files.lock(path):
        assert path.exists()
