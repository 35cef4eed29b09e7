"""Prune a trained network level by level, evaluate every level, and plot test accuracy against sparsity."""

from sparsity import answer_interrupts

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
from sparsity import chain, checkpoint, forecast, heatmaps, inputs, plots, report, runtime, summary
from sparsity.bench import Bench, Extra, Pruned, measure, measure_dense, outdate
from sparsity.checkpoint import Checkpoint
from sparsity.controls import ControlBench, measure_controls, require_comparable
from sparsity.data import DATASETS, Split
from sparsity.engine import ENGINES, require_supported
from sparsity.evaluation import default_batch_size, inference_copy
from sparsity.export import Builder, Export, ExportFiles, add_export_flags, refuse_export_clashes
from sparsity.flags import (
    add_machine_flags,
    integer,
    levels_type,
    number,
    parse_with_explicit,
    set_up_machine,
    stem_type,
)
from sparsity.header import Curve
from sparsity.masks import exclude, positions_per_image, prunable_layers
from sparsity.panel import (
    SENSITIVITY_IMAGES,
    SENSITIVITY_LEVELS,
    Panel,
    add_method_flags,
    choose_panel,
    missing_curves,
    product_panel,
    refuse_clashes,
)
from sparsity.pruner import Pruner, baked
from sparsity.recovery import RECOVERIES, Means
from sparsity.report import Sweep, SweepFiles
from sparsity.rows import level_text, row_key
from sparsity.runtime import UserError
from sparsity.savings import savings_lines
from sparsity.settings import describe_run
from sparsity.stopwatch import Stopwatch
from sparsity.thinning import inner_convs

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


def sweep_levels(args: argparse.Namespace) -> None:
    """The whole run: everything that can fail is checked first, then the levels, then the plots."""
    device = set_up_machine(args)
    args.batch_size = args.batch_size or default_batch_size(device)
    runtime.prepare_folder(args.images_dir, "--images_dir", 64 << 20)
    paths = args.checkpoint or [checkpoint.newest(args.checkpoint_dir)]
    rates = {"rate": args.finetune_learning_rate, "epochs": args.finetune_epochs}
    checkpoints = describe_checkpoints(paths, rates if "finetune" in args.recover else None)
    saved, dense = load_network(paths[0])
    source = inputs.find_source(saved, args.dataset, args.data_dir)
    test, classes = inputs.load_test_images(source, saved, args.max_test_images)
    require_comparable(args.controls, load_network, saved)

    example = torch.zeros(1, 3, source.image_size, source.image_size)
    positions = positions_per_image(dense, example)
    prunable = exclude(prunable_layers(dense, example), args.exclude)
    panel = choose_panel(args, list(prunable), [name for name in inner_convs(dense) if name in prunable])
    dtype = runtime.dtype_of(args.precision)
    inference = inference_copy(dense.to(device), dtype)
    kind = "sensitivity" if args.sensitivity else "pruning"
    name = inputs.output_name(args.name, source, saved.model)
    files = SweepFiles(args.images_dir / f"{name}_{kind}")
    header = describe_run(args, source, test, classes, saved, checkpoints, panel)
    sizes = {name: layer.weight.numel() for name, layer in prunable.items()}
    exported = find_exports(args, name, panel, paths, dense)
    if args.engine == "sparse":
        require_supported(args.engine, inference, example.to(device, dtype))
    load = functools.partial(inputs.load_evidence, source, saved, args.calibration_images, args.seed, dtype, device)
    evidence = load(set(panel)) if args.restart else None  # before the rows go that would be missed if it failed
    sweep = report.open_sweep(files, header, test.labels.numpy(), sizes, args.restart)
    if args.restart:
        state_file(files).unlink(missing_ok=True)
    args.restart = False  # from here on, rows are kept
    test = test.to(device)
    extras = make_extras(args, exported, sweep, test, panel, inference)
    outdate(sweep, extras)
    checkpoints, iterative = sweep.header["checkpoints"], args.schedule == "iterative"
    missing = {name: missing_curves(sweep, name, panel, whole=iterative) for name in checkpoints}
    wanted = {curve for curves in missing.values() for curve in curves}
    calibration, train = evidence or load(wanted)
    tune = functools.partial(inputs.finetuning, train=train, dtype=dtype, **rates) if train else lambda saved: None
    sweep.record_images(
        calibration_sha256=calibration and calibration.images.hash(), training_sha256=train and train.hash()
    )
    means = Means(dense, tuple(prunable), calibration, tune(saved))
    networks = forecast.announce(sweep, missing, means, inference, test, args.batch_size, len(extras))
    del saved, dense

    with tqdm(total=networks * len(test), unit="img", disable=None, leave=False) as bar:
        bench = Bench(sweep, inference, test, positions, args.batch_size, bar, args.engine, extras)
        for (name, curves), path in zip(missing.items(), paths, strict=True):
            if curves or name not in sweep.dense:
                saved, dense = load_network(path)
                if saved.sha256 != checkpoints[name]["sha256"]:
                    raise UserError(f"{path} was replaced while it was being swept; start again")
                means = Means(dense.to(device), tuple(prunable), calibration, tune(saved))
                sweep_checkpoint(bench, name, saved, curves, means, args.seed)
    if args.controls:
        compare_controls(args, bench, paths[0])
    conclude(sweep, args.tolerance, args.sensitivity)


