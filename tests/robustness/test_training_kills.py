"""Trainings that are killed in their middle, or lose one of their processes, end bit for bit as undisturbed ones.

KILLS=10 python -m pytest tests/robustness    kills ten times each instead of once, and by four processes too
"""

import random
import shutil
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


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("attempt", range(KILLS))
def test_a_killed_training_resumes_to_the_bit(images, undisturbed, tmp_path, tmp_path_factory, attempt, capsys):
    """SIGKILL to the one process, or to one of several, at a random moment after the first epoch.

    One process goes on with the training of two, to its end if not to the same bits.
    """
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
    if size == 2:
        alone = shutil.copytree(tmp_path, tmp_path_factory.mktemp("alone"), dirs_exist_ok=True)
        found = run_undisturbed(images, alone, 1, "--resume")[STATE]
        assert "processes: 1 now, 2 before" in capsys.readouterr().out
        assert (found["epoch"], found["settings"]["processes"]) == (EPOCHS, 1)
    assert_same(whole, run_undisturbed(images, tmp_path, size, "--resume"))
    assert not list(tmp_path.rglob(".*.tmp"))  # the half-written file of the kill is gone
    assert whole[STATE]["settings"]["processes"] == size
