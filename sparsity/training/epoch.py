"""One epoch of training."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from sparsity.networks.layers import memory_format
from sparsity.system import processes
from sparsity.system.errors import UserError, one_line


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: optim.Optimizer,
    dtype: torch.dtype,
    epoch: int,
    on_batch: Callable[[int, float], None] = lambda images, loss: None,
    after_step: Callable[[], None] = lambda: None,
    label_smoothing: float = 0.0,
    forward: Callable[[Tensor], Tensor] | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[float, float]:
    """Train `model` in place on every batch (images [B, C, H, W], labels [B]); returns mean loss and accuracy in %.

    In place of labels there may be class probabilities [B, classes]; the most probable class then counts as the label.
    Images are brought to the model's `memory_format`, which its weights should be in already. `dtype` other than
    float32 computes under autocast, with float32 weights. Accuracy is that of the predictions made while training.
    `on_batch` is told images and mean loss so far, `after_step` is called after each step. The loss is cross-entropy
    against labels of which the share `label_smoothing` is spread over all classes (arXiv 1512.00567). `forward`
    computes the logits where it is not `model` itself but compiled, or replicated. A loss that is not finite raises
    UserError: on a CPU at once, elsewhere within 20 steps, so as not to wait for the device in each.

    `part` is (rank, number of processes) where several train together: each gets its part of the images of a batch, as
    `training_batches` gives them, and all labels, and `forward` averages gradients over the processes (`replicate`).
    Each weights its part by its images, so that the gradient is that of the whole batch.
    """
    model.train()
    forward = forward or model
    layout = memory_format(model)
    losses, hits = [], []  # of the steps since the device was asked last
    loss_sum, correct, seen, total = 0.0, 0, 0, 0

    def ask_device(step: int) -> None:
        nonlocal loss_sum, correct
        if losses:
            loss_sum += float(torch.stack(losses).cpu().double().sum())
            correct += int(torch.stack(hits).sum())
            losses.clear()
            hits.clear()
        if not math.isfinite(loss_sum):
            rate = f"learning rate {optimizer.param_groups[0]['lr']:g}; use a smaller --learning_rate"
            raise UserError(f"the loss is {loss_sum} at epoch {epoch}, step {step}, {rate}")

    for step, (images, labels) in enumerate(batches, start=1):
        begin, end = processes.share(len(labels), part)
        mine = labels[begin:end]
        weight = len(mine) * part[1] / len(labels)
        images = images.contiguous(memory_format=layout)
        loss, hit = _backward(forward, images, mine, optimizer, dtype, label_smoothing, weight)
        optimizer.step()
        after_step()
        losses.append(loss * len(mine))
        hits.append(hit)
        seen, total = seen + len(mine), total + len(labels)
        if step % (1 if images.device.type == "cpu" else 20) == 0:
            ask_device(step)
            on_batch(total, loss_sum / seen)
    ask_device(step)
    if part[1] > 1:
        loss_sum, correct = map(sum, zip(*processes.gather((loss_sum, correct)), strict=True))
    return loss_sum / total, 100 * correct / total


def _backward(
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    optimizer: optim.Optimizer,
    dtype: torch.dtype,
    label_smoothing: float,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `weight` times the mean loss of a batch; returns that loss and the number of hits.

    Raises UserError for errors of torch.compile, which compiles in the first forward and backward pass.
    """
    if images.is_cuda:  # before the forward pass, whose CUDA graph may take the gradients' memory
        optimizer.zero_grad()
    try:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if not images.is_cuda:  # as late as can be: the backward pass takes the same memory at once
            optimizer.zero_grad()
        (loss * weight).backward()
    except RuntimeError as error:
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        reason = one_line(error).split(" Set TORCHDYNAMO_VERBOSE")[0][:160]
        raise UserError(f"the network cannot be compiled here ({reason}); use --compile off") from error
    classes = labels.argmax(dim=1) if labels.dim() > 1 else labels
    return loss.detach(), (logits.detach().argmax(dim=1) == classes).sum()
