"""Files whole or not at all, seeds, durations, and the one place that prints errors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsity.system import errors, files, machine
from sparsity.system.errors import UserError

FULL = Path("/dev/full")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    with pytest.raises(TypeError):
        files.write_atomic(path, 5)
    assert path.read_text() == "old"
    with path.open() as reader:  # whoever has the old file open keeps it whole
        files.write_atomic(path, "new")
        assert (reader.read(), path.read_text()) == ("old", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
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


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".file.{process}.tmp").touch()
    files.write_atomic(tmp_path / "file", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"file", f".file.{os.getppid()}.tmp"}


def test_written_files_have_ordinary_permissions(tmp_path):
    files.write_atomic(tmp_path / "file", "x")
    (tmp_path / "other").write_text("x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def stop_by(number):
    def body(team):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal should have arrived")

    return body


def fail(error):
    def body(team):
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (lambda team: None, 0, ""),
        (fail(UserError("two\nlines")), 1, "error: two lines\n"),
        (fail(KeyboardInterrupt()), 130, "\ninterrupted; to go on: again\n"),
        (stop_by(signal.SIGINT), 130, "\ninterrupted; to go on: again\n"),
        (stop_by(signal.SIGTERM), 143, "\ninterrupted; to go on: again\n"),
        (
            fail(torch.OutOfMemoryError("CUDA")),
            1,
            "error: out of memory; use a smaller --batch_size, network or image\n",
        ),
        (fail(OSError(28, "No space left on device")), 1, "error: [Errno 28] No space left on device\n"),
        (fail(MemoryError()), 1, "error: out of memory; use a smaller --batch_size, network or image\n"),
    ],
)
def test_errors_are_printed_in_one_place(capsys, body, status, said):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert errors.run_main(body, lambda: "again") == status
    assert capsys.readouterr().err == said
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_errors_of_the_program_itself_are_not_hidden():
    with pytest.raises(RuntimeError, match="a bug"):
        errors.run_main(fail(RuntimeError("a bug")), lambda: "")


def test_memory_that_the_machine_does_not_have_is_a_user_error(capsys):
    assert errors.run_main(lambda team: torch.empty(2**50), lambda: "") == 1
    assert "out of memory" in capsys.readouterr().err


def test_seeds_of_neighbours_are_unrelated_and_repeatable():
    draws = {keys: torch.rand(4, generator=machine.generator(*keys)) for keys in [(0, 1), (1, 0), (0, 2), (0,)]}
    assert torch.equal(draws[0, 1], torch.rand(4, generator=machine.generator(0, 1)))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_said_as_a_person_says_them(seconds, text):
    assert machine.duration(seconds) == text


def test_precision_is_chosen_by_the_hardware():
    cpu = torch.device("cpu")
    assert machine.resolve_precision("fp32", cpu) == "fp32"
    assert machine.resolve_precision("bf16", cpu) == "bf16"
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    expected = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    assert machine.resolve_precision("auto", cpu) == expected


def test_hashes_see_every_byte(tmp_path):
    tensor = torch.arange(6)
    assert machine.tensor_hash(tensor) == machine.tensor_hash(tensor.clone())
    assert machine.tensor_hash(tensor) != machine.tensor_hash(tensor + 1)
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert files.file_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
