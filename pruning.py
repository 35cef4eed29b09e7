"""Prune a trained network level by level, evaluate every level, and plot test accuracy against sparsity."""

from sparsity import answer_interrupts

if __name__ == "__main__":
    answer_interrupts()

import argparse
import copy
import dataclasses
import math
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import Build_Resnet
from sparsity import checkpoint, plots, report, runtime, summary
from sparsity.checkpoint import Checkpoint
from sparsity.data import (
    CIFAR10_STATISTICS,
    CIFAR100_STATISTICS,
    DATASETS,
    Source,
    Split,
    class_balanced_order,
    default_image_size,
    load_split,
)
from sparsity.evaluation import default_batch_size, evaluate, inference_copy, refresh
from sparsity.flags import add_machine_flags, integer, number, set_up_machine
from sparsity.masks import Census, census, positions_per_image, prunable_layers, prune_l1_uniform
from sparsity.report import Row, Sweep, SweepFiles, level_text, row_key
from sparsity.runtime import UserError


def levels_type(text: str) -> list[float]:
    """Levels in percent, ascending: 'start:stop:step' with stop included, or a list 'a,b,c'."""
    try:
        if ":" in text:
            start, stop, step = (Decimal(part) for part in text.split(":"))
            if not (start.is_finite() and stop.is_finite() and step.is_finite()) or step <= 0 or start > stop:
                raise ValueError
            if (stop - start) / step > 10_000:
                raise argparse.ArgumentTypeError(f"{text!r} is more than 10,000 levels")
            # Decimals, so that 0:1:0.1 ends at 1 and holds 0.3 instead of 0.30000000000000004.
            levels = [start + step * index for index in range(int((stop - start) / step) + 1)]
        else:
            levels = [Decimal(part) for part in text.split(",")]
        if not all(0 <= level <= 100 for level in levels):  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text!r} has a level outside 0 to 100 percent")
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither start:stop:step nor a list such as 0,40,90") from error
    return sorted({float(level_text(float(level))) for level in levels})  # levels of equal text are one level


def stem_type(text: str) -> str:
    """A file name's stem, without folders."""
    if not text.isprintable() or Path(text).name != text or text.startswith(".") or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name for files in --images_dir")
    return text


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
    parser.add_argument("--criterion", choices=("l1",), default="l1", help="what a weight is worth (%(default)s)")
    parser.add_argument(
        "--allocation", choices=("uniform",), default="uniform", help="how a level is dealt to the layers (%(default)s)"
    )
    parser.add_argument("--recover", choices=("none",), default="none", help="what is done after pruning (%(default)s)")
    parser.add_argument("--dataset", choices=DATASETS, help="test images (from the checkpoint)")
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
    return build_parser().parse_args(argv)


