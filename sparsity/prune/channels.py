"""Scores of whole filters and of coupled channels, and masks on the latter.

A new criterion is a function from a network, its `Coupling` and calibration images to scores, with an entry in
FILTER_CRITERIA here and in `system/methods.py`.
"""

import math

import torch
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import BatchNorm, Layer
from sparsity.prune.coupling import Coupling, couple
from sparsity.prune.masks import apply_masks
from sparsity.prune.moments import input_moments, spread

Scores = dict[str, Tensor]  # of the filters of a convolution, or of the units of a group, by its name


@torch.no_grad()
def mask_channels(model: nn.Module, coupling: Coupling, gone: Tensor) -> None:
    """Prune units of channels, in place; `gone` holds a bool for each unit of `coupling`.

    Filters that make them, and the weights of all layers that read them, are masked through `torch.nn.utils.prune`;
    biases and the weight and bias of BatchNorm become zero.
    """
    for name, (outputs, inputs) in coupling.channels(gone).items():
        layer = model.get_submodule(name)
        if isinstance(layer, Layer):
            mask = torch.ones(layer.weight.shape, dtype=torch.bool)
            mask[outputs] = False
            if inputs is not None:
                mask[:, inputs] = False
            apply_masks({name: layer}, {name: mask})
        for part in ("weight", "bias") if isinstance(layer, BatchNorm) else ("bias",):
            value = getattr(layer, part, None)
            if value is not None:
                value[outputs.to(value.device)] = 0


def filter_l1(model: nn.Module, coupling: Coupling, calibration: Calibration | None) -> Tensor:
    """The L1 norms of the weights that go with a unit, each over the mean of its layer, averaged.

    These are its filters, BatchNorm weights, and the weights on its channels in each layer that reads them.
    """
    sums, counts = torch.zeros(2, coupling.units + 1)  # the last one stands for -1, channels that stay
    weights = {name: getattr(model.get_submodule(name), "weight", None) for name in coupling.outputs}
    sides = [(coupling.outputs[name], weight) for name, weight in weights.items() if weight is not None]
    sides += [(numbers, weights[name].transpose(0, 1)) for name, numbers in coupling.inputs.items()]
    for numbers, weight in sides:
        norms = weight.abs().reshape(len(weight), -1).sum(dim=1).cpu()
        sums.index_add_(0, numbers % len(sums), norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny))
        counts.index_add_(0, numbers % len(sums), torch.ones(len(numbers)))
    return sums[:-1] / counts[:-1]


def filter_activation(model: nn.Module, coupling: Coupling, calibration: Calibration | None) -> Tensor:
    """The share of the energy of all inputs of a layer, times its squared weights, summed over the layers that read.

    That is what the layers' outputs lose on the calibration images, were the inputs uncorrelated.
    """
    network = inference_copy(model, calibration.dtype, fold=False)
    names = [name for name, numbers in coupling.inputs.items() if (numbers >= 0).any()]
    moments, sums = input_moments(network, names, calibration, diagonal=True), torch.zeros(coupling.units + 1)
    for name, moment in moments.items():
        layer = model.get_submodule(name)
        energy = (layer.weight.square() * spread(moment, layer)).transpose(0, 1).flatten(1).sum(dim=1).cpu()
        share = energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
        sums.index_add_(0, coupling.inputs[name] % len(sums), share)
    return sums[:-1]


# Each gives a score for every unit of coupled channels, higher stays.
FILTER_CRITERIA = {"filter_l1": filter_l1, "filter_activation": filter_activation}


@torch.no_grad()
def inner_scores(name: str, model: nn.Module, inner: list[str], calibration: Calibration | None) -> Scores:
    """The scores by criterion `name` of the filters of inner convolutions, whose channels nothing else shares."""
    if name == "filter_l1":  # L1 norms (Li et al., arXiv 1608.08710) as they are, so that `global` compares them
        return {conv: model.get_submodule(conv).weight.abs().flatten(1).sum(dim=1) for conv in inner}
    coupling = couple(model)
    scores = FILTER_CRITERIA[name](model, coupling, calibration)
    return {conv: scores[coupling.outputs[conv]] for conv in inner}


@torch.no_grad()
def group_scores(name: str, model: nn.Module, coupling: Coupling, calibration: Calibration | None) -> Scores:
    """The scores by criterion `name` of the units of every group."""
    scores = FILTER_CRITERIA[name](model, coupling, calibration)
    return {group: scores[units] for group, units in coupling.groups.items()}


def rounded(keep: dict[str, Tensor], scores: Scores, multiple: int) -> dict[str, Tensor]:
    """Masks of filters (True stays) that keep a multiple of some number, the nearest one, of the best scores.

    At least that number stays, or all where there are no more. A mask that keeps all, or nothing, stays as it is.
    """
    result = dict(keep)
    for name, mask in keep.items():
        kept = int(mask.sum())
        if kept % multiple and kept < len(mask):
            best = scores[name].argsort(descending=True, stable=True)
            result[name] = torch.zeros_like(mask)
            result[name][best[: max(multiple, multiple * math.floor(kept / multiple + 0.5))]] = True
    return result
