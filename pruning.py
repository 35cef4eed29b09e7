"""Prune a trained network level by level, evaluate every level, and plot test accuracy against sparsity."""

from sparsity.sweep.flags import parse_args
from sparsity.system.errors import start

if __name__ == "__main__":
    start(parse_args)  # --help, usage errors and Ctrl-C are answered before torch is imported, which takes seconds

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn
from tqdm import tqdm

from sparsity.data.images import Split
from sparsity.figures import accuracy, heatmaps
from sparsity.figures.savings import savings_lines
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.inference import compiled
from sparsity.networks.layers import Layer, exclude, positions_per_image, prunable_layers
from sparsity.networks.sparse import require_supported
from sparsity.prune.coupling import couple
from sparsity.prune.groups import require_groups
from sparsity.recover import RECOVERIES
from sparsity.results import comparison, summary, verdicts
from sparsity.results.files import SweepFiles
from sparsity.results.store import Sweep, join_parts, open_sweep, read_sweep
from sparsity.sweep import inputs, work
from sparsity.sweep.choice import chosen_panel, export_candidates
from sparsity.sweep.controls import measure_controls, require_comparable
from sparsity.sweep.describe import describe
from sparsity.sweep.export import Exporter, ExportFiles
from sparsity.sweep.flags import PROGRAMS
from sparsity.sweep.header import describe_sweep, output_name
from sparsity.sweep.level import Evaluator, Extra, PrunedNetwork
from sparsity.sweep.levels import CHOICES
from sparsity.sweep.networks import Networks, resume_curve, save_step
from sparsity.sweep.predict import predict
from sparsity.sweep.prepare import coupled_text, filter_layers, prepare_inference, say_what_stays_dense
from sparsity.sweep.programs import require_program
from sparsity.sweep.search import search_levels
from sparsity.sweep.timing import Timer
from sparsity.system import processes
from sparsity.system.errors import UserError, command_line, run_main
from sparsity.system.files import lock, prepare_folder
from sparsity.system.machine import DTYPES, derived_seed, release_memory, set_up_machine


def run_experiment(
    networks: Networks, share: dict[str, work.Panel], evaluator: Evaluator, iterative: bool, search: float | None
) -> None:
    """The experiment: prune, recover, evaluate and record each network of this process's share.

    In a `search`, for a tolerance of so many points, each row decides the next level.
    """
    sweep = evaluator.sweep
    for name, panel in share.items():
        network = networks.open(name)
        evaluator.begin(name, network.means.dense)
        for curve, levels in panel.items():
            pruner = network.pruner
            if iterative:
                pruner, levels = resume_curve(sweep, network, curve, levels)
            elif search is not None and not curve.pattern:
                levels = search_levels(sweep, name, curve, search)
            for level in levels:
                started, seed = time.perf_counter(), derived_seed(network.seed, round(level * 1e6))
                model, notes = pruner.prune(curve, level)
                notes += RECOVERIES[curve.recover](model, network.means, seed)
                if iterative:  # the next level starts where this one ends
                    pruner = pruner.continued(model)
                if not sweep.has(name, curve, level):
                    evaluator.add(PrunedNetwork(network.saved, name, curve, level, model, notes, started))
                del model  # a masked network is three times as large as the one that is evaluated
                release_memory()
                if iterative:
                    save_step(sweep, network, curve, level, pruner)
            if iterative:
                sweep.files.state(name, curve).unlink(missing_ok=True)


