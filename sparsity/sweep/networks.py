"""Checkpoints while they are swept: dense network, pruner and recovery, levels that lack a row, iterative curves."""

import argparse
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from sparsity.data.calibration import Calibration
from sparsity.data.images import Split
from sparsity.networks import checkpoint
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.families import load_network
from sparsity.networks.layers import set_way, way_of
from sparsity.prune.budget import weight_costs
from sparsity.prune.pruner import Pruner
from sparsity.recover import Means
from sparsity.recover.distill import Distillation
from sparsity.recover.finetune import Finetuning
from sparsity.results.rows import row_key
from sparsity.results.store import Sweep
from sparsity.sweep import work
from sparsity.sweep.evaluator import Evaluator
from sparsity.sweep.inputs import (
    Inputs,
    distillation_count,
    distillation_images,
    finetuning_rate,
    load_training_images,
    training_recipe,
)
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.system.machine import DTYPES, derived_seed
from sparsity.system.methods import Curve, Panel


@dataclass(frozen=True)
class Network:
    """A checkpoint while it is swept: the file `saved`, and in `means` its dense network and what recovers it.

    `how` holds further arguments of `Pruner`: what a level is a share of.
    """

    name: str
    saved: Checkpoint
    means: Means
    seed: int
    how: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def pruner(self) -> Pruner:
        """Prunes the dense network; the seed of what is drawn differs between checkpoints."""
        seed = derived_seed(self.seed, int(self.saved.sha256[:8], 16))
        return Pruner(self.means.dense, list(self.means.layers), self.means.calibration, seed, **self.how)


@dataclass
class Networks:
    """The checkpoints of a sweep, opened one after the other.

    `names` are those that their rows are recorded with, in the order of the checkpoints in `given`; `layers` names the
    prunable layers, `positions` is as from `positions_per_image`, `train` is None where no recovery trains.
    """

    args: argparse.Namespace
    given: Inputs
    names: tuple[str, ...]
    layers: tuple[str, ...]
    positions: dict[str, int]
    calibration: Calibration | None
    train: Split | None
    last: Network | None = field(default=None, init=False)  # the one that was opened last

    def open(self, name: str) -> Network:
        """A checkpoint, read unless it was the last one; UserError when it is another one than the sweep began with."""
        if self.last is None or self.last.name != name:
            self.last = None  # frees it before the next one is read
            self.last = self._read(name)
        return self.last

    def _read(self, name: str) -> Network:
        path, entry = list(zip(self.given.paths, self.given.described.values(), strict=True))[self.names.index(name)]
        saved, dense = load_network(path, self.given.saved.model)
        if saved.sha256 != entry["sha256"]:
            raise UserError(f"{path} was replaced while it was being swept; start again")
        set_way(dense, way_of(self.given.dense))
        saved = replace(saved, data=self.given.saved.data)  # what exported files tell of the images
        args, dtype = self.args, DTYPES[self.args.precision]
        tuning = distillation = None
        if "finetune" in args.recover and self.train is not None:
            rate = finetuning_rate(args, saved)
            tuning = Finetuning(self.train, args.finetune_epochs, rate, **training_recipe(saved), dtype=dtype)
        if "distill" in args.recover and self.train is not None:
            images, augmentation = distillation_images(args, self.train), self.calibration.augmentation
            distillation = Distillation(images, augmentation, args.distill_epochs, args.distill_learning_rate, dtype)
        means = Means(dense.to(torch.device(args.device)), self.layers, self.calibration, tuning, distillation)
        costs = weight_costs(dense, list(self.layers), self.positions) if args.budget == "macs" else None
        how = {"couple": args.couple, "multiple": args.round_filters, "costs": costs}
        return Network(name, saved, means, args.seed, how)


def open_missing(
    args: argparse.Namespace, given: Inputs, panel: Panel, evaluator: Evaluator, search: float | None
) -> tuple[Networks, dict[str, Panel]]:
    """The checkpoints, and this process's share of the networks of `panel` that lack a row, by checkpoint.

    Reads the images that these need, begins to write the sweep, says how long it takes, and evaluates the dense
    networks, all processes together. A `search`, for a tolerance of so many points, lacks levels of its own.
    """
    sweep, settings = evaluator.sweep, evaluator.sweep.header["settings"]
    iterative, known = args.schedule == "iterative", settings.get("calibration_augmentation")
    missing = work.find_missing(sweep, panel, iterative, search)
    calibration, train = load_training_images(args, given, missing.values(), known)
    settings["calibration_augmentation"] = str(calibration.augmentation) if calibration else known
    processes.wait()  # all have read the files that are there
    sweep.begin(calibration_sha256=calibration and calibration.images.hash(), training_sha256=train and train.hash())
    args.words = [word for word in args.words if word != "--restart"]  # an interrupted run goes on with its rows
    names = tuple(sweep.header["checkpoints"])
    networks = Networks(args, given, names, evaluator.layers, evaluator.positions, calibration, train)
    tuned = args.finetune_epochs * len(train or ())
    distilled = args.distill_epochs * distillation_count(args, len(train or ()))
    costs = work.level_costs(len(given.test), len(calibration or ()), distilled, tuned)
    work.announce(evaluator, missing, costs)
    for name in missing:
        if name not in sweep.dense:
            evaluator.add_dense(name, networks.open(name).means.dense)
    return networks, work.my_share(missing, costs, iterative)


def resume_curve(sweep: Sweep, network: Network, curve: Curve, levels: list[float]) -> tuple[Pruner, list[float]]:
    """The pruner of the level where a curve goes on, and the levels from there; from the first if there is no state.

    The state of another sweep is not used. A row before the saved state is missing: start the curve again.
    """
    path = sweep.files.state(network.name, curve)
    if not path.exists():
        return network.pruner, levels
    saved = checkpoint.load(path)
    keys = [row_key(network.name, curve, level) for level in levels]
    row, passed = saved.content.get("row"), 0
    if row in keys and saved.content.get("sweep") == sweep.fingerprint():
        passed = keys.index(row) + 1
    if not passed or not all(sweep.has(network.name, curve, level) for level in levels[:passed]):
        return network.pruner, levels
    pruner = network.pruner.continued(network.means.dense)
    try:
        pruner.network.load_state_dict(saved.net)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged; remove it, and the curve starts from its first level") from error
    return pruner, levels[passed:]


def save_step(sweep: Sweep, network: Network, curve: Curve, level: float, pruner: Pruner) -> None:
    """Write the network that the level after `level` starts from, so that a killed sweep goes on from there."""
    content = {"row": row_key(network.name, curve, level), "sweep": sweep.fingerprint()}
    state = {"net": checkpoint.plain_state(pruner.network)} | content
    checkpoint.save(sweep.files.state(network.name, curve), state)
