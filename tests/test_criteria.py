"""Scores: against their definitions written out, finite, repeatable, and a new one end to end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, awaken
from torch import nn

from sparsity.data.calibration import Calibration
from sparsity.data.images import Split, normalise
from sparsity.networks.layers import prunable_layers, zeros_by_layer
from sparsity.prune import criteria
from sparsity.prune.allocation import prepare, rank
from sparsity.prune.criteria import CRITERIA, NEEDS_CALIBRATION, READS_LABELS, Evidence, score
from sparsity.prune.masks import apply_masks
from sparsity.system.errors import UserError

EXAMPLE = torch.zeros(1, 3, 8, 8)


class MixedNet(nn.Module):
    """A padded strided 3x3, a 1x1 and a linear layer, each before the output layer."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 7, 1)
        self.hidden = nn.Linear(7, 9)
        self.out = nn.Linear(9, 4)

    def forward(self, x):
        x = F.relu(self.point(F.relu(self.wide(x))))
        return self.out(F.relu(self.hidden(x.mean(dim=(2, 3)))))


@pytest.fixture
def mixed_net():
    torch.manual_seed(3)
    return MixedNet().eval()


def evidence_of(model: nn.Module, split: Split, seed: int = 0, **settings) -> Evidence:
    return Evidence(model, prunable_layers(model, EXAMPLE), Calibration(split, **settings), seed)


