"""Reconstruction: zeros stay zero, the dense network keeps its weights, and every fit is the least-squares one."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SmallNet, awaken
from helpers import same_bits
from refits import Kinds, assert_best, normalised, positions_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import Build_Resnet
from sparsity.data.calibration import Augmentation, Calibration, draw_calibration
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import Way, effective_weight, prunable_layers, set_way
from sparsity.prune.masks import prune_l1_uniform
from sparsity.recover import RECOVERIES, Means
from sparsity.recover.distill import Distillation
from sparsity.recover.finetune import Finetuning
from sparsity.recover.reconstruction import reconstruct, refit
from sparsity.recover.streams import stream_copy
from sparsity.system import methods

EXAMPLE = torch.zeros(1, 3, 8, 8)
MODULE, STREAMS = "sparsity.recover.reconstruction.", "sparsity.recover.streams."


@pytest.fixture
def calibration(small_split):
    return draw_calibration(small_split, 40, 0, torch.device("cpu"), torch.float32)


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return awaken(Build_Resnet.build({"arch": "resnet18", "num_classes": 4, "width": 4}))


def means_of(dense, calibration, **recipes):
    return Means(dense, tuple(prunable_layers(dense, EXAMPLE)), calibration, **recipes)


def pruned(dense, sparsity, names=None):
    model = copy.deepcopy(dense)
    layers = prunable_layers(model, EXAMPLE)
    prune_l1_uniform({name: layers[name] for name in names or layers}, sparsity)
    return model


def rebuild(model, means):
    """Reconstruct `model` in place, without the BatchNorm that follows in a sweep; returns the notes."""
    return reconstruct(model, means.dense, means.layers, means.calibration, means.streams)


def weights_of(model):
    return {name: effective_weight(layer).detach().clone() for name, layer in prunable_layers(model, EXAMPLE).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recovery", [name for name, reads in methods.RECOVERIES.items() if reads])
def test_zeros_stay_exactly_zero_and_the_dense_network_keeps_its_weights(resnet, calibration, recovery, dtype):
    """With a subset of positions, as in every sweep of a large network."""
    assert RECOVERIES.keys() == methods.RECOVERIES.keys()  # the names are those of the flags
    before = copy.deepcopy(resnet.state_dict())
    recipes = {"tuning": Finetuning(calibration.images, 1, lambda place: 0.01, 16, 0.9, 5e-4, dtype)}
    recipes["distillation"] = Distillation(calibration.images, Augmentation(), 1, 0.01, dtype)
    means = means_of(resnet, replace(calibration, dtype=dtype, position_limit=40 * 6), **recipes)
    for sparsity in (0.0, 0.5, 0.9, 1.0):
        model = pruned(resnet, sparsity)
        masked = weights_of(model)
        assert RECOVERIES[recovery](model, means, 0) == []
        for name, weight in weights_of(model).items():
            zeros = masked[name] == 0
            assert weight.isfinite().all() and not weight[zeros].any(), name
            assert recovery == "batchnorm" or not model.get_submodule(name).weight_orig[zeros].any()
            assert int(zeros.sum()) == round(sparsity * weight.numel())
            assert sparsity or recovery == "finetune" or torch.equal(weight, masked[name])
        assert not any(module.training for module in model.modules())
        assert torch.isfinite(model(torch.randn(3, 3, 8, 8))).all()
    assert same_bits(before, resnet.state_dict())


@pytest.mark.parametrize("limit", [40 * 64, 40 * 5], ids=["all", "subset"])
@pytest.mark.parametrize(("sparsity", "names"), [(0.3, None), (0.8, None), (0.6, ["down"])])
def test_each_layer_is_the_damped_least_squares_fit_under_its_mask(small_net, calibration, limit, sparsity, names):
    """End to end; the damping are rows that pull towards the masked weights.

    A layer before the first pruned one is not refitted, an unpruned one behind it is.
    """
    calibration = replace(calibration, position_limit=limit)
    model, means = pruned(small_net, sparsity, names), means_of(small_net, calibration)
    masked = weights_of(model)
    rebuild(model, means)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, masked[name]) == (name == "stem" and names is not None)
        assert_best(model, means, name, masked[name])
        assert (positions_of(model, means, name)[0] is None) == (limit > 1000 or name == "hidden")


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("limit", [40 * 64, 40 * 5], ids=["all", "subset"])
def test_groups_and_any_leading_dimensions_are_fitted_as_well_traced_or_not(calibration, limit, traced):
    torch.manual_seed(0)
    dense = awaken(Kinds())
    set_way(dense, Way(traced=traced))
    model, means = pruned(dense, 0.5), means_of(dense, replace(calibration, position_limit=limit))
    masked = weights_of(model)
    assert list(masked) == ["grouped", "depthwise", "pointwise", "windows", "tokens", "signal"]
    assert rebuild(model, means) == []
    for name, weight in masked.items():
        assert not torch.equal(weight, effective_weight(model.get_submodule(name)))
        assert_best(model, means, name, weight, 1e-3)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1 << 20), (torch.bfloat16, 40 * 8)])
def test_outputs_come_closer_than_by_the_mask(resnet, calibration, dtype, limit):
    model, images, errors = pruned(resnet, 0.7), normalised(calibration), []
    means = means_of(resnet, replace(calibration, dtype=dtype, position_limit=limit))
    for recover in (lambda model, means: [], rebuild):
        assert recover(model, means) == []
        with torch.no_grad():
            errors.append(float((model(images) - resnet(images)).square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_dead_inputs_and_rows_whose_error_did_not_fall_keep_the_masked_weights():
    draw = torch.Generator().manual_seed(0)
    weight, cross, skewed = (torch.randn(rows, 5, generator=draw) for rows in (20, 20, 5))
    mask = torch.rand(20, 5, generator=draw) < 0.8
    masked = torch.where(mask, weight, 0)
    fitted, _ = refit(weight, mask, torch.diag(torch.tensor([1.0, 0, 1, 0, 1])), cross)
    assert torch.isfinite(fitted).all() and torch.equal(fitted[:, [1, 3]], masked[:, [1, 3]])
    for broken in (torch.full((5, 5), float("nan")), -torch.eye(5)):
        assert torch.equal(refit(weight, mask, broken, cross)[0], masked)
    no_moment = torch.eye(5) + 3 * (skewed - skewed.T)  # not symmetric: conjugate gradients go astray
    fitted, kept_rows = refit(weight, mask, no_moment, cross)
    change, slope = fitted - masked, torch.where(mask, cross - masked @ no_moment, 0)
    gain = ((change @ no_moment) * change).sum(dim=1) - 2 * (change * slope).sum(dim=1)
    assert (gain <= 1e-5).all()
    assert 0 < kept_rows == int((change == 0).all(dim=1).sum())


def test_labels_and_activations_that_are_computed_again_change_nothing(resnet, calibration, monkeypatch):
    results = []
    for limit in (0, 30_000, 50_000, 70_000, 90_000, 150_000, 1 << 40):  # kept nowhere, at some layers, everywhere
        monkeypatch.setattr(STREAMS + "HELD_BYTES", limit)
        model, labels = pruned(resnet, 0.7), calibration.images.labels.roll(limit % 40)
        rebuild(model, means_of(resnet, replace(calibration, images=replace(calibration.images, labels=labels))))
        results.append(weights_of(model))
    assert all(same_bits(results[0], other) for other in results)


def test_normalised_images_are_held_within_the_bound_alone(small_net, small_split, monkeypatch):
    monkeypatch.setattr(STREAMS + "HELD_BYTES", 0)
    means = means_of(small_net, Calibration(small_split.take(torch.arange(50).repeat(4))))  # 7 batches of 32
    batches, images, alive = Calibration.batches, [], []

    def watched(self, *given, **named):
        for pixels, labels in batches(self, *given, **named):
            images.append(weakref.ref(pixels))
            yield pixels, labels

    monkeypatch.setattr(Calibration, "batches", watched)
    count = lambda *_: alive.append(sum(image() is not None for image in images))  # noqa: E731
    means.streams[0].stem.register_forward_pre_hook(count)
    rebuild(pruned(small_net, 0.5), means)
    assert len(alive) >= 7 and max(alive) <= 4  # a batch of each stream, and the one before it


class Products(TorchDispatchMode):
    """Whether TF32 was allowed in each product of float32 matrices: `allowed`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if function.overloadpacket in products and args[0].dtype == torch.float32:
            self.allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_products_of_bfloat16_activations_may_be_rounded_to_tf32(small_net, calibration, monkeypatch, dtype):
    means, model = means_of(small_net, replace(calibration, dtype=dtype)), pruned(small_net, 0.5)
    everywhere, solver = Products(), Products()
    everywhere.allowed, solver.allowed = [], []

    def watched(*given):
        with solver:
            return refit(*given)

    monkeypatch.setattr(MODULE + "refit", watched)
    torch.set_float32_matmul_precision("high")
    try:
        with everywhere:
            rebuild(model, means)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert solver.allowed and not any(solver.allowed)
    assert any(everywhere.allowed) == (dtype == torch.bfloat16)


