"""Optimizers, the schedule and one epoch of training."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from sparsity.runtime import UserError

SIMD_BLOCK = 16  # channels, with AVX-512; 8 with AVX2

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


def memory_format(model: nn.Module) -> torch.memory_format:
    """The format to take gradients in: channels_last, the faster one, but for networks with narrow shortcuts.

    In channels_last, oneDNN's gradient of a strided 1x1 convolution with fewer input channels than a SIMD block holds
    writes beyond its workspace: a crash, or wrong gradients (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if conv.kernel_size == (1, 1) and max(conv.stride) > 1]
    narrow = any(conv.in_channels // conv.groups < SIMD_BLOCK for conv in strided)
    return torch.contiguous_format if narrow else torch.channels_last


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: optim.Optimizer,
    dtype: torch.dtype,
    epoch: int,
    on_batch: Callable[[int, float], None] = lambda images, loss: None,
    after_step: Callable[[], None] = lambda: None,
) -> EpochResult:
    """Train `model` in place on every batch (images [B, C, H, W], labels [B]) with cross-entropy.

    Images are brought to the model's `memory_format`, which its weights should be in already.
    `dtype` other than float32 computes under autocast, with float32 weights. Accuracy is counted on the predictions
    that training makes anyway. `on_batch` is told images and loss, `after_step` is called after each step. A loss that
    is not finite raises UserError; on a CPU at the step where it happens, elsewhere within 20 steps, so that the device
    is not waited for at each step.
    """
    model.train()
    layout = memory_format(model)
    losses, hits = [], []  # of the steps since the device was asked last
    loss_sum, correct, total = 0.0, 0, 0
    for step, (images, labels) in enumerate(batches, start=1):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(images.contiguous(memory_format=layout))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        after_step()
        losses.append(loss.detach() * len(labels))
        hits.append((logits.detach().argmax(dim=1) == labels).sum())
        total += len(labels)
        if step % (1 if images.device.type == "cpu" else 20) == 0:
            loss_sum, correct = loss_sum + _total(losses), correct + int(_total(hits))
            _require_finite(loss_sum, epoch, step, optimizer)
            on_batch(total, loss_sum / total)
    loss_sum, correct = loss_sum + _total(losses), correct + int(_total(hits))
    _require_finite(loss_sum, epoch, step, optimizer)
    return EpochResult(loss_sum / total, correct, total)


def require_progress(
    optimizer: optim.Optimizer, schedule: optim.lr_scheduler.LRScheduler, saved: dict, epochs: list[int], epoch: int
) -> None:
    """ValueError unless a loaded optimizer, schedule and history all stand after `epoch`.

    `saved` is the state that `schedule` was loaded from, `epochs` the epochs in the history.
    """
    if epochs != list(range(1, epoch + 1)):
        raise ValueError(f"the history is not that of {epoch} epochs")
    # A schedule made anew, because loading may have added to this one whatever the file held.
    fresh = make_schedule(make_optimizer("sgd", nn.Linear(1, 1), 0.1, 0.9, 0.0), schedule.T_max)
    if saved.keys() != fresh.state_dict().keys() or schedule.last_epoch != epoch:
        raise ValueError("the schedule stands elsewhere")
    group = optimizer.param_groups[0]
    if not math.isclose(float(group["lr"]), schedule.get_last_lr()[0], rel_tol=1e-9, abs_tol=1e-30):
        raise ValueError("learning rate and schedule disagree")
    buffers = group["momentum"] > 0 if isinstance(optimizer, optim.SGD) else True
    for parameter in group["params"]:
        tensors = [value for value in optimizer.state.get(parameter, {}).values() if torch.is_tensor(value)]
        wide = [tensor for tensor in tensors if tensor.dim()]  # apart from counts of steps
        if (buffers and not wide) or any(tensor.shape != parameter.shape for tensor in wide):
            raise ValueError("the optimizer lacks its buffers")


def _total(values: list[Tensor]) -> float:
    """Sum of scalars on a device, in float64 on the CPU; empties the list."""
    total = float(torch.stack(values).cpu().double().sum()) if values else 0.0
    values.clear()
    return total


def _require_finite(loss: float, epoch: int, step: int, optimizer: optim.Optimizer) -> None:
    if not math.isfinite(loss):
        rate = optimizer.param_groups[0]["lr"]
        raise UserError(
            f"the loss is {loss} at epoch {epoch}, step {step}, learning rate {rate:g}; "
            "use a smaller --learning_rate (the files of the last good epoch stay)"
        )
