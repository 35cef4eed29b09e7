"""Masks from scores: exact counts, true thresholds, published formulas, no layer left empty."""

import numpy as np
import pytest
import torch

from sparsity.prune.allocation import ALLOCATIONS, Allocator
from sparsity.system.errors import UserError

SPARSITIES = [0.0, 1e-4, 0.3, 0.5, 0.9, 0.999, *(1 - kept / 12_763 for kept in (1, 2, 4)), 1.0]
SHAPES = {"first": (6, 3, 3, 3), "wide": (40, 30, 3, 3), "point": (20, 40, 1, 1), "linear": (50, 20), "single": (1, 1)}


def made_scores(kind: str = "normal", shapes: dict = SHAPES) -> dict[str, torch.Tensor]:
    """Scores of layers on different scales: tie-free, or with many ties and zeros, or all equal."""
    draw = torch.Generator().manual_seed(0)
    kinds = {
        "normal": lambda shape, scale: torch.randn(shape, generator=draw).abs() * scale,
        "tied": lambda shape, scale: torch.randint(0, 5, shape, generator=draw) / 4,
        "equal": lambda shape, scale: torch.full(shape, 0.25),
        "zero": lambda shape, scale: torch.zeros(shape),
    }
    return {name: kinds[kind](shape, scale) for scale, (name, shape) in enumerate(shapes.items(), start=1)}


def kept_of(masks: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([values.flatten() for values in tensors.values()])


def check_masks(scores, name, sparsity, squared=False):
    """The invariants of every allocation; returns its masks and the number of swaps."""
    masks, swapped = Allocator(name, scores, squared).masks(sparsity)
    assert all(mask.dtype == torch.bool and mask.shape == scores[layer].shape for layer, mask in masks.items())
    kept, sizes = kept_of(masks), {layer: values.numel() for layer, values in scores.items()}
    total = sum(sizes.values())
    if name == "uniform":
        assert kept == {layer: size - round(sparsity * size) for layer, size in sizes.items()}
    else:
        assert sum(kept.values()) == total - round(sparsity * total)
        assert all(kept.values()) or (sum(kept.values()) < len(sizes) and swapped == 0)
    for layer, mask in masks.items():
        if 0 < kept[layer] < sizes[layer]:
            gone = scores[layer][~mask]
            assert gone.max() <= scores[layer][mask].min()
            ties = mask.flatten()[scores[layer].flatten() == gone.max()].int()
            assert (ties.diff() >= 0).all()  # of equal scores the first go
    return masks, swapped


@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "zero"])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_exact_counts_with_and_without_ties_whatever_the_layout(name, kind):
    scores = made_scores(kind)
    turned = {layer: s.to(memory_format=torch.channels_last) if s.dim() == 4 else s for layer, s in scores.items()}
    for sparsity in SPARSITIES:
        for squared in (False, True):
            masks, _ = check_masks(scores, name, sparsity, squared)
        other, _ = Allocator(name, turned, squared).masks(sparsity)
        assert all(torch.equal(mask, other[layer]) for layer, mask in masks.items())
    assert all(torch.equal(values, made_scores(kind)[layer]) for layer, values in scores.items())
    for shapes in ({"only": (7, 3)}, {"a": (1,), "b": (1,), "c": (1,)}, {"big": (1000,), "one": (1,)}):
        for sparsity in np.linspace(0, 1, 23):
            check_masks(made_scores(kind, shapes), name, float(sparsity))


def brute_force_lamp(values, squared):
    """The LAMP score of every weight of a layer by its definition, in float64, one weight at a time."""
    squares = values.double().flatten() ** (1 if squared else 2)
    order, result = squares.argsort(stable=True), torch.zeros_like(squares)
    for position, index in enumerate(order):
        rest = squares[order[position:]].sum()
        result[index] = squares[index] / rest if rest > 0 else 0
    return result


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_lamp_is_its_definition(kind, squared):
    scores = made_scores(kind, {"a": (5, 3, 3, 3), "b": (30, 20), "c": (1, 2), "d": (9, 4, 1, 1)})
    if kind == "tied":
        scores["d"].zero_()
    expected = {name: brute_force_lamp(values, squared) for name, values in scores.items()}
    everything = flat(expected)
    for sparsity in (0.1, 0.3, 0.5, 0.8, 0.95):
        masks, swapped = check_masks(scores, "lamp", sparsity, squared)
        count = round(sparsity * len(everything))
        if kind == "normal":
            assert torch.equal(~flat(masks), everything.argsort().argsort() < count)
        elif swapped == 0:
            # Any of equal weights may go, but the LAMP scores that go are the lowest, up to the sums' last bits.
            gone = {name: values.sort().values[: int((~masks[name]).sum())] for name, values in expected.items()}
            torch.testing.assert_close(flat(gone).sort().values, everything.sort().values[:count], rtol=1e-12, atol=0)


