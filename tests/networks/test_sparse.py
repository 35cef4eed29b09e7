"""Sparse arithmetic: the outputs of dense kernels, or a refusal."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from torch import nn

import Build_Resnet
from sparsity.networks import sparse
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.networks.narrow import narrow
from sparsity.networks.sparse import Plane, PlaneConv, require_supported, sparse_network
from sparsity.prune import thinning
from sparsity.prune.filters import mask_filters
from sparsity.prune.masks import prune_l1_uniform
from sparsity.system.errors import UserError


def pruned_copy(arch, level, thin=False):
    torch.manual_seed(0)
    model = awaken(Build_Resnet.build({"arch": arch, "num_classes": 5, "width": 8}))
    if thin:
        mask_filters(
            model, {"layer2.0.conv1": torch.arange(16) < 3, "layer3.1.conv1": torch.zeros(32, dtype=torch.bool)}
        )
        found = thinning.thin(model)
        narrow(model := Build_Resnet.build({"arch": arch, "num_classes": 5, "width": 8}), found.state, found.widths)
        model.load_state_dict(found.state)
        model.eval()
    prune_l1_uniform(prunable_layers(model, torch.zeros(1, 3, 16, 16)), level / 100)
    return inference_copy(model)


def images(count, size=16):
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return noise.contiguous(memory_format=torch.channels_last)


def assert_same_outputs(network, inference, counts):
    with torch.no_grad():
        for count in counts:
            found, expected = network(images(count)), inference(images(count))
            assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def a_conv(in_channels, out_channels, kernel, stride, density, bias=True):
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape) < density)
    return conv.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_convolution_of_planes_is_a_convolution(bias, density, kernel, stride):
    torch.manual_seed(0)
    conv, x = a_conv(5, 7, kernel, stride, density, bias), torch.randn(3, 5, 8, 8)
    layer, plane = PlaneConv(conv, 8, 3, {}), Plane(5, 8, 3)
    for _ in range(2):  # the second time buffers hold the first result
        assert torch.allclose(layer(plane.load(x)).images(), conv(x), atol=1e-5)
        x = x.flip(0)


def test_a_convolution_adds_to_another_plane_and_leaves_its_margins_zero():
    torch.manual_seed(0)
    conv, x, base = a_conv(4, 6, 3, 1, 0.5), torch.randn(2, 4, 6, 6), torch.randn(2, 6, 6, 6)
    into = Plane(6, 6, 2).load(base)
    assert PlaneConv(conv, 6, 2, {})(Plane(4, 6, 2).load(x), into) is into
    assert torch.allclose(into.images(), conv(x) + base, atol=1e-5)
    assert not into.pads.any()
    assert not into.whole[:, : into.margin].any() and not into.whole[:, -into.margin :].any()


@pytest.mark.parametrize(("arch", "thin"), [("resnet18", False), ("resnet50", False), ("resnet50", True)])
@pytest.mark.parametrize("level", [0, 95, 100])
def test_the_sparse_network_gives_the_outputs_of_the_dense_one(arch, thin, level):
    inference = pruned_copy(arch, level, thin)
    before = copy.deepcopy(inference.state_dict())
    require_supported(inference, images(1))
    assert_same_outputs(sparse_network(inference, images(4)), inference, (1, 2, 31, 32, 33, 70))
    assert all(torch.equal(value, before[name]) for name, value in inference.state_dict().items())


class Odd(nn.Module):
    def __init__(self, conv, after):
        super().__init__()
        self.conv, self.linear, self.after = conv, nn.Linear(4, 2), after

    def forward(self, x):
        x = self.after(self.conv(x))
        return self.linear(torch.flatten(F.avg_pool2d(x, x.shape[-2:]), 1))


@pytest.mark.parametrize(
    ("options", "after", "sample"),
    [
        ({"kernel_size": 5, "padding": 2}, F.relu, images(1, 8)),
        ({"padding": 0}, F.relu, images(1, 8)),
        ({"dilation": 2}, F.relu, images(1, 8)),
        ({"stride": 2}, F.relu, images(1, 7)),
        ({}, torch.sigmoid, images(1, 8)),
        ({}, F.relu, images(1, 8)[:, :, :4]),
        ({}, F.relu, images(1, 8).bfloat16()),
    ],
)
def test_other_networks_are_refused(options, after, sample):
    model = Odd(nn.Conv2d(3, 4, **{"kernel_size": 3, "padding": 1} | options), after)
    with pytest.raises(UserError, match="use --engine dense"):
        require_supported(inference_copy(model.eval(), sample.dtype), sample)


def test_a_network_that_planes_get_wrong_is_refused(monkeypatch):
    """Whatever the reason: outputs are compared before anything is evaluated."""
    monkeypatch.setattr(sparse, "_relu", lambda plane: plane)
    with pytest.raises(UserError, match="disagree"):
        sparse_network(pruned_copy("resnet18", 95), images(2))
