"""From a network and a level to a masked copy: the network stays, scores are shared, iterative masks are nested."""

import copy
from itertools import product

import pytest
import torch
from helpers import same_bits

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import effective_weight, prunable_layers, unmasked_state
from sparsity.prune import pruner as module
from sparsity.prune.allocation import ALLOCATIONS, Allocator
from sparsity.prune.criteria import CRITERIA, score
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import Pruner
from sparsity.system.methods import ONE_LAYER, Curve

LAYERS = ["stem", "down", "hidden"]


@pytest.fixture
def pruner(small_net, small_split) -> Pruner:
    return Pruner(small_net, LAYERS, Calibration(small_split), 0)


def masks_of(model) -> dict[str, torch.Tensor]:
    """The masks of a pruned network, by layer; all True where there is none."""
    layers = prunable_layers(model, torch.zeros(1, 3, 8, 8))
    return {name: getattr(layer, "weight_mask", torch.ones_like(layer.weight)).bool() for name, layer in layers.items()}


@pytest.mark.parametrize("recovery", ["none", "finetune"])
def test_the_network_stays_as_it_is_and_only_a_recovery_needs_weights_of_its_own(pruner, recovery):
    before = copy.deepcopy(pruner.network.state_dict())
    model, notes = pruner.prune(Curve("l1", "global", recovery), 70)
    assert notes == [] and same_bits(pruner.network.state_dict(), before)
    shared = model.down.weight_orig.data_ptr() == pruner.network.down.weight.data_ptr()
    assert shared == (recovery == "none")


def test_scores_are_computed_once_for_a_criterion_and_sorted_once_for_a_curve(pruner, monkeypatch):
    scored, sorted_ = [], []
    monkeypatch.setattr(module, "score", lambda name, evidence: scored.append(name) or score(name, evidence))
    monkeypatch.setattr(module, "Allocator", lambda name, *_, squared: sorted_.append(name) or Allocator(name, *_))
    for names in product(("l1", "activation"), ("global", ONE_LAYER + "down", "erk"), ("none", "batchnorm")):
        for level in (30, 60):
            pruner.prune(Curve(*names), level)
    assert scored == ["l1", "activation"]
    assert sorted_ == ["global", "uniform", "erk"] * 2


@pytest.mark.parametrize("steps", [1e-9, 0.05])
def test_l1_uniform_masks_what_the_study_masks_also_of_equal_magnitudes(pruner, steps):
    """In steps of 0.05 about ten weights of a layer share each magnitude."""
    for name in LAYERS:
        weight = pruner.network.get_submodule(name).weight.detach()
        weight.copy_((weight / steps).round() * steps)
    for level in (0, 5, 33, 50, 95, 100):
        by_call = copy.deepcopy(pruner.network)
        prune_l1_uniform({name: by_call.get_submodule(name) for name in LAYERS}, level / 100)
        model, notes = pruner.prune(Curve("l1", "uniform", "batchnorm"), level)
        assert same_bits(model.state_dict(), by_call.state_dict()) and notes == []


def test_a_curve_of_one_layer_prunes_that_layer_alone_and_swaps_are_told_at_their_level_alone(pruner):
    for level in (0, 40, 100):
        for criterion in ("l1", "gradient"):
            model, _ = pruner.prune(Curve(criterion, ONE_LAYER + "down", "none"), level)
            zeros = {name: int((~mask).sum()) for name, mask in masks_of(model).items()}
            assert zeros == {"stem": 0, "down": round(level / 100 * 432), "hidden": 0}
    with torch.no_grad():
        pruner.network.hidden.weight.mul_(1e-6)
    for level, told in ((5, []), (50, ["1 weight swapped so that no layer is empty"]), (5, [])):
        _, notes = pruner.prune(Curve("l1", "global", "none"), level)
        assert notes == told
        notes.append("of a recovery at this level")


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_of_an_iterative_curve_are_nested_and_exact(pruner, criterion, allocation):
    """Even where the weights that are left change between the levels."""
    curve, previous, original = Curve(criterion, allocation, "finetune"), None, pruner.network
    for level in (0, 20, 60, 90, 97, 100):
        model, _ = pruner.prune(curve, level)
        masks = masks_of(model)
        zeros = [int((~mask).sum()) for mask in masks.values()]
        if allocation == "uniform":
            assert zeros == [round(level / 100 * size) for size in (162, 432, 80)]
        else:
            assert sum(zeros) == round(level / 100 * 674)
        assert previous is None or not any((masks[name] & ~previous[name]).any() for name in masks)
        previous = masks
        with torch.no_grad():
            for name in LAYERS:
                model.get_submodule(name).weight_orig.mul_(-1.5)
        pruner = pruner.continued(model)
        state = pruner.network.state_dict()  # that of a plain network of its own
        assert state.keys() == original.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in unmasked_state(model).items())
        assert state["down.weight"].data_ptr() != original.down.weight.data_ptr()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_filters_of_an_iterative_curve_stay_removed(small_net, allocation):
    pruner, gone = Pruner(small_net, LAYERS), torch.zeros(6, dtype=torch.bool)
    for level in (0, 30, 50, 80, 100):
        model, _ = pruner.prune(Curve("filter_l1", allocation, "none"), level)
        now = ~effective_weight(model.stem).flatten(1).any(dim=1)
        assert int(now.sum()) == round(level / 100 * 6) and now[gone].all()
        pruner, gone = pruner.continued(model), now