def sweep_levels(args: argparse.Namespace) -> None:
    """The whole run: everything that can fail is checked first, then the levels, then the plot."""
    device = set_up_machine(args)
    args.batch_size = args.batch_size or default_batch_size(device)
    runtime.prepare_folder(args.images_dir, "--images_dir", 64 << 20)
    paths = args.checkpoint or [checkpoint.newest(Path("checkpoints"))]
    checkpoints = describe_checkpoints(paths)
    curve = (args.criterion, args.allocation, args.recover)
    saved, dense = load_network(paths[0])
    source, test, classes = load_test_images(args, saved)

    example = torch.zeros(1, 3, source.image_size, source.image_size)
    positions = positions_per_image(dense, example)
    prunable = list(prunable_layers(dense, example))
    inference = inference_copy(dense.to(device), runtime.dtype_of(args.precision))
    files = SweepFiles(args.images_dir / f"{output_name(args.name, source, saved.model)}_pruning")
    header = describe_run(args, source, test, classes, saved, checkpoints)
    sweep = report.open_sweep(files, header, test.labels.numpy(), args.restart)
    checkpoints = sweep.header["checkpoints"]
    args.restart = False  # from here on, rows are kept
    test = test.to(device)
    missing = {
        name: [level for level in args.levels if row_key(name, curve, level) not in sweep.rows] for name in checkpoints
    }
    networks = sum(len(levels) + (name not in sweep.dense) for name, levels in missing.items())
    announce(sweep, networks, inference, test, args.batch_size)
    del saved, dense

    with tqdm(total=networks * len(test), unit="img", disable=None, leave=False) as bar:
        for (name, levels), path in zip(missing.items(), paths, strict=True):
            if not levels and name in sweep.dense:
                continue
            saved, dense = load_network(path)
            if saved.sha256 != checkpoints[name]["sha256"]:
                raise UserError(f"{path} was replaced while it was being swept; start again")
            dense.to(device)
            if name not in sweep.dense:
                refresh(inference, dense)
                result = evaluate(inference, test, args.batch_size, bar.update)
                if not math.isfinite(result.loss):
                    raise UserError(f"{path} gives outputs that are not finite; its weights are damaged")
                sweep.add_dense(name, result.predictions.numpy(), {"accuracy": result.accuracy, "loss": result.loss})
            for level in levels:
                bar.set_description(f"{level_text(level)} % pruned")
                started = time.perf_counter()
                counts = prune_and_refresh(inference, dense, prunable, positions, level)
                result = evaluate(inference, test, args.batch_size, bar.update)
                row = Row(
                    name,
                    *curve,
                    level=level,
                    **count_columns(counts),
                    **report.accuracy_columns(result.correct, result.total),
                    loss=round(result.loss, 6),
                    agreement=round(100 * float((result.predictions.numpy() == sweep.dense[name]).mean()), 6),
                    seconds=round(time.perf_counter() - started, 3),
                )
                sweep.add(row, result.predictions.numpy())
                bar.write(f"{level_text(level):>5} % pruned: accuracy {row.accuracy:6.2f} %, {row.seconds:.1f} s")

    conclude(sweep, args.tolerance)


def prune_and_refresh(
    inference: nn.Module, dense: nn.Module, prunable: list[str], positions: dict[str, int], level: float
) -> Census:
    """Prune a fresh copy of the dense network to `level` percent and bring its weights into `inference`, in place."""
    # Masks compound, so every level starts from the dense network: new modules around the same weights, which masks
    # leave as they are.
    model = copy.deepcopy(dense, {id(weight): weight for weight in dense.parameters()})
    layers = {layer: model.get_submodule(layer) for layer in prunable}
    prune_l1_uniform(layers, level / 100)
    counts = census(model, layers, positions)
    refresh(inference, model)
    del model, layers  # a masked network is three times as large as what is evaluated
    runtime.release_memory()
    return counts


def count_columns(counts: Census) -> dict[str, Any]:
    """The columns of a row that come from counting weights."""
    return {
        "sparsity": round(counts.sparsity, 6),
        "nonzero": counts.nonzero,
        "parameters": counts.parameters,
        "compression": round(counts.compression, 6),
        "macs_ratio": round(counts.macs_ratio, 6),
    }


