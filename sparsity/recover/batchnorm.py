"""Re-estimation of BatchNorm statistics: no labels, no gradients, seconds."""

import torch
from torch import fx, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import refresh
from sparsity.networks.layers import BatchNorm


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, calibration: Calibration, copy: fx.GraphModule) -> None:
    """Replace, in place, the running statistics of every BatchNorm of `model` by those of the calibration images.

    Pruning changes the inputs of each BatchNorm, whose statistics are still those of the dense network. The new running
    mean and variance are the averages of the batches' means and unbiased variances, each batch weighed by its images;
    as in training, every layer sees activations that were normalised by their own batch. `copy` is an unfolded
    inference copy of the same structure, which is overwritten. Weights and masks stay as they are.
    (As in G. Yang et al., arXiv 1903.12174, and as OBC does after pruning, arXiv 2208.11580.)
    """
    refresh(copy, model)
    norms = {layer: model.get_submodule(name) for name, layer in copy.named_modules() if isinstance(layer, BatchNorm)}
    norms = {layer: target for layer, target in norms.items() if layer.track_running_stats}
    for layer, target in norms.items():
        layer.train().momentum = 1.0  # the running statistics are then those of the last batch alone
        target.running_mean.zero_()
        target.running_var.zero_()
    for images, _ in calibration.batches():
        copy(images)
        share = len(images) / len(calibration)
        for layer, target in norms.items():
            target.running_mean += share * layer.running_mean
            target.running_var += share * layer.running_var
    copy.eval()
