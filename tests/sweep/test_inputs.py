"""Inputs of a sweep: names of checkpoints, recipes of fine-tuning, names of outputs."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from sparsity.data.images import CIFAR10_STATISTICS, CIFAR100_STATISTICS
from sparsity.data.sources import Source
from sparsity.networks.checkpoint import Checkpoint
from sparsity.sweep.header import output_name
from sparsity.sweep.inputs import (
    distinct_names,
    find_normalisation,
    find_source,
    finetuning_rate,
    training_recipe,
)
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
        found = finetuning_rate(Namespace(finetune_learning_rate=rate, finetune_epochs=epochs), saved)
        return [found(epoch + 0.5) for epoch in range(epochs)]

    saved = replace(SAVED, settings={"learning_rate": 0.01, "T_max": 2})
    assert rates(saved, "rewind", 2) == pytest.approx([0.01, 0.005])
    linear = {"learning_rate": 0.12, "T_max": 4, "schedule_shape": "linear", "warmup_share": 0.25, "warmup_epochs": 0}
    assert rates(replace(SAVED, epoch=4, settings=linear), "rewind", 3) == pytest.approx([0.1, 0.06, 0.02])
    assert rates(SAVED, 0.3, 2) == [0.3, 0.3]
    with pytest.raises(UserError, match="does not tell the learning rates"):
        rates(SAVED, "rewind", 2)
    with pytest.raises(UserError, match="of its training are 0"):
        rates(replace(saved, settings={"learning_rate": 0.01, "T_max": 1}), "rewind", 1)


def test_a_checkpoint_is_finetuned_as_it_was_trained():
    study = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "shift": 4, "border": "zeros"}
    assert training_recipe(SAVED) == study
    told = {"batch_size": 9, "momentum": 0.5, "weight_decay": 0.0, "shift": 3, "border": "reflect"}
    assert training_recipe(replace(SAVED, settings=told | {"other": 1})) == told


def test_images_are_those_that_the_flags_or_else_the_checkpoint_name(capsys):
    data = {"dataset": "folder", "data_dir": "there", "image_size": 8}
    assert find_source(replace(SAVED, data=data), None, None) == Source("folder", Path("there"), 8)
    assert find_source(replace(SAVED, data=data), "cifar10", Path("x")) == Source("cifar10", Path("x"), 8)
    assert find_source(SAVED, None, None) == Source("cifar10", Path("datasets"), 32)
    hundred = replace(SAVED, model={"arch": "resnet18", "num_classes": 100})
    assert find_source(hundred, None, None) == Source("cifar100", Path("datasets"), 32)
    assert find_source(SAVED, None, None, 64).image_size == 64 and capsys.readouterr().out == ""
    assert find_source(replace(SAVED, data=data), None, None, 16).image_size == 16
    assert "8 pixels; --image_size 16 is used instead" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not tell its dataset; name one of cifar10, cifar100"):
        find_source(replace(SAVED, model={"num_classes": 3}), None, None)


def test_images_are_normalised_as_the_flags_or_else_the_checkpoint_tell_and_this_is_said(capsys):
    source, half, other = Source("cifar10", Path("datasets"), 32), [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    told = replace(SAVED, data={"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
    for saved, flags, found, said in (
        (SAVED, (None, None), tuple(map(list, CIFAR10_STATISTICS)), "the constants of CIFAR, as it has no metadata\n"),
        (SAVED, (half, half), (half, half), "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, the constants of --mean and --std\n"),
        (told, (None, None), (half, other), "std 0.25 0.25 0.25, the constants of its training\n"),
        (told, (half, other), (half, other), "of --mean and --std\n"),
        (told, (half, half), (half, half), "not those of its training (mean 0.5 0.5 0.5, std 0.25 0.25 0.25)\n"),
    ):
        assert find_normalisation(saved, source, *flags) == found
        assert capsys.readouterr().out.endswith(said)
    hundred = Source("cifar100", Path("datasets"), 32)
    assert find_normalisation(SAVED, hundred, None, None) == tuple(map(list, CIFAR100_STATISTICS))


def test_synthetic_stays_in_the_name():
    source, spec = Source("synthetic", Path("datasets"), 16), {"arch": "resnet18"}
    assert output_name(None, source, spec) == "synthetic_resnet18"
    assert output_name("mine", source, spec) == "synthetic_mine"
