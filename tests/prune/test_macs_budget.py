"""Levels as shares of the multiply-adds: met at nine levels by every allocation, exact at both ends."""

import pytest
import torch
from conftest import awaken
from torch import Tensor, nn

from sparsity.networks.census import census
from sparsity.networks.families import build
from sparsity.networks.layers import positions_per_image, prunable_layers
from sparsity.prune.budget import ranks, weight_costs
from sparsity.prune.pruner import Pruner
from sparsity.system.methods import ALLOCATIONS, FILTER_ALLOCATIONS, Curve

EXAMPLE = torch.zeros(1, 3, 16, 16)
CURVES = [Curve("l1", name, "none") for name in ALLOCATIONS]
CURVES += [Curve("filter_l1", name, "none") for name in FILTER_ALLOCATIONS]


@pytest.fixture(scope="module")
def resnet():
    """A ResNet-18 of 480 inner filters, as training leaves it: its layers differ in scale."""
    torch.manual_seed(0)
    model = build({"arch": "resnet18", "num_classes": 10, "width": 16})
    with torch.no_grad():
        for number, layer in enumerate(prunable_layers(model, EXAMPLE).values()):
            layer.weight.mul_(1.2**number)
    return awaken(model)


def removed(pruner: Pruner, model: nn.Module, example: Tensor = EXAMPLE) -> float:
    """The share of the multiply-adds of the prunable layers that a masked network has lost, in percent."""
    positions = positions_per_image(pruner.network, example)
    counts = census(model, {name: model.get_submodule(name) for name in pruner.layers}, positions)
    prunable = sum(pruner.network.get_submodule(name).weight.numel() * positions[name] for name in pruner.layers)
    return 100 * (counts.macs - counts.macs_remaining) / prunable


def budgeted(model: nn.Module, example: Tensor = EXAMPLE, **more) -> Pruner:
    layers = list(prunable_layers(model, example))
    return Pruner(model, layers, costs=weight_costs(model, layers, positions_per_image(model, example)), **more)


@pytest.mark.parametrize("curve", CURVES)
def test_nine_levels_are_met_and_both_ends_are_exact(resnet, curve):
    pruner = budgeted(resnet)
    reach, previous = removed(pruner, pruner.prune(curve, 100)[0]), 0.0
    assert reach == 100 or curve.prunes_filters  # no filter of the stem and of a shortcut can go
    assert removed(pruner, pruner.prune(curve, 0)[0]) == 0
    for level in range(10, 100, 40 if curve[:2] == ("filter_l1", "global") else 10):  # which take a second each
        model, notes = pruner.prune(curve, level)
        found = removed(pruner, model)
        assert found == pytest.approx(min(level, reach), abs=0.5) and found > previous - (level > reach)
        assert (f"all filters together are {reach:.1f} % of the multiply-adds" in notes) == (level > reach)
        previous = found


@pytest.mark.parametrize("multiple", [1, 4])
def test_levels_that_channels_are_too_few_to_meet_are_told(multiple):
    torch.manual_seed(0)
    model = awaken(build({"arch": "resnet18", "num_classes": 10, "width": 4}))
    pruner, missed = budgeted(model, couple=True, multiple=multiple), []
    layers = {name: model.get_submodule(name) for name in pruner.layers}
    total = sum(layer.weight.numel() * pruner.costs[name] for name, layer in layers.items())
    for level in (0, 10, 80, 100):
        pruned, notes = pruner.prune(Curve("filter_l1", "uniform", "none"), level)
        zeros = census(pruned, {name: pruned.get_submodule(name) for name in layers}, {}).by_layer
        found = 100 * sum(zeros[name] * cost for name, cost in pruner.costs.items()) / total
        missed.append(abs(found - level) > 0.5)
        told = f"{found:.1f} % of the multiply-adds is the nearest that filters come to"
        assert (told in notes) == missed[-1]
    assert any(missed) and not missed[0] and not missed[-1]


@pytest.mark.parametrize("allocation", ["global", "lamp"])
def test_other_weights_go_than_for_a_share_of_weights(resnet, allocation):
    curve, weights = Curve("l1", allocation, "none"), Pruner(resnet, list(prunable_layers(resnet, EXAMPLE)))
    assert abs(removed(weights, weights.prune(curve, 50)[0]) - 50) > 2  # or the budget would decide nothing


@pytest.mark.parametrize("criterion", ["l1", "filter_l1"])
def test_masks_of_an_iterative_curve_are_nested_and_met(resnet, criterion):
    pruner, gone = budgeted(resnet), None
    for level in (20, 50, 70):
        model, _ = pruner.prune(Curve(criterion, "global", "finetune"), level)
        masks = torch.cat([model.get_submodule(name).weight.flatten() == 0 for name in pruner.layers])
        assert removed(pruner, model) == pytest.approx(level, abs=0.5)
        assert gone is None or masks[gone].all()
        pruner, gone = pruner.continued(model), masks


def test_uniform_filters_are_the_same_share_of_each_layer_to_a_filter(resnet):
    model, _ = budgeted(resnet).prune(Curve("filter_l1", "uniform", "none"), 50)
    kept = [int(layer.weight.flatten(1).any(dim=1).sum()) for name, layer in model.named_modules() if "conv1" in name]
    shares = [count / width for count, width in zip(kept[1:], [16, 16, 32, 32, 64, 64, 128, 128], strict=True)]
    assert max(shares) - min(shares) <= 1 / 16 < min(shares) < 1
    assert ranks({"a": torch.tensor([3.0, 1, 2, 1])})["a"].tolist() == [0.875, 0.125, 0.625, 0.375]


def test_a_shared_weight_costs_what_all_of_its_layers_compute():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.second.weight = self.first.weight
            self.third, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.third(self.second(self.first(self.first(x)))).mean((2, 3)))

    model = Twins()
    assert budgeted(model).costs == {"first": 3 * 256, "third": 64}
