"""optimizer"""

import math
from itertools import compress

import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

OPTIMIZERS = {
    "sgd": lambda parameters, rate, momentum, decay, **options: optim.SGD(
        parameters, lr=rate, momentum=momentum, weight_decay=decay, **options
    ),
    "adam": lambda parameters, rate, momentum, decay, **options: optim.Adam(
        parameters, lr=rate, betas=(momentum, 0.999), weight_decay=decay, **options
    ),
    "rmsprop": lambda parameters, rate, momentum, decay, **options: optim.RMSprop(
        parameters, lr=rate, momentum=momentum, weight_decay=decay, **options
    ),
}


FUSED = ("sgd", "adam")  # one kernel for all parameters


def make_optimizer(
    name: str,
    model: nn.Module,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    norm_weight_decay: bool = True,
) -> optim.Optimizer:
    """The optimizer `name` of OPTIMIZERS, fused on CUDA; for adam `momentum` is the first beta.

    Without `norm_weight_decay` the parameters of BatchNorm and the biases, which is all that has one dimension, are a
    second group without weight decay (arXiv 1812.01187). `nesterov` is for sgd with momentum; others raise TypeError.
    """
    parameters = list(model.parameters())
    groups: list = parameters
    if not norm_weight_decay:
        vectors = [parameter.dim() <= 1 for parameter in parameters]
        groups = [
            {"params": [parameter for parameter, vector in zip(parameters, vectors, strict=True) if not vector]},
            {"params": list(compress(parameters, vectors)), "weight_decay": 0.0},
        ]
    options = {"nesterov": True} if nesterov else {}
    if name in FUSED and all(parameter.is_cuda for parameter in parameters):
        options["fused"] = True
    return OPTIMIZERS[name](groups, learning_rate, momentum, weight_decay, **options)


def make_schedule(optimizer: optim.Optimizer, t_max: int, warmup_epochs: int = 0) -> optim.lr_scheduler.LRScheduler:
    """Cosine annealing, to be stepped once an epoch: down in `t_max` epochs, up in the next (arXiv 1608.03983).

    It follows `warmup_epochs` in which the rate rises linearly (arXiv 1706.02677): these train at 1, 2, ... of
    warmup_epochs + 1 parts of the full rate, which the cosine starts from.
    """
    if not warmup_epochs:
        return optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=t_max)

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        return (1 + math.cos(math.pi * (epoch - warmup_epochs) / t_max)) / 2

    return optim.lr_scheduler.LambdaLR(optimizer, factor)


class MovingAverage(AveragedModel):
    """The exponential moving average of a network's weights and BatchNorm statistics; `module` is the averaged network.

    The decay starts at (1 + t) / (10 + t) after t steps, until that exceeds `decay`, so that the first weights are soon
    forgotten. `update_parameters`, called after each step, moves `module` in place towards the model. AveragedModel's
    own sends its count to the device at each step and waits for that; here the count stays on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)
        move = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
        averages, values = ([*network.parameters(), *network.buffers()] for network in (self.module, model))
        floating = [value.is_floating_point() for value in values]
        move(list(compress(averages, floating)), list(compress(values, floating)), steps)
        counts = [not floats for floats in floating]  # of batches, by BatchNorm: they have no mean
        if any(counts):
            torch._foreach_copy_(list(compress(averages, counts)), list(compress(values, counts)))
        self.n_averaged += 1
