"""From a network and a level to a masked copy of it: scores, allocation, masks."""

import copy

import torch
from torch import Tensor, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import Layer, unmasked_state
from sparsity.prune.allocation import Allocator, Ranking, prepare, rank
from sparsity.prune.criteria import FILTER_CRITERIA, SQUARED, Evidence, score
from sparsity.prune.filters import inner_convs, mask_filters
from sparsity.prune.masks import apply_masks, prune_l1_uniform
from sparsity.results.rows import ONE_LAYER, Curve


class Pruner:
    """Prunes copies of one network to any level; what does not depend on the level is computed once.

    `network` is unmasked, `layers` names its prunable layers. With `nested`, weights that are zero already go before
    all others, so that the masks of an earlier level are part of the next one's.
    """

    def __init__(
        self, network: nn.Module, layers: list[str], calibration: Calibration | None, seed: int, nested: bool = False
    ):
        self.network, self.layers = network, layers
        self.calibration, self.seed, self.nested = calibration, seed, nested
        self._scores: dict[str, tuple[dict[str, Tensor], list[str]]] = {}
        self._rankings: dict[tuple[str, ...], Ranking] = {}
        self._allocators: dict[tuple[str, ...], Allocator] = {}

    def prune(self, curve: Curve, level: float) -> tuple[nn.Module, list[str]]:
        """A masked copy of the network at `level` percent, with weights of its own, and what has to be reported."""
        criterion, allocation, recovery = curve
        if criterion in FILTER_CRITERIA:
            return self._prune_filters(criterion, allocation, level)
        # Without recovery nobody changes the weights, and the copy shares them.
        shared = {id(weight): weight for weight in self.network.parameters()} if recovery == "none" else {}
        model = copy.deepcopy(self.network, shared)
        names = self.layers
        if allocation.startswith(ONE_LAYER):
            names, allocation = [allocation.removeprefix(ONE_LAYER)], "uniform"
        layers = {name: model.get_submodule(name) for name in names}
        if (criterion, allocation) == ("l1", "uniform") and selects_by_call(layers):
            prune_l1_uniform(layers, level / 100)
            return model, []
        masks, swapped = self._allocator(criterion, allocation, names).masks(level / 100)
        apply_masks(layers, masks)
        notes = list(self._scores[criterion][1])
        if swapped:
            weights = "1 weight" if swapped == 1 else f"{swapped} weights"
            notes.append(f"{weights} swapped so that no layer is empty")
        return model, notes

    def _prune_filters(self, criterion: str, allocation: str, level: float) -> tuple[nn.Module, list[str]]:
        """A copy of the network without `level` percent of the filters of its inner convolutions."""
        model = copy.deepcopy(self.network)
        names = [name for name in inner_convs(model) if name in self.layers]
        if allocation.startswith(ONE_LAYER):
            names, allocation = [allocation.removeprefix(ONE_LAYER)], "uniform"
        convs = {name: model.get_submodule(name) for name in names}
        # A level of a few thousand filters is ranked in no time; filters that are gone already have the lowest score.
        with torch.no_grad():
            ranking = rank(FILTER_CRITERIA[criterion](convs))
        keep, swapped = prepare(allocation, ranking).masks(level / 100)
        more = mask_filters(model, keep)
        plural = "s" * (swapped > 1)
        notes = [f"{swapped} filter{plural} swapped so that no layer is empty"] * (swapped > 0)
        return model, notes + [f"filters of blocks of which nothing is left went too: {more}"] * (more > 0)

    def _allocator(self, criterion: str, allocation: str, names: list[str]) -> Allocator:
        key = (criterion, allocation, *names)
        if key not in self._allocators:
            self._allocators = {}  # freed before its successor is made: what lamp keeps is twice the scores
            self._allocators = {key: prepare(allocation, self._ranking(criterion, names))}
        return self._allocators[key]

    def _ranking(self, criterion: str, names: list[str]) -> Ranking:
        """The sorted scores, which all allocations of a criterion share."""
        key = (criterion, *names)
        if key not in self._rankings:
            self._rankings = {}  # those of the last criterion are not needed any more
            if criterion not in self._scores:
                self._scores = {criterion: self._score(criterion)}
            scores, _ = self._scores[criterion]
            self._rankings = {key: rank({name: scores[name] for name in names}, squared=criterion in SQUARED)}
        return self._rankings[key]

    def _score(self, criterion: str) -> tuple[dict[str, Tensor], list[str]]:
        layers: dict[str, Layer] = {name: self.network.get_submodule(name) for name in self.layers}
        notes: list[str] = []
        scores = score(criterion, Evidence(self.network, layers, self.calibration, self.seed, notes))
        if self.nested:
            lowest = min(float(values.min()) for values in scores.values())
            tiny = torch.finfo(torch.float32).tiny
            for name, layer in layers.items():
                above = (scores[name] - min(lowest, 0.0)).clamp_min(tiny)
                scores[name] = torch.where(layer.weight.detach() == 0, 0.0, above)
        return scores, notes


def selects_by_call(layers: dict[str, Layer]) -> bool:
    """Whether l1 uniform is the study's own call for each layer and level, as it is on a CPU; a GPU sorts once instead.

    Both mask the same number of weights of each layer, and the same weights but for equal magnitudes at the threshold:
    there the call leaves the choice to `topk`, while by a ranking those go that come first in the layer.
    """
    return all(layer.weight.device.type == "cpu" for layer in layers.values())


def baked(model: nn.Module, dense: nn.Module) -> nn.Module:
    """A plain network with the effective weights of the masked `model`; `dense`, of its structure, stays as it is."""
    plain = copy.deepcopy(dense)
    plain.load_state_dict(unmasked_state(model))
    return plain.eval()
