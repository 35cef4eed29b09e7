"""Re-estimated BatchNorm statistics are those of the calibration images, and nothing else changes."""

import copy
import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, awaken
from torch import nn

from sparsity.data.calibration import AUGMENTATIONS, Augmentation, augmented_batches, draw_calibration
from sparsity.data.images import Split
from sparsity.data.synthetic import synthetic_images
from sparsity.networks.evaluation import evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.recover.batchnorm import augmentation_distances, reestimate_batchnorm, statistics_distance
from sparsity.training.epoch import train_one_epoch


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


@cache
def bright(slope):
    """Images of 12 pixels, darker to the right by `slope` a column, in which a black border is new."""
    images, labels = synthetic_images(12, train=True)
    images = (255 - images.int() - slope * torch.arange(12)).clamp(0, 255).to(torch.uint8)
    return Split(images, labels, (0.5,) * 3, (0.25,) * 3)


def drawn(split, count, augmentations=AUGMENTATIONS):
    return [draw_calibration(split, count, 1, torch.device("cpu"), torch.float32, each) for each in augmentations]


def test_a_trained_network_loses_nothing_at_0_percent_by_the_augmentation_that_it_tells():
    split, truth = bright(0), Augmentation(3, "reflect")
    torch.manual_seed(1)
    network = SmallNet(10)
    optimizer = torch.optim.SGD(network.parameters(), 0.2, momentum=0.9)
    for epoch, rate in enumerate((0.2, 0.1, 0.02)):
        optimizer.param_groups[0]["lr"] = rate
        train_one_epoch(network, augmented_batches(split, truth, 64, 0, epoch), optimizer, torch.float32, epoch)
    unfolded = inference_copy(network.eval(), fold=False)
    distances = augmentation_distances(unfolded, drawn(split, 512))
    chosen = min(distances, key=distances.get)
    assert chosen.border == "reflect"  # a shift more or less is as good
    dense, lost = evaluate(inference_copy(network), split, 100).accuracy, []
    for calibration in drawn(split, 2048, [chosen, Augmentation()]):
        reestimate_batchnorm(network, calibration, unfolded)
        lost.append(dense - evaluate(inference_copy(network), split, 100).accuracy)
    assert lost[0] <= 0.3 and lost[1] > 10


@torch.no_grad()
@pytest.mark.parametrize("truth", AUGMENTATIONS, ids=str)
def test_statistics_tell_their_augmentation_and_hardly_change_by_it(truth):
    split = bright(6)
    torch.manual_seed(0)
    network = awaken(SmallNet(10)).train()
    for layer in (network.stem_bn, network.down_bn):
        layer.reset_running_stats()
        layer.momentum = None  # the average over all batches
    for images, _ in itertools.chain(*(augmented_batches(split, truth, 128, 5, epoch) for epoch in range(2))):
        network(images)
    before, answers = statistics(network.eval()), evaluate(inference_copy(network), split, 100).predictions
    unfolded = inference_copy(network, fold=False)
    distances = augmentation_distances(unfolded, drawn(split, 512))
    chosen = min(distances, key=distances.get)
    assert chosen == truth or (truth.border == chosen.border == "reflect" and abs(chosen.shift - truth.shift) == 1)
    reestimate_batchnorm(network, *drawn(split, 2048, [truth]), unfolded)
    torch.testing.assert_close(statistics(network), before, rtol=0.03, atol=0.01)
    again = evaluate(inference_copy(network), split, 100).predictions
    assert (again == answers).float().mean() > 0.99


def test_the_distance_of_statistics_is_that_of_normal_distributions():
    def layer(mean, variance, channels=3):
        return torch.full((channels,), mean), torch.full((channels,), variance)

    one, moved, wider = {"a": layer(0.0, 1.0)}, {"a": layer(1.0, 1.0)}, {"a": layer(0.0, 4.0)}
    assert statistics_distance(one, one) == 0
    assert statistics_distance(one, moved) == pytest.approx(1, rel=1e-4)  # KL is 1/2 in each direction
    assert statistics_distance(one, wider) == statistics_distance(wider, one) == pytest.approx(9 / 8, rel=1e-4)
    # Every layer counts the same, whatever its channels, and a channel without variance gives a finite distance.
    both = ({"a": layer(0.0, 1.0), "b": layer(0.0, 1.0, 50)}, {"a": layer(0.0, 1.0), "b": layer(1.0, 1.0, 50)})
    assert statistics_distance(*both) == pytest.approx(0.5, rel=1e-4)
    assert 0 < statistics_distance({"a": layer(0.0, 0.0)}, {"a": layer(0.0, 1e-6)}) < 0.01


def test_a_network_without_running_statistics_tells_no_augmentation(small_split):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert augmentation_distances(inference_copy(network, fold=False), drawn(small_split, 20)) == {}
