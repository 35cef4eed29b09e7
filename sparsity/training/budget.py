"""The epochs of a training that fit into --time_budget: a few steps are timed at each size of the images."""

import copy
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import count, islice, pairwise
from statistics import median

import torch
from torch import Tensor, nn

from sparsity.data.images import Split, batch_bounds, training_batches
from sparsity.networks.evaluation import default_batch_size, evaluate_shared
from sparsity.networks.fused import fused
from sparsity.networks.inference import CompiledNetwork, inference_copy
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.system.machine import DTYPES
from sparsity.training.distributed import replicate
from sparsity.training.epoch import train_one_epoch
from sparsity.training.optimizer import build_optimizer
from sparsity.training.recipe import settle_epochs
from sparsity.training.schedule import image_sizes

TRIAL_STEPS = 4  # timed at each size, after a first one that is not
MARGIN = 0.97  # the share of the time that is planned
Batches = Iterable[tuple[Tensor, Tensor]]


def fit_epochs(args: Namespace, model: nn.Module, training: Split, test: Split, started: float) -> None:
    """Set in `args` the most epochs that end within --time_budget after `started`, and the flags that follow them.

    `started` is a time of `time.perf_counter`. A few steps of a copy of `model` at each size of the images, and one
    evaluation, tell the time of an epoch, which is printed. Every process sets the same number. Raises UserError where
    not even one epoch fits.
    """
    network = fused(inference_copy(model, DTYPES[args.precision]), test)
    begun = time.perf_counter()
    evaluate_shared(network, test, default_batch_size(test.labels.device))
    testing = time.perf_counter() - begun
    part = (processes.rank(), processes.size())
    steps = len(batch_bounds(len(training), args.batch_size, 2 * part[1]))
    train, epoch_seconds = trial(args, model, part), {}
    for size in (*range(args.start_size or args.image_size, args.image_size, 4), args.image_size):
        draws = (args.batch_size, args.seed, 0, args.cutout, part, args.shift, args.border, size)
        batches = training_batches(training, *draws)
        epoch_seconds[size] = steps * seconds_a_step(train, batches) + testing
    left = MARGIN * (args.time_budget - (time.perf_counter() - started) - testing)
    epochs = min(processes.gather(epochs_that_fit(left, epoch_seconds, args.start_size, args.image_size)))
    settle_epochs(args, epochs)
    each = ", ".join(f"{seconds:,.1f} s at {size} pixels" for size, seconds in epoch_seconds.items())
    print(f"{epochs} epochs fit into {timedelta(seconds=args.time_budget)}; an epoch takes {each}")


def trial(args: Namespace, model: nn.Module, part: tuple[int, int]) -> Callable[[Batches], object]:
    """A function that trains a copy of `model` on batches, at a learning rate of 0, which never diverges."""
    network = copy.deepcopy(model)
    optimizer = build_optimizer(args, network)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    begin, end = processes.share(args.batch_size, part)
    step = CompiledNetwork(network, end - begin) if args.compile == "on" else network
    dtype = DTYPES[args.precision]
    return lambda batches: train_one_epoch(network, batches, optimizer, dtype, 0, forward=replicate(step), part=part)


def seconds_a_step(train: Callable[[Batches], object], batches: Batches) -> float:
    """The median time in seconds of a step of `train` on the first TRIAL_STEPS + 1 `batches`, the first left out."""
    stamps = []

    def stamped() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in islice(batches, TRIAL_STEPS + 1):
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            stamps.append(time.perf_counter())
            yield images, labels

    train(stamped())
    stamps.append(time.perf_counter())
    spans = [end - start for start, end in pairwise(stamps)]
    return median(spans[1:] or spans)


def epochs_that_fit(seconds: float, epoch_seconds: dict[int, float], start_size: int, image_size: int) -> int:
    """The most epochs that take at most `seconds`, from the seconds of one at each size of the images.

    Raises UserError where not even one fits.
    """
    for epochs in count(1):
        needed = sum(epoch_seconds[size] for size in image_sizes(start_size, image_size, epochs))
        if needed > seconds:
            break
    if epochs == 1:
        left = max(seconds, 0)
        raise UserError(f"no epoch fits into --time_budget: one takes {needed:.1f} s, and {left:.1f} s are left")
    return epochs - 1
