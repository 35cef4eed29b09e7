"""Networks that are hard on a pruning tool, written as a user would; images [B, 3, 16, 16] to logits of 4 classes.

`--arch tests/networks/awkward.py:NAME` names one of them.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

Output = namedtuple("Output", "features logits")


class ControlFlow(nn.Module):
    """What runs depends on values of tensors, and the feature map is flattened by `view`."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.fc1, self.fc2 = nn.Linear(16 * 4 * 4, 12), nn.Linear(12, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if x.abs().max() > 1e6:
            x = x / x.abs().max()
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


class Twin(ControlFlow):
    """The same network without the branch."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.view(x.size(0), -1))))


class SharedWeights(nn.Module):
    """Two convolutions with one weight, and a linear layer whose weight the output layer shares."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.second.weight = self.first.weight
        self.hidden = nn.Linear(8, num_classes)
        self.back = nn.Linear(num_classes, 8)
        self.output = nn.Linear(8, num_classes)
        self.output.weight = self.hidden.weight

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.second(F.relu(self.first(x)))).mean(dim=(2, 3))
        return self.output(F.relu(self.back(self.hidden(x))))


class CalledTwice(nn.Module):
    """One convolution with its BatchNorm that runs twice in a row."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.block(self.block(self.stem(x)))
        return self.fc(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """A small vision transformer: MultiheadAttention, a parameter of its own, LayerNorm, tokens as dimensions."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.place = nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.norm1, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = self.layer(x + self.mlp(self.norm2(x)))
        return self.head(x.mean(dim=1))


class NoBatchNorm(nn.Module):
    """Convolutions with biases and GroupNorm alone, as in networks for small batches."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"), nn.GroupNorm(2, 8), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=8, padding="same"), nn.SiLU(), nn.Conv2d(8, 12, 1),
        )  # fmt: skip
        self.classifier = nn.Linear(12, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean(dim=(-2, -1)))


class TupleOutput(Twin):
    """Logits first, features behind them."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, x.mean(dim=(2, 3))


class DictOutput(Twin):
    """A dictionary, as of segmentation networks."""

    def forward(self, x):
        return {"features": x.mean(dim=(2, 3)), "out": super().forward(x)}


class NamedOutput(Twin):
    """A named tuple whose logits do not come first."""

    def forward(self, x):
        return Output(x.mean(dim=(2, 3)), super().forward(x))


class ConvHead(nn.Module):
    """All convolutional, with depthwise ones between; the last convolution makes the logits."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.SiLU())
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depth(self.expand(x)))
        return self.head(x).mean(dim=(2, 3))


class Transposed(nn.Module):
    """Down and up again: a transposed convolution with BatchNorm, and a 3-d one over a stack of maps."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.down, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.up, self.bn2 = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6)
        self.deep, self.bn3 = nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        x = F.relu(self.bn2(self.up(F.relu(self.bn1(self.down(x))))))
        x = F.relu(self.bn3(self.deep(x.unflatten(1, (2, 3)))))
        return self.fc(x.mean(dim=(2, 3, 4)))


class OneDimensional(nn.Module):
    """Rows of pixels as a signal: 1-d convolutions, BatchNorm1d, circular padding, dilation, groups."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(48, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16)
        self.conv2 = nn.Conv1d(16, 16, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.bn2, self.fc = nn.BatchNorm1d(16), nn.Linear(16, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x.flatten(1, 2))))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean(dim=2))


class WeightNorm(Twin):
    """One convolution computes its weight from two other parameters."""

    def __init__(self, num_classes=4):
        super().__init__(num_classes)
        self.conv2 = weight_norm(self.conv2)


class OldWeightNorm(Twin):
    """The same by the hook of older torch versions."""

    def __init__(self, num_classes=4):
        super().__init__(num_classes)
        self.conv2 = nn.utils.weight_norm(self.conv2)


class Stochastic(nn.Module):
    """Dropout, and blocks that training skips at random."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.5:
                x = x + F.relu(F.dropout2d(block(x), 0.1, self.training))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight in its forward pass."""

    def forward(self, x):
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (spread + 1e-5), self.bias, self.stride, self.padding)


class OwnBuffers(nn.Module):
    """Buffers that are no BatchNorm: constants, a step count, one that no file holds; a layer that never runs."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("window", torch.hann_window(16).view(1, 1, 1, 16), persistent=False)
        self.conv1, self.conv2 = Standardised(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.auxiliary = nn.Linear(8, num_classes)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.conv1((x - self.mean) * self.window))
        x = F.relu(self.conv2(x) * self.steps / 7).mean(dim=(2, 3))
        return (self.fc(x), self.auxiliary(x)) if self.training else self.fc(x)
