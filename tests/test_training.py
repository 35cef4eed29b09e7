"""One epoch of training, the optimizers and the schedule."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import Build_Resnet
from sparsity.data import normalise, training_batches
from sparsity.runtime import UserError
from sparsity.training import OPTIMIZERS, make_optimizer, make_schedule, memory_format, train_one_epoch


def test_the_cosine_goes_down_up_and_down(small_net):
    optimizer = make_optimizer("sgd", small_net, 0.01, 0.9, 5e-4)
    schedule = make_schedule(optimizer, 20)
    rates = []
    for _ in range(61):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.005 * (1 + math.cos(math.pi * epoch / 20)) for epoch in range(61)]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_flags_reach_the_optimizer(small_net):
    sgd = make_optimizer("sgd", small_net, 0.1, 0.8, 0.01).param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (0.1, 0.8, 0.01)
    adam = make_optimizer("adam", small_net, 0.1, 0.8, 0.01).param_groups[0]
    assert (adam["betas"], adam["weight_decay"]) == ((0.8, 0.999), 0.01)
    rmsprop = make_optimizer("rmsprop", small_net, 0.1, 0.8, 0.01).param_groups[0]
    assert (rmsprop["momentum"], rmsprop["weight_decay"]) == (0.8, 0.01)


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
        assert float((gradient - exact).norm()) <= 0.2 * float(exact.norm()) + 1e-6
