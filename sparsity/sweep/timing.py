"""The columns that `--measure` fills: each network of a sweep is timed against its dense one."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sparsity.networks.evaluation import Evaluation
from sparsity.networks.inference import inference_copy
from sparsity.prune.criteria import FILTER_CRITERIA
from sparsity.results.header import WAYS_OUT
from sparsity.results.rows import TIMED, Row
from sparsity.results.store import Sweep
from sparsity.sweep.export import Builder, smaller
from sparsity.sweep.level import Pruned
from sparsity.sweep.measure import Speed, describe_measurement, time_inference
from sparsity.system.errors import UserError


@dataclass
class Stopwatch:
    """Times inference in fresh processes; one of the `extras` of a bench.

    `inference` is the copy that the bench evaluates in: the very network that is timed, unless whole filters are gone,
    where it is the smaller one. `dense` is the copy that it is timed against, set by `begin`.
    """

    sweep: Sweep
    builder: Builder
    inference: fx.GraphModule
    image_size: int
    dtype: torch.dtype
    device: torch.device
    threads: int
    engine: str
    dense: fx.GraphModule | None = field(default=None, init=False)

    def __post_init__(self):
        there = self.sweep.header.get("measurement", {})
        if there and {key: there.get(key) for key in self._how()} != self._how():
            raise UserError(
                f"{self.sweep.files.csv} holds times of another machine, engine or way of timing; {WAYS_OUT}"
            )

    def _how(self) -> dict[str, Any]:
        return describe_measurement(self.engine, self.device)

    def begin(self, checkpoint: str, dense: nn.Module) -> None:
        """Time from now on against `dense`, whose own times go into the JSON unless they are there."""
        self.dense = inference_copy(dense, self.dtype)
        figures = self.sweep.header["dense"][checkpoint]
        if "throughput" in figures:
            return
        speed = self._time(self.dense, None, "dense")
        self.sweep.record("measurement", self._how() | {"base_memory_mb": speed.base_memory_mb})
        times = {column: getattr(speed, column) for column in TIMED if column != "speedup"}
        self.sweep.record("dense", self.sweep.header["dense"] | {checkpoint: figures | times})

    def lacks(self, row: Row) -> bool:
        """Whether a row has no times."""
        return row.throughput is None

    def _time(self, network: fx.GraphModule, reference: fx.GraphModule | None, engine: str) -> Speed:
        return time_inference(network, reference, self.image_size, self.threads, self.device, engine)

    def columns(self, network: fx.GraphModule, engine: str = "dense") -> dict[str, Any]:
        """The columns of TIMED for an inference copy run by `engine`, in turns with the dense one."""
        speed = asdict(self._time(network, self.dense, engine))
        return {column: speed[column] for column in TIMED}

    def __call__(self, pruned: Pruned, row: Row, result: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """The columns of TIMED for a pruned network."""
        if pruned.curve[0] not in FILTER_CRITERIA:
            return self.columns(self.inference, self.engine), []
        small = smaller(pruned.model, pruned.saved.model, self.builder).network
        return self.columns(inference_copy(small.to(self.device), self.dtype)), []
