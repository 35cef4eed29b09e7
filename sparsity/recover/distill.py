"""Distillation: masked training towards the outputs of the dense network; no labels."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsity.data.calibration import Augmentation, augmented_batches
from sparsity.data.images import Split, batch_bounds
from sparsity.networks.layers import Layer, memory_format
from sparsity.recover.finetune import mask_enforcer
from sparsity.system.errors import UserError
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import make_linear_schedule, make_optimizer

BATCH_SIZE = 128
MOMENTUM = 0.9


@dataclass(frozen=True)
class Distillation:
    """The recipe of distillation: raw `images` of the training split, whose labels are not read, and how to use them.

    `learning_rate` is that of the first step, from which it falls to 0.
    """

    images: Split
    augmentation: Augmentation
    epochs: int
    learning_rate: float
    dtype: torch.dtype


def distill(model: nn.Module, teacher: nn.Module, layers: dict[str, Layer], recipe: Distillation, seed: int) -> None:
    """Train the masked `model` in place towards the class probabilities that `teacher` gives to the same images.

    `teacher` is an inference copy of the dense network in the recipe's `dtype`. The loss is the cross-entropy between
    the probabilities of both (Hinton et al., arXiv 1503.02531, at temperature 1 and without the true labels), on images
    that are augmented anew in each epoch; SGD with Nesterov's momentum, no weight decay, a learning rate that falls
    linearly to 0. Masked weights and removed filters stay zero, see `mask_enforcer`. `seed` draws order and
    augmentation. The model is in eval mode afterwards. Raises UserError where the loss is not finite.
    """
    model.to(memory_format=memory_format(model))
    optimizer = make_optimizer("sgd", model, recipe.learning_rate, MOMENTUM, 0.0, nesterov=True)
    steps = recipe.epochs * len(batch_bounds(len(recipe.images), BATCH_SIZE))
    schedule, enforce_masks = make_linear_schedule(optimizer, steps, 0.0), mask_enforcer(model, layers)

    def after_step() -> None:
        enforce_masks()
        schedule.step()

    for epoch in range(1, recipe.epochs + 1):
        batches = _targets(teacher, recipe, seed, epoch)
        try:
            train_one_epoch(model, batches, optimizer, recipe.dtype, epoch, after_step=after_step)
        except UserError as error:  # its advice names a flag of training
            rate = f"{recipe.learning_rate:g}"
            raise UserError(f"distillation diverged at rate {rate}; use a smaller --distill_learning_rate") from error
    model.eval()


def _targets(teacher: nn.Module, recipe: Distillation, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch: images [B, C, H, W] and the teacher's class probabilities [B, classes], float32."""
    for images, _ in augmented_batches(recipe.images, recipe.augmentation, BATCH_SIZE, seed, epoch):
        with torch.no_grad():
            logits = teacher(images.to(recipe.dtype))
        yield images, logits.float().softmax(dim=1)
