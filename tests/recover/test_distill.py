"""Distillation: nearer to the dense network without a label, under masks that hold; the dense network stays itself."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from helpers import rows_of, same_bits, sweep, without_seconds, zeros_by_layer

import Build_Resnet
import pruning
from sparsity.data.calibration import Augmentation, draw_calibration
from sparsity.data.images import normalise
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import Pruner
from sparsity.prune.thinning import thin
from sparsity.recover import RECOVERIES, Means
from sparsity.recover.distill import Distillation, distill
from sparsity.system.errors import UserError
from sparsity.system.methods import Curve

EXAMPLE = torch.zeros(1, 3, 8, 8)
TABLE = "colours_resnet18_pruning.csv"


def recipe(split, epochs=5, rate=0.05):
    return Distillation(split, Augmentation(), epochs, rate, torch.float32)


def pruned(dense, level=0.5):
    model = copy.deepcopy(dense)
    layers = prunable_layers(model, EXAMPLE)
    prune_l1_uniform(layers, level)
    return model, layers


@torch.no_grad()
def distance(model, dense, split):
    """Mean Kullback-Leibler divergence of the class probabilities of `model` from those of `dense`."""
    images = normalise(split.images, split.mean, split.std)
    logs = [network(images).log_softmax(dim=1) for network in (model, dense)]
    return float(F.kl_div(*logs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_come_nearer_to_the_dense_ones_under_masks_that_hold_in_every_step(small_net, small_split, dtype):
    with torch.no_grad():
        small_net.result.weight.mul_(10)  # so that images get different outputs
    (model, layers), regrown = pruned(small_net, 0.8), []
    counts, before, dense = zeros_by_layer(layers), distance(model, small_net, small_split), copy.deepcopy(small_net)

    def look(module, inputs):
        regrown.extend(bool(layer.weight_orig[layer.weight_mask == 0].any()) for layer in layers.values())

    teacher = inference_copy(small_net, dtype)
    with model.register_forward_pre_hook(look):
        distill(model, teacher, layers, Distillation(small_split, Augmentation(0), 60, 0.05, dtype), 1)
    assert len(regrown) == 60 * 3 and not any(regrown)
    assert zeros_by_layer(layers) == counts and distance(model, small_net, small_split) < 0.7 * before
    assert same_bits(small_net.state_dict(), dense.state_dict())
    assert not any(module.training for module in model.modules())


def test_labels_are_not_read_and_the_seed_repeats_every_bit(small_net, small_split):
    teacher, found = inference_copy(small_net), []
    for labels, seed in ((small_split.labels, 1), (torch.full((50,), -7), 1), (small_split.labels, 2)):
        model, layers = pruned(small_net)
        distill(model, teacher, layers, recipe(replace(small_split, labels=labels)), seed)
        found.append(model.state_dict())
    assert same_bits(found[0], found[1]) and not same_bits(found[0], found[2])


@pytest.mark.parametrize("level", [50, 95])  # of 4 filters, at 95 percent none is left
def test_removed_filters_stay_removed(small_split, level):
    torch.manual_seed(0)
    dense = awaken(Build_Resnet.build({"arch": "resnet18", "num_classes": 4, "width": 4}))
    names = list(prunable_layers(dense, EXAMPLE))
    model, _ = Pruner(dense, names).prune(Curve("filter_l1", "uniform", "distill"), level)
    before = thin(model)
    layers = {name: model.get_submodule(name) for name in names}
    distill(model, inference_copy(dense), layers, recipe(small_split, 2), 0)
    after = thin(model)
    assert (after.widths, after.removed, after.dead) == (before.widths, before.removed, before.dead)
    assert not torch.equal(model.linear.weight, dense.linear.weight)


@pytest.mark.parametrize("level", [0, 0.5, 1])
def test_the_dense_network_keeps_its_bits_and_an_empty_one_predicts_a_constant(small_net, small_split, level):
    model, layers = pruned(small_net, level)
    before, counts = copy.deepcopy(model.state_dict()), zeros_by_layer(layers)
    calibration = draw_calibration(small_split, 40, 0, torch.device("cpu"), torch.float32)
    means = Means(small_net, tuple(layers), calibration, distillation=recipe(small_split))
    assert RECOVERIES["distill"](model, means, 0) == []
    assert zeros_by_layer(layers) == counts
    assert same_bits(model.state_dict(), before) == (level == 0)
    with torch.no_grad():
        logits = model(normalise(small_split.images, small_split.mean, small_split.std))
    assert logits.isfinite().all() and (level < 1 or logits.argmax(dim=1).unique().numel() == 1)


def test_a_rate_that_diverges_names_its_flag(small_net, small_split):
    with pytest.raises(UserError, match="smaller --distill_learning_rate"):
        model, layers = pruned(small_net)
        distill(model, inference_copy(small_net), layers, recipe(small_split, rate=1e30), 0)


FLAGS = ["--levels", "50", "--recover", "distill", "--distill_images", "24", "--distill_epochs", "2"]


def test_an_interrupted_sweep_ends_in_the_same_rows(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    flags = ["--checkpoint", tiny_checkpoint, *FLAGS, "--criterion", "l1", "filter_l1"]
    assert sweep(tmp_path / "whole", *flags) == 0
    assert "distillation trains on 24 training images, without their labels" in capsys.readouterr().out
    recover, calls = pruning.RECOVERIES["distill"], []

    def stopped(*inputs):
        calls.append(inputs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return recover(*inputs)

    monkeypatch.setitem(pruning.RECOVERIES, "distill", stopped)
    assert sweep(tmp_path / "stopped", *flags) == 130
    assert len(rows_of(tmp_path / "stopped" / TABLE)) == 1
    assert sweep(tmp_path / "stopped", *flags) == 0 and len(calls) == 3
    assert without_seconds(tmp_path / "stopped" / TABLE) == without_seconds(tmp_path / "whole" / TABLE)
    assert sweep(tmp_path / "whole", *flags, "--distill_epochs", "3") == 1  # rows of both are not mixed
    assert "distill (2 epochs, 24" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_gpu_distills_as_the_cpu_does(small_net, small_split, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (here, layers), (there, _) = pruned(small_net), pruned(small_net)
    distill(here, inference_copy(small_net), layers, recipe(small_split, 1, 0.01), 0)
    theirs, split = prunable_layers(there.cuda(), EXAMPLE.cuda()), small_split.to(torch.device("cuda"))
    distill(there, inference_copy(small_net.cuda()), theirs, recipe(split, 1, 0.01), 0)
    assert zeros_by_layer(theirs) == zeros_by_layer(layers)
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-3, atol=1e-3)
