"""Calibration images come from the training split alone, and unfolded inputs are what a layer multiplies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsity.data.calibration import Calibration, draw_calibration
from sparsity.data.images import normalise
from sparsity.prune.moments import draw_positions, input_moments, input_rows, output_size

CPU = torch.device("cpu")
LAYERS = [
    (nn.Conv2d(3, 5, 1), (3, 9, 7)),
    (nn.Conv2d(3, 5, 1, stride=2), (3, 9, 7)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 7)),
    (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 9, 8)),
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4), (5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_rows_times_the_weight_are_the_outputs(layer, shape):
    inputs = torch.randn(4, *shape)
    rows = input_rows(layer, inputs)
    outputs = layer(inputs) - (layer.bias.view(-1, 1, 1) if inputs.dim() == 4 else layer.bias)
    flat = outputs.flatten(2).transpose(1, 2).flatten(0, 1) if inputs.dim() == 4 else outputs.flatten(0, -2)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T, flat, rtol=1e-4, atol=1e-5)
    if inputs.dim() == 4:
        assert output_size(layer, inputs) == outputs.shape[-2:]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_chosen_positions_are_among_all(layer, shape):
    inputs = torch.randn(4, *shape)
    everything = input_rows(layer, inputs).view(4, -1, layer.weight[0].numel())
    count = everything.shape[1]
    positions = torch.stack([torch.randperm(count)[: max(1, count // 2)] for _ in range(4)])
    expected = torch.cat([everything[image, positions[image]] for image in range(4)])
    assert torch.equal(input_rows(layer, inputs, positions), expected)


def test_layers_that_cannot_be_unfolded_are_refused():
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")):
        with pytest.raises(ValueError, match="ungrouped"):
            input_rows(layer, torch.randn(1, 4, 5, 5))


def test_calibration_images_are_of_the_training_split_and_balanced(small_split):
    drawn = draw_calibration(small_split, 20, 3, CPU, torch.float32)
    assert torch.bincount(drawn.images.labels).tolist() == [5, 5, 5, 5]
    again = draw_calibration(small_split, 20, 3, CPU, torch.float32)
    assert torch.equal(drawn.images.images, again.images.images)
    other = draw_calibration(small_split, 20, 4, CPU, torch.float32)
    assert not torch.equal(drawn.images.images, other.images.images)
    # Each is a shifted or mirrored training image: its pixels are among those of one, or black padding.
    for image, label in zip(drawn.images.images, drawn.images.labels, strict=True):
        pixels = set(image.flatten().tolist()) - {0}
        same_class = small_split.images[small_split.labels == label]
        assert any(pixels <= set(candidate.flatten().tolist()) for candidate in same_class)


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(8, [8, 8, 4]), (6, [6, 6, 6, 2]), (19, [20]), (50, [20]), (1, [1] * 18 + [2])]
)
def test_every_image_is_in_one_batch_and_none_is_alone_at_the_end(small_split, batch_size, sizes):
    drawn = draw_calibration(small_split, 20, 0, CPU, torch.float32)
    batches = list(drawn.batches(batch_size=batch_size))
    assert [len(images) for images, _ in batches] == sizes
    everything = normalise(drawn.images.images, small_split.mean, small_split.std)
    assert torch.equal(torch.cat([images for images, _ in batches]), everything)


def test_positions_are_drawn_once_and_the_same_number_from_every_image(small_split):
    few = Calibration(small_split, position_limit=50 * 10)
    layer, inputs = nn.Conv2d(3, 2, 3, padding=1), torch.randn(7, 3, 8, 8)
    positions = draw_positions(layer, inputs, few, 1, 2)
    assert positions.shape == (7, 10)
    assert all(len(set(row.tolist())) == 10 and max(row) < 64 for row in positions)
    assert torch.equal(positions, draw_positions(layer, inputs, few, 1, 2))
    assert not torch.equal(positions, draw_positions(layer, inputs, few, 1, 3))
    assert draw_positions(layer, inputs, Calibration(small_split, position_limit=50 * 64), 1, 2) is None


def test_moments_are_those_of_unfolded_inputs(small_net, small_split):
    drawn = draw_calibration(small_split, 30, 0, CPU, torch.float32)
    moments = input_moments(small_net, ["stem", "down", "hidden"], drawn)
    images = normalise(drawn.images.images, small_split.mean, small_split.std)
    with torch.no_grad():
        middle = F.relu(small_net.stem_bn(small_net.stem(images)))
    columns = F.unfold(middle, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double()
    expected = columns.T @ columns / len(columns)
    torch.testing.assert_close(moments["down"].double(), expected, rtol=1e-4, atol=1e-5)
    diagonals = input_moments(small_net, ["stem", "down", "hidden"], drawn, diagonal=True)
    for name, diagonal in diagonals.items():
        torch.testing.assert_close(diagonal, moments[name].diagonal(), rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in small_net.modules())
