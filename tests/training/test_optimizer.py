"""The optimizers, the schedule of the learning rate, and the moving average of weights."""

import copy
import math

import pytest
import torch

from sparsity.data.images import training_batches
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import OPTIMIZERS, MovingAverage, make_linear_schedule, make_optimizer, make_schedule


def rates_of(model, rate, epochs, *schedule_arguments):
    optimizer = make_optimizer("sgd", model, rate, 0.9, 5e-4, norm_weight_decay=False)
    schedule, rates = make_schedule(optimizer, *schedule_arguments), []
    for _ in range(epochs):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        rates.append(first)
        optimizer.step()
        schedule.step()
    return rates


def test_the_cosine_goes_down_up_and_down_after_a_warmup_in_equal_steps(small_net):
    expected = [0.005 * (1 + math.cos(math.pi * epoch / 20)) for epoch in range(61)]
    assert rates_of(small_net, 0.01, 61, 20) == pytest.approx(expected, abs=1e-9)
    rates = rates_of(small_net, 0.2, 31, 25, 5)
    assert rates[:6] == pytest.approx([0.2 * part / 6 for part in (1, 2, 3, 4, 5, 6)])
    assert rates[5:] == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 25)) for epoch in range(26)], abs=1e-12)
    assert rates_of(small_net, 0.2, 3, 25, 1)[:2] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_the_linear_schedule_rises_and_falls_in_equal_steps_to_zero(small_net, share):
    optimizer = make_optimizer("muon", small_net, 0.2, 0.9, 0)
    schedule, rates = make_linear_schedule(optimizer, 200, share), []
    for _ in range(201):
        first, _, third = (group["lr"] for group in optimizer.param_groups)
        assert third == pytest.approx(first / 6)  # groups of other rates keep their proportion
        rates.append(first)
        optimizer.step()
        schedule.step()
    top = round(200 * share)
    assert rates[:top] == pytest.approx([0.2 * (step + 0.5) / top for step in range(top)])
    assert rates[top:200] == pytest.approx([0.2 * (199.5 - step) / (200 - top) for step in range(top, 200)])
    assert sum(rates) == pytest.approx(200 * 0.1) and rates[200] == 0


def test_settings_reach_the_optimizer(small_net):
    for name in OPTIMIZERS.keys() - {"muon"}:
        momentum = {"betas": (0.8, 0.999)} if name == "adam" else {"momentum": 0.8}
        (group,) = make_optimizer(name, small_net, 0.1, 0.8, 0.01).param_groups
        assert group.items() >= ({"lr": 0.1, "weight_decay": 0.01} | momentum).items()
        assert list(map(id, group["params"])) == list(map(id, small_net.parameters()))
        assert not group.get("fused")  # on a CPU
    for nesterov in (False, True):
        assert make_optimizer("sgd", small_net, 0.1, 0.9, 0, nesterov).param_groups[0]["nesterov"] == nesterov


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_convolutions_alone_where_norms_are_spared(small_net, name):
    before = copy.deepcopy(small_net)
    optimizer = make_optimizer(name, small_net, 0.1, 0.9, 0.01, norm_weight_decay=False)
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(map(id, small_net.parameters()))
    for parameter in small_net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {key for key, value in small_net.named_parameters() if not torch.equal(value, before.get_parameter(key))}
    assert moved == {"stem.weight", "down.weight", "hidden.weight", "result.weight"}


def test_a_moving_average_equals_a_plain_loop(small_net, small_split):
    average = MovingAverage(small_net, 0.6)
    expected = copy.deepcopy(small_net.state_dict())
    optimizer, steps = make_optimizer("sgd", small_net, 0.05, 0.9, 0), 0

    def follow():
        nonlocal steps
        decay = min(0.6, (1 + steps) / (10 + steps))
        for name, value in small_net.state_dict().items():
            mean = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value if mean else value.clone()
        average.update_parameters(small_net)
        steps += 1

    for epoch in range(4):
        batches = training_batches(small_split, 10, 0, epoch)
        train_one_epoch(small_net, batches, optimizer, torch.float32, epoch, after_step=follow)
    assert (1 + steps) / (10 + steps) > 0.6  # so that the ramp and the steps after it were both walked
    torch.testing.assert_close(average.module.state_dict(), expected, rtol=1e-5, atol=1e-6)
    assert int(average.module.stem_bn.num_batches_tracked) == steps == int(average.n_averaged)
    average.decay, average.n_averaged = 0.0, average.n_averaged.zero_() + 1  # without memory it is the network
    average.update_parameters(small_net)
    torch.testing.assert_close(average.module.state_dict(), small_net.state_dict(), rtol=0, atol=0)
