"""Inputs of a sweep: names of checkpoints, recipes of fine-tuning, names of outputs."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from sparsity.data.sources import Source
from sparsity.networks.checkpoint import Checkpoint
from sparsity.sweep.header import output_name
from sparsity.sweep.inputs import distinct_names, find_source, finetuning_rates, training_recipe
from sparsity.system.errors import UserError

SAVED = Checkpoint(Path("net.pth"), "0" * 64, {}, epoch=2, model={"arch": "resnet18", "num_classes": 10})


def test_checkpoints_go_by_the_shortest_ends_of_their_paths_that_tell_them_apart():
    for paths, names in [
        (["/far/a/net.pth", "other.pth"], ["net.pth", "other.pth"]),
        (["/far/a/net.pth", "/far/b/net.pth"], ["a/net.pth", "b/net.pth"]),
        (["/far/a/x/net.pth", "/far/b/x/net.pth", "net.pth"], ["a/x/net.pth", "b/x/net.pth", "net.pth"]),
        (["net.pth", "/net.pth"], ["net.pth", "/net.pth"]),
        (["a/net.pth", "a/net.pth"], ["a/net.pth", "a/net.pth"]),
        (["net.pth"], ["net.pth"]),
    ]:
        assert distinct_names([Path(path) for path in paths]) == names


def test_rewinding_uses_the_rates_of_the_training():
    def rates(saved, rate, epochs):
        return finetuning_rates(Namespace(finetune_learning_rate=rate, finetune_epochs=epochs), saved)

    saved = replace(SAVED, settings={"learning_rate": 0.01, "T_max": 2})
    assert rates(saved, "rewind", 2) == pytest.approx((0.01, 0.005))
    assert rates(SAVED, 0.3, 2) == (0.3, 0.3)
    with pytest.raises(UserError, match="does not tell the learning rates"):
        rates(SAVED, "rewind", 2)
    with pytest.raises(UserError, match="of its training are 0"):
        rates(replace(saved, settings={"learning_rate": 0.01, "T_max": 1}), "rewind", 1)


def test_a_checkpoint_is_finetuned_as_it_was_trained():
    assert training_recipe(SAVED) == {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4}
    told = {"batch_size": 9, "momentum": 0.5, "weight_decay": 0.0}
    assert training_recipe(replace(SAVED, settings=told | {"other": 1})) == told


def test_images_are_those_that_the_flags_or_else_the_checkpoint_name(capsys):
    data = {"dataset": "folder", "data_dir": "there", "image_size": 8}
    assert find_source(replace(SAVED, data=data), None, None) == Source("folder", Path("there"), 8)
    assert find_source(replace(SAVED, data=data), "cifar10", Path("x")) == Source("cifar10", Path("x"), 8)
    assert find_source(SAVED, None, None) == Source("cifar10", Path("datasets"), 32)
    assert "has no metadata" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not tell its dataset"):
        find_source(replace(SAVED, model={"num_classes": 3}), None, None)


def test_synthetic_stays_in_the_name():
    source, spec = Source("synthetic", Path("datasets"), 16), {"arch": "resnet18"}
    assert output_name(None, source, spec) == "synthetic_resnet18"
    assert output_name("mine", source, spec) == "synthetic_mine"
