"""Scores of filters and of coupled channels, rounded numbers of them, and a pruner that couples."""

import pytest
import torch
from conftest import awaken
from torch import nn

import Build_Resnet
from sparsity.data.calibration import draw_calibration
from sparsity.networks.layers import prunable_layers, unmasked_state
from sparsity.prune.channels import FILTER_CRITERIA, group_scores, inner_scores, rounded
from sparsity.prune.coupling import couple
from sparsity.prune.filters import inner_convs
from sparsity.prune.pruner import Pruner
from sparsity.system.methods import Curve

EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def calibration(small_split):
    return draw_calibration(small_split, 40, 0, torch.device("cpu"), torch.float32)


def resnet():
    torch.manual_seed(0)
    return awaken(Build_Resnet.resnet18(4, 4))


def test_a_unit_has_the_mean_of_the_norms_of_its_weights_over_those_of_their_layers():
    model = resnet()
    scores, state = group_scores("filter_l1", model, couple(model), None), model.state_dict()
    assert max(len(group.split()) for group in scores) == 3
    for group, norms, readers in (
        ("layer1.0.conv1", ["layer1.0.bn1"], ["layer1.0.conv2"]),
        ("conv1 layer1.0.conv2 layer1.1.conv2", ["bn1", "layer1.0.bn2", "layer1.1.bn2"],
         ["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"]),
        ("layer4.0.conv2 layer4.0.shortcut.0 layer4.1.conv2", ["layer4.0.bn2", "layer4.0.shortcut.1", "layer4.1.bn2"],
         ["layer4.1.conv1", "linear"]),
    ):  # fmt: skip
        rows = [state[f"{name}.weight"].flatten(1).abs().sum(dim=1) for name in group.split()]
        rows += [state[f"{name}.weight"].abs() for name in norms]
        rows += [state[f"{name}.weight"].transpose(0, 1).flatten(1).abs().sum(dim=1) for name in readers]
        torch.testing.assert_close(scores[group], torch.stack([row / row.mean() for row in rows]).mean(dim=0))
    inner = inner_convs(model)
    own = inner_scores("filter_l1", model, inner, None)
    assert all(torch.equal(own[name], model.get_submodule(name).weight.abs().sum(dim=(1, 2, 3))) for name in inner)


def test_activation_is_the_share_of_the_energy_that_a_channel_brings_to_its_readers(small_net, calibration):
    seen = {}
    for name in ("down", "hidden", "result"):
        layer = small_net.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    scores = group_scores("filter_activation", small_net, couple(small_net), calibration)
    assert [float(each.sum()) for each in scores.values()] == pytest.approx([1, 1, 1])
    with torch.no_grad():
        for images, _ in calibration.batches(torch.float32):
            small_net(images)
    for maker, reader in (("down", "hidden"), ("hidden", "result")):
        inputs, weight = torch.cat(seen[reader]), small_net.get_submodule(reader).weight.detach()
        lost = torch.stack(
            [(inputs[:, channel, None] * weight[:, channel]).square().mean() for channel in range(weight.shape[1])]
        )
        torch.testing.assert_close(scores[maker], lost / lost.sum(), rtol=1e-4, atol=1e-6)
    inner = inner_scores("filter_activation", small_net, ["stem"], calibration)
    assert torch.equal(inner["stem"], scores["stem"])


@pytest.mark.parametrize(
    ("kept", "multiple", "left"),
    [(0, 8, 0), (20, 8, 20), (1, 8, 8), (11, 8, 8), (12, 8, 16), (19, 8, 16), (19, 1, 19), (3, 30, 20), (19, 9, 18)],
)
def test_the_nearest_multiple_of_the_best_filters_stays(kept, multiple, left):
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0))
    best = scores.argsort(descending=True)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[best[:kept]] = True
    found = rounded({"conv": mask}, {"conv": scores}, multiple)["conv"]
    assert set(found.nonzero().flatten().tolist()) == set(best[:left].tolist())


@pytest.mark.parametrize("criterion", FILTER_CRITERIA)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_levels_are_shares_of_the_coupled_channels(calibration, criterion, allocation):
    dense = resnet()
    pruner = Pruner(dense, list(prunable_layers(dense, EXAMPLE)), calibration, couple=True)
    for level in (0, 30, 50, 100):
        model, notes = pruner.prune(Curve(criterion, allocation, "none"), level)
        state, coupling = unmasked_state(model), pruner.coupling
        kept = {
            group: int(state[f"{group.split()[0]}.weight"].flatten(1).any(dim=1).sum()) for group in coupling.groups
        }
        assert sum(kept.values()) == coupling.units - round(level / 100 * coupling.units) or allocation == "uniform"
        for group, units in coupling.groups.items() if allocation == "uniform" else ():
            assert kept[group] == len(units) - round(level / 100 * len(units))
        assert notes == [] or "swapped" in notes[0]
        if level == 0:
            assert state.keys() == dense.state_dict().keys() == model.state_dict().keys()
            assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
        if level == 100:
            assert torch.equal(model(torch.rand(2, 3, 8, 8)), dense.linear.bias.expand(2, 4))
    again = pruner.continued(pruner.prune(Curve(criterion, allocation, "none"), 50)[0])
    first, more = (unmasked_state(again.prune(Curve(criterion, allocation, "none"), level)[0]) for level in (50, 75))
    gone = [(state["layer1.0.conv2.weight"].flatten(1) == 0).all(dim=1) for state in (first, more)]
    assert torch.equal(first["layer1.0.conv2.weight"], again.network.layer1[0].conv2.weight)
    assert gone[1][gone[0]].all() and isinstance(again.network, nn.Module)


@pytest.mark.parametrize("couple", [False, True])
def test_rounded_widths(couple):
    dense = resnet()
    pruner = Pruner(dense, list(prunable_layers(dense, EXAMPLE)), couple=couple, multiple=4)
    state = unmasked_state(pruner.prune(Curve("filter_l1", "uniform", "none"), 40)[0])
    kept = {name: int(state[f"{name}.weight"].flatten(1).any(dim=1).sum()) for name in inner_convs(dense)}
    assert list(kept.values()) == [4, 4, 4, 4, 12, 12, 20, 20]  # of 4, 8, 16 and 32: 2, 5, 10 and 19
