"""Coupled channels: which go together, what stays, and the masked network against the thin one."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, awaken
from networks.published import akamaster, chita
from torch import nn

import Build_Resnet
from sparsity.networks.census import census
from sparsity.networks.layers import Way, calls, positions_per_image, prunable_layers, set_way
from sparsity.networks.narrow import narrow
from sparsity.prune.channels import mask_channels
from sparsity.prune.coupling import couple
from sparsity.prune.thinning import thin

EXAMPLE = torch.zeros(1, 3, 16, 16)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def unit(inputs, outputs, size=1, **more):
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=size // 2, **more), nn.BatchNorm2d(outputs))


class Garden(nn.Module):
    """A residual block with a depthwise convolution and a gate, a concatenation, a grouped convolution, flattening."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand, self.depth = unit(3, 6, 3), unit(6, 10), unit(10, 10, 3, groups=10)
        self.squeeze, self.excite, self.shrink = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1), unit(10, 6)
        self.side, self.norm, self.slope = nn.Conv2d(6, 3, 1), nn.BatchNorm2d(9), nn.PReLU(9)
        self.wide, self.grouped, self.narrow = unit(9, 8), unit(8, 12, 3, groups=4, bias=False), unit(12, 2)
        self.hidden, self.head = nn.Linear(2 * 16, 7), nn.Linear(7, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.depth(F.silu(self.expand(x)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.shrink(y)
        x = self.slope(self.norm(torch.cat([x, self.side(x)], 1)))
        x = self.narrow(F.relu(self.grouped(F.relu(self.wide(x)))))
        x = F.adaptive_avg_pool2d(F.relu(x), 4)
        return self.head(F.relu(self.hidden(x.view(x.size(0), -1))))


MAKE = {
    "garden": Garden,
    "resnet18": lambda: Build_Resnet.resnet18(5, 4),
    "resnet50": lambda: Build_Resnet.resnet50(5, 4),
    "padded": akamaster,
    "projected": chita,
}


def network(name):
    torch.manual_seed(0)
    return awaken(MAKE[name]())


def test_channels_that_meet_are_one_unit():
    coupling = couple(network("garden"))
    assert {name: len(units) for name, units in coupling.groups.items()} == {
        "stem.0 shrink.0": 6, "expand.0 depth.0 excite": 10, "squeeze": 4, "side": 3, "wide.0 grouped.0": 4,
        "narrow.0": 2, "hidden": 7,
    }  # fmt: skip
    assert coupling.kept == {"head": "they are outputs of the network"}
    assert coupling.inputs["wide.0"].tolist() == [*coupling.outputs["stem.0"], *coupling.outputs["side"]]
    assert coupling.inputs["hidden"].tolist() == [
        int(number) for number in coupling.outputs["narrow.0"] for _ in range(16)
    ]
    units = coupling.outputs["wide.0"]
    assert torch.equal(units[::2], units[1::2]) and torch.equal(coupling.outputs["grouped.0"][::3], units[::2])
    assert "grouped.0" not in coupling.inputs and "depth.0" not in coupling.inputs


@pytest.mark.parametrize("level", [0, 50, 90, 100])
@pytest.mark.parametrize("name", MAKE)
def test_the_thin_network_gives_the_outputs_of_the_masked_one_with_the_multiply_adds_that_were_counted(name, level):
    model, dense = network(name), network(name)
    coupling = couple(model)
    gone = torch.zeros(coupling.units, dtype=torch.bool)
    for units in coupling.groups.values():  # one channel stays below 100 %
        gone[units[: min(round(level / 100 * len(units)), len(units) - (level < 100))]] = True
    mask_channels(model, coupling, gone)
    found = thin(model)
    small = narrow(MAKE[name](), found.state, found.widths)
    small.load_state_dict(found.state)
    with torch.no_grad():
        outputs, expected = small.eval()(IMAGES), model(IMAGES)
        assert float((outputs - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        if level == 0:
            assert torch.equal(expected, dense(IMAGES)) and found.widths == {}
            assert all(torch.equal(value, found.state[key]) for key, value in dense.state_dict().items())
        if level == 100 and name != "padded":
            assert torch.equal(expected, list(dense.modules())[-1].bias.expand_as(expected))
            assert set(found.widths.values()) <= {1, 2, 3}  # 2, 3: a group of a grouped convolution
    positions = positions_per_image(dense, EXAMPLE)
    counts = census(small, {}, positions_per_image(small, EXAMPLE))
    assert level == 100 or counts.macs == census(model, prunable_layers(model, EXAMPLE), positions).macs_remaining
    assert [call.name for call in calls(small, EXAMPLE)] == [call.name for call in calls(dense, EXAMPLE)]


def test_channels_that_meet_zeros_stay():
    coupling = couple(network("padded"))
    assert coupling.kept["layer3.2.conv2"] == "they meet the zeros of pad"
    stays = coupling.outputs["layer3.2.conv2"] < 0
    assert stays.tolist() == [True] * 24 + [False] * 16 + [True] * 24  # between the zeros are channels of the stem
    assert torch.equal(coupling.outputs["layer3.2.conv2"][24:40], coupling.outputs["conv1"])


class Reads(nn.Module):
    """Two convolutions, and what `read` makes of the first one's channels before the second or a linear layer."""

    def __init__(self, read, last):
        super().__init__()
        self.first, self.read, self.last, self.head = nn.Conv2d(3, 4, 1), read, last, nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.last(self.read(self.first(x))).flatten(2).mean(2))


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda x: x.view(x.shape[0], 2, 2, 16, 16).transpose(1, 2).reshape(x.shape), "read by view"),
        (lambda x: torch.cat(x.chunk(2, dim=1)[::-1], 1), "read by chunk"),
        (lambda x: x[:, [1, 0, 3, 2]], "read by getitem"),
        (lambda x: x.flip(1), "read by flip"),
        (lambda x: x * torch.arange(4.0).view(1, 4, 1, 1), "read by mul"),
        (lambda x: x + x.mean(1, keepdim=True), "read by"),
        (lambda x: torch.cat([x, x], 2)[:, :, :16], "read by cat"),
        (lambda x: x.softmax(1), "read by softmax"),
        (lambda x: F.interpolate(x.flatten(2), size=16), "read by"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), "read by pad"),
    ],
)
def test_channels_stay_where_something_unknown_reads_them(read, reason):
    torch.manual_seed(0)
    last = nn.Conv1d(4, 4, 1) if "interpolate" in read.__code__.co_names else nn.Conv2d(4, 4, 1)
    model = Reads(read, last).eval()
    coupling = couple(model)
    assert coupling.kept["first"].startswith(reason) and (coupling.outputs["first"] < 0).all()
    before = model(IMAGES)
    mask_channels(model, coupling, torch.ones(coupling.units, dtype=torch.bool))
    assert coupling.units == 0 and torch.equal(model(IMAGES), before)


