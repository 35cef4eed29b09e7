"""Whole filters: which may go, the masked network, and the smaller one that gives the same outputs."""

import copy

import pytest
import torch
from conftest import awaken
from torch import nn

import Build_Resnet
from sparsity.networks.layers import prunable_layers, unmasked_state
from sparsity.prune.allocation import prepare, rank
from sparsity.prune.criteria import filter_l1
from sparsity.prune.filters import branches, inner_convs, mask_filters, thin
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import Pruner

LEVELS = [0, 30, 50, 70, 90, 99.5, 100]
ARCHS = ["resnet18", "resnet50"]


def network(arch="resnet50", width=8):
    torch.manual_seed(0)
    return awaken(Build_Resnet.build(spec_of(arch, width)))


def spec_of(arch="resnet50", width=8):
    return {"arch": arch, "num_classes": 5, "width": width}


def pruned(model, level, allocation="uniform"):
    """A copy without `level` percent of its inner filters, which of them were to stay, and how many more went."""
    model = copy.deepcopy(model)
    convs = {name: model.get_submodule(name) for name in inner_convs(model)}
    with torch.no_grad():
        keep, _ = prepare(allocation, rank(filter_l1(convs))).masks(level / 100)
    return model, keep, mask_filters(model, keep)


def rebuilt(spec, found):
    small = Build_Resnet.build(spec | {"widths": found.widths})
    small.load_state_dict(found.state)
    return small.eval()


@torch.no_grad()
def apart(first, second, size=16):
    """Largest difference of outputs in units of the largest output."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    one, other = first(images), second(images)
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("arch", Build_Resnet.ARCHITECTURES)
def test_inner_convolutions_are_those_that_the_blocks_name(arch):
    assert inner_convs(network(arch, 2)) == list(Build_Resnet.inner_widths(arch, 2))


def test_branches_are_found_in_any_network(small_net):
    assert [(branch.convs, branch.residual) for branch in branches(small_net)] == [(("stem", "down"), False)]
    first = branches(network())[0]
    assert first.convs == ("layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3")
    assert first.norms == ("layer1.0.bn1", "layer1.0.bn2", "layer1.0.bn3")
    assert first.residual


class Shared(nn.Module):
    """A convolution whose output is read twice, one that runs twice, and one that is grouped: none may be thinned."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.grouped, self.bn3 = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.twice(x)
        x = self.bn2(self.twice(x)).relu()
        return self.last(self.bn3(self.grouped(x)).relu())


def test_channels_that_something_else_reads_are_left_alone():
    assert branches(Shared()) == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_thin_network_gives_the_outputs_of_the_masked_one(arch, allocation, level):
    model, keep, more = pruned(network(arch), level, allocation)
    found = thin(model)
    small = rebuilt(spec_of(arch), found)
    assert apart(model, small) <= 1e-4
    gone = sum(int((~filters).sum()) for filters in keep.values())
    assert found.removed == gone + more
    assert more == 0 or level > 99  # where a convolution is emptied, its block is
    assert found.dead == 0
    weights = {name: model.get_submodule(name) for name in prunable_layers(model, torch.zeros(1, 3, 16, 16))}
    left = sum(int(torch.count_nonzero(layer.weight)) for layer in weights.values())
    thin_weights = sum(layer.weight.numel() for layer in prunable_layers(small, torch.zeros(1, 3, 16, 16)).values())
    assert thin_weights == left  # what is masked is what is removed, nothing more and nothing less


@pytest.mark.parametrize("level", LEVELS)
def test_exactly_the_share_of_the_filters_goes_in_every_layer(level):
    _, keep, _ = pruned(network(), level)
    for filters in keep.values():
        assert int((~filters).sum()) == round(level / 100 * len(filters))


def test_the_smallest_filters_go():
    dense = network()
    _, keep, _ = pruned(dense, 50)
    for name, filters in keep.items():
        norms = dense.get_submodule(name).weight.detach().abs().sum(dim=(1, 2, 3))
        assert norms[filters].min() >= norms[~filters].max()


