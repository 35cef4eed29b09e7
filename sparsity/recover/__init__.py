"""Recoveries: functions that change a pruned network in place, so that it loses less accuracy.

A new recovery is a function like those below, with an entry in RECOVERIES here and in `system/methods.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.nn.utils.prune import is_pruned

from sparsity.data.calibration import Calibration
from sparsity.networks.fused import fused
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import twins
from sparsity.recover.batchnorm import reestimate_batchnorm
from sparsity.recover.distill import Distillation, distill
from sparsity.recover.finetune import Finetuning, finetune
from sparsity.recover.reconstruction import reconstruct
from sparsity.recover.streams import stream_copy


@dataclass(frozen=True)
class Means:
    """The inputs of a recovery.

    `dense` is the untouched network and `layers` the names of its prunable layers; `calibration`, `tuning` and
    `distillation` are None where no recovery of the run needs them.
    """

    dense: nn.Module
    layers: tuple[str, ...]
    calibration: Calibration | None = None
    tuning: Finetuning | None = None
    distillation: Distillation | None = None

    @cached_property
    def copy(self) -> nn.Module:
        """An unfolded inference copy that a recovery may overwrite; made once for all levels."""
        return inference_copy(self.dense, self.calibration.dtype, fold=False)

    @cached_property
    def streams(self) -> list[nn.Module]:
        """Two unfolded inference copies, for `reconstruct`; made once for all levels."""
        return [stream_copy(self.dense, self.calibration.dtype) for _ in range(2)]

    @cached_property
    def teacher(self) -> nn.Module:
        """The dense network as an inference copy, for `distill`; made once for all levels."""
        return fused(inference_copy(self.dense, self.distillation.dtype), self.distillation.images)


def _batchnorm(model: nn.Module, means: Means, seed: int) -> list[str]:
    found = reestimate_batchnorm(model, means.calibration, means.copy)
    return [] if found else ["no BatchNorm to re-estimate"]


def _reconstruction(model: nn.Module, means: Means, seed: int) -> list[str]:
    # An output layer that lost inputs is refitted too.
    shared = {name for others in twins(model).values() for name in others}
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    heads = [name for name, layer in linear.items() if is_pruned(layer) and name not in shared]
    layers = dict.fromkeys((*means.layers, *heads))
    notes = reconstruct(model, means.dense, layers, means.calibration, means.streams)
    reestimate_batchnorm(model, means.calibration, means.copy)
    return notes


def _distill(model: nn.Module, means: Means, seed: int) -> list[str]:
    layers = {name: model.get_submodule(name) for name in means.layers}
    if all(layer.weight_mask.all() for layer in layers.values() if hasattr(layer, "weight_mask")):
        return []  # nothing is pruned: the outputs are those of the dense network
    notes = _reconstruction(model, means, seed)
    distill(model, means.teacher, layers, means.distillation, seed)
    reestimate_batchnorm(model, means.calibration, means.copy)
    return notes


def _finetune(model: nn.Module, means: Means, seed: int) -> list[str]:
    finetune(model, {name: model.get_submodule(name) for name in means.layers}, means.tuning, seed)
    return []


# Each changes the pruned network in place, draws by `seed`, and returns notes for the user.
RECOVERIES: dict[str, Callable[[nn.Module, Means, int], list[str]]] = {
    "none": lambda model, means, seed: [],
    "batchnorm": _batchnorm,
    "reconstruction": _reconstruction,
    "distill": _distill,
    "finetune": _finetune,
}
