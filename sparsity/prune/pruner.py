"""From a network and a level to a masked copy of it: scores, allocation, masks."""

import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import unmasked_state
from sparsity.prune.allocation import Allocator
from sparsity.prune.budget import filters_share, ranks, weights_share
from sparsity.prune.channels import group_scores, inner_scores, mask_channels, rounded
from sparsity.prune.coupling import Coupling, couple
from sparsity.prune.criteria import SQUARED, Evidence, score
from sparsity.prune.filters import inner_convs, mask_filters
from sparsity.prune.groups import group_masks
from sparsity.prune.masks import apply_masks, mask_twins, prune_l1_uniform
from sparsity.system.methods import ONE_LAYER, Curve

BUDGET_STEP = 0.5  # points of multiply-adds by which a level is missed before `notes` tell it


@dataclass(eq=False)
class Pruner:
    """Prunes copies of one unmasked `network`, whose prunable layers are `layers`, to any level.

    Scores are computed once for all curves of a criterion that follow each other, and sorted once for all levels of a
    curve. `seed` draws random scores; pass another one for each checkpoint. With `nested`, weights that are zero
    already go before all others. With `couple`, criteria of filters remove coupled channels; of each convolution, or
    group of coupled channels, a multiple of `multiple` stays. `costs` holds the multiply-adds of one weight of each
    layer where a level is a share of those, None where it is one of the weights.
    """

    network: nn.Module
    layers: list[str]
    calibration: Calibration | None = None
    seed: int = 0
    nested: bool = False
    couple: bool = False
    multiple: int = 1
    costs: dict[str, int] | None = None

    def __post_init__(self):
        self._curve = ("", "")  # criterion and allocation of those that are held:
        self._scores, self._notes, self._allocator = {}, [], None
        self._filter_scores: dict[str, dict[str, Tensor]] = {}  # of criteria of filters

    @cached_property
    def coupling(self) -> Coupling:
        """The coupled channels that can be removed."""
        return couple(self.network, self.layers)

    def continued(self, model: nn.Module) -> "Pruner":
        """The pruner of the next level of an iterative curve: its network is a plain copy of `model`, masked or not."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(unmasked_state(model))
        return replace(self, network=network.eval(), nested=True)

    def prune(self, curve: Curve, level: float) -> tuple[nn.Module, list[str]]:
        """A copy of the network masked at `level` percent, and notes for the user.

        Its weights are its own, unless the curve recovers nothing: they are then shared with `network`.
        """
        if curve.prunes_filters:
            return self._prune_filters(curve, level)
        shared = {id(weight): weight for weight in self.network.parameters()} if curve.recover == "none" else {}
        model = copy.deepcopy(self.network, shared)
        names, allocation = _scope(curve, self.layers)
        layers = {name: model.get_submodule(name) for name in names}
        on_cpu = next(self.network.parameters()).device.type == "cpu"
        if curve.pattern:
            masks = group_masks(layers, self._scores_by(curve.criterion), *curve.pattern)
            left, size = [name for name in layers if name not in masks], curve.pattern[1]
            told = [f"dense, because their inputs are no multiple of {size}: {', '.join(left)}"] * bool(left)
            layers = {name: layers[name] for name in masks}
        else:
            allocator, sparsity = self._allocate(curve), level / 100
            if self.costs and allocation != "uniform":  # which removes the same share of both
                sparsity = weights_share(allocator, self.costs, sparsity)
            masks, swapped = allocator.masks(sparsity)
            told = _swap_notes(swapped, "weight")
        if (curve.criterion, allocation) == ("l1", "uniform") and on_cpu:
            # Of equal magnitudes at the threshold the study's call masks others; on a GPU it depends on the kernels.
            tied = allocator.tied(sparsity)
            prune_l1_uniform({name: layers[name] for name in tied}, sparsity)
            masks = {name: mask for name, mask in masks.items() if name not in tied}
        apply_masks({name: layers[name] for name in masks}, masks)
        mask_twins(model, layers)
        return model, [*self._notes, *told]

    def _prune_filters(self, curve: Curve, level: float) -> tuple[nn.Module, list[str]]:
        """A copy of the network without `level` percent of its inner filters, or of its coupled channels."""
        scores = self._score_filters(curve.criterion)
        names, allocation = _scope(curve, list(scores))
        # A few thousand filters are sorted in no time; filters that are gone already have the lowest score.
        scores = {name: scores[name] for name in names}
        if self.costs and allocation == "uniform":  # filter by filter, not the layers of one width in step
            allocation, scores = "global", ranks(scores)
        allocator, share, notes = Allocator(allocation, scores), level / 100, []
        if self.costs:
            filters = sum(map(len, allocator.ascending))
            share, met = filters_share(lambda gone: self._without(allocator, gone, True)[0], filters, self.costs, share)
            if share == 1 and 100 * met < level:
                notes = [f"all filters together are {100 * met:.1f} % of the multiply-adds"]
            elif abs(100 * met - level) > BUDGET_STEP:
                notes = [f"{100 * met:.1f} % of the multiply-adds is the nearest that filters come to"]
        model, more = self._without(allocator, share)
        return model, notes + more

    def _without(self, allocator: Allocator, share: float, light: bool = False) -> tuple[nn.Module, list[str]]:
        """A copy of the network without this share of filters or channels; a `light` one shares weights with it."""
        weights = [weight for weight in self.network.parameters() if weight.dim() > 1] if light else []
        model = copy.deepcopy(self.network, {id(weight): weight for weight in weights})
        keep, swapped = allocator.masks(share)
        keep = rounded(keep, allocator.scores, self.multiple)
        if self.couple:
            gone = torch.zeros(self.coupling.units, dtype=torch.bool)
            for name, kept in keep.items():
                gone[self.coupling.groups[name]] = ~kept
            mask_channels(model, self.coupling, gone)
            return model, _swap_notes(swapped, "channel")
        more = mask_filters(model, keep)
        notes = _swap_notes(swapped, "filter")
        return model, notes + [f"filters of blocks of which nothing is left went too: {more}"] * (more > 0)

    def _score_filters(self, criterion: str) -> dict[str, Tensor]:
        """The scores of all channels of each group or, without `couple`, of the filters of each inner convolution."""
        if criterion not in self._filter_scores:
            if self.couple:
                found = group_scores(criterion, self.network, self.coupling, self.calibration)
            else:
                inner = [name for name in inner_convs(self.network) if name in self.layers]
                found = inner_scores(criterion, self.network, inner, self.calibration)
            self._filter_scores[criterion] = found
        return self._filter_scores[criterion]

    def _allocate(self, curve: Curve) -> Allocator:
        """The allocation of a curve's scores; that of the last curve is freed first, because it fills memory."""
        everything = self._scores_by(curve.criterion)
        if self._curve != curve[:2]:
            self._allocator = None
            names, allocation = _scope(curve, self.layers)
            scores = {name: everything[name] for name in names}
            self._allocator = Allocator(allocation, scores, squared=curve.criterion in SQUARED)
            self._curve = curve[:2]
        return self._allocator

    def _scores_by(self, criterion: str) -> dict[str, Tensor]:
        """The scores of all weights by a criterion; those of the last one are freed first, because they fill memory."""
        if self._curve[0] != criterion:
            self._scores, self._allocator = {}, None
            self._scores, self._curve = self._score(criterion), (criterion, "")
        return self._scores

    def _score(self, criterion: str) -> dict[str, Tensor]:
        """The scores of all weights by a criterion."""
        layers = {name: self.network.get_submodule(name) for name in self.layers}
        evidence = Evidence(self.network, layers, self.calibration, self.seed)
        scores, self._notes = score(criterion, evidence), evidence.notes
        if self.nested:
            lowest = min(0.0, *(float(values.min()) for values in scores.values()))
            for name, layer in layers.items():
                above = (scores[name] - lowest).clamp_min(torch.finfo(torch.float32).tiny)
                scores[name] = torch.where(layer.weight.detach() == 0, 0.0, above)
        return scores


def _scope(curve: Curve, names: list[str]) -> tuple[list[str], str]:
    """The layers that a curve prunes, of `names`, and the allocation among them."""
    if curve.allocation.startswith(ONE_LAYER):
        return [curve.allocation.removeprefix(ONE_LAYER)], "uniform"
    return names, curve.allocation


def _swap_notes(swapped: int, unit: str) -> list[str]:
    return [f"{swapped} {unit}{'s' * (swapped > 1)} swapped so that no layer is empty"] * (swapped > 0)
