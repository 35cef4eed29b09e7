"""What a weight is worth: CRITERIA, name -> function that scores every prunable weight, higher stays.

To add one: a function of `Evidence` and an entry in the dict; and in NEEDS_CALIBRATION, READS_LABELS or SQUARED where
that is so. FILTER_CRITERIA score whole filters instead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import Layer, memory_format, positions_per_image
from sparsity.prune.moments import input_moments
from sparsity.system.errors import UserError
from sparsity.system.machine import generator

DAMPING = 0.01  # added to the diagonal of a second moment, as a share of its mean


DAMPING_STEPS = 6  # each ten times the one before


GRADIENT_BATCH = 32  # images whose activations are held at once; the scores do not depend on it


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    `model` is the network to be pruned (in an iterative sweep that of the level before), without masks, in float32 and
    the default memory format; `layers` are its prunable
    layers; `calibration` is on the same device. A criterion that has something to report appends a line to `notes`.
    """

    model: nn.Module
    layers: dict[str, Layer]
    calibration: Calibration | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def moments(self, diagonal: bool = False) -> dict[str, Tensor]:
        """Name -> second moment of a layer's inputs, [d, d] float32, or its diagonal [d]; made anew by each call.

        For a convolution d is C * kh * kw, in the order of its weight.
        """
        network = inference_copy(self.model, self.calibration.dtype, fold=False)
        return input_moments(network, list(self.layers), self.calibration, diagonal)


Scores = dict[str, Tensor]  # layer -> float32, of the weight's shape and on its device


Criterion = Callable[[Evidence], Scores]


def l1(evidence: Evidence) -> Scores:
    """Magnitude."""
    return {name: layer.weight.abs() for name, layer in evidence.layers.items()}


def random(evidence: Evidence) -> Scores:
    """Uniform noise of the seed and the layer's number, the same on every device."""
    return {
        name: torch.rand(layer.weight.shape, generator=generator(evidence.seed, number)).to(layer.weight.device)
        for number, (name, layer) in enumerate(evidence.layers.items())
    }


def activation(evidence: Evidence) -> Scores:
    """Magnitude times the norm of the weight's input over all calibration images and positions.

    Wanda (arXiv 2306.11695), carried over to convolutions by unfolded inputs and, unlike there, compared within a
    layer and not within a row. Where a subset of positions stands for all, their mean square does too.
    """
    images, _ = next(evidence.calibration.batches(torch.float32))
    positions = positions_per_image(evidence.model, images[:1])
    count = len(evidence.calibration)
    norms = {name: (mean * count * positions[name]).sqrt() for name, mean in evidence.moments(diagonal=True).items()}
    return {
        name: layer.weight.abs() * norms[name].view(layer.weight[:1].shape) for name, layer in evidence.layers.items()
    }


def gradient(evidence: Evidence) -> Scores:
    """First-order Taylor (arXiv 1906.10771): |weight times mean gradient of the loss|. Reads the labels.

    The mean is over all calibration images, in eval mode, so that batches do not matter; sums are in float32.
    """
    calibration, weights = evidence.calibration, [layer.weight for layer in evidence.layers.values()]
    sums, layout = [torch.zeros_like(weight) for weight in weights], memory_format(evidence.model)
    with _differentiable(evidence.model, weights):
        for images, labels in calibration.batches(torch.float32):
            for part, truth in zip(images.split(GRADIENT_BATCH), labels.split(GRADIENT_BATCH), strict=True):
                reduced = calibration.dtype != torch.float32
                with torch.autocast(images.device.type, calibration.dtype, enabled=reduced):
                    logits = evidence.model(part.contiguous(memory_format=layout))
                loss = F.cross_entropy(logits.float(), truth, reduction="sum")
                for total, slope in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                    total += slope
    return {
        name: (weight * total / len(calibration)).abs()
        for name, weight, total in zip(evidence.layers, weights, sums, strict=True)
    }


def obs(evidence: Evidence) -> Scores:
    """Error of a layer's outputs, a position, when one weight goes and the others make up for it: w^2 / [H^-1]_jj.

    H is the second moment of the layer's inputs (Optimal Brain Surgeon by layer, arXiv 2208.11580), damped. A weight
    whose input is always zero scores zero.
    """
    moments, scores = evidence.moments(), {}
    for name, layer in evidence.layers.items():
        moment = moments.pop(name)  # a large network holds half a gigabyte of them
        dead = moment.diagonal() == 0
        inverse, damping = _inverse_diagonal(moment, name)
        if damping > DAMPING:
            evidence.notes.append(f"{name}: the inputs' second moment could only be inverted with {damping:g} damping")
        price = inverse.reciprocal().masked_fill(dead, 0)
        scores[name] = layer.weight.square() * price.view(layer.weight[:1].shape)
    return scores


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "random": random,
    "activation": activation,
    "gradient": gradient,
    "obs": obs,
}


def filter_l1(convs: dict[str, nn.Conv2d]) -> Scores:
    """L1 norm of each filter (Li et al., arXiv 1608.08710): name -> [filters]."""
    return {name: conv.weight.abs().flatten(1).sum(dim=1) for name, conv in convs.items()}


# Name -> function of the convolutions whose filters may go.
FILTER_CRITERIA: dict[str, Callable[[dict[str, nn.Conv2d]], Scores]] = {"filter_l1": filter_l1}


FILTER_ALLOCATIONS = ("uniform", "global")  # the others are made for single weights


NEEDS_CALIBRATION = {"activation", "gradient", "obs"}


READS_LABELS = {"gradient"}


SQUARED = {"obs"}  # scores that are squares by nature, so that LAMP takes them as they are


@torch.no_grad()
def score(name: str, evidence: Evidence) -> Scores:
    """The scores of criterion `name`: layer -> finite float32 of the weight's shape, contiguous, without gradients.

    Raises UserError where a layer's scores are not finite, ValueError where a criterion left a layer or a shape out or
    needs calibration images that are not there.
    """
    if name in NEEDS_CALIBRATION and evidence.calibration is None:
        raise ValueError(f"criterion {name} needs calibration images")
    scores = CRITERIA[name](evidence)
    shapes = {layer: module.weight.shape for layer, module in evidence.layers.items()}
    if {layer: values.shape for layer, values in scores.items()} != shapes:
        raise ValueError(f"criterion {name} must give every prunable layer scores of the shape of its weight")
    for layer, values in scores.items():
        if not values.isfinite().all():
            raise UserError(f"criterion {name} gives scores of {layer} that are not finite; look at the checkpoint")
    return {layer: scores[layer].detach().float().contiguous() for layer in shapes}


@contextmanager
def _differentiable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Eval mode and gradients for `weights` alone inside the block, everything as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def _inverse_diagonal(moment: Tensor, name: str) -> tuple[Tensor, float]:
    """Diagonal [d] of the inverse of a second moment [d, d], which is damped in place; and the damping it took."""
    diagonal = moment.diagonal()
    plain, mean = diagonal.clone(), diagonal.mean()
    mean = torch.where(mean > 0, mean, 1)  # where nothing ever arrives, any damping will do
    for step in range(DAMPING_STEPS):
        damping = DAMPING * 10**step
        diagonal.copy_(plain + damping * mean)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            # H = L L^T, so [H^-1]_jj is the square of column j of L^-1: positive whatever the rounding.
            identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            return torch.linalg.solve_triangular(factor, identity, upper=False).square_().sum(dim=0), damping
    raise UserError(f"the second moment of the inputs of {name} cannot be inverted; look at the checkpoint")
