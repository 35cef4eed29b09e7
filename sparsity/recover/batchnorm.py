"""Statistics of BatchNorm: estimated again after pruning, and the augmentation that those of training tell."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsity.data.calibration import Augmentation, Calibration
from sparsity.networks.inference import refresh
from sparsity.networks.layers import BatchNorm

Statistics = dict[str, tuple[Tensor, Tensor]]  # name of a BatchNorm -> mean and variance of each of its channels
EPS = 1e-5  # BatchNorm's by default, added to a variance


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, calibration: Calibration, copy: nn.Module) -> int:
    """Replace, in place, the running statistics of every BatchNorm of `model` by those of the calibration images.

    Pruning changes the inputs of each BatchNorm, whose statistics are still those of the dense network; the new ones
    are `batch_statistics`. `copy` is an unfolded inference copy of the same structure, which is overwritten. Weights
    and masks stay as they are.
    (As in G. Yang et al., arXiv 1903.12174, and as OBC does after pruning, arXiv 2208.11580.) Returns how many there
    are that keep such statistics.
    """
    if not _with_statistics(copy):
        return 0
    refresh(copy, model)
    statistics = batch_statistics(copy, calibration)
    for name, (mean, variance) in statistics.items():
        layer = model.get_submodule(name)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return len(statistics)


@torch.no_grad()
def batch_statistics(network: nn.Module, calibration: Calibration) -> Statistics:
    """The statistics of the calibration images at each BatchNorm of `network`, an unfolded inference copy.

    They are the averages of the batches' means and unbiased variances, each batch weighted by its images; as in
    training, every layer sees activations that were normalised by their own batch. The running statistics of
    `network` are overwritten.
    """
    layers = _with_statistics(network)
    averages = {
        name: (torch.zeros_like(layer.running_mean), torch.zeros_like(layer.running_var))
        for name, layer in layers.items()
    }
    for layer in layers.values():
        layer.train().momentum = 1.0  # the running statistics are then those of the last batch alone
    for images, _ in calibration.batches():
        network(images)
        share = len(images) / len(calibration)
        for name, layer in layers.items():
            averages[name][0].add_(share * layer.running_mean)
            averages[name][1].add_(share * layer.running_var)
    network.eval()
    return averages


def augmentation_distances(network: nn.Module, calibrations: Iterable[Calibration]) -> dict[Augmentation, float]:
    """Augmentation -> how far the statistics of images augmented that way are from the running ones of `network`.

    The augmentation of its training, or one that no statistic tells from it, is nearest; no label is read. Each of
    `calibrations` holds images augmented another way. `network` is an unfolded inference copy; its running statistics
    are overwritten. Empty for a network without them.
    """
    layers = _with_statistics(network)
    stored = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()}
    return {
        calibration.augmentation: statistics_distance(stored, batch_statistics(network, calibration))
        for calibration in (calibrations if stored else ())
    }


def statistics_distance(one: Statistics, other: Statistics) -> float:
    """How far statistics of the same layers are apart: 0 if they are equal, and the same in both directions.

    The mean over all layers of the mean over their channels of KL(p, q) + KL(q, p), p and q normal distributions of
    these means and variances, with EPS added to the variances.
    """
    distances = []
    for name, (mean, variance) in one.items():
        first, second = variance + EPS, other[name][1] + EPS
        ratio, square = first / second, (mean - other[name][0]).square()
        distances.append(((ratio + 1 / ratio + square / first + square / second) / 2 - 1).mean())
    return float(torch.stack(distances).mean())


def _with_statistics(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer of every BatchNorm that keeps running statistics."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.track_running_stats}
