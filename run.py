"""Train a network on CIFAR, a folder of images or synthetic images, and save the checkpoints that pruning.py reads."""

from sparsity.system.errors import command_line, run_main, start
from sparsity.training.recipe import parse_args

if __name__ == "__main__":
    start(parse_args)  # --help, usage errors and Ctrl-C are answered before torch is imported

import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sparsity.data.images import Split, batch_bounds, class_balanced_order, training_batches
from sparsity.data.sources import Source, load_split
from sparsity.figures.training import plot_confusion, plot_training
from sparsity.networks import checkpoint
from sparsity.networks.evaluation import Evaluation, default_batch_size, evaluate_shared
from sparsity.networks.families import file_word, network_name
from sparsity.networks.fused import fused
from sparsity.networks.inference import CompiledNetwork, inference_copy, refresh
from sparsity.results.record import HISTORY_COLUMNS, write_confusion
from sparsity.system import processes
from sparsity.system.files import file_hash, prepare_folder, write_csv, write_json
from sparsity.system.flags import counted
from sparsity.system.machine import DTYPES, derived_seed, describe_machine, set_up_machine, versions
from sparsity.training import resume
from sparsity.training.budget import fit_epochs
from sparsity.training.distributed import average_statistics, replicate, require_enough, share_batchnorm
from sparsity.training.epoch import train_one_epoch
from sparsity.training.network import build_network
from sparsity.training.optimizer import build_training, epoch_rate
from sparsity.training.recipe import training_sizes


def train(args: Namespace) -> None:
    """Train a network: what can fail is checked first, then come the epochs, then pictures and record."""
    started = time.perf_counter()
    processes.join()
    state = resume.find_training_state(args) if args.resume else None  # its settings are in `args` now
    if processes.size() > 1 and args.compile == "auto":
        args.compile = "off"  # around collectives the network is compiled on request only
    device = set_up_machine(args)
    training, test, data = load_images(args)
    require_enough(device, args.batch_size, len(training))
    model, spec = build_network(args, len(data["classes"]), state, device)
    training, test = training.to(device), test.to(device)
    if args.time_budget and not state:  # a resumed run keeps its epochs
        fit_epochs(args, model, training, test, started)
    parts = build_training(args, model, len(batch_bounds(len(training), args.batch_size, 2 * processes.size())))
    history = resume.restore_progress(state, data, parts) if state else []
    numbered, last = prepare_outputs(args, data["name"], model, state)
    tested = parts.average.module if parts.average else model  # the network that is evaluated and saved
    dtype, part = DTYPES[args.precision], (processes.rank(), processes.size())
    inference, sizes = inference_copy(tested, dtype), training_sizes(args)
    network = fused(inference, test)
    announce(args, data["name"], model, len(training), len(test), len(history))
    share_batchnorm(model)
    begin, end = processes.share(args.batch_size, part)
    step = CompiledNetwork(model, end - begin) if args.compile == "on" else model
    new_bar = partial(tqdm, total=len(training), unit="img", disable=None if processes.first() else True, leave=False)

    result = None
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(derived_seed(args.seed, epoch, processes.rank(), 1))  # of what the network draws: dropout
        started, rate, size = time.perf_counter(), epoch_rate(args, parts.optimizer, epoch), sizes[epoch - 1]
        with new_bar(desc=f"epoch {epoch}/{args.epochs}") as bar:
            draws = (args.batch_size, args.seed, epoch, args.cutout, part, args.shift, args.border, size)
            batches = training_batches(training, *draws)
            loss, accuracy = train_one_epoch(
                model, batches, parts.optimizer, dtype, epoch, partial(advance, bar), parts.after_batch,
                args.label_smoothing, forward=replicate(step), part=part,
            )  # fmt: skip
        parts.after_epoch()
        average_statistics(model, tested)
        refresh(inference, tested)
        result = evaluate_shared(network, test, default_batch_size(device))
        figures = (epoch, rate, loss, accuracy, result.loss, result.accuracy, time.perf_counter() - started, size)
        history.append(dict(zip(HISTORY_COLUMNS, figures, strict=True)))
        if processes.first():
            content = describe_network(args, tested, spec, data, history)
            save_epoch(content, numbered.get(epoch), last, resume.training_progress(parts, history))
        print_epoch(history[-1], args)

    final = result or evaluate_shared(network, test, default_batch_size(device))  # a resumed run may have no epoch left
    if processes.first():
        conclude(args, numbered[args.epochs], describe_network(args, tested, spec, data, history), history, final, test)
    processes.leave()


def load_images(args: Namespace) -> tuple[Split, Split, dict[str, Any]]:
    """Training images, test images in the fixed order, and the description of both that a checkpoint keeps."""
    source = Source(args.dataset, args.data_dir, args.image_size)
    with processes.first_alone():
        training, classes = load_split(source, train=True)
        test, _ = load_split(source, train=False, statistics=(training.mean, training.std))
    data = {"dataset": args.dataset, "data_dir": str(args.data_dir), "name": source.name, "image_size": args.image_size}
    statistics = {"mean": list(training.mean), "std": list(training.std)}
    data |= statistics | {"classes": classes, "training_sha256": training.hash()}
    return training, test.take(class_balanced_order(test.labels)), data