def test_a_pruned_filter_is_silent_and_a_kept_one_untouched():
    dense = network()
    model, keep, _ = pruned(dense, 50)
    for branch in branches(dense):
        for index, name in enumerate(branch.inner):
            conv, norm = model.get_submodule(name), model.get_submodule(branch.norms[index])
            reader = model.get_submodule(branch.convs[index + 1])
            gone, kept = ~keep[name], keep[name]
            assert not conv.weight[gone].any() and not norm.weight[gone].any() and not norm.bias[gone].any()
            assert not reader.weight[:, gone].any()
            old = dense.get_submodule(branch.norms[index])
            assert torch.equal(norm.weight[kept], old.weight[kept]) and torch.equal(norm.bias[kept], old.bias[kept])
    assert torch.equal(model.conv1.weight, dense.conv1.weight)


@pytest.mark.parametrize("arch", ARCHS)
def test_at_100_percent_a_block_is_its_shortcut(arch):
    model, _, _ = pruned(network(arch), 100)
    found = thin(model)
    assert set(found.widths.values()) == {0}
    small = rebuilt(spec_of(arch), found)
    assert not any("conv" in name for name, _ in small.layer1.named_modules())
    images = torch.randn(2, 16 if arch == "resnet18" else 64, 8, 8)[:, : small.layer2[0].shortcut[0].in_channels]
    with torch.no_grad():
        block = small.layer2[0]
        assert torch.equal(block(images), block.shortcut(images).relu())
        assert torch.equal(small.layer2[1](block(images)), block(images))


def test_where_one_convolution_is_emptied_all_of_its_branch_goes():
    model = network()
    keep = {name: torch.ones(8, dtype=torch.bool) for name in ("layer1.0.conv1", "layer1.0.conv2")}
    keep["layer1.0.conv2"] = torch.zeros(8, dtype=torch.bool)
    assert mask_filters(model, keep) == 8
    found = thin(model)
    assert (found.widths["layer1.0.conv1"], found.widths["layer1.0.conv2"]) == (0, 0)
    assert apart(model, rebuilt(spec_of(), found)) <= 1e-4


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("level", [0, 50, 90, 97, 99, 99.9, 100])
def test_dead_channels_go_where_outputs_stay_the_same(arch, level):
    model = copy.deepcopy(network(arch))
    prune_l1_uniform(prunable_layers(model, torch.zeros(1, 3, 16, 16)), level / 100)
    found = thin(model)
    assert apart(model, rebuilt(spec_of(arch), found)) <= 1e-4
    assert level == 90 or (found.removed > 0) == (level > 90)
    assert min(found.widths.values()) >= 1


