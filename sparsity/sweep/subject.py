"""A checkpoint while it is swept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from sparsity.data.calibration import Calibration
from sparsity.networks.checkpoint import Checkpoint
from sparsity.prune.pruner import Pruner
from sparsity.recover import Means
from sparsity.recover.finetune import Finetuning
from sparsity.system.errors import UserError


@dataclass(frozen=True)
class Subject:
    """The checkpoint `name` of a sweep: the file, and what its networks are made of and recovered with."""

    name: str
    saved: Checkpoint
    means: Means
    seed: int

    @cached_property
    def pruner(self) -> Pruner:
        """Prunes the untouched network; made once, with what it computes for all levels."""
        return Pruner(self.means.dense, list(self.means.layers), self.means.calibration, self.seed)


@dataclass(frozen=True)
class Subjects:
    """The checkpoints of a sweep, one to be opened at a time.

    `files` is name -> path and hash, `load` reads a path, `layers` names the prunable layers, `tune` tells how a
    checkpoint is fine-tuned, None where nothing is.
    """

    files: dict[str, tuple[Path, str]]
    load: Callable[[Path], tuple[Checkpoint, nn.Module]]
    layers: tuple[str, ...]
    calibration: Calibration | None
    tune: Callable[[Checkpoint], Finetuning | None]
    device: torch.device
    seed: int

    def open(self, name: str) -> Subject:
        """Read a checkpoint; UserError when it is another one than the sweep began with."""
        path, sha256 = self.files[name]
        saved, dense = self.load(path)
        if saved.sha256 != sha256:
            raise UserError(f"{path} was replaced while it was being swept; start again")
        means = Means(dense.to(self.device), self.layers, self.calibration, self.tune(saved))
        return Subject(name, saved, means, self.seed)
