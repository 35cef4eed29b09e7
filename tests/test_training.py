"""One epoch of training, the optimizers, the schedule, the moving average, and the compiled step."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import Build_Resnet
from sparsity.data.images import normalise, training_batches
from sparsity.networks.layers import memory_format
from sparsity.system.errors import UserError
from sparsity.system.machine import resolve_compile
from sparsity.training.epoch import step_function, train_one_epoch
from sparsity.training.optimizer import OPTIMIZERS, MovingAverage, make_optimizer, make_schedule


def rates_of(model, rate, epochs, *schedule_arguments):
    optimizer = make_optimizer("sgd", model, rate, 0.9, 5e-4, norm_weight_decay=False)
    schedule = make_schedule(optimizer, *schedule_arguments)
    rates = []
    for _ in range(epochs):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        rates.append(first)
        optimizer.step()
        schedule.step()
    return rates


def test_the_cosine_goes_down_up_and_down(small_net):
    expected = [0.005 * (1 + math.cos(math.pi * epoch / 20)) for epoch in range(61)]
    assert rates_of(small_net, 0.01, 61, 20) == pytest.approx(expected, abs=1e-9)


def test_a_warmup_rises_in_equal_steps_and_one_cosine_follows(small_net):
    rates = rates_of(small_net, 0.2, 31, 25, 5)
    assert rates[:6] == pytest.approx([0.2 * part / 6 for part in (1, 2, 3, 4, 5, 6)])
    assert rates[5:] == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 25)) for epoch in range(26)], abs=1e-12)
    assert rates[30] == pytest.approx(0, abs=1e-12)  # which is after the last of 30 epochs
    assert rates_of(small_net, 0.2, 3, 25, 1)[:2] == pytest.approx([0.1, 0.2])


def test_flags_reach_the_optimizer(small_net):
    sgd = make_optimizer("sgd", small_net, 0.1, 0.8, 0.01).param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.1, 0.8, 0.01)
    adam = make_optimizer("adam", small_net, 0.1, 0.8, 0.01).param_groups[0]
    assert (adam["betas"], adam["weight_decay"]) == ((0.8, 0.999), 0.01)
    rmsprop = make_optimizer("rmsprop", small_net, 0.1, 0.8, 0.01).param_groups[0]
    assert (rmsprop["momentum"], rmsprop["weight_decay"]) == (0.8, 0.01)


def test_nesterov_reaches_sgd_and_is_off_unless_asked_for(small_net):
    assert make_optimizer("sgd", small_net, 0.1, 0.9, 0, nesterov=True).param_groups[0]["nesterov"]
    assert not make_optimizer("sgd", small_net, 0.1, 0.9, 0).param_groups[0]["nesterov"]


def test_on_a_cpu_no_optimizer_is_fused(small_net):
    for name in OPTIMIZERS:
        assert not make_optimizer(name, small_net, 0.1, 0.9, 0).param_groups[0].get("fused")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_convolutions_alone_where_norms_are_spared(small_net, name):
    before = copy.deepcopy(small_net)
    optimizer = make_optimizer(name, small_net, 0.1, 0.9, 0.01, norm_weight_decay=False)
    covered = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(covered) == sorted(map(id, small_net.parameters()))
    for parameter in small_net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {key: not torch.equal(value, before.get_parameter(key)) for key, value in small_net.named_parameters()}
    weights = {"stem.weight", "down.weight", "hidden.weight", "result.weight"}
    assert {key for key, moves in moved.items() if moves} == weights


def test_one_group_holds_all_where_norms_decay_too(small_net):
    (group,) = make_optimizer("sgd", small_net, 0.1, 0.9, 0.01).param_groups
    assert list(map(id, group["params"])) == list(map(id, small_net.parameters()))


def test_a_moving_average_equals_a_plain_loop(small_net, small_split):
    average = MovingAverage(small_net, 0.6)
    expected = copy.deepcopy(small_net.state_dict())
    optimizer, steps = make_optimizer("sgd", small_net, 0.05, 0.9, 0), 0

    def follow():
        nonlocal steps
        decay = min(0.6, (1 + steps) / (10 + steps))
        for name, value in small_net.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            )
        average.update_parameters(small_net)
        steps += 1

    for epoch in range(4):
        train_one_epoch(
            small_net, training_batches(small_split, 10, 0, epoch), optimizer, torch.float32, epoch, after_step=follow
        )
    assert (1 + steps) / (10 + steps) > 0.6  # so that the ramp and what follows it were both walked
    torch.testing.assert_close(average.module.state_dict(), expected, rtol=1e-5, atol=1e-6)
    assert average.module.stem_bn.num_batches_tracked.dtype == torch.int64
    assert int(average.module.stem_bn.num_batches_tracked) == steps == int(average.n_averaged)
    assert not torch.equal(average.module.stem_bn.running_mean, small_net.stem_bn.running_mean)


def test_a_moving_average_without_memory_is_the_network(small_net, small_split):
    average = MovingAverage(small_net, 0.0)
    optimizer = make_optimizer("sgd", small_net, 0.05, 0.9, 0)
    train_one_epoch(small_net, training_batches(small_split, 10, 0, 1), optimizer, torch.float32, 1)
    average.update_parameters(small_net)
    assert all(torch.equal(value, small_net.state_dict()[key]) for key, value in average.module.state_dict().items())


def test_label_smoothing_is_in_the_loss_and_not_in_the_accuracy(small_net, small_split):
    images = normalise(small_split.images, small_split.mean, small_split.std)
    logits = copy.deepcopy(small_net).train()(images)
    logs = torch.log_softmax(logits, dim=1)
    targets = 0.7 * F.one_hot(small_split.labels, 4) + 0.3 / 4
    optimizer = make_optimizer("sgd", small_net, 1e-9, 0, 0)
    batches = [(images, small_split.labels)]
    result = train_one_epoch(small_net, batches, optimizer, torch.float32, 1, label_smoothing=0.3)
    assert result.loss == pytest.approx(float(-(targets * logs).sum(dim=1).mean().detach()), rel=1e-5)
    assert result.correct == int((logits.argmax(dim=1) == small_split.labels).sum())


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_compiled_step_trains_the_same_weights(small_split):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    twin, losses = copy.deepcopy(model), []
    for network, step in ((model, step_function(model, True, 20)), (twin, step_function(twin, False, 20))):
        optimizer = make_optimizer("sgd", network, 0.01, 0.9, 0)
        batches = training_batches(small_split, 20, 0, 1)  # 20, 20 and 10 images
        losses.append(train_one_epoch(network, batches, optimizer, torch.float32, 1, forward=step).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-6)
    assert step_function(twin, False, 20) is twin


def test_a_network_that_cannot_be_compiled_is_told_with_the_way_out(small_net, monkeypatch):
    def fail(images):
        raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: no g++\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch, "compile", lambda model, mode: fail)
    forward = step_function(small_net, True, 2)
    with pytest.raises(UserError, match=r"\(InvalidCxxCompiler: no g\+\+\); use --compile off$"):
        forward(torch.zeros(2, 3, 8, 8))
    assert forward(torch.zeros(3, 3, 8, 8)).shape == (3, 4)  # of another size: not compiled


def test_compiling_is_automatic_on_cuda_alone():
    names = [("auto", "cuda"), ("auto", "cpu"), ("on", "cpu"), ("off", "cuda")]
    assert [resolve_compile(name, torch.device(device)) for name, device in names] == ["on", "off", "on", "off"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_loss(small_net, small_split, name):
    optimizer = make_optimizer(name, small_net, 0.01, 0.9, 0)
    results = [
        train_one_epoch(small_net, training_batches(small_split, 10, 0, epoch), optimizer, torch.float32, epoch)
        for epoch in range(30)
    ]
    assert results[-1].loss < results[0].loss
    assert all(result.total == 50 for result in results)


def test_loss_and_accuracy_are_those_of_the_predictions_made_while_training(small_net, small_split):
    twin = copy.deepcopy(small_net).train()
    optimizer, twin_optimizer = (make_optimizer("sgd", model, 0.05, 0.9, 0) for model in (small_net, twin))
    images = normalise(small_split.images, small_split.mean, small_split.std)
    batches = list(zip(images.split(16), small_split.labels.split(16), strict=True))
    told = []
    result = train_one_epoch(
        small_net, batches, optimizer, torch.float32, 1, lambda count, loss: told.append((count, loss))
    )
    loss_sum = correct = 0
    for inputs, labels in batches:
        logits = twin(inputs)
        loss = F.cross_entropy(logits, labels)
        twin_optimizer.zero_grad()
        loss.backward()
        twin_optimizer.step()
        loss_sum += float(loss.detach()) * len(labels)
        correct += int(logits.argmax(1).eq(labels).sum())
    assert result.correct == correct
    assert result.loss == pytest.approx(loss_sum / 50, rel=1e-6)
    assert [count for count, _ in told] == [16, 32, 48, 50]
    assert all(torch.equal(a, b) for a, b in zip(small_net.parameters(), twin.parameters(), strict=True))


def test_a_loss_that_is_not_finite_names_epoch_step_and_rate(small_net, small_split):
    images = normalise(small_split.images, small_split.mean, small_split.std)
    poisoned = images.clone()
    poisoned[0] = math.nan
    batches = [(images, small_split.labels), (poisoned, small_split.labels), (images, small_split.labels)]
    optimizer = make_optimizer("sgd", small_net, 0.05, 0.9, 0)
    with pytest.raises(UserError, match=r"loss is nan at epoch 7, step 2, learning rate 0\.05"):
        train_one_epoch(small_net, batches, optimizer, torch.float32, 7)


def test_bfloat16_trains_with_float32_weights(small_net, small_split):
    optimizer = make_optimizer("sgd", small_net, 0.01, 0.9, 0)
    result = train_one_epoch(small_net, training_batches(small_split, 10, 0, 1), optimizer, torch.bfloat16, 1)
    assert math.isfinite(result.loss)
    assert {parameter.dtype for parameter in small_net.parameters()} == {torch.float32}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_gradients_of_narrow_shortcuts_are_right(width, threads):
    """oneDNN gets them wrong, or crashes, in channels_last."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Build_Resnet.resnet18(num_classes=3, width=width)
    assert (memory_format(model) == torch.contiguous_format) == (width < 16)
    model.to(memory_format=memory_format(model))
    images = torch.randn(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    labels, gradients = torch.arange(32) % 3, []
    for network in (model, copy.deepcopy(model).double()):
        optimizer = make_optimizer("sgd", network, 1.0, 0.0, 0.0)
        before = copy.deepcopy(network.state_dict())
        batch = images.to(next(network.parameters()).dtype)
        train_one_epoch(network, [(batch, labels)], optimizer, torch.float32, 1)
        gradients.append({name: before[name] - value for name, value in network.named_parameters()})
    for name, gradient in gradients[0].items():
        exact = gradients[1][name]
        # One ReLU that rounding switches moves them by percents; what is guarded against is wrong by hundreds of times.
        assert float((gradient - exact).detach().norm()) <= 0.2 * float(exact.detach().norm()) + 1e-6