def prepare_outputs(
    args: Namespace, name: str, model: nn.Module, state: checkpoint.Checkpoint | None
) -> tuple[dict[int, Path], Path]:
    """Epoch -> checkpoint, for the epochs after which one is kept, and the training state.

    Checks that the folders can be written to and have room, and says which files of an earlier run are replaced.
    """
    # A resumed run goes on in its own files, whatever the folder of its images is called by now.
    stem = state.path.name.removesuffix("_last.pth") if state else f"{name}_{file_word(args.arch)}"
    epochs = (*range(args.save_every, args.epochs, args.save_every), args.epochs)
    numbered = {epoch: args.checkpoint_dir / f"{stem}_ckpt_epoch{epoch}.pth" for epoch in epochs}
    last = args.checkpoint_dir / f"{stem}_last.pth"
    if not state and (there := [path.name for path in (last, *numbered.values()) if path.exists()]):
        print(f"this run replaces checkpoints of an earlier one in {args.checkpoint_dir}: {', '.join(there)}")
    weights = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    whole = (4 if args.ema else 3) * weights  # weights, their average, and at most two buffers of the optimizer
    files = sum(epoch > (state.epoch if state else 0) for epoch in epochs)
    prepare_folder(args.checkpoint_dir, "--checkpoint_dir", files * weights + 2 * whole)
    prepare_folder(args.images_dir, "--images_dir", 1 << 20)
    return numbered, last


def announce(args: Namespace, name: str, model: nn.Module, training: int, test: int, done: int) -> None:
    """Print the network, the machine, the numbers of images, and the epoch that is resumed after."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    several = f", {processes.size()} processes" if processes.size() > 1 else ""
    how = f"{args.precision}, {counted(args.threads, 'thread')}" + ", compiled" * (args.compile == "on") + several
    print(f"{args.arch} with {parameters:,} parameters on {args.device} ({how})")
    print(f"{name}: {training:,} training and {test:,} test images of {args.image_size} pixels")
    if args.ema:
        print(f"tested and saved is the moving average of the weights (decay {args.ema:g} a step)")
    if done:
        print(f"resuming after epoch {done} of {args.epochs}")


def save_epoch(content: dict[str, Any], numbered: Path | None, last: Path, progress: dict[str, Any]) -> None:
    """Write the network of an epoch to its numbered file, if it has one, and the training state to `last`."""
    if numbered:
        checkpoint.save(numbered, content)
    checkpoint.save(last, content | progress)


def advance(bar: tqdm, images: int, loss: float) -> None:
    """Move a bar to `images` done so far."""
    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
    bar.update(images - bar.n)


def print_epoch(row: dict[str, Any], args: Namespace) -> None:
    """Print an epoch's line, with the size of its images if it changes; a loss against smoothed labels is called so."""
    pixels = f" | {row['image_size']} pixels" if args.start_size else ""
    loss = f"Loss (labels smoothed by {args.label_smoothing:g})" if args.label_smoothing else "Loss"
    print(
        f"Epoch: {row['epoch']}{pixels} | {loss}: {row['loss']:.4f} | "
        f"Training accuracy: {row['training_accuracy']:.3f}% | Test accuracy: {row['test_accuracy']:.3f}% | "
        f"Epoch Time: {row['seconds']:.2f} secs",
        flush=True,
    )


def describe_network(args: Namespace, model: nn.Module, spec: dict, data: dict, history: list) -> dict[str, Any]:
    """The content of a numbered checkpoint: the weights first, as in the reference's format, then plain metadata."""
    return {
        "net": checkpoint.plain_state(model),
        "epoch": len(history),
        "model": spec,
        "data": data,
        "settings": resume.kept_settings(args),
        "metrics": {name: value for name, value in history[-1].items() if name != "seconds"},
        "versions": versions(),
    }


def conclude(
    args: Namespace, network: Path, content: dict[str, Any], history: list, final: Evaluation, test: Split
) -> None:
    """Write curve, confusion matrix and record of the training to --images_dir, and print the test accuracy."""
    checkpoint.save(network, content)  # a run that is resumed at its last epoch may not have saved it
    data, stem = content["data"], network.name.split("_ckpt_epoch")[0]
    curve, confusion = (args.images_dir / f"{stem}_{name}.csv" for name in ("training", "confusion"))
    write_csv(curve, HISTORY_COLUMNS, history)
    write_confusion(confusion, data["classes"], test.labels.cpu().numpy(), final.predictions.numpy())
    facts = {
        "command": args.command,
        "seed": args.seed,
        "settings": content["settings"],
        "image_sizes": [row["image_size"] for row in history],
        "versions": content["versions"],
        "machine": describe_machine(test.labels.device),
        "images": {"training_sha256": data["training_sha256"], "test_sha256": test.hash()},
        "checkpoint": {"file": network.name, "sha256": file_hash(network)},
        "test_accuracy": final.accuracy,
    }
    write_json(curve.with_suffix(".json"), facts)
    title = f"{network_name(content['model'])} on {data['name']}, {args.image_size} px, {len(history)} epochs"
    smoothed = f", labels smoothed by {args.label_smoothing:g}" if args.label_smoothing else ""
    pictures = curve.with_suffix(".png"), confusion.with_suffix(".png")
    plot_training(curve, pictures[0], title + smoothed)
    plot_confusion(confusion, pictures[1], title)
    print(f"Test accuracy: {final.accuracy:.2f} % ({final.correct:,} of {final.total:,} images)")
    print(f"wrote {', '.join(map(str, (network, curve.with_suffix('.json'), *pictures)))}")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status; see `run_main`."""
    program, words = ("run.py", argv) if argv is not None else (sys.argv[0], sys.argv[1:])
    args, started = parse_args(argv), time.time()
    args.command = command_line(program, words)
    return run_main(lambda: train(args), lambda: command_line(program, words, *resume.resume_words(args, started)))


if __name__ == "__main__":
    sys.exit(main())
