"""Prune a trained network level by level, evaluate every level, and plot test accuracy against sparsity."""

from sparsity.data.sources import DATASETS
from sparsity.figures import accuracy, heatmaps
from sparsity.figures.savings import savings_lines
from sparsity.networks import checkpoint, families
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.evaluation import compiled, default_batch_size
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import exclude, positions_per_image, prunable_layers
from sparsity.networks.sparse import ENGINES, require_supported
from sparsity.prune.filters import inner_convs
from sparsity.prune.pruner import Pruner, baked
from sparsity.recover import RECOVERIES
from sparsity.results import store, summary
from sparsity.results.files import SweepFiles
from sparsity.results.rows import Curve, level_text, row_key
from sparsity.results.store import Sweep
from sparsity.sweep import chain, forecast, inputs
from sparsity.sweep.collector import Collector, share_sweep
from sparsity.sweep.controls import ControlBench, measure_controls, require_comparable
from sparsity.sweep.export import Builder, Export, add_export_flags, refuse_export_clashes
from sparsity.sweep.extras import find_exports, find_missing, make_extras
from sparsity.sweep.level import Bench, Pruned, measure, measure_dense, tell_distant
from sparsity.sweep.panel import (
    SENSITIVITY_IMAGES,
    SENSITIVITY_LEVELS,
    Panel,
    add_method_flags,
    choose_panel,
    product_panel,
    refuse_clashes,
)
from sparsity.sweep.settings import describe_run
from sparsity.sweep.subject import Subject, Subjects
from sparsity.sweep.timing import Stopwatch
from sparsity.sweep.work import Item, dealt, work_items
from sparsity.system import errors, machine
from sparsity.system.errors import UserError
from sparsity.system.files import prepare_folder
from sparsity.system.flags import add_machine_flags, integer, levels_type, number, parse_with_explicit, stem_type
from sparsity.system.machine import set_up_machine
from sparsity.system.processes import Ranks
from sparsity.system.startup import answer_interrupts

if __name__ == "__main__":
    answer_interrupts()

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import Build_Resnet

