"""Prune a trained network level by level, evaluate every level, and plot test accuracy against sparsity."""

from sparsity.sweep.flags import parse_args
from sparsity.system.errors import start

if __name__ == "__main__":
    start(parse_args)  # --help, usage errors and Ctrl-C are answered before torch is imported, which takes seconds

import argparse
import sys
import time
from contextlib import nullcontext

from tqdm import tqdm

from sparsity.figures import accuracy, heatmaps
from sparsity.figures.savings import savings_lines
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.fused import fused
from sparsity.networks.inference import compiled
from sparsity.networks.sparse import require_supported
from sparsity.recover import RECOVERIES
from sparsity.results import comparison, summary, verdicts
from sparsity.results.files import SweepFiles
from sparsity.results.store import Sweep, read_sweep
from sparsity.sweep.choice import export_again, prepare_exports, wanted_files
from sparsity.sweep.controls import measure_controls, require_comparable
from sparsity.sweep.describe import describe
from sparsity.sweep.evaluator import Evaluator, PrunedNetwork
from sparsity.sweep.header import describe_sweep, output_name
from sparsity.sweep.inputs import Inputs, load_inputs
from sparsity.sweep.levels import CHOICES
from sparsity.sweep.networks import Networks, open_missing, resume_curve, save_step
from sparsity.sweep.plan import make_extras, open_shared, plan
from sparsity.sweep.predict import predict
from sparsity.sweep.prepare import prepare_inference
from sparsity.sweep.search import search_levels
from sparsity.system import processes
from sparsity.system.errors import command_line, run_main
from sparsity.system.files import lock, prepare_folder, write_atomic
from sparsity.system.flags import counted
from sparsity.system.machine import derived_seed, release_memory, set_up_machine
from sparsity.system.methods import Curve, Panel


def run_experiment(
    networks: Networks, share: dict[str, Panel], evaluator: Evaluator, iterative: bool, search: float | None
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


def evaluate_missing(
    args: argparse.Namespace, given: Inputs, panel: Panel, evaluator: Evaluator, search: float | None = None
) -> None:
    """Evaluate the networks of `panel` that lack a row, by all processes; then the first one has all rows.

    With `search`, points of tolerance, the levels are those that the search finds.
    """
    networks, share = open_missing(args, given, panel, evaluator, search)
    run_experiment(networks, share, evaluator, args.schedule == "iterative", search)
    processes.wait()
    if processes.first():
        evaluator.sweep.join(read_sweep(part) for part in evaluator.sweep.files.parts())


def sweep_levels(args: argparse.Namespace) -> None:
    """A whole run: check all that can fail, evaluate what is missing, then draw and tell what was found."""
    processes.join()
    device = set_up_machine(args)
    args.batch_size = args.batch_size or default_batch_size(device)
    prepare_folder(args.images_dir, "--images_dir", 64 << 20)
    given = load_inputs(args)
    require_comparable(args.controls, given.saved)
    inference = prepare_inference(args, given)
    prunable, positions, panel = plan(args, given)
    if args.engine == "sparse":
        require_supported(inference, given.example.to(device))
    name = output_name(args.name, given.source, given.saved.model)
    exported = prepare_exports(args, given, panel, name)

    files = SweepFiles(args.images_dir / f"{name}_{'sensitivity' if args.sensitivity else 'pruning'}")
    alone = lock(args.images_dir / f".{files.stem.name}.lock") if processes.first() else nullcontext()
    with alone, tqdm(unit="img", disable=None if processes.first() else True, leave=False) as bar:
        sweep = open_shared(files, describe_sweep(args, given, panel), given, prunable, args.restart)
        test = given.test.to(device)
        network = compiled(inference, test, args.batch_size) if args.compile == "on" else fused(inference, test)
        extras = make_extras(args, sweep, exported, panel, test, inference)
        if sweep.kept:
            print(f"kept: {counted(sweep.kept, 'row')} in {files.csv}, measured with these settings")
        rest = {"batch_size": args.batch_size, "engine": args.engine, "extras": extras, "bar": bar}
        evaluator = Evaluator(sweep, inference, network, test, positions, layers=tuple(prunable), **rest)
        evaluate_missing(args, given, panel, evaluator, args.tolerance if args.search else None)
        if args.export in CHOICES:
            again, exporting = export_again(args, given, panel, evaluator)
            if again:
                evaluate_missing(args, given, again, exporting)
        if processes.first():
            measure_controls(args.controls, evaluator, given.saved, given.dense)
            bar.close()
            conclude(sweep, args.tolerance, args.sensitivity, wanted_files(extras))
    processes.leave()


def conclude(sweep: Sweep, tolerance: float, sensitivity: bool, written: set[tuple[Curve, float]]) -> None:
    """Summary, plots, tables and the sentences that answer the question, and the files `written` by curve and level."""
    sweep.pack()
    if sensitivity:
        heatmaps.plot_sensitivity(sweep.files)
        print(summary.sensitivity_table(sweep))
    else:
        entries = verdicts.summarise_all(sweep, tolerance)
        comparisons = comparison.compare_points(sweep, comparison.asked_pairs(sweep, entries))
        sweep.record("summary", entries)
        sweep.record("comparisons", comparisons)
        write_atomic(sweep.files.with_suffix(".md"), summary.markdown_table(sweep))
        accuracy.plot_all(sweep.files)
        print(summary.summary_table(sweep))
        sentences = [entry["sentence"] for entry in [*entries, *comparisons]]
        allocations = comparison.allocation_sentence(comparisons)
        for line in filter(None, [*sentences, allocations, verdicts.scope_text(sweep), *savings_lines(sweep, written)]):
            print(line)
    sweep.files.drop_states()
    sweep.files.drop_old()
    more = "" if sensitivity else ", a table (.md) and more figures"
    print(f"wrote {sweep.files.png}; beside it are .csv, .json, .npz{more}")


def main(argv: list[str] | None = None) -> int:
    """Run the script with these arguments, or those of the command line; returns its exit status."""
    args = parse_args(argv)
    program, args.words = ("pruning.py", argv) if argv is not None else (sys.argv[0], sys.argv[1:])
    args.command = command_line(program, args.words)
    task = predict if args.predict else describe if args.describe else sweep_levels
    return run_main(lambda: task(args), lambda: command_line(program, args.words))


if __name__ == "__main__":
    sys.exit(main())