def test_layers_run_as_soon_as_they_can_and_the_network_stays_the_same(resnet):
    ordered, images = stream_copy(resnet, torch.float32), torch.randn(5, 3, 8, 8)
    assert torch.equal(inference_copy(resnet, fold=False)(images), ordered(images))
    calls = [node.target for node in ordered.graph.nodes if node.op == "call_module"]
    assert abs(calls.index("layer2.0.shortcut.0") - calls.index("layer2.0.conv1")) == 1


class Odd(SmallNet):
    """A layer that runs twice, and a grouped one."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.down_bn(self.down(x)))
        x = self.hidden(F.avg_pool2d(x, x.shape[-2:]).flatten(1))
        return self.result(self.hidden(F.pad(x, (0, -2))))


def test_layers_that_run_twice_are_left_and_told(calibration):
    torch.manual_seed(0)
    dense = awaken(Odd())
    model = pruned(dense, 0.5)
    before = weights_of(model)
    assert rebuild(model, means_of(dense, calibration)) == ["not refitted: hidden (runs 2 times)"]
    changed = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert changed == {"stem", "down"}


@pytest.mark.cuda
@pytest.mark.parametrize("limit", [1 << 20, 40 * 8])
def test_a_gpu_refits_as_the_cpu_does(resnet, calibration, monkeypatch, limit):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(STREAMS + "default_batch_size", lambda device: 20)  # the same positions
    outputs = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        there = replace(calibration, position_limit=limit, images=calibration.images.to(device))
        model, dense = pruned(resnet, 0.7).to(device), copy.deepcopy(resnet).to(device)
        assert rebuild(model, Means(dense, tuple(prunable_layers(resnet, EXAMPLE)), there)) == []
        outputs.append(model(normalised(calibration).to(device)).detach().cpu())
        masked = [layer for layer in model.modules() if hasattr(layer, "weight_mask")]
        assert not any(layer.weight_orig[layer.weight_mask == 0].any() for layer in masked)
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