BUILDER = Builder(Build_Resnet.build, Build_Resnet.spec_of)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        help="one or more, as seeds of one experiment (newest numbered in --checkpoint_dir)",
    )
    parser.add_argument(
        "--levels",
        type=levels_type,
        default="0:100:5",
        help="percent: start:stop:step or a list such as 0,40,99.5 (%(default)s)",
    )
    add_method_flags(parser)
    add_export_flags(parser)
    parser.add_argument("--dataset", choices=DATASETS, help="images to test on (from the checkpoint)")
    parser.add_argument("--data_dir", type=Path, help="where they are (from the checkpoint)")
    parser.add_argument("--max_test_images", type=integer(1), help="the first N of a fixed, class-balanced order (all)")
    parser.add_argument("--batch_size", type=integer(1), help="images at a time (32 on a CPU, 500 on a GPU)")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="dense kernels, sparse ones, or these where their zeros are many enough to pay (%(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=number(0, 100),
        default=1.0,
        help="points of accuracy that may be lost at the chosen level (%(default)s)",
    )
    parser.add_argument(
        "--controls", type=Path, nargs="+", default=[], help="checkpoints of smaller dense networks to compare with"
    )
    parser.add_argument("--name", type=stem_type, help="stem of the outputs ({dataset}_{arch})")
    parser.add_argument("--restart", action="store_true", help="measure again what is in the CSV already")
    add_machine_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with those refused that have no meaning together."""
    parser = build_parser()
    args, explicit = parse_with_explicit(parser, argv)
    refuse_clashes(parser, args, explicit)
    refuse_export_clashes(parser, args, explicit)
    if "calibration_images" in explicit and not args.compare:
        curves = product_panel(args.criterion, args.allocation, args.recover, [])
        if not inputs.needs_calibration(curves):
            parser.error("--calibration_images has no effect without a criterion or --recover that looks at images")
    if args.sensitivity:
        args.levels = args.levels if "levels" in explicit else SENSITIVITY_LEVELS
        args.max_test_images = args.max_test_images or SENSITIVITY_IMAGES
    if args.export is not None:  # nobody who wants one file waits for 21 levels
        args.levels = sorted({*args.export, *(args.levels if "levels" in explicit or args.compare else [])})
    return args


def run_sweep(args: argparse.Namespace, team: Ranks) -> None:
    """The whole run: everything that can fail is checked first, then the levels, then the plots."""
    device = set_up_machine(args, team)
    if args.measure and team.size > 1:
        raise UserError("--measure times networks, which other processes would disturb; leave torchrun out for it")
    args.batch_size = args.batch_size or default_batch_size(device)
    prepare_folder(args.images_dir, "--images_dir", 64 << 20)
    paths = args.checkpoint or [checkpoint.newest(args.checkpoint_dir)]
    rates = {"rate": args.finetune_learning_rate, "epochs": args.finetune_epochs}
    checkpoints = inputs.describe_checkpoints(paths, load_network, rates if "finetune" in args.recover else None)
    saved, dense = load_network(paths[0])
    source = inputs.find_source(saved, args.dataset, args.data_dir)
    with team.in_turn("test images"):
        test, classes = inputs.load_test_images(source, saved, args.max_test_images)
    require_comparable(args.controls, load_network, saved)

    example = torch.zeros(1, 3, source.image_size, source.image_size)
    positions = positions_per_image(dense, example)
    prunable = exclude(prunable_layers(dense, example), args.exclude)
    panel = choose_panel(args, list(prunable), [name for name in inner_convs(dense) if name in prunable])
    dtype = machine.dtype_of(args.precision)
    inference = inference_copy(dense.to(device), dtype)
    name = inputs.output_name(args.name, source, saved.model)
    files = SweepFiles(args.images_dir / f"{name}_{'sensitivity' if args.sensitivity else 'pruning'}")
    header = describe_run(args, source, test, classes, saved, checkpoints, panel)
    sizes = {name: layer.weight.numel() for name, layer in prunable.items()}
    exported = find_exports(args, name, panel, paths, dense)
    if args.engine == "sparse":
        require_supported(args.engine, inference, example.to(device, dtype))
    load = functools.partial(inputs.load_evidence, source, saved, args.calibration_images, args.seed, dtype, device)
    evidence = load(set(panel)) if args.restart else None  # before the rows go that would be missed if it failed
    sweep = share_sweep(team, lambda: open_sweep(files, header, test.labels.numpy(), sizes, args.restart))
    args.restart = False  # from here on, rows are kept
    test = test.to(device)
    extras = make_extras(args, BUILDER, exported, sweep, test, panel, inference)
    missing = find_missing(sweep, extras, panel, team)
    with team.in_turn("training images"):
        calibration, train = evidence or load({curve for curves in missing.values() for curve in curves})
    sweep.record_images(
        calibration_sha256=calibration and calibration.images.hash(), training_sha256=train and train.hash()
    )
    tune = functools.partial(inputs.finetuning, train=train, dtype=dtype, **rates) if train else lambda saved: None
    hashes = [entry["sha256"] for entry in sweep.header["checkpoints"].values()]
    named = dict(zip(sweep.header["checkpoints"], zip(paths, hashes, strict=True), strict=True))
    subjects = Subjects(named, load_network, tuple(prunable), calibration, tune, device, args.seed)
    del saved, dense

    with tqdm(unit="img", disable=None, leave=False) as bar:
        fast = compiled(inference, test, args.batch_size) if args.compile == "on" else None
        bench = Bench(sweep, inference, test, positions, args.batch_size, bar, args.engine, extras, fast)
        measure_missing(bench, subjects, missing, team)
    if team.first:
        compare_controls(args, bench, paths[0])
        conclude(sweep, args.tolerance, args.sensitivity)


def compare_controls(args: argparse.Namespace, bench: Bench, path: Path) -> None:
    """Measure the smaller dense networks as the pruned ones of the first checkpoint, `path`, were measured."""
    if not args.controls:
        return
    dense = load_network(path)[1].to(args.device)
    for extra in bench.extras:
        extra.begin(next(iter(bench.sweep.header["checkpoints"])), dense)
    exports, watch = ([extra for extra in bench.extras if isinstance(extra, kind)] for kind in (Export, Stopwatch))
    measure_controls(
        ControlBench(
            bench.sweep.files.controls,
            bench.test,
            bench.batch_size,
            machine.dtype_of(args.precision),
            exports[0].files if exports else None,
            watch[0] if watch else None,
        ),
        args.controls,
        load_network,
    )


def measure_missing(bench: Bench, subjects: Subjects, missing: dict[str, Panel], team: Ranks) -> None:
    """The untouched checkpoints, by all processes together; then the work items, each by the process that takes it."""
    sweep, iterative = bench.sweep, bench.sweep.header["settings"]["schedule"] != "oneshot"
    work = team.broadcast(lambda: forecast.announce(bench, missing, subjects, team.size))
    bench.bar.reset(work.networks * len(bench.test))
    for name in missing:
        if name not in sweep.dense:
            measure_dense(bench, name, subjects.open(name).means.dense, team)
    items = work_items(missing, work.costs, whole=iterative)
    collector = Collector(team, sweep, functools.partial(tell_distant, bench))
    subject = None
    for item in dealt(items, team):
        collector.require_well()
        if subject is None or subject.name != item.checkpoint:
            subject = None  # its memory goes before the next one comes
            subject = subjects.open(item.checkpoint)
            for extra in bench.extras:
                extra.begin(subject.name, subject.means.dense)
        sweep_levels(bench, subject, item, iterative)
    if team.first:
        wanted = [(item.checkpoint, item.curve, level) for item in items for level in item.levels]
        collector.finish(lambda: all(sweep.has(*row) for row in wanted))


def sweep_levels(bench: Bench, subject: Subject, item: Item, iterative: bool) -> None:
    """The experiment: prune, recover, evaluate, write down, for the levels of a work item."""
    sweep, name, curve, means, seed = bench.sweep, subject.name, item.curve, subject.means, subject.seed
    pruner, levels, recover = subject.pruner, item.levels, RECOVERIES[curve[2]]
    if iterative:
        pruner, levels = continue_chain(sweep, subject, curve, levels)
    for level in levels:
        bench.bar.set_description(f"{level_text(level)} % pruned")
        started = time.perf_counter()
        model, notes = pruner.prune(curve, level)
        notes += recover(model, means, machine.derived_seed(seed, round(level * 1e6)))
        if iterative:  # the next level starts where this one ended
            plain = baked(model, means.dense)
            pruner = Pruner(plain, list(means.layers), means.calibration, seed, nested=True)
        if not sweep.has(name, curve, level):
            measure(bench, Pruned(name, curve, level, model, means.layers, subject.saved, notes, started))
            del model  # a masked network is three times as large as what is evaluated
            machine.release_memory()
        if iterative:
            chain.save_state(
                sweep.files.state(name, curve), row_key(name, curve, level), sweep.fingerprint(), pruner.network
            )
    if iterative:
        sweep.files.state(name, curve).unlink(missing_ok=True)


def continue_chain(
    sweep: Sweep, subject: Subject, curve: Curve, levels: tuple[float, ...]
) -> tuple[Pruner, tuple[float, ...]]:
    """Where an iterative curve goes on: the pruner that starts from the level before, and the levels from there."""
    name, means = subject.name, subject.means
    network = baked(means.dense, means.dense)
    keys = [row_key(name, curve, level) for level in levels]
    passed = chain.load_state(sweep.files.state(name, curve), keys, sweep.fingerprint(), network)
    # A row that the state is beyond was lost, or something more is wanted of it.
    if not all(sweep.has(name, curve, level) for level in levels[:passed]):
        passed, network = 0, means.dense
    nested = passed > 0
    return Pruner(network, list(means.layers), means.calibration, subject.seed, nested), levels[passed:]


def load_network(path: Path) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint, with its `model` entry filled in where the file has none, and its dense network on the CPU."""
    saved = checkpoint.load(path)
    model = families.restore(saved, Build_Resnet.build, Build_Resnet.spec_of)
    return dataclasses.replace(saved, model=saved.model or Build_Resnet.spec_of(saved.net)), model


