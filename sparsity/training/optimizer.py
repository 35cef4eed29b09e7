"""Optimizers, the schedule of the learning rate, and the moving average of weights."""

import math
from itertools import compress

import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

OPTIMIZERS = {"sgd": optim.SGD, "adam": optim.Adam, "rmsprop": optim.RMSprop}
FUSED = ("sgd", "adam")  # run as one kernel for all parameters on CUDA


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

    Without `norm_weight_decay` the parameters of one dimension, those of BatchNorm and the biases, are a second group
    without weight decay (arXiv 1812.01187). `nesterov` is for sgd with momentum; others raise TypeError.
    """
    parameters = list(model.parameters())
    groups: list = parameters
    if not norm_weight_decay:
        vectors = [parameter for parameter in parameters if parameter.dim() <= 1]
        others = [parameter for parameter in parameters if parameter.dim() > 1]
        groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    options = {"betas": (momentum, 0.999)} if name == "adam" else {"momentum": momentum}
    if nesterov:
        options["nesterov"] = True
    if name in FUSED and all(parameter.is_cuda for parameter in parameters):
        options["fused"] = True
    return OPTIMIZERS[name](groups, lr=learning_rate, weight_decay=weight_decay, **options)


def make_schedule(optimizer: optim.Optimizer, t_max: int, warmup_epochs: int = 0) -> optim.lr_scheduler.LRScheduler:
    """Cosine annealing, to be stepped once an epoch: down in `t_max` epochs, up in the next (arXiv 1608.03983).

    It follows `warmup_epochs` of linear warm-up (arXiv 1706.02677), at 1, 2, ... of warmup_epochs + 1 parts of the full
    rate, from which the cosine starts.
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
    forgotten. AveragedModel's own update would wait for the device in each step; here the count stays on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move `module`, in place, one step towards the weights of `model`; counts of batches are copied."""
        steps = int(self.n_averaged)
        move = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
        averages, values = ([*network.parameters(), *network.buffers()] for network in (self.module, model))
        floating = [value.is_floating_point() for value in values]
        move(list(compress(averages, floating)), list(compress(values, floating)), steps)
        if not all(floating):
            counts = [not floats for floats in floating]
            torch._foreach_copy_(list(compress(averages, counts)), list(compress(values, counts)))
        self.n_averaged += 1
