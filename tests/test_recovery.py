"""Recovery: zeros stay zero, the dense network keeps its weights, and every fit is the least-squares one."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, awaken
from torch import nn

import Build_Resnet
from sparsity.data.calibration import draw_calibration
from sparsity.data.images import normalise, training_batches
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import effective_weight, prunable_layers, zeros_by_layer
from sparsity.prune.allocation import prepare, rank
from sparsity.prune.masks import apply_masks, prune_l1_uniform
from sparsity.prune.moments import input_rows
from sparsity.recover import RECOVERIES, Means
from sparsity.recover.batchnorm import reestimate_batchnorm
from sparsity.recover.finetune import Finetuning, finetune, rewound_rates
from sparsity.recover.reconstruction import Moments, reconstruct, refit, stream_copy
from sparsity.system.errors import UserError

CPU = torch.device("cpu")
EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def calibration(small_split):
    return draw_calibration(small_split, 40, 0, CPU, torch.float32)


def means_of(dense, calibration, split=None, rates=(0.01,)):
    tuning = Finetuning(split, rates, 16, 0.9, 5e-4, torch.float32) if split else None
    return Means(dense, tuple(prunable_layers(dense, EXAMPLE)), calibration, tuning)


def pruned(dense, amount, names=None):
    model = copy.deepcopy(dense)
    layers = prunable_layers(model, EXAMPLE)
    prune_l1_uniform({name: layers[name] for name in names or layers}, amount)
    return model


def small_resnet():
    torch.manual_seed(0)
    return awaken(Build_Resnet.build({"arch": "resnet18", "num_classes": 4, "width": 4}))


@pytest.mark.parametrize("recovery", ["batchnorm", "reconstruction", "finetune"])
@pytest.mark.parametrize("amount", [0.0, 0.5, 0.9, 1.0])
def test_zeros_stay_exactly_zero(small_split, calibration, recovery, amount):
    dense = small_resnet()
    before = copy.deepcopy(dense.state_dict())
    model = pruned(dense, amount)
    masked = {name: effective_weight(layer) == 0 for name, layer in prunable_layers(model, EXAMPLE).items()}
    RECOVERIES[recovery](model, means_of(dense, calibration, small_split), 0)
    for name, layer in prunable_layers(model, EXAMPLE).items():
        assert not effective_weight(layer)[masked[name]].any(), name
        assert not layer.weight_orig[masked[name]].any() or recovery == "batchnorm"
        assert int(masked[name].sum()) == round(amount * masked[name].numel())
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert torch.isfinite(model(torch.randn(3, 3, 8, 8))).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_reconstruction_of_the_dense_network_keeps_its_weights_to_the_bit(calibration, threads):
    torch.set_num_threads(threads)
    dense = small_resnet()
    model = pruned(dense, 0.0)
    means = means_of(dense, calibration)
    notes = reconstruct(model, dense, list(means.layers), calibration, means.streams)
    assert notes == []
    for name, layer in prunable_layers(model, EXAMPLE).items():
        assert torch.equal(effective_weight(layer), dense.get_submodule(name).weight)


def test_an_unpruned_layer_behind_a_pruned_one_is_refitted_and_one_before_it_is_not(small_net, calibration):
    model = pruned(small_net, 0.6, ["down"])
    means = means_of(small_net, calibration)
    reconstruct(model, small_net, list(means.layers), calibration, means.streams)
    assert torch.equal(model.stem.weight, small_net.stem.weight)
    assert not torch.equal(model.hidden.weight, small_net.hidden.weight)


def layer_error(layer, weight, received, ideal, dense_layer):
    """Mean squared error of a layer's outputs against the dense ones, in float64."""
    ours = input_rows(layer, received).double() @ weight.flatten(1).double().T
    theirs = input_rows(layer, ideal).double() @ dense_layer.weight.detach().flatten(1).double().T
    return float((ours - theirs).square().mean())


