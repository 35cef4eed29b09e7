"""Re-estimation of BatchNorm statistics: no labels, no gradients, seconds."""

import torch
from torch import fx, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import refresh
from sparsity.networks.layers import BatchNorm


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, calibration: Calibration, copy: fx.GraphModule) -> None:
    """Replace, in place, the running statistics of every BatchNorm of `model` by those of the calibration images.

    Pruning changes what each BatchNorm receives, while it goes on to normalise by what the dense network sent it. The
    new running mean and variance are the averages of the batches' means and unbiased variances, each batch weighed by
    its images; as in training, every layer sees activations that were normalised by their own batch. `copy` is an
    unfolded inference copy of the same structure, which is overwritten. Weights and masks stay as they are.
    (As in G. Yang et al., arXiv 1903.12174, and as OBC does after pruning, arXiv 2208.11580.)
    """
    refresh(copy, model)
    norms = {name: layer for name, layer in copy.named_modules() if has_statistics(layer)}
    means = {name: torch.zeros_like(layer.running_mean) for name, layer in norms.items()}
    variances = {name: torch.zeros_like(layer.running_var) for name, layer in norms.items()}
    momenta = {name: layer.momentum for name, layer in norms.items()}
    try:
        for layer in norms.values():
            layer.train()
            layer.momentum = 1.0  # the running statistics are then those of the last batch alone
        for images, _ in calibration.batches():
            copy(images)
            for name, layer in norms.items():
                share = len(images) / len(calibration)
                means[name] += share * layer.running_mean
                variances[name] += share * layer.running_var
    finally:
        for name, layer in norms.items():
            layer.eval()
            layer.momentum = momenta[name]
    for name in norms:
        target = model.get_submodule(name)
        target.running_mean.copy_(means[name])
        target.running_var.copy_(variances[name])


def has_statistics(layer: nn.Module) -> bool:
    """Whether a module normalises by running statistics."""
    return isinstance(layer, BatchNorm) and layer.track_running_stats
