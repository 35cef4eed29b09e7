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
from sparsity.bench import Bench, measure, measure_dense
from sparsity.checkpoint import Checkpoint
from sparsity.data import DATASETS, Source, Split
from sparsity.evaluation import default_batch_size, inference_copy
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
)
from sparsity.pruner import Pruner, baked
from sparsity.recovery import RECOVERIES, Means
from sparsity.report import Sweep, SweepFiles
from sparsity.rows import level_text, row_key
from sparsity.runtime import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        help="one or more, as seeds of one experiment (newest numbered in checkpoints/)",
    )
    parser.add_argument(
        "--levels",
        type=levels_type,
        default="0:100:5",
        help="percent: start:stop:step or a list such as 0,40,99.5 (%(default)s)",
    )
    add_method_flags(parser)
    parser.add_argument("--dataset", choices=DATASETS, help="images to test on (from the checkpoint)")
    parser.add_argument("--data_dir", type=Path, help="where they are (from the checkpoint)")
    parser.add_argument("--max_test_images", type=integer(1), help="the first N of a fixed, class-balanced order (all)")
    parser.add_argument("--batch_size", type=integer(1), help="images at a time (32 on a CPU, 500 on a GPU)")
    parser.add_argument(
        "--tolerance",
        type=number(0, 100),
        default=1.0,
        help="points of accuracy that may be lost at the chosen level (%(default)s)",
    )
    parser.add_argument("--name", type=stem_type, help="stem of the outputs ({dataset}_{arch})")
    parser.add_argument("--restart", action="store_true", help="measure again what is in the CSV already")
    add_machine_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with those refused that have no meaning together."""
    parser = build_parser()
    args, explicit = parse_with_explicit(parser, argv)
    methods = explicit & {"criterion", "allocation", "recover"}
    if args.compare and (methods or args.sensitivity or "schedule" in explicit):
        parser.error(
            "--compare is a panel of its own; leave out --criterion --allocation --recover --schedule --sensitivity"
        )
    if args.sensitivity and ("allocation" in explicit or args.schedule == "iterative"):
        parser.error("--sensitivity prunes one layer at a time; leave out --allocation and --schedule")
    if args.sensitivity and (len(args.criterion) > 1 or len(args.recover) > 1):
        parser.error("--sensitivity takes one --criterion and one --recover")
    tuned = {"finetune_epochs", "finetune_learning_rate"} & explicit
    if tuned and (args.compare or "finetune" not in args.recover):
        parser.error(f"--{min(tuned)} has no effect without --recover finetune")
    if "calibration_images" in explicit and not args.compare:
        curves = product_panel(args.criterion, args.allocation, args.recover, [])
        if not inputs.needs_calibration(curves):
            parser.error("--calibration_images has no effect without a criterion or --recover that looks at images")
    if args.sensitivity and "tolerance" in explicit:
        parser.error("--tolerance has no effect with --sensitivity, which chooses no level")
    if args.sensitivity:
        args.levels = args.levels if "levels" in explicit else SENSITIVITY_LEVELS
        args.max_test_images = args.max_test_images or SENSITIVITY_IMAGES
    return args


def sweep_levels(args: argparse.Namespace) -> None:
    """The whole run: everything that can fail is checked first, then the levels, then the plots."""
    device = set_up_machine(args)
    args.batch_size = args.batch_size or default_batch_size(device)
    runtime.prepare_folder(args.images_dir, "--images_dir", 64 << 20)
    paths = args.checkpoint or [checkpoint.newest(Path("checkpoints"))]
    rates = {"rate": args.finetune_learning_rate, "epochs": args.finetune_epochs}
    checkpoints = describe_checkpoints(paths, rates if "finetune" in args.recover else None)
    saved, dense = load_network(paths[0])
    source = inputs.find_source(saved, args.dataset, args.data_dir)
    test, classes = inputs.load_test_images(source, saved, args.max_test_images)

    example = torch.zeros(1, 3, source.image_size, source.image_size)
    positions = positions_per_image(dense, example)
    prunable = exclude(prunable_layers(dense, example), args.exclude)
    panel = choose_panel(args, list(prunable))
    dtype = runtime.dtype_of(args.precision)
    inference = inference_copy(dense.to(device), dtype)
    kind = "sensitivity" if args.sensitivity else "pruning"
    files = SweepFiles(args.images_dir / f"{inputs.output_name(args.name, source, saved.model)}_{kind}")
    header = describe_run(args, source, test, classes, saved, checkpoints, panel)
    sizes = {name: layer.weight.numel() for name, layer in prunable.items()}
    load = functools.partial(inputs.load_evidence, source, saved, args.calibration_images, args.seed, dtype, device)
    evidence = load(set(panel)) if args.restart else None  # before the rows go that would be missed if it failed
    sweep = report.open_sweep(files, header, test.labels.numpy(), sizes, args.restart)
    if args.restart:
        state_file(files).unlink(missing_ok=True)
    args.restart = False  # from here on, rows are kept
    checkpoints, iterative = sweep.header["checkpoints"], args.schedule == "iterative"
    missing = {name: missing_curves(sweep, name, panel, whole=iterative) for name in checkpoints}
    wanted = {curve for curves in missing.values() for curve in curves}
    calibration, train = evidence or load(wanted)
    tune = functools.partial(inputs.finetuning, train=train, dtype=dtype, **rates) if train else lambda saved: None
    sweep.record_images(
        calibration_sha256=calibration and calibration.images.hash(), training_sha256=train and train.hash()
    )
    means = Means(dense, tuple(prunable), calibration, tune(saved))
    networks = forecast.announce(sweep, missing, means, inference, test.to(device), args.batch_size)
    del saved, dense

    with tqdm(total=networks * len(test), unit="img", disable=None, leave=False) as bar:
        bench = Bench(sweep, inference, test.to(device), positions, args.batch_size, bar)
        for (name, curves), path in zip(missing.items(), paths, strict=True):
            if not curves and name in sweep.dense:
                continue
            saved, dense = load_network(path)
            if saved.sha256 != checkpoints[name]["sha256"]:
                raise UserError(f"{path} was replaced while it was being swept; start again")
            dense.to(device)
            if name not in sweep.dense:
                measure_dense(bench, name, dense)
            means = Means(dense, tuple(prunable), calibration, tune(saved))
            sweep_curves(bench, name, curves, means, args.seed)

    conclude(sweep, args.tolerance, args.sensitivity)


def sweep_curves(bench: Bench, name: str, curves: Panel, means: Means, seed: int) -> None:
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
                measure(bench, name, curve, level, model, means.layers, notes, started)
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
    if any(key not in sweep.rows for key in keys[:passed]):  # a row was lost that the state is beyond
        passed, network = 0, means.dense
    nested = passed > 0
    return Pruner(network, list(means.layers), means.calibration, seed, nested), levels[passed:]


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


def describe_run(
    args: argparse.Namespace,
    source: Source,
    test: Split,
    classes: list[str],
    saved: Checkpoint,
    checkpoints: dict[str, dict[str, Any]],
    panel: Panel,
) -> dict[str, Any]:
    """What the JSON holds; rows are only mixed where `settings` and `data` are the same."""
    arch, device = saved.model["arch"], torch.device(args.device)
    # An iterative curve depends on all levels before, so that levels cannot be added to one that is there.
    levels = ",".join(map(level_text, args.levels))
    calibrated, tuned = inputs.needs_calibration(panel) or None, inputs.needs_training(panel) or None
    return {
        "title": f"{arch} on {source.name}, {shorten(list(checkpoints))}\n{len(test):,} test images, {args.precision}",
        "curves": [list(curve) for curve in panel],
        "settings": {
            "arch": arch,
            "test_images": len(test),
            "batch_size": args.batch_size,
            "precision": args.precision,
            "device": device.type,
            "threads": args.threads,
            "seed": args.seed,
            "calibration_images": calibrated and (args.calibration_images or inputs.DEFAULT_CALIBRATION),
            "schedule": f"iterative {levels}" if args.schedule == "iterative" else "oneshot",
            "finetune": tuned and f"{args.finetune_epochs} epochs, {args.finetune_learning_rate}",
            "torch": str(torch.__version__),
        },
        "data": inputs.describe_data(source, test, classes),
        "checkpoints": checkpoints,
        "versions": runtime.versions(),
        "machine": runtime.machine(device),
        "command": args.command,
    }


def shorten(names: list[str]) -> str:
    """Names in a title: all of one or two, otherwise the first and a count."""
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"


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
        for entry in entries:
            print(entry["sentence"])
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
