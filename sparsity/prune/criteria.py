"""Criteria: functions that score every prunable weight; weights of the lowest scores are masked first.

A new criterion is a function from `Evidence` to `Scores`, with an entry in CRITERIA here and in `system/methods.py`
(`add_criterion` makes both). Those of whole filters are in `prune/channels.py`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import Layer, memory_format, positions_per_image
from sparsity.prune.moments import exact_products, input_moments, spread, unfold_problem
from sparsity.system import methods
from sparsity.system.errors import UserError
from sparsity.system.machine import generator

DAMPING = 0.01  # added to the diagonal of a second moment, as a share of its mean
DAMPING_STEPS = 6  # each ten times the one before, as far as an inverse takes them
GRADIENT_BATCH = 32  # images whose activations are held at once; the scores do not depend on it


@dataclass(frozen=True)
class Evidence:
    """The inputs of a criterion.

    `model` is the network to be pruned (in an iterative sweep that of the level before), without masks, in float32 and
    the default memory format; `layers` are its prunable layers; `calibration` is on the same device. A criterion with
    something to report appends a line to `notes`.
    """

    model: nn.Module
    layers: dict[str, Layer]
    calibration: Calibration | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def moments(self, diagonal: bool = False) -> dict[str, Tensor]:
        """Name -> second moment [d, d] (float32) of a layer's inputs as from `input_rows`, or its diagonal [d].

        Layers that `unfold_problem` names have none.
        """
        network = inference_copy(self.model, self.calibration.dtype, fold=False)
        names = [name for name, layer in self.layers.items() if not unfold_problem(layer)]
        return input_moments(network, names, self.calibration, diagonal)


Scores = dict[str, Tensor]  # layer -> float32, of the weight's shape and on its device
Criterion = Callable[[Evidence], Scores]


def l1(evidence: Evidence) -> Scores:
    """Magnitude."""
    return {name: layer.weight.abs() for name, layer in evidence.layers.items()}


def random(evidence: Evidence) -> Scores:
    """Uniform noise from the seed and the layer's number, the same on every device."""
    return {
        name: torch.rand(layer.weight.shape, generator=generator(evidence.seed, number)).to(layer.weight.device)
        for number, (name, layer) in enumerate(evidence.layers.items())
    }


def activation(evidence: Evidence) -> Scores:
    """Magnitude times the norm of the weight's input over all calibration images and positions.

    Wanda (arXiv 2306.11695), carried over to convolutions by unfolded inputs and, unlike there, compared within a
    layer and not within a row. From a subset of positions, the norm over all is estimated by the mean square.
    """
    images, _ = next(evidence.calibration.batches(torch.float32))
    positions = positions_per_image(evidence.model, images[:1])
    count = len(evidence.calibration)
    moments = evidence.moments(diagonal=True)
    return _scale(evidence, {name: (mean * count * positions[name]).sqrt() for name, mean in moments.items()})


def _scale(evidence: Evidence, factors: dict[str, Tensor], squared: bool = False) -> Scores:
    """Magnitudes, or their squares, times the factor of each weight's input, [d] of a layer or [g, d] in groups.

    A layer without factors, because its inputs cannot be unfolded, gets the mean of all others, so that its weights
    compare by magnitude; which is noted.
    """
    without = [name for name in evidence.layers if name not in factors]
    usual = 1.0
    if without:
        usual = sum(float(values.mean()) for values in factors.values()) / len(factors) if factors else 1.0
        evidence.notes.append(f"scored by magnitude, not by inputs: {', '.join(without)}")
    scores = {}
    for name, layer in evidence.layers.items():
        factor = spread(factors[name], layer) if name in factors else usual
        magnitude = layer.weight.abs()
        scores[name] = (magnitude.square() if squared else magnitude) * factor
    return scores


