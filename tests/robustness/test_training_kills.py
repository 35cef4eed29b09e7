"""Trainings that are killed in their middle, or lose one of their processes, end bit for bit as undisturbed ones.

KILLS=10 python -m pytest tests/robustness    kills ten times each instead of once, and by four processes too
"""

import random
import signal
import time

import pytest
from conftest import train, train_arguments, write_image_folder
from helpers import KILLS, assert_same, checkpoints, kill_when, launch, run_to_the_end

EPOCHS, STATE = 5, "colours_resnet18_last.pth"
# Three epochs on images of 4 pixels, then two on 8.
RECIPE = ["--recipe", "strong", "--ema", "0.9", "--cutout", "2", "--batch_size", "25", "--save_every", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("more") / "colours", train=60, test=100)


def run_undisturbed(images, out, size, *flags):
    """The checkpoints of a training to its end, in this process or by torchrun as several."""
    flags = ["--epochs", str(EPOCHS), *RECIPE, *flags]
    if size == 1:
        train(images, out, *flags)
    else:
        said = run_to_the_end("run.py", *train_arguments(images, out, *flags), processes=size)
        assert said.count("each process has the statistics of its own part") == said.count("\nTest accuracy: ") == 1
    return checkpoints(out)


@pytest.fixture(scope="module", params=[1, 2, 4] if KILLS > 1 else [1, 2])
def undisturbed(request, images, tmp_path_factory):
    """The number of processes, and the checkpoints of a training by so many that nobody disturbed."""
    return request.param, run_undisturbed(images, tmp_path_factory.mktemp("whole"), request.param)


@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_training_resumes_to_the_bit(images, undisturbed, tmp_path, attempt):
    """SIGKILL to the one process, or to one of several, at a random moment after the first epoch."""
    size, whole = undisturbed
    draw = random.Random(attempt)
    delay, rank = draw.uniform(0, 0.1), draw.randrange(size) if size > 1 else -1

    def ready():
        there = (tmp_path / "checkpoints" / STATE).exists()
        time.sleep(delay if there else 0)
        return there

    flags = train_arguments(images, tmp_path, "--epochs", str(EPOCHS), *RECIPE)
    kill_when(launch("run.py", *flags, processes=size), ready, rank=rank)
    assert 1 <= checkpoints(tmp_path)[STATE]["epoch"] < EPOCHS  # the kill came in the middle
    assert_same(whole, run_undisturbed(images, tmp_path, size, "--resume"))
    assert not list(tmp_path.rglob(".*.tmp"))  # the half-written file of the kill is gone
    assert whole[STATE]["settings"]["processes"] == size


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_is_one_line_with_the_way_on(images, tmp_path, number, status):
    process = launch("run.py", *train_arguments(images, tmp_path, "--epochs", "1000", *RECIPE))
    err = kill_when(process, (tmp_path / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth").exists, number)
    assert process.returncode == status
    (line,) = err.strip().splitlines()
    assert line.startswith("interrupted; to go on: python ") and line.endswith("--resume")
