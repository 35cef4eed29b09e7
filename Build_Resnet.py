"""ResNets for small images: 3x3 stem of stride 1, no max-pooling, four stages, global average pooling.

The architecture is that of He et al., arXiv 1512.03385, with the stem that CIFAR-10 repositories use. Parameter names
(`conv1, bn1, layer{1..4}.{i}.conv{1..3}, .bn{1..3}, .shortcut.0, .shortcut.1, linear`) are those of the reference
study and of kuangliu-style repositories, so weights travel in both directions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Identity (an empty sequence) where the shapes agree, otherwise a strided 1x1 convolution."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions around a shortcut; the output has 4 x `channels` channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * channels)
        self.shortcut = _shortcut(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """`num_blocks` holds the blocks of each of the four stages, `width` the channels of the first stage.

    Input [B, 3, H, W], output logits [B, num_classes]; H and W are free, 32 is what CIFAR-10 has.
    """

    def __init__(self, block: type, num_blocks: list[int], num_classes: int = 10, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        in_channels = width
        for stage, blocks in enumerate(num_blocks):
            channels, stride = width * 2**stage, 1 if stage == 0 else 2
            layer = nn.Sequential()
            for index in range(blocks):
                layer.append(block(in_channels, channels, stride if index == 0 else 1))
                in_channels = channels * block.expansion
            setattr(self, f"layer{stage + 1}", layer)
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        # Pooling over the whole map: at 32x32 this is the reference's 4x4 pooling, and other sizes work too.
        out = F.avg_pool2d(out, out.shape[-2:])
        return self.linear(torch.flatten(out, 1))


ARCHITECTURES = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}


def build(spec: dict) -> ResNet:
    """The network that `spec` describes: {'arch': a key of ARCHITECTURES, 'num_classes': int, 'width': int}.

    Raises ValueError when the description is not one of these.
    """
    arch, num_classes, width = (spec.get(key) for key in ("arch", "num_classes", "width"))
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    for key, value in (("num_classes", num_classes), ("width", width)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is {value!r}, not a positive whole number")
    return ResNet(*ARCHITECTURES[arch], num_classes, width)


def zero_last_norms(model: ResNet) -> None:
    """Set the weights of the last BatchNorm of each residual branch to 0, in place (arXiv 1706.02677, section 5.1).

    Each block without a strided shortcut then starts as the identity.
    """
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)


def spec_of(state: dict[str, Tensor]) -> dict:
    """Read the description that `build` takes off the names and shapes of a state dict that carries no metadata.

    Raises ValueError when the tensors are not those of a network of this file.
    """
    stem, output = state.get("conv1.weight"), state.get("linear.weight")
    if stem is None or output is None or stem.dim() != 4 or output.dim() != 2:
        raise ValueError("not a ResNet of this project: conv1.weight or linear.weight is missing or misshapen")
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    stages = ([name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")] for stage in range(1, 5))
    shape = (block, [len(set(indices)) for indices in stages])
    if shape not in ARCHITECTURES.values():
        raise ValueError(f"its {shape[1]} blocks of type {block.__name__} are none of the known architectures")
    arch = next(arch for arch, known in ARCHITECTURES.items() if known == shape)
    return {"arch": arch, "num_classes": output.shape[0], "width": stem.shape[0]}


def _constructor(arch: str):
    """The function that builds an architecture for a number of classes and a width of the first stage."""

    def construct(num_classes: int = 10, width: int = 64) -> ResNet:
        return ResNet(*ARCHITECTURES[arch], num_classes, width)

    block, num_blocks = ARCHITECTURES[arch]
    construct.__name__, construct.__doc__ = arch, f"A network of {num_blocks} {block.__name__}s; see `ResNet`."
    return construct


resnet18, resnet34, resnet50, resnet101, resnet152 = map(_constructor, ARCHITECTURES)


def Resnet50Model(num_classes: int = 10) -> ResNet:
    """ResNet-50 by the reference study's name: bottlenecks 3, 4, 6, 3; 23,520,842 parameters with ten classes."""
    return resnet50(num_classes)