def open_sweep(files: SweepFiles, *parts: Any) -> Sweep:
    """`store.open_sweep`; at a restart the networks of iterative curves that are not done go as well."""
    sweep = store.open_sweep(files, *parts)
    if not sweep.rows:
        files.drop_states()
    return sweep


def conclude(sweep: Sweep, tolerance: float, sensitivity: bool) -> None:
    """Summary, plots, tables and the sentences that answer the question."""
    if sensitivity:
        heatmaps.plot_sensitivity(sweep.files)
        print(summary.sensitivity_table(sweep))
    else:
        entries = summary.summarise_all(sweep, tolerance)
        sweep.finish(entries)
        summary.write_markdown(sweep)
        accuracy.plot_all(sweep.files)
        print(summary.summary_table(sweep))
        for line in [*(entry["sentence"] for entry in entries), *savings_lines(sweep)]:
            print(line)
    sweep.files.drop_states()
    sweep.drop_old()
    print(f"wrote {sweep.files.png} and what it is drawn from beside it: .csv, .json, .npz")


def main(argv: list[str] | None = None) -> int:
    program, words = ("pruning.py", argv) if argv is not None else (sys.argv[0], sys.argv[1:])
    with errors.usage_errors():
        args = parse_args(argv)
    args.command = errors.command_line(program, words)
    return errors.run_main(
        lambda team: run_sweep(args, team),
        lambda: errors.command_line(program, [word for word in words if args.restart or word != "--restart"]),
    )


if __name__ == "__main__":
    sys.exit(main())
