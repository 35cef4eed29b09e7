"""The fused graph gives the logits of the inference copy, and steps aside where it would not."""

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from helpers import logits_of, masked
from torch import nn

import Build_Resnet
from sparsity.networks.fused import KERNELS, fused
from sparsity.networks.inference import inference_copy, refresh

ONE, SUM = KERNELS._convolution_pointwise.default, KERNELS._convolution_pointwise.binary
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def kernels(network):
    """How many convolutions are fused with a ReLU, and how many with an addition too."""
    called = [node.target for node in network.graph.nodes if node.op == "call_function"]
    return called.count(ONE), called.count(SUM)


@pytest.mark.parametrize(("arch", "expected"), [("resnet18", (9, 8)), ("resnet50", (33, 16))])
def test_convolutions_before_a_relu_and_one_of_each_sum_are_fused_and_follow_their_weights(small_split, arch, expected):
    torch.manual_seed(0)
    model = awaken(getattr(Build_Resnet, arch)(width=8))
    inference = inference_copy(model)
    network = fused(inference, small_split)
    assert kernels(network) == expected
    for level in (0, 50, 100):
        refresh(inference, masked(model, level))
        torch.testing.assert_close(logits_of(network, small_split), logits_of(inference, small_split), **EXACT)


@pytest.mark.skipif(not KERNELS._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here")
def test_bfloat16_rounds_about_as_much_as_without(small_split):
    torch.manual_seed(0)
    model = awaken(Build_Resnet.resnet18(width=8))
    expected, plain = logits_of(model, small_split), inference_copy(model, torch.bfloat16)
    network = fused(plain, small_split)
    assert kernels(network) == (9, 8)
    errors = [logits_of(each, small_split, torch.bfloat16).float() - expected for each in (network, plain)]
    assert errors[0].norm() < 1.2 * errors[1].norm()


class Block(nn.Module):
    """Two convolutions, `join` of their outputs and the input of the second one, and an output layer."""

    def __init__(self, join, **settings):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, **settings)
        self.relu, self.output, self.join = nn.ReLU(), nn.Linear(8, 10), join

    def forward(self, images):
        middle = self.first(images)
        return self.output(self.join(self, middle).mean((2, 3)))


FUSED = {
    "a module": ((1, 0), lambda net, x: net.relu(net.second(x))),
    "a method": ((1, 0), lambda net, x: net.second(x).relu()),
    "a chain": ((2, 0), lambda net, x: torch.relu(net.second(F.relu(x)))),
    "added on the left": ((0, 1), lambda net, x: F.relu(x + net.second(x))),
    "added on the right": ((0, 1), lambda net, x: F.relu(torch.add(net.second(x), x))),
}
PLAIN = {
    "no ReLU": lambda net, x: net.second(x) + x,
    "read twice": lambda net, x: (lambda y: F.relu(y) + y)(net.second(x)),
    "a sum that is read twice": lambda net, x: (lambda y: F.relu(y) + y)(net.second(x) + x),
    "a number": lambda net, x: F.relu(net.second(x) + 1),
    "scaled": lambda net, x: F.relu(torch.add(net.second(x), x, alpha=2)),
    "added to itself": lambda net, x: (lambda y: F.relu(y + y))(net.second(x)),
    "something else in between": lambda net, x: F.relu(net.second(x) + x.mean((2, 3), keepdim=True)),
    "a convolution that is broadcast": lambda net, x: F.relu(x + net.second(x.mean((2, 3), keepdim=True))),
    "another activation": lambda net, x: F.silu(net.second(x)),
}


@pytest.mark.parametrize("name", FUSED)
def test_forms_of_addition_and_relu_are_fused(small_split, name):
    torch.manual_seed(0)
    expected, join = FUSED[name]
    inference = inference_copy(Block(join).eval())
    network = fused(inference, small_split)
    assert kernels(network) == expected
    torch.testing.assert_close(logits_of(network, small_split), logits_of(inference, small_split), **EXACT)


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_kernel_does_not_do_stays(small_split, name):
    inference = inference_copy(Block(PLAIN[name]).eval())
    assert fused(inference, small_split) is inference


def test_convolutions_of_other_padding_stay(small_split):
    inference = inference_copy(Block(lambda net, x: F.relu(net.second(x)), padding_mode="reflect").eval())
    assert fused(inference, small_split) is inference


@pytest.mark.parametrize("settings", [{"groups": 4}, {"groups": 8}, {"dilation": 2}, {"stride": 2}, {"bias": False}])
@pytest.mark.parametrize("images", [1, 32])
def test_convolutions_of_every_geometry_are_fused(small_split, settings, images):
    torch.manual_seed(0)
    inference = inference_copy(Block(lambda net, x: F.relu(net.second(x)), **settings).eval())
    network, few = fused(inference, small_split), small_split.take(torch.arange(images))
    assert kernels(network) == (1, 0)
    torch.testing.assert_close(logits_of(network, few), logits_of(inference, few), **EXACT)


def test_a_convolution_that_is_called_twice_is_fused_once(small_split):
    torch.manual_seed(0)
    inference = inference_copy(Block(lambda net, x: F.relu(net.second(x)) + net.second(x + 1)).eval())
    network = fused(inference, small_split)
    assert kernels(network) == (1, 0)
    inference.second.weight.mul_(2)
    torch.testing.assert_close(logits_of(network, small_split), logits_of(inference, small_split), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_overwrites_what_a_convolution_reads_stays(small_split, dtype):
    def join(net, x):
        y = net.second(x)
        x.mul_(1.05)  # a fused convolution would come after it
        return F.relu(y) + x

    inference = inference_copy(Block(join).eval(), dtype)
    assert fused(inference, small_split) is inference


def test_a_network_that_is_no_graph_stays(small_split):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).eval()
    assert fused(model, small_split) is model
