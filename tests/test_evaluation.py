"""The folded copy says what the masked network says; every image is counted once."""

import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from torch import nn

import Build_Resnet
from sparsity.data.images import normalise
from sparsity.networks.evaluation import compiled, evaluate
from sparsity.networks.inference import inference_copy, refresh
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.system.errors import UserError

EXAMPLE = torch.zeros(1, 3, 8, 8)


def logits_of(network, split, dtype=torch.float32):
    with torch.no_grad():
        return network(normalise(split.images, split.mean, split.std, dtype)).float()


def mask(model, level):
    prune_l1_uniform(prunable_layers(model, EXAMPLE), level / 100)
    return model


@pytest.mark.parametrize("level", [0, 40, 90, 100])
@pytest.mark.parametrize("arch", ["small", "resnet18", "resnet50"])
def test_the_inference_copy_agrees_with_the_masked_network(small_net, small_split, arch, level):
    model = small_net
    if arch != "small":
        torch.manual_seed(0)
        model = awaken(Build_Resnet.build({"arch": arch, "num_classes": 4, "width": 4}))
    mask(model, level)
    found, expected = logits_of(inference_copy(model), small_split), logits_of(model, small_split)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.argmax(1).eq(expected.argmax(1)).float().mean() >= 0.998
    assert found.isfinite().all()


def test_at_100_percent_the_prediction_is_constant(small_net, small_split):
    result = evaluate(inference_copy(mask(small_net, 100)), small_split, 16)
    assert len(result.predictions.unique()) == 1


def test_making_a_copy_leaves_the_model_as_it_was(small_net, small_split):
    mask(small_net, 50)
    before = copy.deepcopy(small_net.state_dict())
    evaluate(inference_copy(small_net, torch.bfloat16), small_split, 16)
    assert all(torch.equal(before[name], value) for name, value in small_net.state_dict().items())
    assert small_net.stem.weight.is_contiguous()


def test_a_refreshed_copy_is_a_new_copy(small_net, small_split):
    inference = inference_copy(small_net)
    other = awaken(type(small_net)(), seed=5)
    mask(other, 30)
    refresh(inference, other)
    assert torch.equal(logits_of(inference, small_split), logits_of(inference_copy(other), small_split))
    refresh(inference, small_net)
    assert torch.equal(logits_of(inference, small_split), logits_of(inference_copy(small_net), small_split))


def test_the_copy_has_no_batch_norm_and_the_wanted_type(small_net, small_split):
    inference = inference_copy(small_net, torch.bfloat16)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in inference.modules())
    assert {parameter.dtype for parameter in inference.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in inference.parameters())
    close = logits_of(inference, small_split, torch.bfloat16) - logits_of(small_net, small_split)
    assert close.abs().max() < 0.05


class Awkward(nn.Module):
    """What must not be folded or overwritten: shared layers, sums read twice, BatchNorm after nothing, parameters."""

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


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 64])
def test_every_image_counts_once_whatever_the_batch_size(small_net, small_split, batch_size):
    seen = []
    result = evaluate(small_net, small_split, batch_size, seen.append)
    logits = logits_of(small_net, small_split)
    assert torch.equal(result.predictions, logits.argmax(1))
    assert (result.correct, result.total) == (int(logits.argmax(1).eq(small_split.labels).sum()), 50)
    assert result.accuracy == 100 * result.correct / 50
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, small_split.labels)), rel=1e-5)
    assert sum(seen) == 50


def test_a_perfect_network_reads_100_percent(small_split):
    class Oracle(nn.Module):
        """Gives the labels in order; 50 images in batches of 16 leave a last batch of 2."""

        def __init__(self):
            super().__init__()
            self.unused, self.seen = nn.Parameter(torch.zeros(1)), 0

        def forward(self, x):
            labels = small_split.labels[self.seen : self.seen + len(x)]
            self.seen += len(x)
            return F.one_hot(labels, 4).float()

    assert evaluate(Oracle(), small_split, 16).accuracy == 100


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_copy_follows_its_weights_and_is_compiled_once(small_net, small_split):
    """50 images in batches of 16: three of them compiled, and the last one of 2 by the copy itself."""
    inference = inference_copy(small_net)
    torch._dynamo.utils.counters.clear()
    network = compiled(inference, small_split, 16)
    for level in (0, 40, 90):
        refresh(inference, mask(copy.deepcopy(small_net), level))
        found, expected = (evaluate(each, small_split, 16) for each in (network, inference))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert torch.equal(found.predictions, expected.predictions)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_logits_of_a_compiled_copy_are_not_overwritten_by_the_next_batch(small_net, small_split, monkeypatch):
    """Here by a stand-in for the CUDA graph, which gives the same memory each time."""
    memory = torch.empty(25, 4)
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda images: memory.copy_(network(images)))
    inference = inference_copy(small_net)
    network = compiled(inference, small_split, 25)
    images = normalise(small_split.images, small_split.mean, small_split.std)
    with torch.inference_mode():
        found = torch.cat([network(part) for part in images.split(25)])
        torch.testing.assert_close(found, inference(images), rtol=1e-5, atol=1e-6)


def test_where_nothing_can_be_compiled_it_is_said_in_one_line(small_net, small_split, monkeypatch):
    def fails(images):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", lambda network, **_: fails)
    with pytest.raises(UserError, match=r"does not work here \(no compiler found\)"):
        compiled(inference_copy(small_net), small_split, 16)
