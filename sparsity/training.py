"""Optimizers, the schedule and one epoch of training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from sparsity.runtime import UserError

OPTIMIZERS = {
    "sgd": lambda parameters, rate, momentum, decay: optim.SGD(
        parameters, lr=rate, momentum=momentum, weight_decay=decay
    ),
    "adam": lambda parameters, rate, momentum, decay: optim.Adam(
        parameters, lr=rate, betas=(momentum, 0.999), weight_decay=decay
    ),
    "rmsprop": lambda parameters, rate, momentum, decay: optim.RMSprop(
        parameters, lr=rate, momentum=momentum, weight_decay=decay
    ),
}


@dataclass(frozen=True)
class EpochResult:
    """Mean loss over the images of an epoch, and how many of them were classified correctly while training."""

    loss: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total


def make_optimizer(
    name: str, model: nn.Module, learning_rate: float, momentum: float, weight_decay: float
) -> optim.Optimizer:
    """The optimizer `name` of OPTIMIZERS; for adam `momentum` is the first beta."""
    return OPTIMIZERS[name](model.parameters(), learning_rate, momentum, weight_decay)


def make_schedule(optimizer: optim.Optimizer, t_max: int) -> optim.lr_scheduler.LRScheduler:
    """Cosine annealing, to be stepped once an epoch: down in `t_max` epochs, up in the next (arXiv 1608.03983)."""
    return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=t_max)


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: optim.Optimizer,
    dtype: torch.dtype,
    epoch: int,
    on_batch: Callable[[int, float], None] = lambda images, loss: None,
) -> EpochResult:
    """Train `model` in place on every batch (images [B, C, H, W], labels [B]) with cross-entropy.

    `dtype` other than float32 computes under autocast, with float32 weights. Accuracy is counted on the predictions
    that training makes anyway. `on_batch` is told images and loss. A loss that is not finite raises UserError; on a
    CPU at the step where it happens, elsewhere within 20 steps, so that the device is not waited for at each step.
    """
    model.train()
    loss_sum = correct = None
    total, check_every = 0, 1
    for step, (images, labels) in enumerate(batches, start=1):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            batch_loss, batch_correct = loss.double() * len(labels), (logits.argmax(dim=1) == labels).sum()
            loss_sum = batch_loss if loss_sum is None else loss_sum + batch_loss
            correct = batch_correct if correct is None else correct + batch_correct
        total += len(labels)
        check_every = 1 if images.device.type == "cpu" else 20
        if step % check_every == 0:
            mean = float(loss_sum) / total
            _require_finite(mean, epoch, step, optimizer)
            on_batch(total, mean)
    mean = float(loss_sum) / total
    _require_finite(mean, epoch, step, optimizer)
    return EpochResult(mean, int(correct), total)


def _require_finite(loss: float, epoch: int, step: int, optimizer: optim.Optimizer) -> None:
    if not torch.isfinite(torch.tensor(loss)):
        rate = optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the loss is {loss} at epoch {epoch}, step {step}, learning rate {rate:g}; "
            "use a smaller --learning_rate (the files of the last good epoch stay)"
        )
