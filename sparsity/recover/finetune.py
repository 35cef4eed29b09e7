"""Fine-tuning: masked training on the labelled training split."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sparsity.data.images import SHIFT, Split, batch_bounds, training_batches
from sparsity.networks.layers import BatchNorm, InAttention, Layer, memory_format
from sparsity.system.errors import UserError
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import make_optimizer
from sparsity.training.schedule import cosine_factor, linear_factor


@dataclass(frozen=True)
class Finetuning:
    """The recipe of fine-tuning on the images of `train`, which `shift` and `border` augment.

    `rate` maps a place in fine-tuning, in epochs, to the learning rate; a step has that of its middle.
    """

    train: Split
    epochs: int
    rate: Callable[[float], float]
    batch_size: int
    momentum: float
    weight_decay: float
    dtype: torch.dtype
    shift: int = SHIFT
    border: str = "zeros"


def rewound_rate(
    learning_rate: float, t_max: int, trained: int, epochs: int, warmup: int = 0, warmup_share: float | None = None
) -> Callable[[float], float]:
    """The `rate` of a Finetuning that repeats the last `epochs` of `trained` ones (Renda et al., arXiv 2003.02389).

    The training's schedule is that of `make_schedule` or, with a `warmup_share`, that of `make_linear_schedule` over
    `t_max` epochs. A training shorter than `epochs` counts as repeated.
    """
    begin = trained - epochs
    if warmup_share is not None:
        return lambda place: learning_rate * linear_factor((begin + place) % trained / t_max, warmup_share)
    return lambda place: learning_rate * cosine_factor((begin + int(place)) % trained, t_max, warmup)


def mask_enforcer(model: nn.Module, layers: dict[str, Layer]) -> Callable[[], None]:
    """A function that sets masked weights of `layers` and channels of removed filters to zero, to call after each step.

    These are the BatchNorm channels of `model` whose weight and bias are both zero now. It is called once here.
    """
    masked = [layer for layer in layers.values() if hasattr(layer, "weight_mask")]
    inside = [layer for layer in masked if isinstance(layer, InAttention)]  # which reads `weight` past torch's hook
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    removed = [(norm, (norm.weight == 0) & (norm.bias == 0)) for norm in norms if norm.affine]
    removed = [(norm, channels) for norm, channels in removed if channels.any()]

    @torch.no_grad()
    def enforce_masks() -> None:
        for layer in masked:
            layer.weight_orig.mul_(layer.weight_mask)
        for layer in inside:
            with torch.enable_grad():
                layer.weight = layer.weight_orig * layer.weight_mask
        for norm, channels in removed:
            norm.weight.masked_fill_(channels, 0)
            norm.bias.masked_fill_(channels, 0)

    enforce_masks()
    return enforce_masks


def finetune(model: nn.Module, layers: dict[str, Layer], tuning: Finetuning, seed: int) -> None:
    """Train the masked `model` in place with SGD and cross-entropy on augmented, labelled training images.

    Masked weights of `layers` stay exactly zero, and so do weight and bias of a BatchNorm channel where both are zero,
    as those of removed filters: changes by gradient, momentum and weight decay are undone after every step. `seed`
    draws order and augmentation. The model is in eval mode afterwards. Raises UserError where the loss is not finite.
    """
    model.to(memory_format=memory_format(model))
    optimizer = make_optimizer("sgd", model, 1.0, tuning.momentum, tuning.weight_decay)
    steps = len(batch_bounds(len(tuning.train), tuning.batch_size))
    schedule = LambdaLR(optimizer, lambda step: tuning.rate((step + 0.5) / steps))
    enforce_masks = mask_enforcer(model, layers)

    def after_step() -> None:
        enforce_masks()
        schedule.step()

    for epoch in range(1, tuning.epochs + 1):
        augmentation = {"shift": tuning.shift, "border": tuning.border}
        batches = training_batches(tuning.train, tuning.batch_size, seed, epoch, **augmentation)
        try:
            train_one_epoch(model, batches, optimizer, tuning.dtype, epoch, after_step=after_step)
        except UserError as error:  # its advice names a flag of training
            raise UserError("fine-tuning diverged; use a smaller --finetune_learning_rate") from error
    model.eval()