def test_lamp_refuses_negative_scores_and_sums_in_float64():
    with pytest.raises(UserError, match="negative scores"):
        Allocator("lamp", made_scores() | {"linear": torch.tensor([-1.0, 2.0])})
    # 2^24 + 1 is 2^24 in float32; many small squares under a large one would vanish.
    scores = {"a": torch.cat([torch.full((200_000,), 1.0), torch.tensor([6000.0])]), "b": torch.tensor([1.0, 6010.0])}
    # In a: the lowest weight's score is 1 / (6000^2 + 2e5); in b: 1 / (1 + 6010^2), between the first ones of a.
    before = sum(6000**2 + 200_000 - cut > 6010**2 + 1 for cut in range(200_000))
    assert 0 < before < 200_000
    for count, zeros_of_b in [(before, 0), (before + 2, 1)]:
        masks, _ = Allocator("lamp", scores).masks(count / 200_003)
        assert kept_of(masks) == {"a": 200_001 - count + zeros_of_b, "b": 2 - zeros_of_b}


@pytest.mark.parametrize(
    ("kept", "counts"),
    [
        (56, (4, 17, 35)),  # sums of dimensions 4, 20 and 40: 56 * 4 / 64 = 3.5, 17.5 and 35
        (100, (4, 32, 64)),  # tiny would get 6.25 and is capped at 4; 96 over 60 are 1.6 for each
        (310, (4, 100, 206)),  # middle's 306 / 60 * 20 = 102 is above 100 as well once tiny is capped
    ],
)
def test_erk_by_hand_with_capped_layers(kept, counts):
    scores = made_scores("normal", {"tiny": (2, 2), "middle": (10, 10), "large": (20, 20)})
    masks, swapped = Allocator("erk", scores).masks(1 - kept / 504)
    assert (tuple(kept_of(masks).values()), swapped) == (counts, 0)


@pytest.mark.parametrize("name", ["global", "lamp", "erk"])
def test_no_layer_ends_empty_and_swaps_are_counted(name):
    weak, middle = torch.arange(1.0, 11) * 1e-6, torch.arange(1.0, 101) / 10
    scores = {"strong": torch.arange(1.0, 1001), "weak": weak, "zero": torch.zeros(10), "middle": middle}
    for kept in (4, 5, 20, 500):
        masks, swapped = check_masks(scores, name, 1 - kept / 1120)
        counts = kept_of(masks)
        assert all(counts.values())
        if name == "global" and kept < 500:
            assert swapped == (3 if kept < 100 else 2)
            assert counts == {"strong": kept - 3, "weak": 1, "zero": 1, "middle": 1}
            assert masks["weak"].nonzero().tolist() == [[9]]  # its best
            assert bool(masks["strong"][-(kept - 3) :].all())  # the worst kept ones went
    scores = {"a": torch.tensor([40.0, 11, 10]), "b": torch.tensor([1.0, 20, 30]), "c": torch.tensor([0.1])}
    masks, swapped = Allocator("global", scores).masks(3 / 7)
    assert swapped == 1  # 11 is worse than 20, whatever else the layers keep
    assert flat(masks).tolist() == [True, False, False, False, True, True, True]


@pytest.mark.parametrize("kind", ["normal", "tied"])
@pytest.mark.parametrize("name", ["uniform", "global", "lamp"])
def test_masks_of_higher_levels_are_parts_of_those_of_lower_ones_and_global_is_one_threshold(name, kind):
    """Of equal scores the first go, layer by layer."""
    scores = made_scores(kind)
    allocator, everything = Allocator(name, scores), flat(scores)
    previous = flat(allocator.masks(0.0)[0])
    for sparsity in (1e-4, *np.linspace(0.01, 0.8, 33)):
        masks, swapped = allocator.masks(float(sparsity))
        kept, gone = flat(masks), round(sparsity * len(everything))
        assert swapped == 0 and not (kept & ~previous).any()
        assert name != "global" or torch.equal(~kept, everything.argsort(stable=True).argsort() < gone)
        previous = kept
