"""One epoch of training: loss, accuracy, precision, the compiled step, and what stops it."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import Build_Resnet
from sparsity.data.images import normalise, training_batches
from sparsity.networks.inference import CompiledNetwork
from sparsity.networks.layers import memory_format
from sparsity.system.errors import UserError
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import make_optimizer


def train(model, split, batch_size=10, dtype=torch.float32, rate=0.01, **options):
    optimizer = make_optimizer("sgd", model, rate, 0.9, 0)
    return train_one_epoch(model, training_batches(split, batch_size, 0, 1), optimizer, dtype, 1, **options)


def whole(split):
    return normalise(split.images, split.mean, split.std), split.labels


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_and_accuracy_are_those_of_the_predictions_made_while_training(small_net, small_split, smoothing):
    twin, told = copy.deepcopy(small_net).train(), []
    optimizer, twin_optimizer = (make_optimizer("sgd", model, 0.05, 0.9, 0) for model in (small_net, twin))
    batches = list(zip(*(tensor.split(16) for tensor in whole(small_split)), strict=True))
    options = {"on_batch": lambda count, loss: told.append(count), "label_smoothing": smoothing}
    found = train_one_epoch(small_net, batches, optimizer, torch.float32, 1, **options)
    loss_sum = correct = 0
    for images, labels in batches:
        logits = twin(images)
        twin_optimizer.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=smoothing).backward()
        twin_optimizer.step()
        targets = (1 - smoothing) * F.one_hot(labels, 4) + smoothing / 4
        loss_sum -= float((targets * logits.detach().log_softmax(1)).sum())
        correct += int(logits.argmax(1).eq(labels).sum())  # not smoothed
    assert found == (pytest.approx(loss_sum / 50, rel=1e-5), 100 * correct / 50)
    assert told == [16, 32, 48, 50]
    assert all(torch.equal(a, b) for a, b in zip(small_net.parameters(), twin.parameters(), strict=True))


def test_bfloat16_trains_float32_weights_and_a_loss_that_is_not_finite_is_told(small_net, small_split):
    assert math.isfinite(train(small_net, small_split, dtype=torch.bfloat16)[0])
    assert {parameter.dtype for parameter in small_net.parameters()} == {torch.float32}
    images, labels = whole(small_split)
    batches, optimizer = [(images, labels), (images * math.nan, labels)], make_optimizer("sgd", small_net, 0.05, 0.9, 0)
    with pytest.raises(UserError, match=r"loss is nan at epoch 7, step 2, learning rate 0\.05"):
        train_one_epoch(small_net, batches, optimizer, torch.float32, 7)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_compiled_step_trains_the_same_weights(small_split):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    twin = copy.deepcopy(model)
    loss, _ = train(model, small_split, 20, forward=CompiledNetwork(model, 20))  # 20, 20 and 10 images
    assert loss == pytest.approx(train(twin, small_split, 20)[0], rel=1e-5)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_network_that_cannot_be_compiled_is_told_with_the_way_out(small_net, small_split, monkeypatch, where):
    def fail(gradient=None):
        raise torch._dynamo.exc.TorchDynamoException("no g++\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    def fails_late(images):  # the backward pass is compiled when it runs for the first time
        logits = small_net(images)
        logits.register_hook(fail)
        return logits

    monkeypatch.setattr(torch, "compile", lambda model, **options: fails_late if where == "backward" else fail)
    with pytest.raises(UserError, match=r"cannot be compiled here \(no g\+\+\); use --compile off$"):
        train(small_net, small_split, forward=CompiledNetwork(small_net, 10))
    train(small_net, small_split, forward=CompiledNetwork(small_net, 11))  # batches of another size are not compiled


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [2, 8, 16])
def test_gradients_of_narrow_shortcuts_are_right(width, threads):
    """oneDNN gets them wrong, or crashes, in channels_last."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Build_Resnet.resnet18(num_classes=3, width=width)
    assert (memory_format(model) == torch.contiguous_format) == (width < 16)
    model.to(memory_format=memory_format(model))
    images = torch.randn(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(model).double()
    for network, batch in ((model, images), (twin, images.double())):
        optimizer = make_optimizer("sgd", network, 0.0, 0.0, 0.0)
        train_one_epoch(network, [(batch, torch.arange(32) % 3)], optimizer, torch.float32, 1)
    for found, exact in zip(model.parameters(), twin.parameters(), strict=True):
        # One ReLU that rounding switches moves them by percents; wrong ones are off by hundreds of times.
        assert float((found.grad - exact.grad).norm()) <= 0.2 * float(exact.grad.norm()) + 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_trains_as_on_the_cpu(small_net, small_split, dtype, compiled):
    """Convolutions and BatchNorm; compiled with CUDA graphs, over three epochs, so that graphs are replayed."""
    torch.backends.cudnn.allow_tf32 = False
    model = copy.deepcopy(small_net).cuda().to(memory_format=torch.channels_last)
    split, step = small_split.to(torch.device("cuda")), CompiledNetwork(model, 10) if compiled else model
    for network, images, forward in ((small_net, small_split, None), (model, split, step)):
        optimizer = make_optimizer("sgd", network, 0.01, 0.9, 0)
        for epoch in range(3):
            batches = training_batches(images, 10, 0, epoch)
            assert math.isfinite(train_one_epoch(network, batches, optimizer, dtype, epoch, forward=forward)[0])
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for found, expected in zip(model.state_dict().values(), small_net.state_dict().values(), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)
