"""Filters: which may be removed, the masked network, and the thin one that gives the same outputs."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from conftest import awaken
from torch import nn

import Build_Resnet
from Build_Resnet import BasicBlock, Bottleneck
from sparsity.networks.families import build_empty
from sparsity.networks.layers import prunable_layers, unmasked_state
from sparsity.networks.narrow import narrow
from sparsity.prune.allocation import Allocator
from sparsity.prune.filters import Branch, branches, inner_convs, mask_filters
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import Pruner
from sparsity.prune.thinning import thin
from sparsity.system.methods import Curve

LEVELS = [0, 50, 90, 99.5, 100]
ARCHS = ["resnet18", "resnet50"]
EXAMPLE = torch.zeros(1, 3, 16, 16)


def spec_of(arch="resnet50", width=8):
    return {"arch": arch, "num_classes": 5, "width": width}


def network(arch="resnet50", width=8):
    torch.manual_seed(0)
    return awaken(Build_Resnet.build(spec_of(arch, width)))


def pruned(model, level, allocation="uniform"):
    """A copy without `level` percent of its inner filters, which of them were to stay, and how many more went."""
    model = copy.deepcopy(model)
    convs = {name: model.get_submodule(name) for name in inner_convs(model)}
    scores = {name: conv.weight.abs().flatten(1).sum(dim=1) for name, conv in convs.items()}
    keep, _ = Allocator(allocation, scores).masks(level / 100)
    return model, keep, mask_filters(model, keep)


def rebuilt(spec, found):
    small = build_empty(spec | {"widths": found.widths}, found.state)
    small.load_state_dict(found.state, assign=True)
    return small.eval()


@torch.no_grad()
def apart(first, second):
    """Largest difference of outputs in units of the largest output."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    one, other = first(images), second(images)
    return float((one - other).abs().max() / one.abs().max())


