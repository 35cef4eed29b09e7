"""The inference copy gives the outputs of the masked network, and so does the compiled one."""

import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from helpers import logits_of, masked
from torch import nn

import Build_Resnet
from sparsity.networks.evaluation import evaluate
from sparsity.networks.inference import compiled, inference_copy, refresh
from sparsity.system.errors import UserError


@pytest.mark.parametrize("level", [0, 40, 90, 100])
@pytest.mark.parametrize("arch", ["small", "resnet18", "resnet50"])
def test_the_inference_copy_agrees_with_the_masked_network(small_net, small_split, arch, level):
    model = small_net
    if arch != "small":
        torch.manual_seed(0)
        model = awaken(Build_Resnet.build({"arch": arch, "num_classes": 4, "width": 4}))
    model = masked(model, level)
    before, expected = copy.deepcopy(model.state_dict()), logits_of(model, small_split)
    rounded = inference_copy(model, torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert not any(isinstance(module, nn.BatchNorm2d) for module in rounded.modules())
    found = logits_of(inference_copy(model), small_split)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.argmax(1).eq(expected.argmax(1)).float().mean() >= 0.998


def test_a_refreshed_copy_is_a_new_copy(small_net, small_split):
    inference = inference_copy(small_net)
    for other in (masked(awaken(type(small_net)(), seed=5), 30), small_net):
        refresh(inference, other)
        assert torch.equal(logits_of(inference, small_split), logits_of(inference_copy(other), small_split))


class Awkward(nn.Module):
    """Not to be folded or overwritten: shared layers, sums read twice, BatchNorm after nothing, parameters."""

    def __init__(self):
        super().__init__()
        self.first_bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shared_bn = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.rand(3, 1, 1))
        self.read_twice, self.read_twice_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.kept = nn.Conv2d(3, 3, 1)
        self.linear = nn.Linear(3, 5)
        self.linear_bn = nn.BatchNorm1d(5)
        self.output = nn.Linear(5, 4)

    def forward(self, x):
        x = self.first_bn(x)
        y = self.conv(x)
        y = F.relu(self.shared_bn(y)) + self.shared_bn(self.conv(x)) + y
        total = y + x
        z = self.read_twice(total)
        y = self.read_twice_bn(z) + z  # folding would change both
        z = self.kept(y)
        y = F.relu(z) + z  # overwriting would change both
        y = (F.relu(total) + total + y) * self.scale
        y = y.mean(dim=(2, 3))
        return self.output(F.relu(self.linear_bn(self.linear(y))))


def test_layers_used_twice_and_outputs_read_twice_stay_right(small_split):
    torch.manual_seed(0)
    model = awaken(Awkward())
    model.linear_bn.running_mean.uniform_(-1, 1)
    inference = inference_copy(model)
    torch.testing.assert_close(logits_of(inference, small_split), logits_of(model, small_split), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.scale.mul_(2)
        model.first_bn.running_mean.add_(1)
    refresh(inference, model)
    torch.testing.assert_close(logits_of(inference, small_split), logits_of(model, small_split), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_copy_follows_its_weights_and_is_compiled_once(small_net, small_split):
    """50 images in batches of 16: three of them compiled, and the last one of 2 by the copy itself."""
    inference = inference_copy(small_net)
    torch._dynamo.utils.counters.clear()
    network = compiled(inference, small_split, 16)
    for level in (0, 40, 90):
        refresh(inference, masked(small_net, level))
        found, expected = (evaluate(each, small_split, 16) for each in (network, inference))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert torch.equal(found.predictions, expected.predictions)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiler_that_fails_is_told_in_one_line(small_net, small_split, monkeypatch):
    def fails(images):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda network, **_: fails)
    with pytest.raises(UserError, match=r"does not work here \(no compiler found\)"):
        compiled(inference_copy(small_net), small_split, 16)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_cuda_graph_runs_refreshed_weights(small_net, small_split, dtype):
    """The graph keeps the addresses of the weights, not their values; its outputs outlive the next replay."""
    test = small_split.to(torch.device("cuda"))
    inference = inference_copy(small_net.cuda(), dtype)
    network = compiled(inference, test, 25)
    outputs = []
    for level in (0, 40, 90):
        model = masked(small_net.cpu(), level).cuda()
        refresh(inference, model)
        outputs.append(logits_of(network, test.take(torch.arange(25)), dtype))
        expected = logits_of(inference_copy(model, dtype), test.take(torch.arange(25)), dtype)
        torch.testing.assert_close(outputs[-1], expected, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(outputs[0], outputs[-1], atol=5e-2)
