"""The networks that --export writes: those of levels, or those that the summary of a sweep chooses."""

import argparse
from dataclasses import replace
from typing import Any

from sparsity.data.images import Split
from sparsity.results.comparison import furthest
from sparsity.results.rows import curve_name
from sparsity.results.store import Sweep
from sparsity.results.verdicts import curve_of, summarise_all
from sparsity.sweep.evaluator import Evaluator, Extra
from sparsity.sweep.export import Exporter, ExportFiles
from sparsity.sweep.flags import PROGRAMS
from sparsity.sweep.inputs import Inputs
from sparsity.sweep.levels import CHOICES, SEARCH_STEP
from sparsity.sweep.programs import require_program
from sparsity.system.machine import DTYPES
from sparsity.system.methods import Curve, Panel


def prepare_exports(args: argparse.Namespace, given: Inputs, panel: Panel, name: str) -> ExportFiles:
    """The paths of exported files, which begin with `name`.

    Raises UserError where they cannot be made or written, or would replace an input.
    """
    files = ExportFiles(args.checkpoint_dir, name, args.export_precision, args.export_format)
    if args.export is not None:
        if args.export_format in PROGRAMS:
            require_program(given.dense, given.test, args.export_precision, args.export_format)
        wanted, most = export_candidates(args.export, panel, args.search)
        weights = sum(parameter.numel() for parameter in given.dense.parameters())
        files.require_writable(wanted, most, [*given.paths, *args.controls], weights)
    return files


def export_candidates(export: list[float] | str, panel: Panel, search: bool) -> tuple[list[tuple[Curve, float]], int]:
    """The networks, by curve and level, that --export may write, and how many of them it writes at most."""
    if isinstance(export, list):
        wanted = [(curve, level) for curve, levels in panel.items() for level in levels if level in export]
        return wanted, len(wanted)
    grid = [SEARCH_STEP * step for step in range(1, round(100 / SEARCH_STEP) + 1)]
    reached = {curve: grid if search and not curve.pattern else levels for curve, levels in panel.items()}
    wanted = [(curve, level) for curve, levels in reached.items() for level in levels]
    return wanted, len(panel) if export == "chosen" else 1


def make_exporter(args: argparse.Namespace, sweep: Sweep, files: ExportFiles, panel: Panel, test: Split) -> Exporter:
    """Writes the networks of the levels that --export lists; none yet where the results choose them."""
    wanted = set() if args.export in CHOICES else set(export_candidates(args.export, panel, args.search)[0])
    about = {"schedule": sweep.header["settings"]["schedule"], "seed": args.seed, "excluded": args.exclude}
    about |= {"budget": args.budget}
    return Exporter(wanted, files, sweep, test, args.batch_size, DTYPES[args.precision], about)


def wanted_files(extras: tuple[Extra, ...]) -> set[tuple[Curve, float]]:
    """The networks of which a command wanted files, by curve and level."""
    return {wanted for extra in extras if isinstance(extra, Exporter) for wanted in extra.wanted}


def export_again(
    args: argparse.Namespace, given: Inputs, panel: Panel, evaluator: Evaluator
) -> tuple[Panel, Evaluator]:
    """The curves and levels to be pruned once more for the files of the chosen networks, and an evaluator for them.

    No curves where the files are there. The evaluator exports only, so that times in the rows stay. Says which curves
    get no file.
    """
    sweep, exporter = evaluator.sweep, next(extra for extra in evaluator.extras if isinstance(extra, Exporter))
    entries = summarise_all(sweep, args.tolerance)
    chosen, lines = chosen_panel(sweep, entries, panel, args.export == "best", args.budget == "macs")
    for line in lines:
        print(line)
    exporter.wanted.update((curve, level) for curve, (level,) in chosen.items())
    exporter.files.require_writable([*exporter.wanted], 0, [*given.paths, *args.controls], 0)  # of rows there before
    lacking = [row.key for row in sweep.table() if exporter.lacks(row)]
    sweep.outdate(lacking)
    if args.schedule == "iterative":  # a level is reached by those before
        chosen = {curve: [step for step in panel[curve] if step <= level] for curve, (level,) in chosen.items()}
    if lacking:
        print("the networks at the chosen levels are made once more, for their files")
    return chosen if lacking else {}, replace(evaluator, extras=(exporter,))


def chosen_panel(
    sweep: Sweep, entries: list[dict[str, Any]], panel: Panel, best: bool, macs: bool
) -> tuple[Panel, list[str]]:
    """Curve -> its chosen level, of the curves in `panel` or the `best` of them; and lines about curves without one.

    `entries` are those of `summarise_all`. The best curve's chosen level removes the most weights, or multiply-adds
    with `macs`. A level of 0 % is no network to take away.
    """
    mine = [entry for entry in entries if curve_of(entry) in panel]
    found = {curve_of(entry): [entry["level"]] for entry in mine if entry["level"]}
    if best and found:
        curve = furthest(sweep, [entry for entry in mine if entry["level"]], "macs" if macs else "weights")
        return {curve: found[curve]}, []
    without = [curve_name(curve_of(entry)) for entry in mine if not entry["level"]]
    return found, [f"{name}: no file is written, because no level above 0 % was chosen" for name in without]
