"""Real sweeps, killed in their middle, continue to the very rows of an undisturbed sweep, by one process or several.

KILLS=10 python -m pytest tests/robustness    kills ten times each instead of once
"""

import json
import random
import signal

import numpy as np
import pytest
from conftest import write_image_folder
from helpers import (
    KILLS,
    ROOT,
    export,
    files_of,
    kill_when,
    launch,
    rows_of,
    run_to_the_end,
    sweep,
    without_seconds,
)

TABLE = "colours_resnet18_pruning.csv"
LEVELS = 2 * 21


@pytest.fixture(scope="module")
def flags(tiny_checkpoint, tmp_path_factory):
    """Flags of a sweep of 42 networks that takes a few seconds."""
    images = write_image_folder(tmp_path_factory.mktemp("more") / "colours", train=16, test=250)
    method = ["--recover", "none", "batchnorm", "--calibration_images", "16", "--allocation", "global"]
    return ["--checkpoint", tiny_checkpoint, "--data_dir", images, "--precision", "fp32", "--threads", "1", *method]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """The folder of a sweep that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert sweep(out, *flags) == 0
    return out


def rows_so_far(folder):
    """How many finished rows are on disk, in the table or in the part of another process."""
    return sum(max(0, path.read_text().count("\n") - 1) for path in folder.glob("colours_resnet18_pruning*.csv"))


def assert_same_sweep(found, expected):
    assert without_seconds(found / TABLE) == without_seconds(expected / TABLE)
    with np.load(files_of(found).npz) as mine, np.load(files_of(expected).npz) as other:
        assert set(mine.files) == set(other.files)
        assert all(np.array_equal(mine[key], other[key]) for key in other.files)
    assert not [path for kind in ("_part*", "_state.pth") for path in found.glob(f"*{kind}")]


@pytest.mark.parametrize("processes", [1, 2, 4] if KILLS > 1 else [1, 2])
@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_sweep_continues_with_the_missing_rows(undisturbed, flags, tmp_path, attempt, processes):
    draw = random.Random(100 * processes + attempt)
    count, rank = draw.randint(1, LEVELS // 2), draw.randrange(processes)
    run = launch("pruning.py", *flags, "--images_dir", tmp_path, processes=processes)
    kill_when(run, lambda: rows_so_far(tmp_path) >= count, rank=rank if processes > 1 else -1)
    kept = rows_so_far(tmp_path)
    assert count <= kept < LEVELS
    assert sweep(tmp_path, *flags, "--levels", "0,100") == 0  # joins what was finished, and little else
    before = rows_of(tmp_path / TABLE)
    assert len(before) >= kept
    assert sweep(tmp_path, *flags) == 0
    assert all(row in rows_of(tmp_path / TABLE) for row in before)
    assert_same_sweep(tmp_path, undisturbed)


def test_curves_in_steps_and_exported_files_are_those_of_one_process(flags, tmp_path):
    steps = ["--levels", "40,80", "--schedule", "iterative", "--export", "80"]
    one, two = tmp_path / "1", tmp_path / "2"
    assert export(one, *flags, *steps) == 0
    places = ["--images_dir", two, "--checkpoint_dir", two / "files"]
    run_to_the_end("pruning.py", *flags, *steps, *places, processes=2)
    assert_same_sweep(two, one)
    files = [sorted((out / "files").glob("*.npz")) for out in (one, two)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 2
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    headers = [json.loads((out / TABLE).with_suffix(".json").read_text()) for out in (one, two)]
    assert headers[0]["exports"].keys() == headers[1]["exports"].keys()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--checkpoint", "nowhere.pth"], "error: checkpoint nowhere.pth is not there"),
        (["--levels", "forty"], "pruning.py: error: argument --levels: 'forty' is neither"),
    ],
)
def test_an_error_of_all_processes_is_told_once(tmp_path, flags, expected):
    process = launch("pruning.py", *flags, "--images_dir", tmp_path, processes=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith(("error:", "interrupted", "pruning.py: error:"))]
    assert len(said) == 1 and said[0].startswith(expected)


def test_an_interruption_is_one_line_with_the_way_on(flags, tmp_path):
    process = launch("pruning.py", *flags, "--images_dir", tmp_path, "--restart")
    err = kill_when(process, lambda: rows_so_far(tmp_path) > 2, signal.SIGINT)
    assert process.returncode == 130
    (line,) = err.strip().splitlines()
    assert line.startswith(f"interrupted; to go on: python {ROOT}/pruning.py --checkpoint")
    assert "--restart" not in line  # the rows so far are kept
