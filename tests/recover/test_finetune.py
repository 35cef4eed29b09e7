"""Fine-tuning: masks hold after every step, removed filters stay removed, the loss falls, rates are rewound."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from helpers import zeros_by_layer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import Build_Resnet
from sparsity.data.images import normalise
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import Pruner
from sparsity.prune.thinning import thin
from sparsity.recover.finetune import Finetuning, finetune, rewound_rate
from sparsity.system.errors import UserError
from sparsity.system.methods import Curve
from sparsity.training.optimizer import make_optimizer, make_schedule

EXAMPLE = torch.zeros(1, 3, 8, 8)


def recipe(split, rate, epochs=1, weight_decay=5e-4, dtype=torch.float32):
    return Finetuning(split, epochs, lambda place: rate, 16, 0.9, weight_decay, dtype)


def pruned(dense):
    model = copy.deepcopy(dense)
    layers = prunable_layers(model, EXAMPLE)
    prune_l1_uniform(layers, 0.5)
    return model, layers


@torch.no_grad()
def loss_of(model, split):
    return float(F.cross_entropy(model(normalise(split.images, split.mean, split.std)), split.labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_under_masks_that_hold_in_every_step_and_the_seed_repeats_it(small_net, small_split, dtype):
    (model, layers), (again, others), regrown = pruned(small_net), pruned(small_net), []
    counts, before = zeros_by_layer(layers), loss_of(model, small_split)

    def look(module, inputs):
        regrown.extend(bool(layer.weight_orig[layer.weight_mask == 0].any()) for layer in layers.values())

    handle = model.register_forward_pre_hook(look)
    for network, masked in ((model, layers), (again, others)):
        finetune(network, masked, recipe(small_split, 0.05, epochs=5, dtype=dtype), 1)
    handle.remove()
    assert len(regrown) == 5 * 4 * 3 and not any(regrown)
    assert zeros_by_layer(layers) == counts and loss_of(model, small_split) < before
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("level", [0, 50, 95, 100])  # of 4 filters, at 95 percent none is left
def test_removed_filters_and_emptied_blocks_stay_removed(small_split, arch, level):
    """The last BatchNorm's bias of an emptied block has a gradient."""
    torch.manual_seed(0)
    dense = awaken(Build_Resnet.build({"arch": arch, "num_classes": 4, "width": 4}))
    layers = list(prunable_layers(dense, EXAMPLE))
    model, _ = Pruner(dense, layers).prune(Curve("filter_l1", "uniform", "finetune"), level)
    before = thin(model)
    finetune(model, {name: model.get_submodule(name) for name in layers}, recipe(small_split, 0.05, epochs=2), 0)
    after = thin(model)
    assert (after.widths, after.removed, after.dead) == (before.widths, before.removed, before.dead)
    assert not torch.equal(model.linear.weight, dense.linear.weight)
    assert model.layer1[0].bn2.bias.any() == (level <= 50)


@pytest.mark.parametrize(("t_max", "warmup"), [(20, 0), (2, 3)])
def test_rewound_rates_are_those_of_the_last_epochs_of_the_training(t_max, warmup):
    """The study's schedule falls in 20 epochs, rises in 20 and falls again."""
    optimizer = make_optimizer("sgd", torch.nn.Linear(1, 1), 0.01, 0.0, 0.0)
    schedule, trained = make_schedule(optimizer, t_max, warmup), []
    for _ in range(60):
        trained.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rewound = rewound_rate(0.01, t_max, 60, 7, warmup)
    assert [rewound(epoch + 0.9) for epoch in range(7)] == pytest.approx(trained[-7:], abs=1e-9)
    longer = rewound_rate(0.01, t_max, 60, 61, warmup)
    assert [longer(epoch) for epoch in range(61)] == pytest.approx([trained[-1], *trained], abs=1e-9)


def test_rewound_rates_of_a_linear_schedule_change_with_each_batch():
    linear = rewound_rate(0.12, 4, 4, 4, warmup_share=0.25)
    assert [linear(place) for place in (0, 0.5, 1, 2, 3, 3.9)] == pytest.approx([0, 0.06, 0.12, 0.08, 0.04, 0.004])
    again = rewound_rate(0.12, 4, 3, 4, warmup_share=0.25)
    assert [again(place) for place in (0, 0.5, 1, 1.5, 3.5)] == pytest.approx([0.08, 0.06, 0, 0.06, 0.06])


def test_every_step_has_the_rate_of_its_middle_and_too_large_ones_name_their_own_flag(small_net, small_split):
    rates, steps = [], -(-len(small_split) // 16)
    handle = register_optimizer_step_pre_hook(lambda optimizer, *rest: rates.append(optimizer.param_groups[0]["lr"]))
    finetune(*pruned(small_net), replace(recipe(small_split, 0, epochs=2), rate=lambda place: 0.01 * place), 0)
    handle.remove()
    assert rates == pytest.approx([0.01 * (step + 0.5) / steps for step in range(2 * steps)])
    with pytest.raises(UserError, match="smaller --finetune_learning_rate"):
        finetune(*pruned(small_net), recipe(small_split, 1e20, epochs=3, weight_decay=0.1), 0)


def test_training_images_are_augmented_as_told(small_net, small_split):
    found = []
    for shift, border in ((4, "zeros"), (4, "zeros"), (4, "reflect"), (0, "zeros")):
        model, layers = pruned(small_net)
        finetune(model, layers, replace(recipe(small_split, 0.05), shift=shift, border=border), 1)
        found.append(model.stem.weight_orig.detach())
    assert torch.equal(found[0], found[1])
    assert not any(torch.equal(found[0], other) for other in found[2:])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_fine_tunes_as_the_cpu_does(small_net, small_split, monkeypatch, dtype):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (here, layers), (there, _) = pruned(small_net), pruned(small_net)
    finetune(here, layers, recipe(small_split, 0.01), 0)
    theirs = prunable_layers(there.cuda(), EXAMPLE.cuda())
    finetune(there, theirs, recipe(small_split.to(torch.device("cuda")), 0.01, dtype=dtype), 0)
    assert zeros_by_layer(theirs) == zeros_by_layer(layers)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=tolerance, atol=tolerance)