@torch.enable_grad()
def gradient(evidence: Evidence) -> Scores:
    """First-order Taylor (arXiv 1906.10771): |weight times mean gradient of the loss|. Reads the labels.

    The mean is over all calibration images, in eval mode, so that batches do not matter; sums are in float32.
    """
    model, calibration = copy.deepcopy(evidence.model).eval().requires_grad_(False), evidence.calibration
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in evidence.layers]
    sums, layout = [torch.zeros_like(weight) for weight in weights], memory_format(model)
    for images, labels in calibration.batches(torch.float32):
        for part, truth in zip(images.split(GRADIENT_BATCH), labels.split(GRADIENT_BATCH), strict=True):
            with torch.autocast(images.device.type, calibration.dtype, enabled=calibration.dtype != torch.float32):
                logits = model(part.contiguous(memory_format=layout))
            loss = F.cross_entropy(logits.float(), truth, reduction="sum")
            for total, slope in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += slope
    layers = zip(evidence.layers, weights, sums, strict=True)
    return {name: (weight * total / len(calibration)).abs() for name, weight, total in layers}


def obs(evidence: Evidence) -> Scores:
    """Squared error of a layer's outputs when one weight is removed and the others are refitted: w^2 / [H^-1]_jj.

    H is the damped second moment of the layer's inputs (Optimal Brain Surgeon by layer, arXiv 2208.11580). A weight
    whose input is always zero scores zero.
    """
    moments, prices = evidence.moments(), {}
    for name in list(moments):
        moment = moments.pop(name)  # a large network holds half a gigabyte of them
        dead = moment.diagonal(dim1=-2, dim2=-1) == 0
        groups = moment if moment.dim() == 3 else [moment]
        inverses, dampings = zip(*(_inverse_diagonal(group, name) for group in groups), strict=True)
        if max(dampings) > DAMPING:
            told = f"{name}: the inputs' second moment could only be inverted with {max(dampings):g} damping"
            evidence.notes.append(told)
        prices[name] = torch.stack(inverses).view_as(dead).reciprocal().masked_fill(dead, 0)
    return _scale(evidence, prices, squared=True)


CRITERIA = {"l1": l1, "random": random, "activation": activation, "gradient": gradient, "obs": obs}
SQUARED = {"obs"}  # their scores are squares, which LAMP takes as they are


def add_criterion(name: str, function: Criterion, reads: str = "") -> None:
    """Register a criterion for `--criterion name`; it `reads` of the training split "", "images" or "labels" too."""
    CRITERIA[name] = function
    methods.CRITERIA[name] = reads


@torch.no_grad()
def score(name: str, evidence: Evidence) -> Scores:
    """The scores of criterion `name`: layer -> finite float32 of the weight's shape, contiguous, without gradients.

    Raises UserError where a layer's scores are not finite, ValueError where a criterion gave another shape.
    """
    scores = CRITERIA[name](evidence)
    for layer, module in evidence.layers.items():
        if layer not in scores or scores[layer].shape != module.weight.shape:
            raise ValueError(f"criterion {name} must give every prunable layer scores of the shape of its weight")
        if not scores[layer].isfinite().all():
            raise UserError(f"criterion {name} gives scores of {layer} that are not finite; look at the checkpoint")
    return {layer: scores[layer].detach().float().contiguous() for layer in evidence.layers}


@exact_products()
def _inverse_diagonal(moment: Tensor, name: str) -> tuple[Tensor, float]:
    """Diagonal [d] of the inverse of a second moment [d, d], which is damped in place; and the damping used."""
    plain, mean = moment.diagonal().clone(), moment.diagonal().mean()
    for damping in (DAMPING * 10**step for step in range(DAMPING_STEPS)):
        moment.diagonal().copy_(plain + damping * torch.where(mean > 0, mean, 1))  # without any input, any will do
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            # H = L L^T, so [H^-1]_jj is the square of column j of L^-1: positive whatever the rounding.
            identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            return torch.linalg.solve_triangular(factor, identity, upper=False).square_().sum(dim=0), damping
    raise UserError(f"the second moment of the inputs of {name} cannot be inverted; look at the checkpoint")
