"""Layers of a network: which are prunable, which weights compute, and what is counted."""

import copy

import pytest
import torch
from torch import nn

import Build_Resnet
from sparsity.networks.census import census
from sparsity.networks.layers import (
    effective_weight,
    exclude,
    positions_per_image,
    prunable_layers,
    unmasked_state,
)
from sparsity.prune.masks import prune_l1_uniform
from sparsity.system.errors import UserError

EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_the_output_layer_is_the_last_linear_layer_that_runs(small_net):
    assert list(prunable_layers(small_net, EXAMPLE)) == ["stem", "down", "hidden"]  # `result` is defined before hidden
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert list(prunable_layers(convolutions, EXAMPLE)) == ["0"]


def test_a_resnet_keeps_its_output_layer_and_prunes_all_convolutions():
    with torch.device("meta"):
        model, example = Build_Resnet.resnet50(), torch.zeros(1, 3, 32, 32)
        layers, positions = prunable_layers(model, example), positions_per_image(model, example)
    assert len(layers) == 53 and all(isinstance(layer, nn.Conv2d) for layer in layers.values())
    assert sum(layer.weight.numel() for layer in layers.values()) == 23_447_232
    macs = sum(positions[name] * model.get_submodule(name).weight.numel() for name in positions)
    assert round(macs / 1e9, 3) == 1.298
    kept = exclude(layers, ["layer1.*.conv1.weight", "*.shortcut.0", "conv1"])
    assert len(layers) - len(kept) == 3 + 4 + 1
    assert "layer1.0.conv1" not in kept and "layer2.0.conv1" in kept


def test_looking_at_a_network_leaves_no_hooks_and_no_changed_statistics(small_net):
    small_net.train()
    before = copy.deepcopy(small_net.state_dict())
    prunable_layers(small_net, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in small_net.state_dict().items())
    assert not any(module._forward_hooks for module in small_net.modules())
    assert small_net.training and small_net.down_bn.training


def test_patterns_exclude_layers_and_name_some_but_not_all(small_net):
    layers = prunable_layers(small_net, EXAMPLE)
    for patterns, left in (
        ([], ["stem", "down", "hidden"]),
        (["stem"], ["down", "hidden"]),
        (["*d*n*"], ["stem"]),
        (["[sh]*.weight", "stem"], ["down"]),
    ):
        assert list(exclude(layers, patterns)) == left
    for pattern in ("nothing", "result.weight", "stem.bias", "Stem", "ste", ""):
        with pytest.raises(UserError, match=r"names no prunable weight.*stem\.weight, down\.weight"):
            exclude(layers, ["stem", pattern])
    with pytest.raises(UserError, match="no layer to prune"):
        exclude(layers, ["stem", "[dh]*"])


def test_the_effective_weight_is_never_stale(small_net):
    layers = prunable_layers(small_net, EXAMPLE)
    dense = small_net.stem.weight.clone()
    names = list(small_net.state_dict())
    assert torch.equal(effective_weight(small_net.stem), dense)
    prune_l1_uniform(layers, 0.5)
    with torch.no_grad():
        small_net.stem.weight_orig.mul_(3)
    expected = dense * 3 * small_net.stem.weight_mask
    assert torch.equal(effective_weight(small_net.stem), expected)
    state = unmasked_state(small_net)
    assert sorted(state) == sorted(names)
    assert torch.equal(state["stem.weight"], expected)
    assert state["stem.weight"].data_ptr() != small_net.stem.weight_orig.data_ptr()


def test_counts_by_hand(small_net):
    positions = positions_per_image(small_net, EXAMPLE)
    assert positions == {"stem": 64, "down": 16, "hidden": 1, "result": 1}
    layers = prunable_layers(small_net, EXAMPLE)
    prune_l1_uniform(layers, 0.5)
    counts = census(small_net, layers, positions)
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
    assert counts.by_layer == {"stem": stem // 2, "down": down // 2, "hidden": hidden // 2}
    with torch.no_grad():
        for parameter in small_net.parameters():
            parameter.zero_()  # leaves `weight` stale under a mask
    counts = census(small_net, layers, positions)
    assert (counts.sparsity, counts.compression, counts.macs_ratio) == (100, float("inf"), float("inf"))
    assert sum(counts.by_layer.values()) == counts.zeros == counts.prunable
