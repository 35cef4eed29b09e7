"""Optimizers, the schedule, the moving average of weights, and one epoch of training."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from sparsity.networks.layers import memory_format
from sparsity.system.errors import UserError, one_line
from sparsity.system.processes import ALONE, Ranks, share


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


class CompiledStep(nn.Module):
    """Runs `model` in training, compiled for batches of `batch_size`; another size runs by `model` as it is.

    On CUDA with CUDA graphs. The first call compiles, and raises UserError where there is no compiler.
    """

    def __init__(self, model: nn.Module, batch_size: int):
        super().__init__()
        self.model, self.batch_size = model, batch_size
        self.on_cuda = next(model.parameters()).is_cuda
        self.fast = torch.compile(model, mode="reduce-overhead" if self.on_cuda else None)

    def forward(self, images: Tensor) -> Tensor:
        """The logits of images [B, C, H, W]: [B, classes]."""
        if len(images) != self.batch_size:
            return self.model(images)
        if self.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # what the step before left in its graph may be overwritten
        try:
            return self.fast(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = one_line(error).split(" Set TORCHDYNAMO_VERBOSE")[0][:160]
            raise UserError(f"the network cannot be compiled here ({reason}); use --compile off") from error


def step_function(model: nn.Module, compiled: bool, batch_size: int) -> nn.Module:
    """What computes the logits of a batch in training: `model` itself, or a CompiledStep with the same weights."""
    return CompiledStep(model, batch_size) if compiled else model


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
    team: Ranks = ALONE,
) -> EpochResult:
    """Train `model` in place on every batch (images [B, C, H, W], labels [B]) with cross-entropy.

    Images are brought to the model's `memory_format`, which its weights should be in already.
    `dtype` other than float32 computes under autocast, with float32 weights. Accuracy is counted on the predictions
    that training makes anyway. `on_batch` is told images and loss, `after_step` is called after each step. The loss,
    also that reported, is against labels of which the share `label_smoothing` is spread over all classes (arXiv
    1512.00567). `forward` computes the logits where it is not `model` itself, as `step_function` gives it. A loss that
    is not finite raises UserError; on a CPU at the step where it happens, elsewhere within 20 steps, so that the device
    is not waited for at each step.

    Of several processes each gets its part of the images of a batch, in `training_batches`, and all labels; `forward`
    is then what averages gradients over the processes, as `replicate` gives it. Each weighs its part by its images, so
    that the gradient is that of the whole batch.
    """
    model.train()
    forward = forward or model
    layout = memory_format(model)
    losses, hits = [], []  # of the steps since the device was asked last
    loss_sum, correct, seen, total = 0.0, 0, 0, 0
    for step, (images, labels) in enumerate(batches, start=1):
        if images.is_cuda:  # before the forward pass, whose CUDA graph may take the gradients' memory
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images.contiguous(memory_format=layout))
        begin, end = share(len(labels), team.rank, team.size)
        mine = labels[begin:end]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, mine, label_smoothing=label_smoothing)
        if not images.is_cuda:  # as late as can be: the backward pass takes the same memory at once
            optimizer.zero_grad(set_to_none=True)
        (loss * (len(mine) * team.size / len(labels)) if team.size > 1 else loss).backward()
        optimizer.step()
        after_step()
        losses.append(loss.detach() * len(mine))
        hits.append((logits.detach().argmax(dim=1) == mine).sum())
        seen, total = seen + len(mine), total + len(labels)
        if step % (1 if images.device.type == "cpu" else 20) == 0:
            loss_sum, correct = loss_sum + _total(losses), correct + int(_total(hits))
            _require_finite(loss_sum, epoch, step, optimizer)
            on_batch(total, loss_sum / seen)
    loss_sum, correct = loss_sum + _total(losses), correct + int(_total(hits))
    _require_finite(loss_sum, epoch, step, optimizer)
    loss_sum, correct = map(sum, zip(*team.gather((loss_sum, correct)), strict=True))
    return EpochResult(loss_sum / total, correct, total)


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
