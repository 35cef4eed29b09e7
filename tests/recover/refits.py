"""A refit against least squares in float64, and a network with a layer of each kind that can be refitted."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparsity.data.images import normalise
from sparsity.networks.layers import effective_weight
from sparsity.prune.moments import draw_positions, groups_of, input_rows, weight_rows
from sparsity.recover.streams import open_stream


@torch.no_grad()
def input_of(model, name, images):
    seen = []
    with model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        model(images)
    return seen[0]


def normalised(calibration):
    return normalise(calibration.images.images, calibration.images.mean, calibration.images.std)


def inputs_of(network, means, name):
    """The inputs of a layer, in the batches of a refit, which are of 32 images."""
    inputs = input_of(network, name, normalised(means.calibration))
    return inputs.split(32 * len(inputs) // len(means.calibration))


def positions_of(model, means, name):
    """The positions of the refit of a layer, for each batch."""
    readings = open_stream(means.streams[0], means.calibration).readings([name])
    layer, images = means.dense.get_submodule(name), [32, 8]
    return [
        draw_positions(layer, x, means.calibration, readings[0].number, batch, images=images[batch])
        for batch, x in enumerate(inputs_of(model, means, name))
    ]


def assert_best(model, means, name, masked, tolerance=1e-4):
    """Assert that the weights of a layer are the damped least-squares fit, against `lstsq` in float64, row by row.

    `tolerance` is a share of the fall in error that it can reach.
    """
    layer, weight = means.dense.get_submodule(name), effective_weight(model.get_submodule(name)).detach()
    groups, places = groups_of(layer), positions_of(model, means, name)
    by_rows = lambda values: weight_rows(values, groups).reshape(groups, -1, weight_rows(values).shape[1])  # noqa: E731
    rows, targets = (
        torch.cat(
            [
                input_rows(layer, x, positions).reshape(groups, -1, weight_rows(weight).shape[1])
                for x, positions in zip(inputs_of(network, means, name), places, strict=True)
            ],
            dim=1,
        ).double()
        for network in (model, means.dense)
    )
    targets = targets @ by_rows(layer.weight.detach()).double().mT
    for x, y, olds, news in zip(rows.numpy(), targets.numpy(), by_rows(masked), by_rows(weight), strict=True):
        pull = (0.01 * np.square(x).mean()) ** 0.5 * np.eye(x.shape[1])
        stacked = np.concatenate([x / len(x) ** 0.5, pull])
        for row, (old, new) in enumerate(zip(olds.double().numpy(), news.double().numpy(), strict=True)):
            kept = old != 0
            wanted = np.concatenate([y[:, row] / len(x) ** 0.5, pull @ old])
            best, *_ = np.linalg.lstsq(stacked[:, kept], wanted, rcond=None)
            errors = [np.square(stacked[:, kept] @ values - wanted).sum() for values in (best, new[kept], old[kept])]
            assert errors[1] - errors[0] <= tolerance * (errors[2] - errors[0]) + 1e-9, (name, row)
            assert not new[~kept].any()


class Kinds(nn.Module):
    """Grouped, depthwise and 1-d convolutions, unusual padding, linear layers over windows and tokens."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect", groups=3)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False)
        self.bn, self.pointwise = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)
        self.windows, self.tokens = nn.Linear(8, 8), nn.Linear(8, 8)
        self.signal = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.result = nn.Linear(8, 4)

    def forward(self, x):
        x = F.silu(self.pointwise(F.relu(self.bn(self.depthwise(F.relu(self.grouped(x)))))))
        x = x.unflatten(2, (2, 2)).permute(0, 2, 3, 4, 1).flatten(0, 1)  # [2 B, 2, 4, 8]
        x = self.windows(x).relu().unflatten(0, (-1, 2)).flatten(1, 3)  # [B, 16, 8]
        x = self.tokens(x).relu().transpose(1, 2)
        return self.result(self.signal(x).relu().mean(dim=2))