class Shared(nn.Module):
    """A convolution read twice, one that runs twice, a grouped one, one under a sigmoid: all must stay."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.grouped, self.bn3 = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)
        self.last, self.bn4, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sigmoid()
        self.end = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.twice(x)
        x = self.bn2(self.twice(x)).relu()
        x = self.last(self.bn3(self.grouped(x)).relu())
        return self.end(self.relu(self.bn4(x)))


def inner_names(model):
    """The convolutions of each block but the last one, by name."""
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, BasicBlock | Bottleneck)}
    counts = {name: 2 if isinstance(block, Bottleneck) else 1 for name, block in blocks.items()}
    return [f"{name}.conv{number + 1}" for name, count in counts.items() for number in range(count)]


def test_branches_are_found_in_any_network_where_nothing_else_reads_a_channel(small_net):
    for arch in Build_Resnet.ARCHITECTURES:
        assert inner_convs(network(arch, 2)) == inner_names(network(arch, 2))
    assert [(branch.convs, branch.residual) for branch in branches(small_net)] == [(("stem", "down"), False)]
    convs, norms = (tuple(f"layer1.0.{kind}{number}" for number in (1, 2, 3)) for kind in ("conv", "bn"))
    assert branches(network())[0] == Branch(convs, norms, residual=True)
    assert branches(Shared()) == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_thin_network_gives_the_outputs_of_the_masked_one(arch, allocation, level):
    dense = network(arch)
    model, keep, more = pruned(dense, level, allocation)
    before = copy.deepcopy(model.state_dict())
    found = thin(model)
    small = rebuilt(spec_of(arch), found)
    assert apart(model, small) <= 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert more == 0 or level > 99  # where a convolution is emptied, its block is, but for a filter of zeros in each
    assert (found.dead > 0) == any(not filters.any() for filters in keep.values())
    assert found.removed + found.dead == sum(int((~filters).sum()) for filters in keep.values()) + more
    left = sum(int(torch.count_nonzero(layer.weight)) for layer in prunable_layers(model, EXAMPLE).values())
    # Masked is removed, nothing more and nothing less.
    assert sum(int(torch.count_nonzero(layer.weight)) for layer in prunable_layers(small, EXAMPLE).values()) == left
    assert found.dead or sum(layer.weight.numel() for layer in prunable_layers(small, EXAMPLE).values()) == left
    for name, filters in keep.items() if allocation == "uniform" else ():
        assert int((~filters).sum()) == round(level / 100 * len(filters))
        norms = dense.get_submodule(name).weight.detach().abs().sum(dim=(1, 2, 3))
        assert filters.all() or not filters.any() or norms[filters].min() >= norms[~filters].max()


def test_a_pruned_filter_is_silent_and_a_kept_one_untouched():
    dense = network()
    model, keep, _ = pruned(dense, 50)
    old, new = dense.state_dict(), unmasked_state(model)
    for branch in branches(dense):
        for name, norm, reader in zip(branch.convs, branch.norms, branch.convs[1:], strict=False):
            for key in (f"{name}.weight", f"{norm}.weight", f"{norm}.bias"):
                assert not new[key][~keep[name]].any()
                assert "conv" in key or torch.equal(new[key][keep[name]], old[key][keep[name]])
            assert not new[f"{reader}.weight"][:, ~keep[name]].any()
    assert torch.equal(new["conv1.weight"], old["conv1.weight"])


@pytest.mark.parametrize("arch", ARCHS)
def test_where_a_convolution_is_emptied_its_branch_goes_and_at_100_percent_a_block_is_its_shortcut(arch):
    model = network(arch)
    convs = branches(model)[0].convs[:-1]
    assert mask_filters(model, {convs[-1]: torch.zeros(8, dtype=torch.bool)}) == 8 * (len(convs) - 1)
    found = thin(model)
    assert {found.widths[name] for name in convs} == {1} and apart(model, rebuilt(spec_of(arch), found)) <= 1e-4
    found = thin(pruned(network(arch), 100)[0])
    assert found.widths == dict.fromkeys(inner_names(model), 1)
    small = rebuilt(spec_of(arch), found)
    block, following = small.layer2[:2]
    images = torch.randn(2, block.shortcut[0].in_channels, 8, 8)
    with torch.no_grad():
        assert torch.equal(block(images), block.shortcut(images).relu())
        assert torch.equal(following(block(images)), block(images))
    again = thin(small)
    assert again.removed == 0 and again.dead == found.dead == len(found.widths)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("level", [0, 50, 90, 97, 99.9, 100])
def test_dead_channels_go_where_outputs_stay_the_same(arch, level):
    model = network(arch)
    prune_l1_uniform(prunable_layers(model, EXAMPLE), level / 100)
    found = thin(model)
    assert apart(model, rebuilt(spec_of(arch), found)) <= 1e-4
    assert level == 90 or (found.removed > 0) == (level > 90)
    assert min(found.widths.values(), default=1) >= 1


class Inverted(nn.Module):
    """An inverted residual block as of MobileNet, its activations no ReLU, and a branch over pooling before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Hardswish(), nn.MaxPool2d(2))
        self.next = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU())
        depth = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.block = nn.Sequential(expand, depth, nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.next(self.stem(x))
        return self.fc((x + self.block(x)).mean(dim=(2, 3)))


def test_depthwise_convolutions_go_along_and_removed_channels_are_silent():
    torch.manual_seed(0)
    dense = awaken(Inverted())
    assert inner_convs(dense) == ["stem.0", "block.0.0"] and not any(branch.plain for branch in branches(dense))
    model, keep, more = pruned(dense, 50)
    found = thin(model)
    assert more == 0 and found.removed == sum(int((~filters).sum()) for filters in keep.values())
    small = narrow(Inverted(), found.state, found.widths)
    small.load_state_dict(found.state)
    assert small.block[1][0].groups == 12 and apart(model, small.eval()) <= 1e-4
    gone = ~keep["block.0.0"]
    assert int(gone.sum()) == 12
    seen = {}
    for name in ("block.0.2", "block.1.2"):
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        expected = model(torch.randn(2, 3, 16, 16))
    assert expected.isfinite().all()
    for output in seen.values():
        assert not output[:, gone].any() and output[:, ~gone].any()
    state = unmasked_state(model)
    assert not state["block.1.0.weight"][gone].any() and not state["block.2.weight"][:, gone].any()
    model, _, more = pruned(dense, 100)  # the block is its shortcut
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        through = model.next(model.stem(images))
        torch.testing.assert_close(model(images), model.fc(through.mean(dim=(2, 3))))


def sequence(width, padding):
    first, second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 5, 3, padding=padding, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(5))


