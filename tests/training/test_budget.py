"""A training in a given time: the epochs that fit, said, trained, and kept to by a resumed run."""

import re

import pytest
import torch
from conftest import train, train_arguments
from helpers import checkpoints

import run
from sparsity.system.errors import UserError
from sparsity.training import budget
from sparsity.training.budget import TRIAL_STEPS, epochs_that_fit, seconds_a_step
from sparsity.training.schedule import image_sizes

pytestmark = pytest.mark.usefixtures("without_pictures")
SPENT, STATE = {20: 10.0, 24: 14.0, 28: 19.0, 32: 25.0}, "colours_resnet18_last.pth"


@pytest.mark.parametrize("start", [0, 20])
def test_the_most_epochs_that_fit_are_taken(start):
    for epochs in range(1, 30):
        needed = sum(SPENT[size] for size in image_sizes(start, 32, epochs))
        assert epochs_that_fit(needed, SPENT, start, 32) == epochs
        assert epochs == 1 or epochs_that_fit(needed - 1e-6, SPENT, start, 32) == epochs - 1
    with pytest.raises(UserError, match=r"no epoch fits into --time_budget: one takes 25\.0 s, and 24\.0 s are left"):
        epochs_that_fit(24, SPENT, start, 32)


def test_the_median_step_counts_and_the_first_does_not(monkeypatch):
    now = iter([0.0, 9.0, 10.0, 12.0, 13.0, 14.0])  # the first step takes 9 s
    monkeypatch.setattr(budget.time, "perf_counter", lambda: next(now))
    seen = []
    assert seconds_a_step(seen.extend, ((torch.zeros(2), step) for step in range(99))) == 1
    assert len(seen) == TRIAL_STEPS + 1


def test_a_run_says_and_trains_the_epochs_that_fit_and_a_resumed_one_keeps_to_them(
    image_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(budget, "seconds_a_step", lambda train, batches: 10.0)
    flags = ["--time_budget", "2m", "--recipe", "strong"]  # an epoch of three batches takes 30 s
    timed = checkpoints(train(image_folder, tmp_path / "timed", *flags))[STATE]
    said = r"3 epochs fit into 0:02:00; an epoch takes 3\d\.\d s at 4 pixels, 3\d\.\d s at 8 pixels\n"
    assert re.search(said, capsys.readouterr().out)
    followed = {"epochs": 3, "T_max": 3, "time_budget": 120.0, "shift": 3, "cutout": 0, "ema": 0.0}
    assert timed["settings"].items() >= followed.items()
    assert run.main(train_arguments(image_folder, tmp_path, "--time_budget", "30s")) == 1
    assert "no epoch fits into --time_budget: one takes 3" in capsys.readouterr().err
    monkeypatch.setattr(budget, "seconds_a_step", None)  # nothing is timed again
    train(image_folder, tmp_path / "timed", *flags, "--resume")
    assert run.main(train_arguments(image_folder, tmp_path / "timed", "--time_budget", "3m", "--resume")) == 1
    assert "time_budget 180.0 (saved: 120.0)" in capsys.readouterr().err


def test_each_size_is_timed_and_changes_nothing(image_folder, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(budget, "epochs_that_fit", lambda seconds, spent, *sizes: told.append((seconds, spent)) or 2)
    flags = ["--recipe", "strong", "--learning_rate", "0.02"]
    timed = checkpoints(train(image_folder, tmp_path / "timed", "--time_budget", "60s", *flags))[STATE]
    ((seconds, spent),) = told
    assert 0 < seconds < budget.MARGIN * 60  # the trial took a part of it
    assert list(spent) == [4, 8] and min(spent.values()) > 0
    plain = checkpoints(train(image_folder, tmp_path / "plain", "--epochs", "2", *flags))[STATE]
    assert all(torch.equal(value, timed["net"][name]) for name, value in plain["net"].items())
