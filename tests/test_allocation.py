"""Masks from scores: exact counts, true thresholds, published formulas, nothing left empty."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsity.data.calibration import Calibration
from sparsity.networks.layers import prunable_layers
from sparsity.prune import pruner
from sparsity.prune.allocation import ALLOCATIONS, prepare, rank
from sparsity.prune.criteria import CRITERIA, SQUARED, Evidence, score
from sparsity.prune.masks import apply_masks, prune_l1_uniform
from sparsity.prune.pruner import Pruner
from sparsity.system.errors import UserError

EXAMPLE = torch.zeros(1, 3, 8, 8)
AMOUNTS = [0.0, 1e-4, 0.3, 0.5, 0.9, 0.999, 1.0]
ACROSS = ["global", "lamp", "erk"]
SHAPES = {"first": (6, 3, 3, 3), "wide": (40, 30, 3, 3), "point": (20, 40, 1, 1), "linear": (50, 20), "single": (1, 1)}


def made_scores(kind: str = "normal", shapes: dict = SHAPES, seed: int = 0) -> dict[str, torch.Tensor]:
    """Scores of layers on different scales: tie-free, or with many ties and zeros, or all equal."""
    draw = torch.Generator().manual_seed(seed)
    scores = {}
    for number, (name, shape) in enumerate(shapes.items()):
        if kind == "equal":
            scores[name] = torch.full(shape, 0.25)
        elif kind == "zero":
            scores[name] = torch.zeros(shape)
        elif kind == "tied":
            scores[name] = torch.randint(0, 5, shape, generator=draw) / 4
        else:
            scores[name] = torch.randn(shape, generator=draw).abs() * (1 + number)
    return scores


def zeros_of(masks: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.flatten() for values in tensors.values()])


def check_masks(scores, name, amount, squared=False):
    """What holds for every allocation; returns its masks and the number of swaps."""
    masks, swapped = prepare(name, rank(scores, squared)).masks(amount)
    assert {layer: mask.shape for layer, mask in masks.items()} == {layer: s.shape for layer, s in scores.items()}
    assert all(mask.dtype == torch.bool for mask in masks.values())
    zeros, sizes = zeros_of(masks), {layer: values.numel() for layer, values in scores.items()}
    total = sum(sizes.values())
    if name == "uniform":
        assert zeros == {layer: round(amount * size) for layer, size in sizes.items()}
    else:
        assert sum(zeros.values()) == round(amount * total)
        if total - round(amount * total) >= len(sizes):
            assert all(zeros[layer] < size for layer, size in sizes.items())
    for layer, mask in masks.items():
        if 0 < zeros[layer] < sizes[layer]:
            assert scores[layer][~mask].max() <= scores[layer][mask].min()
    return masks, swapped


@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "zero"])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_exact_counts_with_and_without_ties(name, kind):
    for amount in AMOUNTS:
        for squared in (False, True):
            check_masks(made_scores(kind), name, amount, squared)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_exact_counts_for_every_criterion(small_net, small_split, name, criterion):
    evidence = Evidence(small_net, prunable_layers(small_net, EXAMPLE), Calibration(small_split))
    scores = score(criterion, evidence)
    for amount in AMOUNTS:
        check_masks(scores, name, amount, criterion in SQUARED)


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize(
    "shapes", [{"only": (7, 3)}, {"a": (1,), "b": (1,), "c": (1,)}, {"big": (1000,), "one": (1,)}], ids=len
)
def test_few_and_tiny_layers(name, shapes):
    for kind in ("normal", "tied"):
        for amount in [*AMOUNTS, *np.linspace(0, 1, 23)]:
            check_masks(made_scores(kind, shapes), name, float(amount))


@pytest.mark.parametrize("amount", [-0.1, 1.1, math.nan, 40])
def test_an_amount_outside_0_to_1_is_refused(amount):
    with pytest.raises(ValueError, match="share"):
        prepare("global", rank(made_scores())).masks(amount)


def test_an_integer_amount_is_a_share():
    masks, _ = prepare("uniform", rank(made_scores())).masks(1)
    assert not flat(masks).any()


@pytest.mark.parametrize("kind", ["normal", "tied"])
@pytest.mark.parametrize("amount", [1e-4, 0.3, 0.5, 0.7])
def test_global_is_one_threshold(kind, amount):
    scores = made_scores(kind)
    masks, swapped = check_masks(scores, "global", amount)
    everything, kept = flat(scores), flat(masks)
    assert swapped == 0
    assert everything[~kept].max() <= everything[kept].min()


def test_global_orders_negative_scores_and_extreme_ones():
    scores = {
        "a": torch.tensor([-3.0, -1e-45, 0.0, 2.0, 3e38]),
        "b": torch.tensor([-2.0, -0.0, 1e-45, 1.0, -3e38]),
    }
    order = flat(scores).sort().values
    for count in range(8):  # of 9 and more, a layer is kept alive
        masks, _ = prepare("global", rank(scores)).masks(count / 10)
        assert torch.equal(flat(scores)[~flat(masks)].sort().values, order[:count])


def brute_force_lamp(scores, squared):
    """Every weight's LAMP score by its definition, in float64, one weight at a time."""
    result = {}
    for name, values in scores.items():
        squares = values.double().flatten() ** (1 if squared else 2)
        order = squares.argsort(stable=True)
        result[name] = torch.zeros_like(squares)
        for position, index in enumerate(order):
            rest = squares[order[position:]].sum()
            result[name][index] = squares[index] / rest if rest > 0 else 0
    return result


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_lamp_is_its_definition(kind, squared):
    scores = made_scores(kind, {"a": (5, 3, 3, 3), "b": (30, 20), "c": (1, 2), "d": (9, 4, 1, 1)})
    if kind == "tied":
        scores["d"].zero_()
    expected = brute_force_lamp(scores, squared)
    assert all(float(values.max()) == 1 for name, values in expected.items() if kind == "normal" or name != "d")
    everything = torch.cat([*expected.values()])
    for amount in (0.1, 0.3, 0.5, 0.8, 0.95):
        masks, swapped = check_masks(scores, "lamp", amount, squared)
        kept = torch.cat([masks[name].flatten() for name in expected])
        if kind == "normal":
            wanted = torch.ones_like(kept)
            wanted[everything.argsort()[: round(amount * len(wanted))]] = False
            assert torch.equal(kept, wanted)
        elif swapped == 0:
            # Which of equal weights goes is free, but what is kept has the same scores, up to the sums' last bits.
            counts = [int((~masks[name]).sum()) for name in expected]
            gone = torch.cat([v.sort().values[:n] for v, n in zip(expected.values(), counts, strict=True)])
            wanted = everything.sort().values[: round(amount * len(everything))]
            torch.testing.assert_close(gone.sort().values, wanted, rtol=1e-12, atol=0)


