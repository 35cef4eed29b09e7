"""Pruned networks as files: thin where that changes no output, written, read back, and counted in bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsity.data.images import Split
from sparsity.networks.checkpoint import save, save_packed, save_safetensors
from sparsity.networks.evaluation import Evaluation, evaluate
from sparsity.networks.families import build_empty, load_network
from sparsity.networks.fused import SAMPLE, fused
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import Way, set_way, unmasked_state, way_of, with_versions
from sparsity.networks.packed import entropy_bits, share, stored
from sparsity.prune.thinning import Thin, thin
from sparsity.results.rows import Row
from sparsity.results.statistics import halves
from sparsity.results.store import Sweep
from sparsity.sweep.evaluator import PrunedNetwork
from sparsity.sweep.flags import EXPORT_BITS, EXPORT_FORMATS, PROGRAMS
from sparsity.sweep.programs import make_program, predictions_of, write_program
from sparsity.system.errors import UserError
from sparsity.system.files import file_hash, prepare_folder
from sparsity.system.flags import counted, level_text
from sparsity.system.machine import versions
from sparsity.system.methods import Curve


def thin_network(model: nn.Module, spec: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], Thin]:
    """The thin network of `model`, masked or not: without the channels that can go at unchanged outputs.

    It is on the CPU, in eval mode; with its description, made from `spec` of `model`, and the counts of channels.
    """
    found = thin(model)
    if found.widths:
        spec = spec | {"widths": spec.get("widths", {}) | found.widths}
    return _build(spec, found.state, way_of(model)), spec, found


def _build(spec: dict[str, Any], state: dict[str, Tensor], way: Way) -> nn.Module:
    """The network of a description and a state dict, on the CPU, in eval mode."""
    network = build_empty(spec, state)
    empty = any(tensor.is_meta for tensor in network.parameters())
    network.load_state_dict(state, assign=empty)  # the others may share weights
    set_way(network, way)
    return network.eval()


@dataclass(frozen=True)
class ExportFiles:
    """Files of networks in `folder` whose names begin with `name`, in a `precision` and a `form` of sweep/flags.py."""

    folder: Path
    name: str
    precision: str
    form: str

    def path(self, curve: tuple[str, ...], level: float) -> Path:
        """The file of a level of a curve; 2:4 is written 2-4, because not every system takes colons."""
        parts = (self.name, *(part.replace(":", "-") for part in curve), level_text(level))
        return self.folder / f"{'_'.join(parts)}{EXPORT_FORMATS[self.form]}"

    def require_writable(self, wanted: list[tuple[Curve, float]], most: int, inputs: list[Path], weights: int) -> None:
        """UserError where there is no room for the files of `wanted`, or one would replace one of `inputs`.

        `wanted` are the curves and levels of a network of so many `weights`, of which `most` are written.
        """
        paths = [self.path(*each) for each in wanted]
        new = min(most, sum(not path.exists() for path in paths))
        prepare_folder(self.folder, "--checkpoint_dir", 4 * weights * new)
        read = {path.resolve() for path in inputs}
        for path in paths:
            if path.resolve() in read:
                raise UserError(f"{path} would be replaced by the network made of it; use another --name")

    def write(self, path: Path, content: dict[str, Any]) -> None:
        """Write a network, {'net': state dict on the CPU, ...}, in the precision and form of these files.

        Dense and safetensors files hold zeros; dense ones are in the reference's format. With bf16 their tensors are
        of that type.
        """
        if self.form == "packed":
            save_packed(path, content, self.precision)
            return
        net = stored(content["net"], self.precision)
        if self.precision == "bf16":
            net = share(net, lambda _, value: value.bfloat16() if value.is_floating_point() else value)
        if self.form == "safetensors":
            save_safetensors(path, content | {"net": net})
        else:
            save(path, content | {"net": with_versions(net, content["net"])})


@dataclass(frozen=True)
class Exporter:
    """Writes the `wanted` networks, of a curve and a level, to `files`; one of the extras of an evaluator.

    Where a file may give other answers than the evaluated network, because it is thin or in bf16, it is evaluated on
    `test` in `dtype`; a program always, as it runs. Every file is read back and compared when it is written. `about`
    goes into every file.
    """

    wanted: set[tuple[Curve, float]]
    files: ExportFiles
    sweep: Sweep
    test: Split
    batch_size: int
    dtype: torch.dtype
    about: dict[str, Any]

    def begin(self, checkpoint: str, dense: nn.Module) -> None:
        """Nothing depends on the dense network."""

    def lacks(self, row: Row) -> bool:
        """Whether the file of a row is wanted and is not there as it was written, in this place and precision."""
        if (row.curve, row.level) not in self.wanted:
            return False
        entry, path = self.sweep.header.get("exports", {}).get(row.key), self.files.path(row.curve, row.level)
        wanted = (str(path), self.files.precision)
        if entry is None or (entry["file"], entry["precision"]) != wanted:
            return True
        return not path.is_file() or file_hash(path) != entry["sha256"]

    def __call__(self, pruned: PrunedNetwork, row: Row, result: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """Write the file of a network if it is wanted: its bytes, and how many channels are dead."""
        if (pruned.curve, pruned.level) not in self.wanted:
            return {}, []
        state, spec, counts = self._network(pruned)
        kept, predictions = stored(state, self.files.precision), result.predictions.numpy()
        notes = []
        if counts and not pruned.curve.prunes_filters and (counts.removed or counts.dead):
            notes.append(f"dead channels: {counts.removed} removed from the file, {counts.dead} stay")
        program, way = None, way_of(pruned.model)
        if self.files.form in PROGRAMS:
            program = make_program(_build(spec, state, way), self.test, self.files.precision)
        if program or self.files.precision != "fp32" or (counts and counts.removed):
            again = predictions_of(program, self.test) if program else self._predictions(_build(spec, kept, way))
            differing, predictions = int((again.numpy() != predictions).sum()), again.numpy()
            changed = f"{counted(differing, 'prediction')} differ{'s' * (differing == 1)}"
            notes.append(f"file {self._metrics(predictions)['test_accuracy']:.2f} %, {changed}")
        metrics = self._metrics(predictions)
        path, metadata = self.files.path(pruned.curve, pruned.level), self._metadata(pruned, row, spec, metrics)
        if program:
            notes += write_program(path, program, metadata, self.test.images[:SAMPLE], self.files.form)
        else:
            self.files.write(path, {"net": state} | metadata)
            found = load_network(path, pruned.saved.model)[1].state_dict()
            if wrong := [name for name in kept if not torch.equal(found[name], kept[name])]:
                raise UserError(f"{path} came back with other values of {wrong[0]}; the disk or memory is not sound")
        entry = self._entry(path, row) | {"accuracy": metrics["test_accuracy"]}
        entry |= {name: metrics[name] for name in ("reporting_accuracy", "reporting_images")}
        self.sweep.merge("exports", {pruned.key: entry})
        return {"file_bytes": entry["bytes"]}, notes

    def _network(self, pruned: PrunedNetwork) -> tuple[dict[str, Tensor], dict[str, Any], Thin | None]:
        """State dict and description of the network in the file, and the counts of channels where it is thin."""
        if self.files.form in ("packed", *PROGRAMS) or pruned.curve.prunes_filters:
            network, spec, counts = thin_network(pruned.model, pruned.saved.model)
            return network.state_dict(), spec, counts
        # A file with zeros is for code that knows the usual widths alone.
        return unmasked_state(pruned.model, "cpu"), pruned.saved.model, None

    def _predictions(self, network: nn.Module) -> Tensor:
        """The class that the network in a file predicts for each test image."""
        inference = inference_copy(network.to(self.test.images.device), self.dtype)
        return evaluate(fused(inference, self.test), self.test, self.batch_size).predictions

    def _entry(self, path: Path, row: Row) -> dict[str, Any]:
        """The entry of a file in the JSON: its bytes, bits for each prunable weight, and the yardstick for them."""
        size, weights = path.stat().st_size, sum(self.sweep.layers.values())
        zeros = round(row.sparsity / 100 * weights)
        return {
            "file": str(path),
            "bytes": size,
            "sha256": file_hash(path),
            "precision": self.files.precision,
            "bits_a_weight": round(8 * size / weights, 4),
            "entropy_and_values": round(entropy_bits(zeros, weights, EXPORT_BITS[self.files.precision]), 4),
        }

    def _metrics(self, predictions: np.ndarray) -> dict[str, float | int]:
        """Accuracies in percent of the network in a file, on all test images and on the half for reporting."""
        right, reporting = predictions == self.sweep.labels, halves(self.sweep.labels)[1]
        return {
            "test_accuracy": round(100 * float(right.mean()), 6),
            "test_images": len(right),
            "reporting_accuracy": round(100 * float(right[reporting].mean()), 6),
            "reporting_images": int(reporting.sum()),
        }

    def _metadata(
        self, pruned: PrunedNetwork, row: Row, spec: dict[str, Any], metrics: dict[str, float | int]
    ) -> dict[str, Any]:
        """The entries of a file beside the weights: those of the checkpoint, and how it was pruned."""
        saved = pruned.saved
        how = {name: getattr(row, name) for name in ("criterion", "allocation", "recover", "level", "sparsity")}
        return {
            "epoch": saved.epoch,
            "model": spec,
            **{key: getattr(saved, key) for key in ("data", "settings") if getattr(saved, key)},
            "pruning": how | {"checkpoint": pruned.checkpoint, "sha256": saved.sha256} | self.about,
            "metrics": metrics,
            "versions": versions(),
        }
