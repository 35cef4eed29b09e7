"""Masked training on the training split."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sparsity.data.images import Split, training_batches
from sparsity.networks.layers import Layer, memory_format
from sparsity.system.errors import UserError
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import make_optimizer, make_schedule


@dataclass(frozen=True)
class Finetuning:
    """How a pruned network is trained on: `rates` holds the learning rate of each epoch."""

    train: Split
    rates: tuple[float, ...]
    batch_size: int
    momentum: float
    weight_decay: float
    dtype: torch.dtype


def rewound_rates(
    learning_rate: float, t_max: int, trained: int, epochs: int, warmup_epochs: int = 0
) -> tuple[float, ...]:
    """The learning rates of the last `epochs` of a training of `trained` epochs (Renda et al., arXiv 2003.02389).

    The training's schedule is that of `make_schedule`. With more epochs than it had, it is repeated from its
    first.
    """
    optimizer = make_optimizer("sgd", nn.Linear(1, 1), learning_rate, 0.0, 0.0)
    schedule = make_schedule(optimizer, t_max, warmup_epochs)
    rates = []
    for _ in range(trained):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()  # without gradients: only so that the schedule may be stepped
        schedule.step()
    return tuple(rates[index % trained] for index in range(trained - epochs, trained))


def finetune(
    model: nn.Module,
    layers: dict[str, Layer],
    tuning: Finetuning,
    seed: int,
    on_batch: Callable[[int, float], None] = lambda images, loss: None,
) -> None:
    """Train the masked `model` in place with SGD and cross-entropy on augmented, labelled training images.

    Pruned weights (of `layers`) stay exactly zero: what momentum and weight decay do to them is undone after every
    step. `seed` draws the order and augmentation. The model is in eval mode afterwards.
    """
    model.to(memory_format=memory_format(model))
    optimizer = make_optimizer("sgd", model, tuning.rates[0], tuning.momentum, tuning.weight_decay)
    masked = [layer for layer in layers.values() if hasattr(layer, "weight_mask")]

    @torch.no_grad()
    def enforce_masks() -> None:
        for layer in masked:
            layer.weight_orig.mul_(layer.weight_mask)

    enforce_masks()
    for epoch, rate in enumerate(tuning.rates, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = training_batches(tuning.train, tuning.batch_size, seed, epoch)
        try:
            train_one_epoch(model, batches, optimizer, tuning.dtype, epoch, on_batch, enforce_masks)
        except UserError as error:  # its way out names a flag of training
            raise UserError(
                f"fine-tuning diverged at learning rate {rate:g}; use a smaller --finetune_learning_rate"
            ) from error
    model.eval()
