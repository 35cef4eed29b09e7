"""The gradients of a first step by several processes, against those of one, of a small network with frozen BatchNorm.

    torchrun --nproc_per_node=2 tests/gradients.py OUT.json

writes the relative L2 distance of all gradients, in float64 and float32, for a batch that the processes share evenly
and one that they do not.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).parents[1]))

import Build_Resnet
from sparsity.data.images import Split, training_batches
from sparsity.system import processes
from sparsity.system.processes import ALONE, Ranks
from sparsity.training.distributed import replicate, start_group
from sparsity.training.epoch import train_one_epoch

ARCH = {"arch": "resnet18", "num_classes": 10, "width": 4}


def frozen(model: nn.Module) -> nn.Module:
    """Replace, in place, every BatchNorm by a fixed scale and shift."""
    for name, module in model.named_children():
        if isinstance(module, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(module.num_features, eps=module.eps)
            fixed.load_state_dict(module.state_dict())
            setattr(model, name, fixed)
        else:
            frozen(module)
    return model


class Stepless(torch.optim.SGD):
    """An optimizer that leaves weights and gradients as they are."""

    def step(self, closure=None):
        """Nothing."""

    def zero_grad(self, set_to_none=True):
        """Nothing."""


def gradients(model: nn.Module, split: Split, batch: int, dtype: torch.dtype, team: Ranks) -> torch.Tensor:
    """All gradients of the first step of an epoch of one batch of the first `batch` images, as one vector."""
    model = copy.deepcopy(model).to(dtype)
    network = replicate(model, team)
    few = split.take(torch.arange(batch))
    batches = training_batches(few, batch, 0, 1, team=team)
    train_one_epoch(
        model, ((images.to(dtype), labels) for images, labels in batches), Stepless(model.parameters()),
        torch.float32, 1, forward=network, team=team,
    )  # fmt: skip
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def main() -> None:
    torch.set_num_threads(1)
    team = processes.start()
    team.join()
    start_group(team, torch.device("cpu"))
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(24) % 10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    model = frozen(Build_Resnet.build(ARCH))
    found = {}
    for batch in (24, 23):
        for dtype in (torch.float64, torch.float32):
            alone = gradients(model, split, batch, dtype, ALONE)
            together = gradients(model, split, batch, dtype, team)
            found[f"{batch} {dtype}"] = float((together - alone).norm() / alone.norm())
    if team.first:
        Path(sys.argv[1]).write_text(json.dumps(found))
    team.leave()


if __name__ == "__main__":
    main()
