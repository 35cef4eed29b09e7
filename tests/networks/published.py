"""Two ResNet-20 for images of 32 pixels as others published them, written as a user with one of their files would.

--checkpoint resnet20-12fca82f.th   --arch tests/networks/published.py:akamaster --mean imagenet --std imagenet
--checkpoint chita_resnet20.pth.tar --arch tests/networks/published.py:chita     --mean half --std half
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut: without weights, or a convolution where `projected` and the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, projected: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2
        if projected and stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            shortcut = self.downsample(x)
        elif self.stride > 1:  # every second pixel, its channels between as many zeros before as behind them
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        else:
            shortcut = x
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + shortcut)


class ResNet20(nn.Module):
    """Three stages of three blocks; the output layer is called `head`."""

    def __init__(self, num_classes: int, projected: bool, head: str):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1, projected) for _ in range(3)))
        self.layer2 = nn.Sequential(*(Block(32 if i else 16, 32, 1 if i else 2, projected) for i in range(3)))
        self.layer3 = nn.Sequential(*(Block(64 if i else 32, 64, 1 if i else 2, projected) for i in range(3)))
        self.head = head
        self.add_module(head, nn.Linear(64, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))


def akamaster(num_classes: int = 10) -> nn.Module:
    """The ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10."""
    return ResNet20(num_classes, projected=False, head="linear")


def chita(num_classes: int = 10) -> nn.Module:
    """The ResNet-20 of github.com/mazumder-lab/CHITA, from github.com/IntelLabs/distiller."""
    return ResNet20(num_classes, projected=True, head="fc")
