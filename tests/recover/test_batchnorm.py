"""Re-estimated BatchNorm statistics are those of the calibration images, and nothing else changes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparsity.data.calibration import draw_calibration
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.recover.batchnorm import reestimate_batchnorm


@pytest.fixture
def calibration(small_split):
    return draw_calibration(small_split, 40, 0, torch.device("cpu"), torch.float32)


@pytest.fixture
def pruned(small_net):
    prune_l1_uniform(prunable_layers(small_net, torch.zeros(1, 3, 8, 8)), 0.5)
    return small_net


def statistics(model):
    return torch.cat([value.cpu() for name, value in model.state_dict().items() if "running_" in name])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [40, 16])  # one batch; batches of 16, 16 and 8, which weigh by their images
def test_statistics_are_those_of_the_batches_and_nothing_else_changes(pruned, calibration, batch_size, dtype):
    exact, low = (replace(calibration, batch_size=batch_size, dtype=which) for which in (torch.float32, dtype))
    before, network = copy.deepcopy(pruned.state_dict()), inference_copy(pruned, dtype, fold=False)
    for _ in range(2):  # the copy serves again
        reestimate_batchnorm(pruned, low, network)
    for name, value in pruned.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(("running_mean", "running_var")), name
    expected = torch.zeros(28)
    for images, _ in exact.batches():
        seen = pruned.stem(images)
        middle = F.batch_norm(seen, None, None, pruned.stem_bn.weight, pruned.stem_bn.bias, training=True)
        moments = [(x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3))) for x in (seen, pruned.down(F.relu(middle)))]
        expected += torch.cat([value for pair in moments for value in pair]) * len(images) / 40
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(statistics(pruned), expected, **tolerance)
    assert not any(module.training for module in network.modules())


@pytest.mark.cuda
def test_a_gpu_finds_the_statistics_of_the_cpu(pruned, calibration, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        model, images = pruned.to(device), calibration.images.to(device)
        reestimate_batchnorm(model, replace(calibration, images=images), inference_copy(model, fold=False))
        found.append(statistics(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