def sweep_levels(args: argparse.Namespace) -> None:
    """A whole run: check all that can fail, evaluate what is missing, then draw and tell what was found."""
    processes.join()
    device = set_up_machine(args)
    if args.measure and processes.size() > 1:
        raise UserError("--measure times networks, which other processes would disturb; leave torchrun out for it")
    args.batch_size = args.batch_size or default_batch_size(device)
    prepare_folder(args.images_dir, "--images_dir", 64 << 20)
    given = inputs.load_inputs(args)
    require_comparable(args.controls, given.saved)
    inference = prepare_inference(args, given)
    prunable, positions, panel = plan(args, given)
    if args.engine == "sparse":
        require_supported(inference, given.example.to(device))
    exported = prepare_exports(args, given, panel)

    files = SweepFiles(args.images_dir / f"{exported.name}_{'sensitivity' if args.sensitivity else 'pruning'}")
    alone = lock(args.images_dir / f".{files.stem.name}.lock") if processes.first() else nullcontext()
    with alone, tqdm(unit="img", disable=None if processes.first() else True, leave=False) as bar:
        sweep = open_shared(files, describe_sweep(args, given, panel), given, prunable, args.restart)
        test = given.test.to(device)
        fast = compiled(inference, test, args.batch_size) if args.compile == "on" else None
        extras = make_extras(args, sweep, exported, panel, test, inference)
        rest = {"batch_size": args.batch_size, "engine": args.engine, "extras": extras, "bar": bar}
        evaluator = Evaluator(sweep, inference, fast, test, positions, layers=tuple(prunable), **rest)
        evaluate_missing(args, given, panel, evaluator, args.tolerance if args.search else None)
        if args.export in CHOICES:
            export_chosen(args, given, panel, evaluator)
        if processes.first():
            measure_controls(args.controls, evaluator, given.saved, given.dense)
            bar.close()
            conclude(sweep, args.tolerance, args.sensitivity)
    processes.leave()


def plan(args: argparse.Namespace, given: inputs.Inputs) -> tuple[dict[str, Layer], dict[str, int], work.Panel]:
    """Prunable layers, output positions per image of each layer (for multiply-adds), and the curves and levels."""
    example = given.example.to(args.device)
    prunable = exclude(prunable_layers(given.dense, example), args.exclude)
    say_what_stays_dense(given.dense, example)
    if args.couple:
        print(f"coupled: {coupled_text(couple(given.dense, prunable))}")
    inner = filter_layers(given.dense, list(prunable), args.couple)
    panel = work.choose_panel(args, list(prunable), inner)
    require_groups(prunable, panel)
    return prunable, positions_per_image(given.dense, example), panel


def prepare_exports(args: argparse.Namespace, given: inputs.Inputs, panel: work.Panel) -> ExportFiles:
    """The paths of exported files; UserError where they cannot be made or written, or would replace an input."""
    name = output_name(args.name, given.source, given.saved.model)
    files = ExportFiles(args.checkpoint_dir, name, args.export_precision, args.export_format)
    if args.export is not None:
        if args.export_format in PROGRAMS:
            require_program(given.dense, given.test, args.export_precision, args.export_format)
        wanted, most = export_candidates(args.export, panel, args.search)
        weights = sum(parameter.numel() for parameter in given.dense.parameters())
        files.require_writable(wanted, most, [*given.paths, *args.controls], weights)
    return files


def open_shared(
    files: SweepFiles, header: dict[str, Any], given: inputs.Inputs, prunable: dict[str, Layer], restart: bool
) -> Sweep:
    """The rows that are there, of this and of earlier runs, and the files that this process adds its own rows to."""
    if processes.first():
        join_parts(files, restart)
    processes.wait()
    sizes = {name: layer.weight.numel() for name, layer in prunable.items()}
    sweep = open_sweep(files, header, given.test.labels.numpy(), sizes, restart)
    return sweep if processes.first() else sweep.part(processes.rank())


def make_extras(
    args: argparse.Namespace,
    sweep: Sweep,
    exported: ExportFiles,
    panel: work.Panel,
    test: Split,
    inference: nn.Module,
) -> tuple[Extra, ...]:
    """The measurements of --export and --measure; rows that lack one are to be evaluated again."""
    extras: list[Extra] = []
    dtype = DTYPES[args.precision]
    if args.export is not None:
        about = {"schedule": sweep.header["settings"]["schedule"], "seed": args.seed, "excluded": args.exclude}
        about["budget"] = args.budget
        wanted = set() if args.export in CHOICES else set(export_candidates(args.export, panel, search=False)[0])
        extras.append(Exporter(wanted, exported, sweep, test, args.batch_size, dtype, about))
    if args.measure:
        extras.append(Timer(sweep, inference, test.images.shape[-1], args.engine, args.compile == "on"))
    sweep.outdate(row.key for row in sweep.table() if any(extra.lacks(row) for extra in extras))
    return tuple(extras)


