"""Masks on layers: exactly as many as asked for, the smallest weights, through torch, never twice."""

import copy

import pytest
import torch
from helpers import bits, same_bits, zeros_by_layer
from torch.nn.utils import prune

from sparsity.networks.census import census
from sparsity.networks.layers import positions_per_image, prunable_layers
from sparsity.prune.allocation import Allocator
from sparsity.prune.masks import apply_masks, prune_l1_uniform

EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sparsity", [0, 0.05, 0.15, 0.333, 0.5, 0.95, 0.995, 1])  # ints are shares too
def test_exactly_the_share_of_smallest_weights_is_masked_in_every_layer(small_net, sparsity, memory_format):
    """By torch's own call, on several threads, and to the bit by masks of sorted magnitudes; nothing else changes."""
    torch.set_num_threads(2)
    by_call, by_sort = copy.deepcopy(small_net), copy.deepcopy(small_net).to(memory_format=memory_format)
    layers, ours = (prunable_layers(model, EXAMPLE) for model in (by_call, by_sort))
    prune_l1_uniform(layers, sparsity)
    scores = {name: layer.weight.abs() for name, layer in ours.items()}
    apply_masks(ours, Allocator("uniform", scores).masks(sparsity)[0])
    for name, layer in layers.items():
        dense, kept = small_net.get_submodule(name).weight, layer.weight_mask.bool()
        assert dense.unique().numel() == dense.numel()  # no ties
        assert int((~kept).sum()) == round(sparsity * kept.numel())
        if 0 < int(kept.sum()) < kept.numel():
            assert dense[kept].abs().min() >= dense[~kept].abs().max()
        assert prune.is_pruned(ours[name]) and torch.equal(layer.weight_orig, dense)
        assert bits(layer.weight.detach()) == bits(ours[name].weight.detach())
    assert same_bits(by_call.state_dict(), by_sort.state_dict())
    assert zeros_by_layer(ours) == {name: round(sparsity * layer.weight.numel()) for name, layer in layers.items()}
    assert torch.equal(by_call.result.weight, small_net.result.weight) and not prune.is_pruned(by_call.result)
    assert by_sort(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_zeros_that_are_there_already_count_towards_the_level_and_masks_do_not_compound(small_net):
    with torch.no_grad():
        small_net.down.weight.view(-1)[:216] = 0  # half of the layer
    layers, positions = prunable_layers(small_net, EXAMPLE), positions_per_image(small_net, EXAMPLE)
    prune_l1_uniform(layers, 0.3)
    masks = {name: layer.weight > 0 for name, layer in layers.items()}
    for again in (lambda: prune_l1_uniform(layers, 0.4), lambda: apply_masks(layers, masks)):
        with pytest.raises(ValueError, match="masked already"):
            again()
    assert zeros_by_layer(layers)["down"] == 216
    assert census(small_net, layers, positions).zeros == 216 + round(0.3 * 162) + round(0.3 * 80)