def test_lamp_refuses_negative_scores():
    with pytest.raises(UserError, match="linear has negative scores"):
        prepare("lamp", rank(made_scores() | {"linear": torch.tensor([-1.0, 2.0])}))


def test_lamp_sums_in_float64():
    # 2^24 + 1 is 2^24 in float32; many small squares under a large one would vanish.
    scores = {"a": torch.cat([torch.full((2_000_000,), 1.0), torch.tensor([6000.0])]), "b": torch.tensor([1.0, 6155.0])}
    # In a: the lowest weight's score is 1 / (6000^2 + 2e6); in b: 1 / (1 + 6155^2), between the first ones of a.
    masks, _ = prepare("lamp", rank(scores)).masks(1_115_950 / 2_000_003)
    rest = [6000**2 + 2_000_000 - cut for cut in range(2_000_000)]
    before = sum(value > 6155**2 + 1 for value in rest)
    assert 0 < before < 1_115_950
    assert zeros_of(masks) == {"a": 1_115_949, "b": 1}
    masks, _ = prepare("lamp", rank(scores)).masks(before / 2_000_003)
    assert zeros_of(masks) == {"a": before, "b": 0}
    masks, _ = prepare("lamp", rank(scores)).masks((before + 2) / 2_000_003)
    assert zeros_of(masks) == {"a": before + 1, "b": 1}


