"""Optimizers, the schedule of the learning rate, and the moving average of weights."""

from argparse import Namespace
from itertools import compress
from typing import NamedTuple

import torch
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsity.system.machine import DTYPES
from sparsity.training.muon import Muon, muon_groups
from sparsity.training.schedule import cosine_factor, linear_factor

OPTIMIZERS = {"sgd": optim.SGD, "adam": optim.Adam, "rmsprop": optim.RMSprop, "muon": Muon}
FUSED = ("sgd", "adam")  # run as one kernel for all parameters on CUDA


def make_optimizer(
    name: str,
    model: nn.Module,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    norm_weight_decay: bool = True,
    dtype: torch.dtype = torch.float32,
) -> optim.Optimizer:
    """The optimizer `name` of OPTIMIZERS, fused on CUDA; for adam `momentum` is the first beta.

    Without `norm_weight_decay` the parameters of one dimension, those of BatchNorm and the biases, are a second group
    without weight decay (arXiv 1812.01187). `nesterov` is for sgd and muon with momentum; others raise TypeError. Muon
    orthogonalises in `dtype`; its groups and rates are those of `muon_groups`.
    """
    if name == "muon":
        groups = muon_groups(model, learning_rate, weight_decay, norm_weight_decay)
        return Muon(groups, learning_rate, momentum, weight_decay, nesterov, dtype)
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

    return optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: cosine_factor(epoch, t_max, warmup_epochs))


def make_linear_schedule(optimizer: optim.Optimizer, steps: int, warmup_share: float) -> optim.lr_scheduler.LRScheduler:
    """`linear_factor` over `steps` batches, to be stepped after each; a batch has the learning rate of its middle."""
    return optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_factor((step + 0.5) / steps, warmup_share))


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


class Training(NamedTuple):
    """All that training steps change: network, moving average of its weights if any, optimizer and schedule.

    The schedule is stepped after each batch if `each_batch`, otherwise after each epoch.
    """

    model: nn.Module
    average: MovingAverage | None
    optimizer: optim.Optimizer
    schedule: optim.lr_scheduler.LRScheduler
    each_batch: bool = False

    def after_batch(self) -> None:
        """Update the moving average, and step the schedule if it goes by batches."""
        if self.average:
            self.average.update_parameters(self.model)
        if self.each_batch:
            self.schedule.step()

    def after_epoch(self) -> None:
        """Step the schedule if it goes by epochs."""
        if not self.each_batch:
            self.schedule.step()


def build_training(args: Namespace, model: nn.Module, steps: int) -> Training:
    """The training of `model` that the flags ask for, in epochs of `steps` batches."""
    average = MovingAverage(model, args.ema) if args.ema else None
    optimizer = build_optimizer(args, model)
    if args.schedule_shape == "linear":
        schedule = make_linear_schedule(optimizer, args.T_max * steps, args.warmup_share)
        return Training(model, average, optimizer, schedule, each_batch=True)
    return Training(model, average, optimizer, make_schedule(optimizer, args.T_max, args.warmup_epochs))


def build_optimizer(args: Namespace, model: nn.Module) -> optim.Optimizer:
    """The optimizer of `model` that the flags ask for, at the highest learning rate."""
    rule = (args.learning_rate, args.momentum, args.weight_decay, args.nesterov, args.norm_weight_decay)
    return make_optimizer(args.optimizer, model, *rule, DTYPES[args.precision])


def epoch_rate(args: Namespace, optimizer: optim.Optimizer, epoch: int) -> float:
    """The learning rate of an epoch that begins; that of its middle where it changes with each batch."""
    if args.schedule_shape == "linear":
        return args.learning_rate * linear_factor((epoch - 0.5) / args.T_max, args.warmup_share)
    return optimizer.param_groups[0]["lr"]
