"""Real processes, killed at random moments, continue to the very numbers of an undisturbed run.

KILLS=10 python -m pytest tests/test_interruption.py    kills ten times each instead of once
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_image_folder
from test_pruning import rows_of, without_seconds
from test_run import assert_same

import pruning
import run

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("KILLS", "1"))
EPOCHS = 6
NETWORK = ["--arch", "resnet18", "--width", "4", "--image_size", "8", "--batch_size", "64"]


def start(script, arguments):
    """The script as a process of its own, at the moment of its first line."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    return process


def kill_after(process, seconds, number=signal.SIGKILL):
    """Send a signal after some seconds; returns exit status and stderr."""
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("more") / "colours", train=300, test=250)


def training_flags(images, out):
    places = ["--checkpoint_dir", str(out / "checkpoints"), "--images_dir", str(out / "images")]
    data = ["--dataset", "folder", "--data_dir", str(images)]
    return [*data, *NETWORK, *places, "--epochs", str(EPOCHS), "--save_every", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    """A training that nobody disturbed, and the seconds that it took."""
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.perf_counter()
    assert run.main(training_flags(images, out)) == 0
    return out, time.perf_counter() - started


def checkpoints(out):
    folder = out / "checkpoints"
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))}


@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_training_resumes_to_the_bit(undisturbed, images, tmp_path, attempt):
    whole, seconds = undisturbed
    flags = training_flags(images, tmp_path)
    moment = random.Random(attempt).uniform(0, seconds)
    kill_after(start("run.py", flags), moment)
    saved = list((tmp_path / "checkpoints").glob("*_last.pth"))
    assert run.main([*flags, *(["--resume"] if saved else [])]) == 0
    assert not list(tmp_path.rglob(".*.tmp"))  # what the kill left half written is gone
    expected, found = checkpoints(whole), checkpoints(tmp_path)
    assert list(found) == list(expected)
    assert_same(expected, found)


@pytest.fixture(scope="module")
def sweep_flags(undisturbed):
    path = next((undisturbed[0] / "checkpoints").glob("*_epoch6.pth"))
    return ["--checkpoint", str(path), "--precision", "fp32", "--threads", "1", "--levels", "0:100:5"]


@pytest.fixture(scope="module")
def undisturbed_sweep(sweep_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    started = time.perf_counter()
    assert pruning.main([*sweep_flags, "--images_dir", str(out)]) == 0
    return out, time.perf_counter() - started


@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_sweep_continues_with_the_missing_levels(undisturbed_sweep, sweep_flags, tmp_path, attempt):
    whole, seconds = undisturbed_sweep
    flags = [*sweep_flags, "--images_dir", str(tmp_path)]
    kill_after(start("pruning.py", flags), random.Random(100 + attempt).uniform(0, seconds))
    table = tmp_path / "colours_resnet18_pruning.csv"
    kept = rows_of(table) if table.exists() else []
    assert pruning.main(flags) == 0
    assert rows_of(table)[: len(kept)] == kept
    name = "colours_resnet18_pruning"
    assert without_seconds(table) == without_seconds(whole / f"{name}.csv")
    with np.load(tmp_path / f"{name}.npz") as mine, np.load(whole / f"{name}.npz") as other:
        assert set(mine.files) == set(other.files)
        assert all(np.array_equal(mine[key], other[key]) for key in other.files)


@pytest.mark.parametrize("moment", [0.3, 1.0])
@pytest.mark.parametrize("script", ["run.py", "pruning.py"])
def test_an_interruption_while_torch_is_imported_is_one_line(script, moment):
    process = subprocess.Popen([sys.executable, str(ROOT / script)], stderr=subprocess.PIPE, text=True)
    status, err = kill_after(process, moment, signal.SIGINT)
    assert (status, err.strip()) == (130, "interrupted before anything was done")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_with_the_way_on(images, tmp_path, number, status):
    flags = training_flags(images, tmp_path)
    flags[flags.index("--epochs") + 1] = "1000"
    process = start("run.py", flags)
    while not list((tmp_path / "checkpoints").glob("*_last.pth")):
        time.sleep(0.05)
    found, err = kill_after(process, 0.1, number)
    assert found == status
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"interrupted; to go on: python {ROOT}/run.py --dataset folder")
    assert lines[0].endswith("--resume")