def inputs_of(model: nn.Module, split: Split, layer: nn.Module) -> torch.Tensor:
    """All rows [N, d] that a layer multiplies, by `F.unfold`."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(normalise(split.images, split.mean, split.std))
    handle.remove()
    if isinstance(layer, nn.Linear):
        return seen[0]
    columns = F.unfold(seen[0], layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_finite_float32_of_the_weights_shape_and_repeatable(small_net, small_split, name):
    before = copy.deepcopy(small_net.state_dict())
    evidence = evidence_of(small_net, small_split)
    scores = score(name, evidence)
    assert list(scores) == ["stem", "down", "hidden"]
    for layer, values in scores.items():
        assert values.shape == evidence.layers[layer].weight.shape
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        assert not values.requires_grad
        assert values.min() >= 0 and values.unique().numel() > 1
    again = score(name, evidence_of(small_net, small_split))
    assert all(torch.equal(values, again[layer]) for layer, values in scores.items())
    assert all(torch.equal(before[key], value) for key, value in small_net.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in small_net.modules())
    assert evidence.notes == []


@pytest.mark.parametrize("name", ["l1", "random", "activation", "gradient", "obs"])
def test_only_some_look_at_images_and_only_one_at_labels(small_net, small_split, name):
    layers = prunable_layers(small_net, EXAMPLE)
    scores = score(name, evidence_of(small_net, small_split))
    if name in NEEDS_CALIBRATION:
        with pytest.raises(ValueError, match="needs calibration"):
            score(name, Evidence(small_net, layers))
    else:
        blind = score(name, Evidence(small_net, layers))
        assert all(torch.equal(scores[layer], blind[layer]) for layer in layers)
    other = Split(small_split.images, (small_split.labels + 1) % 4, small_split.mean, small_split.std)
    relabelled = score(name, evidence_of(small_net, other))
    assert (name in READS_LABELS) != all(torch.equal(scores[layer], relabelled[layer]) for layer in layers)


def test_l1_is_magnitude(small_net):
    scores = score("l1", Evidence(small_net, prunable_layers(small_net, EXAMPLE)))
    assert torch.equal(scores["down"], small_net.down.weight.detach().abs())


def test_random_follows_seed_and_layer_only(small_net, small_split):
    scores = score("random", evidence_of(small_net, small_split, seed=5))
    same = score("random", evidence_of(awaken(SmallNet(), 9), small_split, seed=5, batch_size=7))
    other = score("random", evidence_of(small_net, small_split, seed=6))
    assert all(torch.equal(scores[layer], same[layer]) for layer in scores)
    assert not any(torch.equal(scores[layer], other[layer]) for layer in scores)
    assert not torch.equal(scores["stem"].flatten()[:80], scores["hidden"].flatten())


@pytest.mark.parametrize("batch_size", [8, 128])
def test_activation_is_magnitude_times_norm_of_unfolded_inputs(mixed_net, small_split, batch_size):
    scores = score("activation", evidence_of(mixed_net, small_split, batch_size=batch_size))
    assert list(scores) == ["wide", "point", "hidden"]
    for name, values in scores.items():
        weight = mixed_net.get_submodule(name).weight.detach()
        norm = inputs_of(mixed_net, small_split, mixed_net.get_submodule(name)).double().norm(dim=0)
        expected = weight.double().abs() * norm.view(weight[:1].shape)
        torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)


def test_activation_of_a_subset_of_positions_estimates_the_same_norm(mixed_net, small_split):
    full = score("activation", evidence_of(mixed_net, small_split))
    few = score("activation", evidence_of(mixed_net, small_split, position_limit=300))
    assert not torch.equal(full["wide"], few["wide"])
    assert (few["wide"].sum() / full["wide"].sum() - 1).abs() < 0.1


def test_obs_is_square_over_the_diagonal_of_the_explicit_inverse(mixed_net, small_split):
    scores = score("obs", evidence_of(mixed_net, small_split))
    for name, values in scores.items():
        rows = inputs_of(mixed_net, small_split, mixed_net.get_submodule(name)).double()
        moment = rows.T @ rows / len(rows)
        moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        weight = mixed_net.get_submodule(name).weight.detach().double()
        expected = weight.square() / torch.linalg.inv(moment).diagonal().view(weight[:1].shape)
        alive = (rows != 0).any(dim=0).view(weight[:1].shape).expand_as(weight)
        torch.testing.assert_close(values[alive].double(), expected[alive], rtol=1e-4, atol=0)
        assert not values[~alive].any()


@pytest.mark.parametrize("dead", [[2], list(range(6))], ids=["one", "all"])
def test_obs_scores_weights_of_dead_inputs_zero(mixed_net, small_split, dead):
    with torch.no_grad():
        mixed_net.wide.weight[dead] = 0
        mixed_net.wide.bias[dead] = -1
    scores = score("obs", evidence_of(mixed_net, small_split))["point"]
    assert not scores[:, dead].any()
    alive = [channel for channel in range(6) if channel not in dead]
    assert scores[:, alive].sum() > 0 or not alive


def test_obs_raises_the_damping_and_says_so(monkeypatch, mixed_net, small_split):
    # Without any damping to speak of, inputs that all depend on one number have no inverse.
    monkeypatch.setattr(criteria, "DAMPING", 1e-9)
    with torch.no_grad():
        mixed_net.wide.weight.copy_(mixed_net.wide.weight[:1].expand_as(mixed_net.wide.weight).clone())
        mixed_net.wide.bias.fill_(0.3)
    evidence = evidence_of(mixed_net, small_split)
    scores = score("obs", evidence)
    assert all(values.isfinite().all() for values in scores.values())
    assert any("point" in note and "damping" in note for note in evidence.notes)


def test_gradient_is_the_plain_one_for_any_batch_size(small_net, small_split):
    logits = small_net(normalise(small_split.images, small_split.mean, small_split.std))
    F.cross_entropy(logits, small_split.labels).backward()
    layers = prunable_layers(small_net, EXAMPLE)
    expected = {name: (layer.weight * layer.weight.grad).abs().detach() for name, layer in layers.items()}
    for parameter in small_net.parameters():
        parameter.grad = None
    for batch_size in (1, 7, 49, 50, 128):
        scores = score("gradient", evidence_of(small_net, small_split, batch_size=batch_size))
        for name, values in scores.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].max()))


def test_gradient_leaves_the_network_as_it_was(small_net, small_split):
    small_net.train()
    small_net.stem_bn.eval()
    small_net.hidden.weight.requires_grad_(False)
    before = copy.deepcopy(small_net.state_dict())
    flags = [parameter.requires_grad for parameter in small_net.parameters()]
    score("gradient", evidence_of(small_net, small_split))
    assert all(torch.equal(before[name], value) for name, value in small_net.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in small_net.parameters()]
    assert all(parameter.grad is None for parameter in small_net.parameters())
    assert small_net.down_bn.training
    assert not small_net.stem_bn.training


def test_gradient_puts_modes_back_after_an_error(small_net, small_split):
    evidence = evidence_of(small_net.train(), Split(small_split.images, small_split.labels + 9, (0.5,) * 3, (0.2,) * 3))
    with pytest.raises((IndexError, RuntimeError)):
        score("gradient", evidence)
    assert small_net.training
    assert all(parameter.requires_grad for parameter in small_net.parameters())


@pytest.mark.parametrize("name", sorted(NEEDS_CALIBRATION))
def test_bfloat16_gives_nearly_the_same_scores(small_net, small_split, name):
    exact = score(name, evidence_of(small_net, small_split))
    reduced = score(name, evidence_of(small_net, small_split, dtype=torch.bfloat16))
    for layer, values in exact.items():
        assert reduced[layer].dtype == torch.float32
        correlation = torch.corrcoef(torch.stack([values.flatten(), reduced[layer].flatten()]))[0, 1]
        assert correlation > 0.99


@pytest.mark.parametrize("name", ["l1", "activation", "gradient"])
def test_scores_that_are_not_finite_name_the_layer(small_net, small_split, name):
    with torch.no_grad():
        small_net.down.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"of (stem|down|hidden) that are not finite"):
        score(name, evidence_of(small_net, small_split))


def test_obs_of_inputs_that_are_not_finite_names_the_layer(small_net, small_split):
    with torch.no_grad():
        small_net.stem.bias = nn.Parameter(torch.full((6,), torch.nan))
    with pytest.raises(UserError, match="down"):
        score("obs", evidence_of(small_net, small_split))


def test_a_criterion_that_leaves_a_layer_out_is_refused(monkeypatch, small_net):
    monkeypatch.setitem(CRITERIA, "half", lambda evidence: {"stem": evidence.layers["stem"].weight.abs()})
    with pytest.raises(ValueError, match="every prunable layer"):
        score("half", Evidence(small_net, prunable_layers(small_net, EXAMPLE)))


def test_a_new_criterion_is_a_function_and_an_entry(monkeypatch, small_net):
    def spread(evidence):
        """Distance from the mean of the layer's weights."""
        return {name: (layer.weight - layer.weight.mean()).abs() for name, layer in evidence.layers.items()}

    monkeypatch.setitem(CRITERIA, "spread", spread)
    layers = prunable_layers(small_net, EXAMPLE)
    scores = score("spread", Evidence(small_net, layers))
    masks, _ = prepare("global", rank(scores)).masks(0.5)
    apply_masks(layers, masks)
    total = sum(values.numel() for values in scores.values())
    assert sum(zeros_by_layer(layers).values()) == round(0.5 * total)
    kept = min(float(scores[name][mask].min()) for name, mask in masks.items())
    assert kept >= max(float(scores[name][~mask].max()) for name, mask in masks.items())
    assert small_net(torch.randn(2, 3, 8, 8)).isfinite().all()
