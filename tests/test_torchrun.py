"""Real runs by torchrun on the CPU: the results of one process, and of an undisturbed run after a rank was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import train_arguments, write_image_folder
from test_interruption import checkpoints
from test_pruning import rows_of, without_seconds
from test_run import assert_same

import pruning

ROOT = Path(__file__).parents[1]
TABLE = "colours_resnet18_pruning.csv"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ERROR = "error: rank {rank} (process {process}) of 2 died; what was finished before is kept; to go on: torchrun"


def launch(processes, script, *arguments):
    """A run of several processes, begun."""
    return subprocess.Popen(
        [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )


def run_to_the_end(processes, script, *arguments):
    """Its standard output; the run has to succeed."""
    process = launch(processes, script, *arguments)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def process_of(launcher, rank):
    """The process of a rank, as the environment of the children tells it."""
    for child in subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"rank {rank} is not there")


def kill_rank(launcher, rank, when):
    """Kill a rank as soon as `when` holds; the run has to end by itself, and says what happened in one line of ours."""
    while not when():
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.02)
    process = process_of(launcher, rank)
    started = time.perf_counter()
    os.kill(process, signal.SIGKILL)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and time.perf_counter() - started < 60
    ours = [line for line in err.splitlines() if line.startswith(("error:", "interrupted"))]
    assert len(ours) == 1 and ours[0].startswith(ERROR.format(rank=rank, process=process))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("more") / "colours", train=40, test=120)


def test_gradients_of_one_step_are_those_of_one_process(tmp_path):
    out = tmp_path / "found.json"
    run_to_the_end(3, "tests/gradients.py", out)
    found = json.loads(out.read_text())
    assert len(found) == 4
    for name, distance in found.items():
        assert distance < (1e-12 if "float64" in name else 1e-5), name


def test_a_killed_training_resumes_to_the_bit(images, tmp_path):
    def flags(out):
        return train_arguments(
            images, out, "--epochs", "4", "--batch_size", "25", "--recipe", "strong", "--warmup_epochs", "1"
        )

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    said = run_to_the_end(2, "run.py", *flags(whole))
    assert said.count("each process has the statistics of its own part") == said.count("\nTest accuracy: ") == 1
    state = cut / "checkpoints" / "colours_resnet18_last.pth"
    kill_rank(launch(2, "run.py", *flags(cut)), 1, state.exists)
    before = torch.load(state, weights_only=True)["epoch"]
    assert before < 4
    run_to_the_end(2, "run.py", *flags(cut), "--resume")
    assert_same(checkpoints(whole), checkpoints(cut))
    settings = checkpoints(whole)["colours_resnet18_last.pth"]["settings"]
    assert settings["processes"] == 2


def test_a_sweep_goes_on_after_a_kill_to_the_rows_of_one_process(images, tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", str(tiny_checkpoint), "--data_dir", str(images), "--precision", "fp32", "--threads", "1"]
    flags += ["--levels", "0:100:5", "--recover", "none", "batchnorm", "--calibration_images", "16"]
    alone, cut = tmp_path / "alone", tmp_path / "cut"
    assert pruning.main([*flags, "--images_dir", str(alone)]) == 0
    table = cut / TABLE
    kill_rank(
        launch(2, "pruning.py", *flags, "--images_dir", cut), 0, lambda: table.exists() and len(rows_of(table)) > 5
    )
    kept = rows_of(table)
    assert 5 < len(kept) < len(rows_of(alone / TABLE))
    assert pruning.main([*flags, "--images_dir", str(cut)]) == 0
    assert all(row in rows_of(table) for row in kept)
    assert without_seconds(table) == without_seconds(alone / TABLE)


def test_curves_in_steps_and_exported_files_are_those_of_one_process(images, tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", str(tiny_checkpoint), "--data_dir", str(images), "--precision", "fp32", "--threads", "1"]
    flags += ["--levels", "40,80", "--schedule", "iterative", "--recover", "none", "batchnorm", "--export", "80"]
    flags += ["--calibration_images", "16"]
    folders = []
    for name in ("alone", "shared"):
        out = tmp_path / name
        folders.append(out)
        words = [*flags, "--images_dir", str(out), "--checkpoint_dir", str(out / "files")]
        if name == "alone":
            assert pruning.main(words) == 0
        else:
            run_to_the_end(2, "pruning.py", *words)
    assert without_seconds(folders[0] / TABLE) == without_seconds(folders[1] / TABLE)
    files = [sorted((out / "files").glob("*.npz")) for out in folders]
    assert [path.name for path in files[0]] == [path.name for path in files[1]] and len(files[0]) == 2
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    headers = [json.loads((out / TABLE).with_suffix(".json").read_text()) for out in folders]
    assert headers[0]["exports"].keys() == headers[1]["exports"].keys()
    assert not list(folders[1].glob("*_state.pth"))


def test_what_is_wrong_is_said_once(tmp_path):
    process = launch(2, "pruning.py", "--checkpoint", "nowhere.pth", "--images_dir", tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    said = [line for line in err.splitlines() if line.startswith(("error:", "interrupted", "usage:"))]
    assert len(said) == 1 and said[0].startswith("error: checkpoint nowhere.pth is not there")