@pytest.mark.parametrize(
    ("padding", "unread", "bias", "removed", "dead"),
    [
        (0, [], 0.0, 2, 0),  # an unpadded convolution passes a constant on to its BatchNorm
        (1, [], 0.0, 1, 1),  # a padded one sees it differently at the border
        (1, [0, 3], 0.0, 3, 0),  # channels that nobody reads go whatever they emit
        (1, [], 2.0, 0, 2),  # the bias of a zero filter makes the quiet channel loud
    ],
)
def test_constants_of_dead_channels(padding, unread, bias, removed, dead):
    """Channel 0 of the first convolution is dead and loud, channel 1 dead and quiet."""
    torch.manual_seed(0)
    model = awaken(sequence(4, padding))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias.copy_(torch.tensor([0.0, bias, 0.0, 0.0]))
        model[1].weight[:] = 1
        model[1].running_mean[:] = 0
        model[1].bias[:2] = torch.tensor([0.7, -0.7])
        model[3].weight[:, unread] = 0
    found = thin(model)
    assert (found.removed, found.dead) == (removed, dead)
    assert torch.equal(found.state["4.running_mean"], model[4].running_mean) == (padding == 1)
    small = sequence(found.widths.get("0", 4), padding)
    small.load_state_dict(found.state)
    assert apart(model, small.eval()) <= 1e-5


def test_a_thin_network_is_thinned_again_and_excluded_layers_keep_their_filters():
    first = thin(pruned(network(), 50)[0])
    dense = rebuilt(spec_of(), first)
    layers = [name for name in prunable_layers(dense, EXAMPLE) if name != "layer1.0.conv1"]
    model, _ = Pruner(dense, layers).prune(Curve("filter_l1", "uniform", "none"), 50)
    twice, widths = thin(model), first.widths
    widths |= twice.widths
    assert (widths["layer1.0.conv1"], widths["layer1.0.conv2"]) == (4, 2)
    assert apart(model, rebuilt(spec_of(), replace(twice, widths=widths))) <= 1e-4


def test_impossible_widths_are_refused():
    found = thin(pruned(network(), 50)[0])
    name = "layer1.0.conv1"
    for said, widths, tensors in (
        ("no convolution or linear layer", {"layer9.0.conv1": 1}, {}),
        ("no convolution or linear layer", {"bn1": 1}, {}),
        ("no convolution or linear layer", {3: 1}, {}),
        *(("from 1 to 8", {name: width}, {}) for width in (9, 0, -1, True, 2.0)),
        ("not a dictionary", [[1]], {}),
        ("is 3, but not that of its weight", {name: 3}, {}),
        ("is 4, but not that of its weight", {name: 4}, {f"{name}.weight": torch.tensor(0.0)}),
        ("no part of", {name: 4}, {f"{name}.weight": torch.zeros(4, 8, 3, 3)}),
        ("no part of", {name: 4}, {f"{name}.weight": torch.zeros(4, 9, 1, 1)}),
        ("no part of", {name: 4}, {"layer1.0.bn1.weight": torch.zeros(0)}),
        ("no part of", {name: 4}, {"layer1.0.bn1.bias": torch.zeros(())}),
    ):
        with pytest.raises(ValueError, match=said):
            build_empty(spec_of() | {"widths": widths}, found.state | tensors)
    with pytest.raises(ValueError, match="depth has 6 filters, which are no whole groups"):
        grouped = nn.Sequential(OrderedDict(depth=nn.Conv2d(8, 16, 1, groups=4)))
        narrow(grouped, {"depth.weight": torch.zeros(6, 2, 1, 1)}, {})