def test_erk_by_hand_with_a_capped_layer():
    # Sums of dimensions 4, 20 and 40, sizes 4, 100 and 400. Of 56 kept weights, 56 * 4 / 64 = 3.5, 17.5 and 35.
    shapes = {"tiny": (2, 2), "middle": (10, 10), "large": (20, 20)}
    masks, swapped = prepare("erk", rank(made_scores("normal", shapes))).masks(1 - 56 / 504)
    assert [504 - 448, swapped] == [56, 0]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"tiny": 4, "middle": 17, "large": 35}
    # Of 100 kept, tiny would get 6.25 and is capped at 4; 96 over 60 are 1.6 for each: 32 and 64.
    masks, _ = prepare("erk", rank(made_scores("normal", shapes))).masks(1 - 100 / 504)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"tiny": 4, "middle": 32, "large": 64}
    # Of 310, middle's 306 / 60 * 20 = 102 is above 100 as well once tiny is capped; large takes the other 206.
    masks, _ = prepare("erk", rank(made_scores("normal", shapes))).masks(1 - 310 / 504)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"tiny": 4, "middle": 100, "large": 206}


def test_erk_densities_follow_the_formula():
    shapes = {"a": (64, 32, 3, 3), "b": (128, 64, 3, 3), "c": (128, 64, 1, 1), "d": (200, 128)}
    scores = made_scores("normal", shapes)
    masks, _ = check_masks(scores, "erk", 0.95)
    factors = []
    for name, shape in shapes.items():
        out, inner, height, width = (*shape, 1, 1)[:4]
        dimensions = out + inner + (height + width if len(shape) == 4 else 0)
        density = float(masks[name].double().mean())
        assert density < 1
        factors.append(density * out * inner * height * width / dimensions)
    assert max(factors) - min(factors) < 1 / min(sum(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", ACROSS)
def test_no_layer_ends_empty_and_swaps_are_counted(name):
    scores = {
        "strong": torch.arange(1.0, 1001),
        "weak": torch.arange(1.0, 11) * 1e-6,
        "zero": torch.zeros(10),
        "middle": torch.arange(1.0, 101) / 10,
    }
    for kept in (4, 5, 20, 500):
        masks, swapped = check_masks(scores, name, 1 - kept / 1120)
        counts = {layer: int(mask.sum()) for layer, mask in masks.items()}
        assert all(counts.values())
        if name == "global" and kept < 500:
            assert swapped == (3 if kept < 100 else 2)
            assert counts == {"strong": kept - 3, "weak": 1, "zero": 1, "middle": 1}
            assert masks["weak"].nonzero().tolist() == [[9]]  # its best
            assert bool(masks["strong"][-(kept - 3) :].all())  # the worst kept ones went


def test_the_worst_weight_that_is_kept_elsewhere_goes():
    scores = {"a": torch.tensor([40.0, 11, 10]), "b": torch.tensor([1.0, 20, 30]), "c": torch.tensor([0.1])}
    masks, swapped = prepare("global", rank(scores)).masks(3 / 7)
    assert swapped == 1
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [True, False, False],  # 11 is worse than 20, whatever else the layers keep
        "b": [False, True, True],
        "c": [True],
    }


def test_below_one_weight_a_layer_counts_stay_exact():
    for name in ACROSS:
        for kept in (1, 2, 4):
            masks, swapped = prepare(name, rank(made_scores())).masks(1 - kept / 12_763)
            assert (sum(int(mask.sum()) for mask in masks.values()), swapped) == (kept, 0)


@pytest.mark.parametrize("kind", ["normal", "tied"])
@pytest.mark.parametrize("name", ["uniform", "global", "lamp"])
def test_masks_of_higher_levels_are_parts_of_those_of_lower_ones(name, kind):
    allocator = prepare(name, rank(made_scores(kind)))
    previous = flat(allocator.masks(0.0)[0])
    assert previous.all()
    for amount in np.linspace(0, 0.8, 33):
        masks, swapped = allocator.masks(float(amount))
        assert swapped == 0
        assert not (flat(masks) & ~previous).any()
        previous = flat(masks)


@pytest.mark.parametrize("amount", [0, 0.05, 0.333, 0.5, 0.999, 1.0])
def test_uniform_on_magnitudes_is_l1_unstructured_bit_for_bit(small_net, amount):
    one, other = copy.deepcopy(small_net), copy.deepcopy(small_net)
    ours, theirs = prunable_layers(one, EXAMPLE), prunable_layers(other, EXAMPLE)
    assert all(layer.weight.abs().unique().numel() == layer.weight.numel() for layer in ours.values())  # no ties
    masks, _ = prepare("uniform", rank(score("l1", Evidence(one, ours)))).masks(amount)
    apply_masks(ours, masks)
    prune_l1_uniform(theirs, amount)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    for name, layer in ours.items():
        assert np.array_equal(layer.weight.detach().view(torch.int32), theirs[name].weight.detach().view(torch.int32))


def test_without_a_cpu_uniform_magnitude_comes_from_scores_sorted_once(small_net, monkeypatch):
    """The masks are those of the call for each layer and level, and the other allocations share the sorted scores."""
    layers, sorts = list(prunable_layers(small_net, EXAMPLE)), []
    by_call, by_ranking = (Pruner(small_net, layers, None, 0) for _ in range(2))
    monkeypatch.setattr(pruner, "rank", lambda *given, **named: sorts.append(1) or rank(*given, **named))
    for level in (0.0, 5.0, 33.3, 50.0, 95.0, 100.0):
        theirs, _ = by_call.prune(("l1", "uniform", "none"), level)
        with monkeypatch.context() as patch:
            patch.setattr(pruner, "selects_by_call", lambda layers: False)
            ours, notes = by_ranking.prune(("l1", "uniform", "none"), level)
        assert notes == []
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
        for allocation in ("global", "lamp", "erk"):
            by_ranking.prune(("l1", allocation, "none"), level)
    assert len(sorts) == 1


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_scores_in_another_layout_are_ranked_alike(kind):
    scores = made_scores(kind)
    turned = {name: s.to(memory_format=torch.channels_last) if s.dim() == 4 else s for name, s in scores.items()}
    for name in ALLOCATIONS:
        plain, other = (prepare(name, rank(values)).masks(0.4)[0] for values in (scores, turned))
        assert all(torch.equal(plain[layer], other[layer]) for layer in scores)


def test_one_ranking_serves_all_allocations_and_stays_as_it_is():
    scores = made_scores()
    before = {name: values.clone() for name, values in scores.items()}
    ranking = rank(scores)
    alone = {name: prepare(name, rank(scores)).masks(0.7)[0] for name in ALLOCATIONS}
    for name in (*ALLOCATIONS, *reversed(ALLOCATIONS)):
        masks, _ = prepare(name, ranking).masks(0.7)
        assert all(torch.equal(mask, alone[name][layer]) for layer, mask in masks.items())
    assert all(torch.equal(values, before[name]) for name, values in scores.items())


MEMORY = r"""
import re, sys
from pathlib import Path
import torch
from sparsity.allocation import prepare, rank

def peak():
    # Of this process alone: ru_maxrss would begin with that of the one that started it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

name, sizes = sys.argv[1], [12_000_000, 4_000_000, 2_000_000, 1_500_000, 500_000]
prepare(name, rank({"a": torch.rand(1000)})).masks(0.5)
before = peak()
scores = {str(size): torch.rand(size) for size in sizes}
assert peak() - before > 3.9 * sum(sizes)
allocator = prepare(name, rank(scores))
for amount in (0.0, 0.3, 0.5, 0.9, 0.999, 1.0):
    masks, _ = allocator.masks(amount)
    assert sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values()) == round(amount * sum(sizes))
print((peak() - before) / (4 * sum(sizes)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["global", "lamp"])
def test_memory_is_below_five_copies_of_the_weights(name):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", MEMORY, name]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    copies = float(result.stdout)
    assert 2 < copies < 5
