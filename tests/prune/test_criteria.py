"""Scores: against their definitions written out, finite, repeatable, and a new criterion in a few lines."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same_bits
from torch import nn

from sparsity.data.calibration import Calibration
from sparsity.data.images import Split, normalise
from sparsity.networks.layers import prunable_layers
from sparsity.prune import allocation, criteria
from sparsity.prune.channels import FILTER_CRITERIA
from sparsity.prune.criteria import CRITERIA, Evidence, score
from sparsity.system import methods
from sparsity.system.errors import UserError
from sparsity.system.methods import Curve

EXAMPLE = torch.zeros(1, 3, 8, 8)
READING = [name for name, reads in methods.CRITERIA.items() if reads]


def evidence_of(model: nn.Module, split: Split, seed: int = 0, **settings) -> Evidence:
    return Evidence(model, prunable_layers(model, EXAMPLE), Calibration(split, **settings), seed)


def inputs_of(model: nn.Module, split: Split, name: str) -> torch.Tensor:
    """All rows [N, d] that a layer multiplies, by `F.unfold`, in float64."""
    layer, seen = model.get_submodule(name), []
    with layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0])), torch.no_grad():
        model(normalise(split.images, split.mean, split.std))
    if isinstance(layer, nn.Linear):
        return seen[0].double()
    columns = F.unfold(seen[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1).double()


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_repeatable_and_read_what_the_entry_of_their_criterion_tells(small_net, small_split, name):
    """Whatever mode the network is in; and it stays as it was."""
    small_net.train()
    small_net.stem_bn.eval()
    small_net.hidden.weight.requires_grad_(False)
    before = copy.deepcopy(small_net.state_dict())
    evidence = evidence_of(small_net, small_split)
    scores = score(name, evidence)
    assert list(scores) == ["stem", "down", "hidden"]
    for layer, values in scores.items():
        assert (values.shape, values.dtype) == (evidence.layers[layer].weight.shape, torch.float32)
        assert values.is_contiguous() and not values.requires_grad
        assert values.min() >= 0 and values.isfinite().all() and values.unique().numel() > 1
    assert same_bits(scores, score(name, evidence_of(small_net.eval(), small_split)))
    assert same_bits(before, small_net.state_dict())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in small_net.modules())
    flags = {key for key, parameter in small_net.named_parameters() if not parameter.requires_grad}
    assert flags == {"hidden.weight"} and all(parameter.grad is None for parameter in small_net.parameters())
    assert name in READING or same_bits(scores, score(name, Evidence(small_net, evidence.layers)))
    other = replace(small_split, labels=(small_split.labels + 1) % 4)
    relabelled = score(name, evidence_of(small_net, other))
    assert same_bits(scores, relabelled) != (methods.CRITERIA[name] == "labels")


def test_l1_is_magnitude_and_random_follows_seed_and_layer_only(small_net, small_split):
    scores = score("random", evidence_of(small_net, small_split, seed=5))
    assert torch.equal(score("l1", evidence_of(small_net, small_split))["down"], small_net.down.weight.detach().abs())
    with torch.no_grad():
        small_net.stem.weight.mul_(2)
    same = score("random", evidence_of(small_net, small_split, seed=5, batch_size=7))
    other = score("random", evidence_of(small_net, small_split, seed=6))
    for layer, values in scores.items():
        assert torch.equal(values, same[layer]) and not torch.equal(values, other[layer])
    assert not torch.equal(scores["stem"].flatten()[:80], scores["hidden"].flatten())


@pytest.mark.parametrize("batch_size", [8, 128])
def test_activation_is_magnitude_times_norm_of_unfolded_inputs(small_net, small_split, batch_size):
    scores = score("activation", evidence_of(small_net, small_split, batch_size=batch_size))
    for name, values in scores.items():
        weight = small_net.get_submodule(name).weight.detach()
        norm = inputs_of(small_net, small_split, name).norm(dim=0)
        expected = weight.double().abs() * norm.view(weight[:1].shape)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)


def test_obs_is_the_error_when_a_weight_is_removed_and_the_others_are_refitted(small_net, small_split):
    """By least squares in float64; the damping are rows of their own, which pull towards the old weights."""
    scores = score("obs", evidence_of(small_net, small_split))
    for name, chosen in [("stem", [(0, 0), (5, 26)]), ("down", [(0, 0), (7, 53)]), ("hidden", [(0, 0), (9, 7)])]:
        rows = inputs_of(small_net, small_split, name).numpy()
        count, width = rows.shape
        damping = 0.01 * np.square(rows).mean()
        rows = np.concatenate([rows / count**0.5, damping**0.5 * np.eye(width)])
        weight = small_net.get_submodule(name).weight.detach().double().flatten(1).numpy()
        for row, removed in chosen:
            others = np.delete(rows, removed, axis=1)
            solution, *_ = np.linalg.lstsq(others, rows @ weight[row], rcond=None)
            error = np.square(others @ solution - rows @ weight[row]).sum()
            found = float(scores[name].flatten(1)[row, removed])
            assert found == pytest.approx(error, rel=1e-3)


def test_obs_scores_weights_of_dead_inputs_zero_and_raises_the_damping_and_says_so(monkeypatch, small_net, small_split):
    for dead in ([2], list(range(6))):
        with torch.no_grad():
            small_net.stem_bn.weight[dead] = 0
            small_net.stem_bn.bias[dead] = -1
        scores = score("obs", evidence_of(small_net, small_split))["down"]
        assert not scores[:, dead].any() and scores.any() == (len(dead) < 6)
    # Without any damping to speak of, inputs that all depend on one number have no inverse.
    monkeypatch.setattr(criteria, "DAMPING", 1e-9)
    with torch.no_grad():
        small_net.down_bn.weight.fill_(0)
        small_net.down_bn.bias.fill_(0.3)
    evidence = evidence_of(small_net, small_split)
    assert all(values.isfinite().all() for values in score("obs", evidence).values())
    assert any("hidden" in note and "damping" in note for note in evidence.notes)


def test_gradient_is_the_plain_one_for_any_batch_size(small_net, small_split):
    logits = small_net(normalise(small_split.images, small_split.mean, small_split.std))
    F.cross_entropy(logits, small_split.labels).backward()
    for batch_size in (7, 49, 128):
        for name, values in score("gradient", evidence_of(small_net, small_split, batch_size=batch_size)).items():
            weight = small_net.get_submodule(name).weight
            expected = (weight * weight.grad).abs().detach()
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", READING)
def test_bfloat16_and_a_subset_of_positions_give_nearly_the_same_scores(small_net, small_split, name):
    exact = score(name, evidence_of(small_net, small_split))
    reduced = score(name, evidence_of(small_net, small_split, dtype=torch.bfloat16, position_limit=1000))
    for layer, values in exact.items():
        assert reduced[layer].dtype == torch.float32
        correlation = torch.corrcoef(torch.stack([values.flatten(), reduced[layer].flatten()]))[0, 1]
        assert correlation > 0.98


@pytest.mark.parametrize("name", ["l1", "activation", "gradient", "obs"])
def test_scores_that_are_not_finite_name_the_layer(small_net, small_split, name):
    with torch.no_grad():
        small_net.down.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"of (the inputs of )?(stem|down|hidden) "):
        score(name, evidence_of(small_net, small_split))


def test_a_new_criterion_is_a_function_and_one_call(monkeypatch, small_net, small_split):
    assert CRITERIA.keys() == methods.CRITERIA.keys() > criteria.SQUARED  # the names are those of the flags
    assert FILTER_CRITERIA.keys() == methods.FILTER_CRITERIA.keys()
    assert tuple(allocation.ALLOCATIONS) == methods.ALLOCATIONS
    for registry in (CRITERIA, methods.CRITERIA):  # which forget it again
        monkeypatch.setitem(registry, "own", None)
    for reads in ("", "images", "labels"):
        criteria.add_criterion("own", lambda evidence: {"stem": -evidence.layers["stem"].weight}, reads)
        assert Curve("own", "global", "none").needs_calibration == bool(reads)
    evidence = evidence_of(small_net, small_split)
    with pytest.raises(ValueError, match="every prunable layer"):
        score("own", evidence)
    del evidence.layers["down"], evidence.layers["hidden"]
    assert torch.equal(score("own", evidence)["stem"], -small_net.stem.weight)
