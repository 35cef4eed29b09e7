"""Masks: how many, which, where not, and what is counted afterwards."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import Build_Resnet
from sparsity.networks.layers import (
    census,
    effective_weight,
    exclude,
    positions_per_image,
    prunable_layers,
    zeros_by_layer,
)
from sparsity.prune.masks import apply_masks, prune_l1_uniform
from sparsity.system.errors import UserError

EXAMPLE = torch.zeros(1, 3, 8, 8)
LEVELS = [0, 5, 15, 33.3, 50, 95, 99.5, 100]


def pruned(model, level):
    model = copy.deepcopy(model)
    layers = prunable_layers(model, EXAMPLE)
    prune_l1_uniform(layers, level / 100)
    return model, layers


@pytest.mark.parametrize("level", LEVELS)
def test_exactly_the_share_is_masked_in_every_layer(small_net, level):
    _, layers = pruned(small_net, level)
    for layer in layers.values():
        assert int((layer.weight_mask == 0).sum()) == round(level / 100 * layer.weight.numel())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", [5, 50, 95])
def test_kept_weights_are_larger_than_masked_ones_and_unchanged(small_net, level, threads):
    torch.set_num_threads(threads)
    _, layers = pruned(small_net, level)
    for name, layer in layers.items():
        dense = small_net.get_submodule(name).weight
        mask = layer.weight_mask.bool()
        assert dense[mask].abs().min() >= dense[~mask].abs().max()
        assert torch.equal(layer.weight[mask], dense[mask])


def test_both_ends(small_net):
    _, layers = pruned(small_net, 0)
    assert all(torch.equal(layer.weight, small_net.get_submodule(name).weight) for name, layer in layers.items())
    _, layers = pruned(small_net, 100)
    assert all(not layer.weight.any() for layer in layers.values())


def test_the_output_layer_is_the_last_linear_layer_that_runs(small_net):
    assert list(prunable_layers(small_net, EXAMPLE)) == ["stem", "down", "hidden"]
    model, _ = pruned(small_net, 100)
    assert torch.equal(model.result.weight, small_net.result.weight)
    assert not prune.is_pruned(model.result)


def test_a_resnet_keeps_its_output_layer_and_prunes_all_convolutions():
    model = Build_Resnet.resnet50(width=2)
    layers = prunable_layers(model, torch.zeros(1, 3, 32, 32))
    assert len(layers) == 53
    assert "linear" not in layers
    assert all(isinstance(layer, nn.Conv2d) for layer in layers.values())
    assert model.training


def test_without_linear_layers_the_last_convolution_is_the_output():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert list(prunable_layers(model, EXAMPLE)) == ["0"]


def test_looking_at_a_network_leaves_no_hooks_and_no_changed_statistics(small_net):
    small_net.train()
    small_net.stem_bn.eval()
    before = copy.deepcopy(small_net.state_dict())
    prunable_layers(small_net, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in small_net.state_dict().items())
    assert not any(module._forward_hooks for module in small_net.modules())
    assert small_net.down_bn.training
    assert not small_net.stem_bn.training


def test_masks_do_not_compound(small_net):
    _, layers = pruned(small_net, 20)
    with pytest.raises(ValueError, match="masked already"):
        prune_l1_uniform(layers, 0.4)


def test_an_amount_of_one_is_everything_and_not_one_weight(small_net):
    layers = prunable_layers(small_net, EXAMPLE)
    prune_l1_uniform(layers, 1)
    assert not any(layer.weight.any() for layer in layers.values())


def test_the_effective_weight_is_never_stale(small_net):
    model, layers = pruned(small_net, 50)
    with torch.no_grad():
        model.stem.weight_orig.mul_(3)
    assert torch.equal(effective_weight(model.stem), small_net.stem.weight * 3 * layers["stem"].weight_mask)
    assert torch.equal(effective_weight(small_net.stem), small_net.stem.weight)


def test_counts_by_hand(small_net):
    positions = positions_per_image(small_net, EXAMPLE)
    assert positions == {"stem": 64, "down": 16, "hidden": 1, "result": 1}
    model, layers = pruned(small_net, 50)
    counts = census(model, layers, positions)
    stem, down, hidden, result = 6 * 27, 8 * 54, 80, 40
    assert counts.prunable == stem + down + hidden
    assert counts.zeros == (stem + down + hidden) // 2
    assert counts.parameters == stem + down + hidden + result + 8 + 10 + 4 + 2 * (6 + 8)
    assert counts.nonzero == counts.parameters - counts.zeros
    assert counts.macs == 64 * stem + 16 * down + hidden + result
    assert counts.macs_remaining == 32 * stem + 8 * down + hidden // 2 + result
    assert counts.sparsity == 50
    assert counts.compression == counts.parameters / counts.nonzero
    assert counts.macs_ratio == counts.macs / counts.macs_remaining


def test_counts_of_resnet50_are_those_counted_by_hand():
    model = Build_Resnet.resnet50().eval()
    positions = positions_per_image(model, torch.zeros(1, 3, 32, 32))
    counts = census(model, prunable_layers(model, torch.zeros(1, 3, 32, 32)), positions)
    assert counts.prunable == 23_447_232
    assert counts.parameters == 23_520_842
    assert round(counts.macs / 1e9, 3) == 1.298
    assert counts.zeros <= 2  # random weights may hold a zero


def test_zeros_that_are_there_already_count_towards_the_level(small_net):
    with torch.no_grad():
        small_net.down.weight.view(-1)[:216] = 0  # half of the layer
    model, layers = pruned(small_net, 30)
    counts = census(model, layers, positions_per_image(small_net, EXAMPLE))
    assert int((effective_weight(layers["down"]) == 0).sum()) == 216
    assert counts.zeros == 216 + round(0.3 * 162) + round(0.3 * 80)


def drawn_masks(layers, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(layer.weight.shape, generator=draw) < 0.4 for name, layer in layers.items()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_masks_are_applied_through_torch_and_nothing_else_changes(small_net, memory_format):
    model = copy.deepcopy(small_net).to(memory_format=memory_format)
    layers = prunable_layers(model, EXAMPLE)
    masks = drawn_masks(layers)
    apply_masks(layers, masks)
    for name, layer in layers.items():
        dense = small_net.get_submodule(name).weight
        assert prune.is_pruned(layer)
        assert torch.equal(layer.weight_mask.bool(), masks[name])
        assert torch.equal(layer.weight_orig, dense)
        assert torch.equal(layer.weight, dense * masks[name])
    assert torch.equal(model.result.weight, small_net.result.weight)
    assert zeros_by_layer(layers) == {name: int((~mask).sum()) for name, mask in masks.items()}
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_masks_are_not_applied_twice(small_net):
    layers = prunable_layers(small_net, EXAMPLE)
    masks = drawn_masks(layers)
    apply_masks({"hidden": layers["hidden"]}, {"hidden": masks["hidden"]})
    before = copy.deepcopy(small_net.state_dict())
    with pytest.raises(ValueError, match="masked already"):
        apply_masks(layers, masks)
    assert before.keys() == small_net.state_dict().keys()


@pytest.mark.parametrize("fault", ["missing", "other", "shape"])
def test_masks_that_do_not_fit_change_nothing(small_net, fault):
    layers = prunable_layers(small_net, EXAMPLE)
    masks = drawn_masks(layers)
    if fault == "missing":
        del masks["hidden"]
    elif fault == "other":
        masks["result"] = torch.ones(4, 10)
    else:
        masks["hidden"] = masks["hidden"].T
    with pytest.raises(ValueError, match="one mask of the shape"):
        apply_masks(layers, masks)
    assert not any(prune.is_pruned(layer) for layer in layers.values())


def test_zeros_by_layer_are_those_of_the_census(small_net):
    with torch.no_grad():
        small_net.down.weight.view(-1)[:100] = 0
    layers = prunable_layers(small_net, EXAMPLE)
    assert zeros_by_layer(layers) == {"stem": 0, "down": 100, "hidden": 0}
    apply_masks(layers, drawn_masks(layers))
    with torch.no_grad():
        layers["stem"].weight_orig.zero_()  # leaves `weight` stale
    zeros = zeros_by_layer(layers)
    assert sum(zeros.values()) == census(small_net, layers, positions_per_image(small_net, EXAMPLE)).zeros
    assert zeros["down"] > 100
    assert zeros["stem"] == 162


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], ["stem", "down", "hidden"]),
        (["stem.weight"], ["down", "hidden"]),
        (["stem"], ["down", "hidden"]),
        (["*d*n*"], ["stem"]),
        (["[sh]*.weight", "stem"], ["down"]),
    ],
)
def test_excluded_layers(small_net, patterns, left):
    layers = prunable_layers(small_net, EXAMPLE)
    assert list(exclude(layers, patterns)) == left
    assert list(layers) == ["stem", "down", "hidden"]


def test_excluded_layers_of_a_resnet_by_glob():
    layers = prunable_layers(Build_Resnet.resnet50(width=2), torch.zeros(1, 3, 32, 32))
    kept = exclude(layers, ["layer1.*.conv1.weight", "*.shortcut.0", "conv1"])
    assert len(layers) - len(kept) == 3 + 4 + 1
    assert "layer1.0.conv1" not in kept and "layer2.0.conv1" in kept


@pytest.mark.parametrize("pattern", ["nothing", "result.weight", "stem.bias", "Stem", "ste", ""])
def test_a_pattern_that_names_no_prunable_layer_is_an_error(small_net, pattern):
    layers = prunable_layers(small_net, EXAMPLE)
    with pytest.raises(UserError, match=r"names no prunable weight.*stem\.weight, down\.weight"):
        exclude(layers, ["stem", pattern])


def test_excluding_every_layer_is_an_error(small_net):
    with pytest.raises(UserError, match="no layer to prune"):
        exclude(prunable_layers(small_net, EXAMPLE), ["stem", "[dh]*"])