def sweep_checkpoint(bench: Bench, name: str, saved: Checkpoint, curves: Panel, means: Means, seed: int) -> None:
    """One checkpoint: its dense network, then its curves."""
    if name not in bench.sweep.dense:
        measure_dense(bench, name, means.dense)
    for extra in bench.extras:
        extra.begin(name, means.dense)
    sweep_curves(bench, name, saved, curves, means, seed)


def compare_controls(args: argparse.Namespace, bench: Bench, path: Path) -> None:
    """Measure the smaller dense networks as the pruned ones of the first checkpoint, `path`, were measured."""
    dense = load_network(path)[1].to(args.device)
    for extra in bench.extras:
        extra.begin(next(iter(bench.sweep.header["checkpoints"])), dense)
    files, watch = ([extra for extra in bench.extras if isinstance(extra, kind)] for kind in (Export, Stopwatch))
    measure_controls(
        ControlBench(
            bench.sweep.files.controls,
            bench.test,
            bench.batch_size,
            runtime.dtype_of(args.precision),
            files[0].files if files else None,
            watch[0] if watch else None,
        ),
        args.controls,
        load_network,
    )


def sweep_curves(bench: Bench, name: str, saved: Checkpoint, curves: Panel, means: Means, seed: int) -> None:
    """The experiment, for one checkpoint: prune, recover, evaluate, write down, for every curve and level."""
    sweep, iterative = bench.sweep, bench.sweep.header["settings"]["schedule"] != "oneshot"
    pruner = Pruner(means.dense, list(means.layers), means.calibration, seed)
    for curve, levels in curves.items():
        recover = RECOVERIES[curve[2]]
        if iterative:
            pruner, levels = continue_chain(sweep, name, curve, levels, means, seed)
        for level in levels:
            bench.bar.set_description(f"{level_text(level)} % pruned")
            started = time.perf_counter()
            model, notes = pruner.prune(curve, level)
            notes += recover(model, means, runtime.derived_seed(seed, round(level * 1e6)))
            if iterative:  # the next level starts where this one ended
                plain = baked(model, means.dense)
                pruner = Pruner(plain, list(means.layers), means.calibration, seed, nested=True)
            if not sweep.has(name, curve, level):
                measure(bench, Pruned(name, curve, level, model, means.layers, saved, notes, started))
                del model  # a masked network is three times as large as what is evaluated
                runtime.release_memory()
            if iterative:
                key = row_key(name, curve, level)
                chain.save_state(state_file(sweep.files), key, sweep.fingerprint(), pruner.network)


