"""What is done to a network after pruning: RECOVERIES, each a function that changes the pruned network in place."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from sparsity.data.calibration import Calibration
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import Layer
from sparsity.recover.batchnorm import reestimate_batchnorm
from sparsity.recover.finetune import Finetuning, finetune
from sparsity.recover.reconstruction import reconstruct, stream_copy


@dataclass(frozen=True)
class Means:
    """What a recovery may use.

    `dense` is the untouched network and `layers` the names of its prunable layers; `calibration` and `tuning` are None
    where no recovery of the run needs them.
    """

    dense: nn.Module
    layers: tuple[str, ...]
    calibration: Calibration | None = None
    tuning: Finetuning | None = None

    @cached_property
    def copy(self) -> fx.GraphModule:
        """An unfolded inference copy that a recovery may overwrite; made once for all levels."""
        return inference_copy(self.dense, self.calibration.dtype, fold=False)

    @cached_property
    def streams(self) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Two unfolded inference copies, for `reconstruct`; made once for all levels."""
        return tuple(stream_copy(self.dense, self.calibration.dtype) for _ in range(2))

    def masked_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The prunable layers of a pruned network, by name."""
        return {name: model.get_submodule(name) for name in self.layers}


def _none(model: nn.Module, means: Means, seed: int) -> list[str]:
    return []


def _batchnorm(model: nn.Module, means: Means, seed: int) -> list[str]:
    reestimate_batchnorm(model, means.calibration, means.copy)
    return []


def _reconstruction(model: nn.Module, means: Means, seed: int) -> list[str]:
    notes = reconstruct(model, means.dense, list(means.layers), means.calibration, means.streams)
    reestimate_batchnorm(model, means.calibration, means.copy)
    return notes


def _finetune(model: nn.Module, means: Means, seed: int) -> list[str]:
    finetune(model, means.masked_layers(model), means.tuning, seed)
    return []


# Each takes the pruned network, which it changes in place, what it may use, and a seed for what it draws; it returns
# what has to be reported of this level.
RECOVERIES: dict[str, Callable[[nn.Module, Means, int], list[str]]] = {
    "none": _none,
    "batchnorm": _batchnorm,
    "reconstruction": _reconstruction,
    "finetune": _finetune,
}


NEED_CALIBRATION = frozenset({"batchnorm", "reconstruction"})


NEED_TRAINING = frozenset({"finetune"})  # reads the labels of the training split
