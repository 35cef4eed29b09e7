"""A sweep before its first level: layers, curves, the rows that are there, and what is measured beside accuracy."""

import argparse
from typing import Any

from torch import nn

from sparsity.data.images import Split
from sparsity.networks.layers import Layer, exclude, positions_per_image, prunable_layers
from sparsity.prune.coupling import couple
from sparsity.prune.groups import require_groups
from sparsity.results.files import SweepFiles
from sparsity.results.store import Sweep, join_parts, open_sweep
from sparsity.sweep.choice import make_exporter
from sparsity.sweep.evaluator import Extra
from sparsity.sweep.export import ExportFiles
from sparsity.sweep.inputs import Inputs
from sparsity.sweep.prepare import coupled_text, filter_layers, say_what_stays_dense
from sparsity.sweep.timing import Timer
from sparsity.sweep.work import choose_panel
from sparsity.system import processes
from sparsity.system.methods import Panel


def plan(args: argparse.Namespace, given: Inputs) -> tuple[dict[str, Layer], dict[str, int], Panel]:
    """Prunable layers, output positions per image of each layer (for multiply-adds), and the curves and levels."""
    example = given.example.to(args.device)
    prunable = exclude(prunable_layers(given.dense, example), args.exclude)
    say_what_stays_dense(given.dense, example)
    if args.couple:
        print(f"coupled: {coupled_text(couple(given.dense, prunable))}")
    panel = choose_panel(args, list(prunable), filter_layers(given.dense, list(prunable), args.couple))
    require_groups(prunable, panel)
    return prunable, positions_per_image(given.dense, example), panel


def open_shared(
    files: SweepFiles, header: dict[str, Any], given: Inputs, prunable: dict[str, Layer], restart: bool
) -> Sweep:
    """The rows that are there, of this and of earlier runs, and the files that this process adds its own rows to."""
    if processes.first():
        join_parts(files, restart)
    processes.wait()
    sizes = {name: layer.weight.numel() for name, layer in prunable.items()}
    sweep = open_sweep(files, header, given.test.labels.numpy(), sizes, restart)
    return sweep if processes.first() else sweep.part(processes.rank())


def make_extras(
    args: argparse.Namespace, sweep: Sweep, files: ExportFiles, panel: Panel, test: Split, inference: nn.Module
) -> tuple[Extra, ...]:
    """The measurements of --export and --measure; rows that lack one are to be evaluated again."""
    extras: list[Extra] = []
    if args.export is not None:
        extras.append(make_exporter(args, sweep, files, panel, test))
    if args.measure:
        extras.append(Timer(sweep, inference, test.images.shape[-1], args.engine, args.compile == "on"))
    sweep.outdate(row.key for row in sweep.table() if any(extra.lacks(row) for extra in extras))
    return tuple(extras)