def one_branch(padding):
    """conv -> BatchNorm -> ReLU -> conv -> BatchNorm; channel 0 of the first is dead and loud, 1 dead and quiet."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=padding, bias=False),
        nn.BatchNorm2d(5),
    )
    awaken(model)
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[1].weight[:] = 1
        model[1].running_mean[:] = 0
        model[1].bias[:2] = torch.tensor([0.7, -0.7])
    return model


def shrunk(padding, found):
    width = found.widths["0"]
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 5, 3, padding=padding, bias=False),
        nn.BatchNorm2d(5),
    )
    model.load_state_dict(found.state)
    return model.eval()


def test_an_unpadded_convolution_passes_a_constant_on_to_its_batchnorm():
    model = one_branch(padding=0)
    found = thin(model)
    assert (found.removed, found.dead) == (2, 0)
    assert not torch.equal(found.state["4.running_mean"], model[4].running_mean)
    assert apart(model, shrunk(0, found)) <= 1e-5


def test_a_padded_convolution_sees_a_constant_differently_at_the_border_so_it_stays():
    model = one_branch(padding=1)
    found = thin(model)
    assert (found.removed, found.dead) == (1, 1)
    assert torch.equal(found.state["4.running_mean"], model[4].running_mean)
    assert apart(model, shrunk(1, found)) <= 1e-6


def test_channels_that_nobody_reads_go_whatever_they_emit():
    model = one_branch(padding=1)
    with torch.no_grad():
        model[3].weight[:, [0, 3]] = 0
    found = thin(model)
    assert (found.removed, found.dead) == (3, 0)
    assert apart(model, shrunk(1, found)) <= 1e-6


def test_a_bias_counts_as_what_a_zero_filter_emits():
    model = one_branch(padding=1)
    model[0].bias = nn.Parameter(torch.tensor([0.0, 2.0, 0.0, 0.0]))  # the quiet channel becomes loud
    assert thin(model).dead == 2


def test_thinning_leaves_the_network_as_it_is():
    model, _, _ = pruned(network(), 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    thin(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_thin_network_is_thinned_again():
    model, _, _ = pruned(network(), 50)
    spec = spec_of() | {"widths": thin(model).widths}
    small = rebuilt(spec_of(), thin(model))
    again, _, _ = pruned(small, 50)
    found = thin(again)
    assert found.widths["layer1.0.conv1"] == 2
    assert apart(again, rebuilt(spec, found)) <= 1e-4


def test_the_stem_of_a_network_without_branches_is_left_alone():
    model, _, _ = pruned(network(), 100)
    small = rebuilt(spec_of(), thin(model))
    assert inner_convs(small) == []
    prune_l1_uniform(prunable_layers(small, torch.zeros(1, 3, 16, 16)), 1.0)
    assert thin(small).removed == 0


def test_pruning_filters_leaves_the_dense_network_as_it_is():
    dense = network()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    layers = list(prunable_layers(dense, torch.zeros(1, 3, 16, 16)))
    Pruner(dense, layers, None, 0).prune(("filter_l1", "uniform", "none"), 70)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_excluded_layers_keep_their_filters():
    dense = network()
    layers = [name for name in prunable_layers(dense, torch.zeros(1, 3, 16, 16)) if name != "layer1.0.conv1"]
    model, _ = Pruner(dense, layers, None, 0).prune(("filter_l1", "uniform", "none"), 50)
    assert thin(model).widths["layer1.0.conv1"] == 8
    assert thin(model).widths["layer1.0.conv2"] == 4


def test_unmasked_state_is_that_of_the_effective_weights(small_net):
    model = copy.deepcopy(small_net)
    prune_l1_uniform(prunable_layers(model, torch.zeros(1, 3, 8, 8)), 0.5)
    state = unmasked_state(model)
    assert state.keys() == small_net.state_dict().keys()
    small_net.load_state_dict(state)
    assert apart(model, small_net, 8) <= 1e-6
    assert int((state["stem.weight"] == 0).sum()) == state["stem.weight"].numel() // 2


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ([1], "not a dictionary"),
        ({"layer9.0.conv1": 1}, "no inner convolution"),
        ({"layer1.0.conv3": 1}, "no inner convolution"),
        ({3: 1}, "no inner convolution"),
        ({"layer1.0.conv1": 9}, "from 0 to 8"),
        ({"layer1.0.conv1": -1}, "from 0 to 8"),
        ({"layer1.0.conv1": True}, "from 0 to 8"),
        ({"layer1.0.conv1": 2.0}, "from 0 to 8"),
        ({"layer1.0.conv1": 0}, "no filters in one convolution"),
    ],
)
def test_widths_that_cannot_be_are_refused(widths, said):
    with pytest.raises(ValueError, match=said):
        Build_Resnet.build(spec_of() | {"widths": widths})


def test_widths_are_read_off_the_shapes():
    found = thin(pruned(network(), 50)[0])
    assert Build_Resnet.spec_of(found.state) == spec_of() | {"widths": found.widths}
    assert "widths" not in Build_Resnet.spec_of(network().state_dict())
    empty = thin(pruned(network(), 100)[0])
    with pytest.raises(ValueError, match="none of the known architectures"):
        Build_Resnet.spec_of(empty.state)
