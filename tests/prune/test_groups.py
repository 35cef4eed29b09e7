"""N:M masks: exact in every group of inputs, the highest scores stay, and layers that do not fit stay dense."""

import pytest
import torch
from torch import nn

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import effective_weight
from sparsity.prune.criteria import CRITERIA
from sparsity.prune.groups import group_masks, require_groups
from sparsity.prune.pruner import Pruner
from sparsity.recover import RECOVERIES, Means
from sparsity.system.errors import UserError
from sparsity.system.methods import Curve, pattern_of

LAYERS = {
    "linear": (nn.Linear(16, 5), 1),
    "conv": (nn.Conv2d(8, 6, 3), 1),
    "grouped": (nn.Conv2d(16, 8, 3, groups=2), 1),
    "one": (nn.Conv1d(8, 3, 5), 1),
    "transposed": (nn.ConvTranspose2d(16, 6, 3, groups=2), 0),  # weights [in, out / groups, kh, kw]
}
DENSE = {
    "image": nn.Conv2d(3, 8, 3),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "narrow": nn.ConvTranspose2d(8, 8, 3, groups=4),
}


@pytest.mark.parametrize(("kept", "size"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_every_group_keeps_its_best_and_layers_that_do_not_fit_have_no_mask(kept, size):
    layers = {name: layer for name, (layer, _) in LAYERS.items()} | DENSE
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(layer.weight.shape, generator=draw) for name, layer in layers.items()}
    masks = group_masks(layers, scores, kept, size)
    fitting = set(LAYERS) | ({"narrow"} if size == 2 else set())
    assert set(masks) == fitting
    for name, (layer, inputs) in LAYERS.items():
        assert masks[name].dtype == torch.bool and masks[name].shape == layer.weight.shape
        rows = masks[name].movedim(inputs, -1).reshape(-1, size)  # each layer has a multiple of 8 inputs
        values = scores[name].movedim(inputs, -1).reshape(-1, size)
        assert (rows.sum(dim=1) == kept).all()
        assert (values.masked_fill(~rows, 2).amin(dim=1) > values.masked_fill(rows, -1).amax(dim=1)).all()


def test_of_equal_scores_the_first_go():
    scores = {"linear": torch.tensor([[1.0, 1, 1, 1, 0, 2, 2, 0], [3, 0, 0, 0, 5, 5, 5, 5]])}
    masks = group_masks({"linear": nn.Linear(8, 2)}, scores, 2, 4)
    assert masks["linear"].int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0, 1, 1]]


def test_names_of_patterns():
    good = {"2:4": (2, 4), "4:8": (4, 8), "1:64": (1, 64), "63:64": (63, 64)}
    bad = ("uniform", "4:4", "5:4", "0:4", "2:65", "02:4", "2:4:8", "2:", "only 2:4", "", "²:4")
    assert {text: pattern_of(text) for text in (*good, *bad)} == good | dict.fromkeys(bad)


def test_no_layer_that_fits_is_told_before_work():
    curves = [Curve("l1", "uniform", "none"), Curve("l1", "3:7", "none")]
    with pytest.raises(UserError, match="no layer has inputs in multiples of 7, as --allocation 3:7 needs"):
        require_groups(DENSE, curves)
    require_groups(DENSE | {"fits": nn.Linear(14, 2)}, curves)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pruned_network_has_the_masks_of_its_criterion_and_recoveries_keep_them(small_net, small_split, criterion):
    calibration, names = Calibration(small_split), ("stem", "down", "hidden")
    pruner = Pruner(small_net, list(names), calibration, 0)
    pruner.prune(Curve("l1", "global", "none"), 50)  # other scores and another allocation before
    recoveries = ("none", "batchnorm", "reconstruction") if criterion == "l1" else ("reconstruction",)
    for recover in recoveries:
        model, notes = pruner.prune(Curve(criterion, "1:2", recover), 50)
        RECOVERIES[recover](model, Means(small_net, names, calibration), 0)
        assert notes[-1] == "dense, because their inputs are no multiple of 2: stem"
        for name in ("down", "hidden"):
            groups = (effective_weight(model.get_submodule(name)) != 0).movedim(1, -1).reshape(-1, 2)
            assert (groups.sum(dim=1) == 1).all()
        assert effective_weight(model.stem).all()
    kept = pruner.prune(Curve("l1", "global", "none"), 0)[0]  # the allocation after it is its own again
    assert all(layer.weight_mask.all() for layer in (kept.stem, kept.down, kept.hidden))


def test_layers_that_share_a_weight_share_its_groups():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

    model, _ = Pruner(Twins(), ["first"]).prune(Curve("l1", "2:4", "none"), 50)
    assert torch.equal(model.first.weight_mask, model.second.weight_mask) and model.first.weight_mask.sum() == 32