def evaluate_missing(
    args: argparse.Namespace,
    given: inputs.Inputs,
    panel: work.Panel,
    evaluator: Evaluator,
    search: float | None = None,
) -> None:
    """Evaluate the networks without a row: the dense ones by all processes together, then each its share.

    With `search`, points of tolerance, the levels of `panel` are those that the search finds.
    """
    sweep, iterative = evaluator.sweep, args.schedule == "iterative"
    missing = work.find_missing(sweep, panel, iterative, search)
    settings = sweep.header["settings"]
    known = settings.get("calibration_augmentation")
    calibration, train = inputs.load_training_images(args, given, missing.values(), known)
    settings["calibration_augmentation"] = str(calibration.augmentation) if calibration else known
    processes.wait()  # all have read the files that are there
    sweep.begin(calibration_sha256=calibration and calibration.images.hash(), training_sha256=train and train.hash())
    args.words = [word for word in args.words if word != "--restart"]  # an interrupted run goes on with its rows
    names, positions = tuple(sweep.header["checkpoints"]), evaluator.positions
    networks = Networks(args, given, names, evaluator.layers, positions, calibration, train)
    work.announce(evaluator, missing)
    for name in missing:
        if name not in sweep.dense:
            evaluator.add_dense(name, networks.open(name).means.dense)
    tuned = args.finetune_epochs * len(train or ())
    distilled = args.distill_epochs * len(inputs.distillation_images(args, train)) if train else 0
    costs = work.level_costs(len(given.test), len(calibration or ()), distilled, tuned)
    run_experiment(networks, work.my_share(missing, costs, iterative), evaluator, iterative, search)
    processes.wait()
    if processes.first():
        sweep.join(read_sweep(part) for part in sweep.files.parts())


def export_chosen(args: argparse.Namespace, given: inputs.Inputs, panel: work.Panel, evaluator: Evaluator) -> None:
    """Prune and recover the networks at the chosen levels once more, and write their files; their rows stay the same.

    Nothing is done where the files are there.
    """
    sweep, exporter = evaluator.sweep, next(extra for extra in evaluator.extras if isinstance(extra, Exporter))
    entries = verdicts.summarise_all(sweep, args.tolerance)
    chosen, lines = chosen_panel(sweep, entries, panel, args.export == "best", args.budget == "macs")
    exporter.wanted.update((curve, level) for curve, (level,) in chosen.items())
    exporter.files.require_writable([*exporter.wanted], 0, [*given.paths, *args.controls], 0)  # of rows there before
    lacking = [row.key for row in sweep.table() if exporter.lacks(row)]
    sweep.outdate(lacking)
    if args.schedule == "iterative":  # a level is reached by those before
        chosen = {curve: [step for step in panel[curve] if step <= level] for curve, (level,) in chosen.items()}
    if lacking:
        print("the networks at the chosen levels are made once more, for their files")
        evaluate_missing(args, given, chosen, replace(evaluator, extras=(exporter,)))
    for line in lines:
        print(line)


def conclude(sweep: Sweep, tolerance: float, sensitivity: bool) -> None:
    """Summary, plots, tables and the sentences that answer the question."""
    sweep.pack()
    if sensitivity:
        heatmaps.plot_sensitivity(sweep.files)
        print(summary.sensitivity_table(sweep))
    else:
        entries = verdicts.summarise_all(sweep, tolerance)
        comparisons = comparison.compare_curves(sweep, entries)
        sweep.record("summary", entries)
        sweep.record("comparisons", comparisons)
        summary.write_markdown(sweep)
        accuracy.plot_all(sweep.files)
        print(summary.summary_table(sweep))
        sentences = [entry["sentence"] for entry in [*entries, *comparisons]]
        allocations = comparison.allocation_sentence(comparisons)
        for line in filter(None, [*sentences, allocations, verdicts.scope_text(sweep), *savings_lines(sweep)]):
            print(line)
    sweep.files.drop_states()
    sweep.files.drop_old()
    print(f"wrote {sweep.files.png} and what it is drawn from beside it: .csv, .json, .npz")


def main(argv: list[str] | None = None) -> int:
    """Run the script with these arguments, or those of the command line; returns its exit status."""
    args = parse_args(argv)
    program, args.words = ("pruning.py", argv) if argv is not None else (sys.argv[0], sys.argv[1:])
    args.command = command_line(program, args.words)
    task = predict if args.predict else describe if args.describe else sweep_levels
    return run_main(lambda: task(args), lambda: command_line(program, args.words))


if __name__ == "__main__":
    sys.exit(main())
