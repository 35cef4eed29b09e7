"""What is measured or written of every network beside its accuracy, as the flags ask for."""

import argparse
from pathlib import Path

import torch
from torch import nn

from sparsity.data.images import Split
from sparsity.results.rows import Curve
from sparsity.results.store import Sweep
from sparsity.sweep.export import Builder, Export, ExportFiles
from sparsity.sweep.level import Extra, outdate
from sparsity.sweep.panel import Panel, missing_curves
from sparsity.sweep.timing import Stopwatch
from sparsity.system.machine import dtype_of
from sparsity.system.processes import Ranks


def find_exports(args: argparse.Namespace, name: str, panel: Panel, paths: list[Path], dense: nn.Module) -> ExportFiles:
    """Where exported files go, once it is clear that they can."""
    files = ExportFiles(args.checkpoint_dir, name, args.export_precision, args.export_format)
    if args.export is not None:
        weights = sum(parameter.numel() for parameter in dense.parameters())
        files.require_writable(exported_levels(args, panel), [*paths, *args.controls], weights)
    return files


def exported_levels(args: argparse.Namespace, panel: Panel) -> list[tuple[Curve, float]]:
    """The curves and levels that `--export` means."""
    return [(curve, level) for curve, levels in panel.items() for level in levels if level in args.export]


def make_extras(
    args: argparse.Namespace,
    builder: Builder,
    files: ExportFiles,
    sweep: Sweep,
    test: Split,
    panel: Panel,
    inference: nn.Module,
) -> tuple[Extra, ...]:
    """What `--export` and `--measure` ask for."""
    dtype, extras = dtype_of(args.precision), []
    if args.export is not None:
        about = {"schedule": sweep.header["settings"]["schedule"], "seed": args.seed, "excluded": args.exclude}
        files.announce_replaced(exported_levels(args, panel), sweep)
        extras.append(Export(frozenset(args.export), files, builder, sweep, test, args.batch_size, dtype, about))
    if args.measure:
        size, device = test.images.shape[-1], torch.device(args.device)
        extras.append(Stopwatch(sweep, builder, inference, size, dtype, device, args.threads, args.engine))
    return tuple(extras)


def find_missing(sweep: Sweep, extras: tuple[Extra, ...], panel: Panel, team: Ranks) -> dict[str, Panel]:
    """Checkpoint -> what has to be measured of it, as the first process finds it; what lacks an extra is outdated."""
    outdate(sweep, extras)
    sweep.outdate(team.broadcast(lambda: sweep.outdated))
    whole = sweep.header["settings"]["schedule"] != "oneshot"
    return team.broadcast(
        lambda: {name: missing_curves(sweep, name, panel, whole) for name in sweep.header["checkpoints"]}
    )
