"""The gradients of a first step by several processes, against those of one, of a small network without BatchNorm.

    torchrun --nproc_per_node=2 tests/training/gradients.py OUT.json

writes the relative L2 distance of all gradients, in float64 and float32, for a batch that the processes share evenly
and one that they do not.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from sparsity.data.images import Split, training_batches
from sparsity.system import processes
from sparsity.training.distributed import replicate
from sparsity.training.epoch import train_one_epoch


def gradients(model: nn.Module, split: Split, dtype: torch.dtype, part: tuple[int, int]) -> torch.Tensor:
    """All gradients of an epoch of one batch of all images, as one vector; weights stay as they are."""
    model = copy.deepcopy(model).to(dtype)
    batches = [(images.to(dtype), labels) for images, labels in training_batches(split, len(split), 0, 1, part=part)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    network = replicate(model) if part[1] > 1 else model
    train_one_epoch(model, batches, optimizer, torch.float32, 1, forward=network, part=part)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.join()
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(24) % 10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    found = {}
    for count in (24, 23):
        for dtype in (torch.float64, torch.float32):
            case = nn.Sequential(*layers), split.take(torch.arange(count)), dtype
            alone = gradients(*case, (0, 1))
            together = gradients(*case, (processes.rank(), processes.size()))
            found[f"{count} {dtype}"] = float((together - alone).norm() / alone.norm())
    if processes.first():
        Path(sys.argv[1]).write_text(json.dumps(found))
    processes.leave()
