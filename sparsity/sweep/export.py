"""Pruned networks as files: made smaller where that changes nothing, written, read back, and counted in bytes."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.data.images import Split
from sparsity.networks.checkpoint import load, save, save_packed
from sparsity.networks.evaluation import Evaluation, evaluate
from sparsity.networks.families import restore
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import unmasked_state
from sparsity.networks.packed import entropy_bits, stored
from sparsity.prune.criteria import FILTER_CRITERIA
from sparsity.prune.filters import Thin, thin
from sparsity.results.rows import Curve, Row, level_text
from sparsity.results.store import Sweep
from sparsity.sweep.level import Pruned
from sparsity.system.errors import UserError
from sparsity.system.files import file_hash, prepare_folder
from sparsity.system.flags import levels_type
from sparsity.system.machine import versions

FORMATS = {"packed": ".npz", "dense": ".pth"}


VALUE_BITS = {"fp32": 32, "bf16": 16}


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which networks are written to files, and what is measured of each."""
    parser.add_argument("--export", type=levels_type, help="write the networks of these levels to --checkpoint_dir")
    parser.add_argument(
        "--export_precision", choices=tuple(VALUE_BITS), default="fp32", help="of the values in files (%(default)s)"
    )
    parser.add_argument(
        "--export_format",
        choices=tuple(FORMATS),
        default="packed",
        help="packed (.npz), or dense: a .pth with zeros that other code reads (%(default)s)",
    )
    parser.add_argument(
        "--checkpoint_dir",
        type=Path,
        default=Path("checkpoints"),
        help="where exported files go and the newest checkpoint is looked for (%(default)s)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="latency, throughput and memory of every network, timed against dense"
    )


def refuse_export_clashes(parser: argparse.ArgumentParser, args: argparse.Namespace, explicit: set[str]) -> None:
    """End the program, as argparse does, on flags that have no meaning with or without --export and --measure."""
    useless = sorted(explicit & {"export_precision", "export_format"})
    if useless and args.export is None:
        parser.error(f"--{useless[0]} has no effect without --export")
    if args.sensitivity and (args.export is not None or args.measure):
        parser.error("--sensitivity prunes one layer at a time; leave out --export and --measure")
    if args.export is not None and args.schedule == "iterative" and "levels" not in explicit:
        parser.error("--schedule iterative prunes in the steps of --levels; give them with --export")
    if args.sensitivity and args.controls:
        parser.error("--sensitivity draws no controls; leave out --controls")
    if args.export is not None and len(args.checkpoint or []) > 1:
        parser.error("--export writes a file for each curve and level; name one --checkpoint")


@dataclass(frozen=True)
class Builder:
    """How networks are made from descriptions: `build` and `spec_of` as for `checkpoint.restore`."""

    build: Callable[[dict], nn.Module]
    spec_of: Callable[[dict], dict]


@dataclass(frozen=True)
class Smaller:
    """A network without the channels that could go: on the CPU, in eval mode, with its description, and the counts."""

    network: nn.Module
    spec: dict[str, Any]
    thin: Thin


def smaller(model: nn.Module, spec: dict[str, Any], builder: Builder) -> Smaller:
    """What is left of `model`, masked or not, when every channel is removed that can be; `model` stays as it is."""
    found = thin(model)
    if found.removed:
        spec = spec | {"widths": spec.get("widths", {}) | found.widths}
    with torch.device("meta"):
        network = builder.build(spec)
    network.load_state_dict(found.state, assign=True)
    return Smaller(network.eval(), spec, found)


@dataclass(frozen=True)
class ExportFiles:
    """Where networks go: files in `folder` that begin with `name`.

    `precision` is a key of VALUE_BITS, `form` one of FORMATS: packed, or dense, which is a .pth with zeros.
    """

    folder: Path
    name: str
    precision: str
    form: str

    def path(self, curve: Curve, level: float) -> Path:
        """The file of a level of a curve."""
        return self.folder / f"{'_'.join((self.name, *curve, level_text(level)))}{FORMATS[self.form]}"

    def require_writable(self, wanted: list[tuple[Curve, float]], inputs: list[Path], weights: int) -> None:
        """UserError where a folder is in the way, there is no room, or a file would replace one of `inputs`.

        `wanted` are the curves and levels of a network of so many `weights`.
        """
        paths = [self.path(*each) for each in wanted]
        prepare_folder(self.folder, "--checkpoint_dir", 4 * weights * sum(not path.exists() for path in paths))
        read = {path.resolve() for path in inputs}
        for path in paths:
            if path.is_dir():
                raise UserError(f"{path} is a folder where a file is to be exported; move it or use another --name")
            if path.resolve() in read:
                raise UserError(f"{path} would be replaced by what is made of it; use another --name")

    def announce_replaced(self, wanted: list[tuple[Curve, float]], sweep: Sweep) -> None:
        """Say which files, other than the sweep's own, will be replaced."""
        ours = {entry["file"] for entry in sweep.header.get("exports", {}).values()}
        paths = [str(self.path(*each)) for each in wanted if self.path(*each).exists()]
        if replaced := [path for path in paths if path not in ours]:
            print(f"replacing {', '.join(replaced[:3])}" + (f" and {len(replaced) - 3} more" * (len(replaced) > 3)))

    def write(self, path: Path, content: dict[str, Any]) -> None:
        """Write a network, {'net': state dict on the CPU, ...}, in the precision and form of these files."""
        if self.form == "packed":
            save_packed(path, content, self.precision)
        else:
            write_dense(path, content, self.precision)