def inputs_of(model, names, images):
    """What each layer receives, by hooks."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
@pytest.mark.parametrize("amount", [0.3, 0.8, 0.97])
def test_no_layer_ends_with_a_larger_error_than_the_plain_mask(calibration, allocation, amount):
    dense = small_resnet()
    model = copy.deepcopy(dense)
    layers = prunable_layers(model, EXAMPLE)
    scores = {name: torch.rand(layer.weight.shape) for name, layer in layers.items()}  # any criterion
    masks, _ = prepare(allocation, rank(scores)).masks(amount)
    apply_masks(layers, masks)
    plain = {name: effective_weight(layer).clone() for name, layer in layers.items()}
    means = means_of(dense, calibration)
    reconstruct(model, dense, list(means.layers), calibration, means.streams)
    images = normalise(calibration.images.images, calibration.images.mean, calibration.images.std)
    received, ideal = (inputs_of(network, means.layers, images) for network in (model, dense))
    better = 0
    for name, layer in layers.items():
        errors = [
            layer_error(layer, weight, received[name], ideal[name], dense.get_submodule(name))
            for weight in (effective_weight(layer).detach(), plain[name].detach())
        ]
        assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-12, name
        better += errors[0] < 0.99 * errors[1]
    assert better >= 4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(6, 5, 1, bias=False), (6, 7, 7)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (3, 9, 9)),
        (nn.Linear(8, 5), (8,)),
    ],
)
def test_a_fit_without_damping_is_that_of_lstsq(layer, shape):
    draw = torch.Generator().manual_seed(0)
    ideal = torch.randn(60, *shape, generator=draw, dtype=torch.float64)
    received = ideal + 0.3 * torch.randn(ideal.shape, generator=draw, dtype=torch.float64)
    weight = layer.weight.detach().flatten(1).double()
    mask = torch.rand(weight.shape, generator=draw) < 0.5
    rows, targets = input_rows(layer, received).double(), input_rows(layer, ideal).double() @ weight.T
    moments = Moments(rows.T @ rows / len(rows), targets.T @ rows / len(rows))
    result = refit(weight, mask, moments, damping=0.0, iterations=500, residual=1e-14)
    assert result.kept_rows == 0
    assert not result.weight[~mask].any()
    for row in range(len(weight)):
        solution, *_ = np.linalg.lstsq(rows[:, mask[row]].numpy(), targets[:, row].numpy(), rcond=None)
        np.testing.assert_allclose(result.weight[row, mask[row]].numpy(), solution, rtol=1e-8, atol=1e-10)


def test_damping_pulls_towards_the_masked_weights():
    draw = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(3, 6, generator=draw), torch.randn(40, 6, generator=draw)
    mask = torch.rand(3, 6, generator=draw) < 0.6
    targets = rows @ weight.T + 1
    moments = Moments(rows.T @ rows / 40, targets.T @ rows / 40)
    masked = torch.where(mask, weight, 0)
    free, tied = (refit(weight, mask, moments, damping).weight for damping in (0.0, 1e6))
    torch.testing.assert_close(tied, masked, rtol=0, atol=1e-4)
    assert (free - masked).abs().max() > 0.01


def test_dead_inputs_and_moments_that_are_none_keep_the_masked_weights():
    weight, mask = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    dead = torch.diag(torch.tensor([1.0, 0, 1, 0, 1]))
    result = refit(weight, mask, Moments(dead, torch.randn(3, 5)), damping=0.0)
    assert torch.isfinite(result.weight).all()
    assert torch.equal(result.weight[:, [1, 3]], weight[:, [1, 3]])
    broken = refit(weight, mask, Moments(torch.full((5, 5), float("nan")), torch.randn(3, 5)))
    assert torch.equal(broken.weight, weight)
    assert refit(weight, mask, Moments(-torch.eye(5), torch.randn(3, 5))).weight.equal(weight)


def test_a_row_whose_error_did_not_fall_keeps_its_masked_weights():
    draw = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(20, 5, generator=draw), torch.rand(20, 5, generator=draw) < 0.8
    skewed = torch.randn(5, 5, generator=draw)
    no_moment = torch.eye(5) + 3 * (skewed - skewed.T)  # not symmetric: conjugate gradients go astray
    cross = torch.randn(20, 5, generator=draw)
    result = refit(weight, mask, Moments(no_moment, cross), damping=0.0)
    masked = torch.where(mask, weight, 0)
    change = result.weight - masked
    slope = cross - masked @ no_moment
    gain = ((change @ no_moment) * change).sum(dim=1) - 2 * (change * torch.where(mask, slope, 0)).sum(dim=1)
    assert (gain <= 1e-5).all()
    assert 0 < result.kept_rows == int((change == 0).all(dim=1).sum())


def test_activations_that_are_computed_again_change_nothing(calibration, monkeypatch):
    results = []
    for limit in (0, 30_000, 50_000, 70_000, 90_000, 150_000, 1 << 40):  # kept nowhere, at some layers, everywhere
        monkeypatch.setattr("sparsity.recover.reconstruction.HELD_BYTES", limit)
        dense = small_resnet()
        model = pruned(dense, 0.7)
        means = means_of(dense, calibration)
        reconstruct(model, dense, list(means.layers), calibration, means.streams)
        results.append([effective_weight(layer) for layer in prunable_layers(model, EXAMPLE).values()])
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_layers_run_as_soon_as_they_can_and_the_network_stays_the_same():
    dense = small_resnet()
    plain = inference_copy(dense, fold=False)
    ordered = stream_copy(dense, torch.float32)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(plain(images), ordered(images))
    calls = [node.target for node in ordered.graph.nodes if node.op == "call_module"]
    assert abs(calls.index("layer2.0.shortcut.0") - calls.index("layer2.0.conv1")) == 1


def test_a_layer_that_runs_twice_is_left_and_told(calibration):
    class Twice(SmallNet):
        def forward(self, x):
            x = F.relu(self.stem_bn(self.stem(x)))
            x = F.relu(self.down_bn(self.down(x)))
            x = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
            x = self.hidden(x)
            return self.result(self.hidden(F.pad(x, (0, -2))))

    torch.manual_seed(0)
    dense = awaken(Twice())
    model = pruned(dense, 0.5)
    means = means_of(dense, calibration)
    notes = reconstruct(model, dense, list(means.layers), calibration, means.streams)
    assert any("hidden was not refitted" in note for note in notes)


def test_batchnorm_of_one_batch_is_exact(small_net, calibration):
    images = normalise(calibration.images.images, calibration.images.mean, calibration.images.std)
    model = pruned(small_net, 0.5)
    reestimate_batchnorm(model, calibration, inference_copy(small_net, fold=False))
    with torch.no_grad():
        seen = model.stem(images).double()
    torch.testing.assert_close(model.stem_bn.running_mean.double(), seen.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.stem_bn.running_var.double(), seen.var(dim=(0, 2, 3)), rtol=1e-5, atol=1e-6)
    middle = F.relu(F.batch_norm(seen.float(), None, None, model.stem_bn.weight, model.stem_bn.bias, training=True))
    with torch.no_grad():
        deeper = model.down(middle)
    torch.testing.assert_close(model.down_bn.running_mean, deeper.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.down_bn.running_var, deeper.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_batchnorm_of_several_batches_weighs_them_by_their_images(small_net, small_split):
    calibration = draw_calibration(small_split, 40, 0, CPU, torch.float32)
    object.__setattr__(calibration, "batch_size", 16)  # batches of 16, 16 and 8
    momentum = small_net.stem_bn.momentum
    model = pruned(small_net, 0.5)
    copy_ = inference_copy(small_net, fold=False)
    reestimate_batchnorm(model, calibration, copy_)
    mean = variance = 0
    for images, _ in calibration.batches():
        seen = model.stem(images).detach()
        mean = mean + seen.mean(dim=(0, 2, 3)) * len(images) / 40
        variance = variance + seen.var(dim=(0, 2, 3)) * len(images) / 40
    torch.testing.assert_close(model.stem_bn.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.stem_bn.running_var, variance, rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in copy_.modules())
    assert copy_.stem_bn.momentum == model.stem_bn.momentum == momentum


def test_batchnorm_changes_statistics_only(small_net, calibration):
    model = pruned(small_net, 0.5)
    before = copy.deepcopy(model.state_dict())
    reestimate_batchnorm(model, calibration, inference_copy(small_net, fold=False))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(("running_mean", "running_var")), name


def test_recovery_reads_the_calibration_images_alone(small_net, calibration, small_split):
    """Other labels, and other images outside of the calibration, change nothing."""
    results = []
    for shift in (0, 1):
        drawn = copy.copy(calibration.images)
        object.__setattr__(drawn, "labels", (drawn.labels + shift) % 4)
        object.__setattr__(calibration, "images", drawn)
        model = pruned(small_net, 0.6)
        RECOVERIES["reconstruction"](model, means_of(small_net, calibration), 0)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_reconstruction_brings_the_outputs_closer_than_the_mask(calibration):
    dense = small_resnet()
    images = normalise(calibration.images.images, calibration.images.mean, calibration.images.std)
    errors = {}
    for recovery in ("none", "reconstruction"):
        model = pruned(dense, 0.7)
        means = means_of(dense, calibration)
        if recovery == "reconstruction":
            reconstruct(model, dense, list(means.layers), calibration, means.streams)
        with torch.no_grad():
            errors[recovery] = float((model(images) - dense(images)).square().mean())
    assert errors["reconstruction"] < 0.5 * errors["none"]


def test_finetuning_lowers_the_loss_under_the_masks(small_net, small_split):
    model = pruned(small_net, 0.5)
    layers = prunable_layers(model, EXAMPLE)
    counts = zeros_by_layer(layers)
    tuning = Finetuning(small_split, (0.05,) * 5, 16, 0.9, 5e-4, torch.float32)
    images = normalise(small_split.images, small_split.mean, small_split.std)

    def loss():
        with torch.no_grad():
            return float(F.cross_entropy(model(images), small_split.labels))

    before = loss()
    finetune(model, layers, tuning, 1)
    assert loss() < before
    assert zeros_by_layer(layers) == counts
    again = pruned(small_net, 0.5)
    finetune(again, prunable_layers(again, EXAMPLE), tuning, 1)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_masks_are_enforced_after_every_step(small_net, small_split):
    model = pruned(small_net, 0.5)
    layers = prunable_layers(model, EXAMPLE)
    seen = []

    def look(images, loss):
        seen.append(
            max(float(layer.weight_orig.detach()[layer.weight_mask == 0].abs().max()) for layer in layers.values())
        )

    finetune(model, layers, Finetuning(small_split, (0.05,), 16, 0.9, 0.1, torch.float32), 0, look)
    assert len(seen) == len(list(training_batches(small_split, 16, 0, 1)))
    assert max(seen) == 0


def test_finetuning_that_diverges_names_its_own_flag(small_net, small_split):
    model = pruned(small_net, 0.5)
    with pytest.raises(UserError, match="smaller --finetune_learning_rate"):
        finetune(
            model, prunable_layers(model, EXAMPLE), Finetuning(small_split, (1e20,) * 3, 8, 0.9, 0.1, torch.float32), 0
        )


def test_rewound_rates_are_the_last_of_the_training():
    # The study's schedule: 60 epochs, half period 20, down, up, down.
    assert rewound_rates(0.01, 20, 60, 1)[0] == pytest.approx(0.01 * (1 + np.cos(np.pi * 59 / 20)) / 2)
    rates = rewound_rates(0.01, 20, 60, 20)
    assert rates[0] == pytest.approx(0.01)
    assert list(rates) == sorted(rates, reverse=True)
    assert rewound_rates(0.1, 2, 2, 3) == pytest.approx((0.05, 0.1, 0.05))