def load_network(path: Path) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint, with its `model` entry filled in where the file has none, and its dense network on the CPU."""
    saved = checkpoint.load(path)
    model = checkpoint.restore(saved, Build_Resnet.build, Build_Resnet.spec_of)
    return dataclasses.replace(saved, model=saved.model or Build_Resnet.spec_of(saved.net)), model


def describe_checkpoints(paths: list[Path]) -> dict[str, dict[str, Any]]:
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
        kinds.append((saved.model, *(data.get(key) for key in ("dataset", "image_size", "mean", "std", "classes"))))
        if kinds[-1] != kinds[0]:
            raise UserError(f"{path} and {paths[0]} differ in network or data; sweep them apart, with --name for each")
    return described


def load_test_images(args: argparse.Namespace, saved: Checkpoint) -> tuple[Source, Split, list[str]]:
    """The test images that the flags or else the checkpoint name, in the fixed order, and the names of the classes."""
    data = saved.data or {}
    num_classes = saved.model["num_classes"]
    dataset = args.dataset or data.get("dataset") or {10: "cifar10", 100: "cifar100"}.get(num_classes)
    if dataset not in DATASETS:
        raise UserError(f"{saved.path} does not tell its dataset; name one of {', '.join(DATASETS)} with --dataset")
    if not data:
        print(f"{saved.path} has no metadata: images of {dataset} are normalised with the usual constants of CIFAR")
    data_dir = args.data_dir or Path(data.get("data_dir", "datasets"))
    source = Source(dataset, data_dir, data.get("image_size") or default_image_size(dataset))
    usual = CIFAR100_STATISTICS if dataset == "cifar100" else CIFAR10_STATISTICS
    statistics = (tuple(data["mean"]), tuple(data["std"])) if data else usual
    test, classes = load_split(source, train=False, statistics=statistics)
    if len(classes) != num_classes:
        raise UserError(f"{saved.path} tells {num_classes} classes apart, {source.name} has {len(classes)}")
    if data and data["classes"] != classes:
        differing = next(pair for pair in zip(data["classes"], classes, strict=False) if pair[0] != pair[1])
        raise UserError(
            f"{saved.path} was trained on other classes than {source.name} has: {' against '.join(differing)}"
        )
    test = test.take(class_balanced_order(test.labels)[: args.max_test_images])
    if len(test) < 2 * num_classes:
        raise UserError(
            f"{len(test)} test images are too few for {num_classes} classes: a level is chosen on one half of them and "
            f"reported on the other; use at least {2 * num_classes}"
        )
    return source, test, classes


def output_name(name: str | None, source: Source, spec: dict) -> str:
    """The stem of the outputs; that images are synthetic is always in it."""
    name = name or f"{source.name}_{spec['arch']}"
    return name if source.dataset != "synthetic" or "synthetic" in name else f"synthetic_{name}"


def describe_run(
    args: argparse.Namespace,
    source: Source,
    test: Split,
    classes: list[str],
    saved: Checkpoint,
    checkpoints: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """What the JSON holds; rows are only mixed where `settings` and `data` are the same."""
    arch, device = saved.model["arch"], torch.device(args.device)
    return {
        "title": (
            f"{arch} on {source.name}, {shorten(list(checkpoints))}\n"
            f"smallest weights of each layer pruned; {len(test):,} test images, {args.precision}"
        ),
        "settings": {
            "arch": arch,
            "test_images": len(test),
            "batch_size": args.batch_size,
            "precision": args.precision,
            "device": device.type,
            "threads": args.threads,
            "seed": args.seed,
            "torch": str(torch.__version__),
        },
        "data": {
            "dataset": source.name,
            "image_size": source.image_size,
            "mean": list(test.mean),
            "std": list(test.std),
            "classes": classes,
            "test_sha256": test.hash(),
        },
        "checkpoints": checkpoints,
        "versions": runtime.versions(),
        "machine": runtime.machine(device),
        "command": args.command,
    }


def shorten(names: list[str]) -> str:
    """Names in a title: all of one or two, otherwise the first and a count."""
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"


def announce(sweep: Sweep, networks: int, inference: nn.Module, test: Split, batch_size: int) -> None:
    """Say what is kept and, from a first few batches, how long the rest will take."""
    if sweep.rows:
        print(f"{len(sweep.rows)} rows in {sweep.files.csv} were measured with these settings and are kept")
    if not networks:
        return
    few = test.take(torch.arange(min(len(test), 4 * batch_size)))
    evaluate(inference, few, batch_size)  # warm-up
    started = time.perf_counter()
    evaluate(inference, few, batch_size)
    rate = len(few) / (time.perf_counter() - started)
    expected = runtime.duration(networks * len(test) / rate)
    print(f"about {expected}: {networks} networks x {len(test):,} images at {rate:,.0f} images/s", flush=True)


def conclude(sweep: Sweep, tolerance: float) -> None:
    """Summary, plot, table and the sentence that answers the question."""
    entries = [summary.summarise(sweep, curve, tolerance) for curve in sweep.curves()]
    sweep.finish(entries)
    plots.plot_sweep(sweep.files)
    print(summary.summary_table(sweep))
    for entry in entries:
        print(entry["sentence"])
    print(f"wrote {sweep.files.png} and beside it .csv, .json, .npz")


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