@dataclass(frozen=True)
class Export:
    """Writes the networks of `levels` to `files`; one of the `extras` of a bench.

    What goes into a file is evaluated on `test` in `dtype` where it may differ from the network that was measured, and
    read back and compared when it is written. `about` goes into every file.
    """

    levels: frozenset[float]
    files: ExportFiles
    builder: Builder
    sweep: Sweep
    test: Split
    batch_size: int
    dtype: torch.dtype
    about: dict[str, Any]

    def begin(self, checkpoint: str, dense: nn.Module) -> None:
        """Nothing depends on the dense network."""

    def lacks(self, row: Row) -> bool:
        """Whether the file of a row is wanted, and is not there as it was written, or was written in another way."""
        if row.level not in self.levels:
            return False
        entry, path = self.sweep.header.get("exports", {}).get(row.key), self.files.path(row.curve, row.level)
        wanted = (str(path), self.files.precision)
        if entry is None or (entry["file"], entry["precision"]) != wanted or not path.is_file():
            return True
        return path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]

    def __call__(self, pruned: Pruned, row: Row, result: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """Write the file of a network if its level is wanted: its bytes, and how many channels are dead."""
        if pruned.level not in self.levels:
            return {}, []
        path, filters = self.files.path(pruned.curve, pruned.level), pruned.curve[0] in FILTER_CRITERIA
        if self.files.form == "packed" or filters:
            small = smaller(pruned.model, pruned.saved.model, self.builder)
            state, spec, counts = small.network.state_dict(), small.spec, small.thin
        else:  # a file with zeros is for code that knows the usual widths alone
            state = {name: value.cpu() for name, value in unmasked_state(pruned.model).items()}
            spec, counts = pruned.saved.model, None
        kept = stored(state, self.files.precision)
        notes = [] if filters or counts is None else _dead_words(counts)
        accuracy = row.accuracy
        if self.files.precision != "fp32" or (counts and counts.removed):
            again = self._evaluate(kept, spec)
            accuracy = round(again.accuracy, 6)
            differing = int((again.predictions != result.predictions).sum())
            notes.append(f"file {accuracy:.2f} %, {differing} predictions differ")
        self.files.write(path, {"net": state} | self._content(pruned, row, spec, accuracy))
        self._read_back(path, kept)
        entry = self._entry(path, row) | {"accuracy": accuracy}
        self.sweep.merge("exports", {pruned.key: entry})
        return {"file_bytes": entry["bytes"]}, notes

    def _evaluate(self, state: dict[str, Tensor], spec: dict[str, Any]) -> Evaluation:
        """What the network in a file says of the test images, where it is not that of the row."""
        network = self.builder.build(spec)
        network.load_state_dict(state)
        inference = inference_copy(network.eval().to(self.test.images.device), self.dtype)
        return evaluate(inference, self.test, self.batch_size)

    def _entry(self, path: Path, row: Row) -> dict[str, Any]:
        """What the JSON tells of a file: its bytes, and bits for each prunable weight beside the yardstick for them."""
        size, weights = path.stat().st_size, sum(self.sweep.layers.values())
        zeros = round(row.sparsity / 100 * weights)
        return {
            "file": str(path),
            "bytes": size,
            "sha256": file_hash(path),
            "precision": self.files.precision,
            "bits_a_weight": round(8 * size / weights, 4),
            "entropy_and_values": round(entropy_bits(zeros, weights, VALUE_BITS[self.files.precision]), 4),
        }

    def _content(self, pruned: Pruned, row: Row, spec: dict[str, Any], accuracy: float) -> dict[str, Any]:
        """What the file tells beside the weights: all that the checkpoint told, and how it was pruned."""
        saved = pruned.saved
        told = {"data": saved.data, "settings": saved.settings}
        how = {name: getattr(row, name) for name in ("criterion", "allocation", "recover", "level", "sparsity")}
        return {
            "epoch": saved.epoch,
            "model": spec,
            **{key: value for key, value in told.items() if value},
            "pruning": how | {"checkpoint": pruned.checkpoint, "sha256": saved.sha256} | self.about,
            "metrics": {"test_accuracy": accuracy, "test_images": len(self.test)},
            "versions": versions(),
        }

    def _read_back(self, path: Path, expected: dict[str, Tensor]) -> None:
        """UserError unless a file that was just written holds the network of `expected`, value for value."""
        network = restore(load(path), self.builder.build, self.builder.spec_of)
        found = network.state_dict()
        wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
        if wrong:
            raise UserError(f"{path} came back with other values of {wrong[0]}; the disk or memory is not sound")


def write_dense(path: Path, content: dict[str, Any], precision: str) -> None:
    """Write a checkpoint with zeros, in the reference's format; with bf16 its tensors are of that type."""
    net = stored(content["net"], precision)
    if precision == "bf16":
        net = {name: value.bfloat16() if value.is_floating_point() else value for name, value in net.items()}
    save(path, content | {"net": net})


def _dead_words(counts: Thin) -> list[str]:
    if not counts.removed and not counts.dead:
        return []
    return [f"dead channels: {counts.removed} removed from the file, {counts.dead} stay"]