class Tokens(nn.Module):
    """Linear layers on [B, N, C], flattened: a channel is not a row of places there."""

    def __init__(self, flat):
        super().__init__()
        self.patch, self.up, self.down, self.flat = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 6), nn.Linear(6, 4), flat
        self.head = nn.Linear(64 if flat else 4, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.flatten(1) if self.flat else x.mean(1))


@pytest.mark.parametrize("flat", [True, False])
def test_of_tokens_the_hidden_channels_go(flat):
    torch.manual_seed(0)
    model = Tokens(flat)
    coupling = couple(model)
    assert {name: len(units) for name, units in coupling.groups.items()} == {"up": 6}
    mask_channels(model, coupling, torch.arange(6) < 4)
    found = thin(model)
    small = narrow(Tokens(flat), found.state, found.widths)
    small.load_state_dict(found.state)
    torch.testing.assert_close(small(IMAGES), model(IMAGES))
    assert found.widths == {"up": 2}


class Again(nn.Module):
    """A convolution that runs twice, two that share their weight, and one whose weight is read past it."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.one, self.other = (nn.Conv2d(inputs, 4, 1, bias=False) for inputs in (3, 4, 4, 4))
        self.other.weight = self.one.weight
        self.past, self.free, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.twice(self.twice(x).relu()).relu()
        x = F.conv2d(self.past(x), self.past.weight)
        return self.head(self.free(self.other(self.one(x))).mean((2, 3)))


def test_a_layer_that_runs_twice_has_one_width_and_shared_weights_stay():
    coupling = couple(Again())
    assert coupling.groups.keys() == {"free"}
    assert {name: reason for name, reason in coupling.kept.items() if name != "head"} == {
        "stem": "read by Conv2d past", "twice": "read by Conv2d past",
    }  # fmt: skip


def test_only_given_layers_lose_filters_and_untraced_networks_none():
    model = network("resnet18")
    layers = [name for name in prunable_layers(model, EXAMPLE) if name != "layer2.0.conv2"]
    coupling = couple(model, layers)
    assert coupling.kept["layer2.0.conv2"] == "layer2.0.conv2 is not pruned"
    assert (coupling.outputs["layer2.0.shortcut.0"] < 0).all() and (coupling.inputs["layer3.0.conv1"] < 0).all()
    model = SmallNet()
    assert [len(units) for units in couple(model).groups.values()] == [6, 8, 10]
    set_way(model, Way(traced=False))
    assert couple(model).units == 0


def test_a_dead_channel_of_a_stage_goes_from_files_without_masks():
    model = network("resnet18")
    with torch.no_grad():
        for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0"):
            model.get_submodule(name).weight[:, 2] = 0
    found = thin(model)
    assert {found.widths[name] for name in ("conv1", "layer1.0.conv2", "layer1.1.conv2")} == {3}
