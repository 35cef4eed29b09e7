"""Second moments of inputs: rows times the weight are the outputs, sums are float32, and bfloat16 loses nothing."""

import pytest
import torch
from torch import nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import inference_copy
from sparsity.prune.moments import (
    add_moment,
    as_weight,
    draw_positions,
    exact_products,
    groups_of,
    input_moments,
    input_rows,
    spread,
    symmetric,
    weight_rows,
)

LAYERS = [
    (nn.Conv2d(3, 5, 1), (3, 9, 7)),
    (nn.Conv2d(3, 5, 1, stride=2), (3, 9, 7)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 9, 7)),
    (nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 9, 8)),
    (nn.Linear(6, 4), (6,)),
    (nn.Linear(6, 4), (5, 6)),
    (nn.Linear(6, 4), (5, 2, 6)),
    (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 7, 5)),
    (nn.Conv2d(4, 8, (1, 3), stride=2, groups=4), (4, 7, 5)),
    (nn.Conv2d(3, 4, 4, padding="same", padding_mode="reflect"), (3, 9, 7)),
    (nn.Conv2d(3, 4, 3, padding=(0, 1), padding_mode="circular"), (3, 9, 7)),
    (nn.Conv1d(6, 4, 3, padding=2, dilation=2, groups=2), (6, 11)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_unfolded_rows_times_the_weight_are_the_outputs_and_positions_are_among_them(layer, shape):
    inputs = torch.randn(4, *shape)
    groups = groups_of(layer)
    rows, weight = input_rows(layer, inputs), weight_rows(layer.weight, groups)
    convolution = not isinstance(layer, nn.Linear)
    outputs = layer(inputs).movedim(1, -1) if convolution else layer(inputs)
    expected = (outputs - layer.bias).flatten(0, -2)
    found = rows @ weight.mT if groups == 1 else (rows @ weight.mT).movedim(0, 1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(as_weight(weight, layer.weight), layer.weight)
    assert torch.equal(spread(weight[..., 0, :], layer)[0], layer.weight[0])
    everything = rows.unflatten(-2, (4, -1))
    count = everything.shape[-2]
    positions = torch.stack([torch.randperm(count)[: max(1, count // 2)] for _ in range(4)])
    expected = torch.cat([everything[..., image, positions[image], :] for image in range(4)], dim=-2)
    assert torch.equal(input_rows(layer, inputs, positions), expected)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_whose_inputs_cannot_be_unfolded_are_refused():
    attention = nn.MultiheadAttention(4, 2)
    refused = [nn.ConvTranspose1d(4, 4, 3), nn.Conv3d(4, 4, 3), attention.out_proj, Scaled(4, 4, 3)]
    for layer in refused:
        with pytest.raises(ValueError, match=r"transposed|3-d|MultiheadAttention|of its own"):
            input_rows(layer, torch.randn(1, 4, 5, 5))


def test_positions_are_drawn_once_and_the_same_number_from_every_image(small_split):
    few = Calibration(small_split, position_limit=50 * 10)
    layer, inputs = nn.Conv2d(3, 2, 3, padding=1), torch.randn(7, 3, 8, 8)
    positions = draw_positions(layer, inputs, few, 1, 2, images=7)
    assert positions.shape == (7, 10)
    assert all(len(set(row.tolist())) == 10 and max(row) < 64 for row in positions)
    assert torch.equal(positions, draw_positions(layer, inputs, few, 1, 2, images=7))
    assert not torch.equal(positions, draw_positions(layer, inputs, few, 1, 3, images=7))
    assert draw_positions(layer, inputs, Calibration(small_split, position_limit=50 * 64), 1, 2, images=7) is None


@pytest.mark.parametrize("size", [1, 2, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_many_batches_are_those_of_float64(size, dtype):
    """Activations in bfloat16 have exact products; only the sums round, in float32."""
    draw = torch.Generator().manual_seed(0)
    total, exact = torch.zeros(size, size), torch.zeros(size, size, dtype=torch.float64)
    with exact_products(dtype):
        for _ in range(20):
            rows = torch.randn(150, size, generator=draw).relu().to(dtype).float()
            add_moment(total, rows)
            exact += rows.double().T @ rows.double()
    assert torch.get_float32_matmul_precision() == "highest"
    torch.testing.assert_close(symmetric(total).double(), exact, rtol=1e-5, atol=1e-6 * float(exact.max()))


def test_moments_of_a_network_are_means_over_positions_and_hold_their_diagonal(small_net, small_split):
    network, names = inference_copy(small_net, torch.bfloat16, fold=False), ["stem", "down", "hidden"]
    calibration = Calibration(small_split, torch.bfloat16, batch_size=16)
    seen = {name: [] for name in names}
    for name in names:
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: seen[name].append(input_rows(layer, *inputs)))
    full = input_moments(network, names, calibration)
    for name, diagonal in input_moments(network, names, calibration, diagonal=True).items():
        rows = torch.cat(seen[name]).double()
        expected = rows.T @ rows / len(rows)
        torch.testing.assert_close(full[name].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(diagonal.double(), expected.diagonal(), rtol=1e-5, atol=1e-6)