def continue_chain(
    sweep: Sweep, name: str, curve: Curve, levels: list[float], means: Means, seed: int
) -> tuple[Pruner, list[float]]:
    """Where an iterative curve goes on: the pruner that starts from the level before, and the levels from there."""
    network = baked(means.dense, means.dense)
    keys = [row_key(name, curve, level) for level in levels]
    passed = chain.load_state(state_file(sweep.files), keys, sweep.fingerprint(), network)
    # A row that the state is beyond was lost, or something more is wanted of it.
    if not all(sweep.has(name, curve, level) for level in levels[:passed]):
        passed, network = 0, means.dense
    nested = passed > 0
    return Pruner(network, list(means.layers), means.calibration, seed, nested), levels[passed:]


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
    args: argparse.Namespace, files: ExportFiles, sweep: Sweep, test: Split, panel: Panel, inference: nn.Module
) -> tuple[Extra, ...]:
    """What `--export` and `--measure` ask for."""
    dtype, extras = runtime.dtype_of(args.precision), []
    if args.export is not None:
        about = {"schedule": sweep.header["settings"]["schedule"], "seed": args.seed, "excluded": args.exclude}
        files.announce_replaced(exported_levels(args, panel), sweep)
        extras.append(Export(frozenset(args.export), files, BUILDER, sweep, test, args.batch_size, dtype, about))
    if args.measure:
        size, device = test.images.shape[-1], torch.device(args.device)
        extras.append(Stopwatch(sweep, BUILDER, inference, size, dtype, device, args.threads, args.engine))
    return tuple(extras)


def state_file(files: SweepFiles) -> Path:
    """Where an iterative sweep keeps the network of its last level until it is done."""
    return files.with_suffix("_state.pth")


def load_network(path: Path) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint, with its `model` entry filled in where the file has none, and its dense network on the CPU."""
    saved = checkpoint.load(path)
    model = checkpoint.restore(saved, Build_Resnet.build, Build_Resnet.spec_of)
    return dataclasses.replace(saved, model=saved.model or Build_Resnet.spec_of(saved.net)), model


def describe_checkpoints(paths: list[Path], rates: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Name -> hash and epoch of every checkpoint, after making sure that all can be read and belong together."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    described: dict[str, dict[str, Any]] = {}
    kinds = []
    for name, path in zip(names, paths, strict=True):
        saved, _ = load_network(path)
        twins = [other for other, entry in described.items() if entry["sha256"] == saved.sha256]
        if twins or name in described:
            raise UserError(f"--checkpoint {path} is the same as {(twins or [name])[0]}; name each one once")
        described[name] = {"sha256": saved.sha256, "epoch": saved.epoch}
        data = saved.data or {}
        if rates:  # whether it can be fine-tuned is found out before long work
            inputs.training_recipe(saved)
            inputs.finetuning_rates(saved, **rates)
        kinds.append((saved.model, *(data.get(key) for key in ("dataset", "image_size", "mean", "std", "classes"))))
        if kinds[-1] != kinds[0]:
            raise UserError(f"{path} and {paths[0]} differ in network or data; sweep them apart, with --name for each")
    return described


def conclude(sweep: Sweep, tolerance: float, sensitivity: bool) -> None:
    """Summary, plots, tables and the sentences that answer the question."""
    if sensitivity:
        heatmaps.plot_sensitivity(sweep.files)
        print(summary.sensitivity_table(sweep))
    else:
        entries = summary.summarise_all(sweep, tolerance)
        sweep.finish(entries)
        summary.write_markdown(sweep)
        plots.plot_all(sweep.files)
        print(summary.summary_table(sweep))
        for line in [*(entry["sentence"] for entry in entries), *savings_lines(sweep)]:
            print(line)
    state_file(sweep.files).unlink(missing_ok=True)
    sweep.drop_old()
    print(f"wrote {sweep.files.png} and what it is drawn from beside it: .csv, .json, .npz")


def main(argv: list[str] | None = None) -> int:
    program, words = ("pruning.py", argv) if argv is not None else (sys.argv[0], sys.argv[1:])
    args = parse_args(argv)
    args.command = runtime.command_line(program, words)
    return runtime.run_main(
        lambda: sweep_levels(args),
        lambda: runtime.command_line(program, [word for word in words if args.restart or word != "--restart"]),
    )


if __name__ == "__main__":
    sys.exit(main())
