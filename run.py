"""Train a network on CIFAR, a folder of images or synthetic images, and save the checkpoints that pruning.py reads."""

from sparsity import answer_interrupts

if __name__ == "__main__":
    answer_interrupts()

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

import Build_Resnet
from sparsity import checkpoint, plots, report, runtime
from sparsity.data import (
    DATASETS,
    Source,
    Split,
    class_balanced_order,
    default_image_size,
    load_split,
    training_batches,
)
from sparsity.evaluation import Evaluation, default_batch_size, evaluate, inference_copy, refresh
from sparsity.flags import add_machine_flags, integer, number, parse_with_explicit, set_up_machine
from sparsity.ranks import Ranks
from sparsity.runtime import UserError
from sparsity.training import (
    OPTIMIZERS,
    make_optimizer,
    make_schedule,
    memory_format,
    require_progress,
    train_one_epoch,
)

# What makes one experiment differ from another; a resumed run must not change these.
EXPERIMENT = (
    *("dataset", "image_size", "arch", "width", "optimizer", "batch_size", "learning_rate", "momentum"),
    *("weight_decay", "T_max", "seed", "precision"),
)
KEPT = (*EXPERIMENT, "epochs", "save_every", "device", "threads", "data_dir")  # what a checkpoint keeps of the flags
HISTORY_COLUMNS = ("epoch", "learning_rate", "loss", "training_accuracy", "test_loss", "test_accuracy", "seconds")


def build_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = kind(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch_size", type=integer(2), default=128, help="images a step (%(default)s)")
    parser.add_argument(
        "--learning_rate", type=number(0, 1e30, above=True), default=0.01, help="initial learning rate (%(default)s)"
    )
    parser.add_argument(
        "--momentum", type=number(0, 0.9999), default=0.9, help="for adam: its first beta (%(default)s)"
    )
    parser.add_argument("--weight_decay", type=number(0, 1e30), default=5e-4, help="L2 regularisation (%(default)s)")
    parser.add_argument("--epochs", type=integer(1), default=60, help="passes over the training images (%(default)s)")
    parser.add_argument(
        "--T_max", type=integer(1), default=20, help="half period of the cosine schedule, in epochs (%(default)s)"
    )
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="optimizer (%(default)s)")
    parser.add_argument(
        "--arch", choices=tuple(Build_Resnet.ARCHITECTURES), default="resnet50", help="network (%(default)s)"
    )
    parser.add_argument("--width", type=integer(1, 4096), default=64, help="channels of the first stage (%(default)s)")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="images to train on (%(default)s)")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("datasets"), help="where they are, or are downloaded to (%(default)s)"
    )
    parser.add_argument("--image_size", type=integer(4, 512), help="side in pixels (32; synthetic: 16)")
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=Path("checkpoints"), help="where checkpoints go (%(default)s)"
    )
    parser.add_argument(
        "--save_every", type=integer(1), default=10, help="epochs between numbered checkpoints (%(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the training state in --checkpoint_dir")
    add_machine_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as attributes; `explicit` holds the names of those that were given."""
    args, explicit = parse_with_explicit(build_parser(), argv)
    args.explicit = explicit
    return args


def find_training_state(args: argparse.Namespace) -> checkpoint.Checkpoint:
    """The training state that `--resume` means: the only one in the folder that fits --dataset and --arch as given."""
    states = sorted(args.checkpoint_dir.glob("*_last.pth"))
    if "arch" in args.explicit:
        states = [path for path in states if path.name.endswith(f"_{args.arch}_last.pth")]
    if "dataset" in args.explicit:
        stem = Source(args.dataset, args.data_dir, 0).name
        folder_unknown = args.dataset == "folder" and "data_dir" not in args.explicit
        states = [path for path in states if folder_unknown or path.name.startswith(f"{stem}_")]
    if not states:
        raise UserError(
            f"nothing to resume: {args.checkpoint_dir} has no training state of this run; leave --resume out"
        )
    if len(states) > 1:
        names = ", ".join(path.name for path in states)
        raise UserError(f"--resume could mean {names}; say which with --dataset and --arch")
    state = checkpoint.load(states[0])
    missing = [key for key in ("optimizer", "schedule", "history") if key not in state.content]
    if missing or not state.epoch or not set(EXPERIMENT) <= state.settings.keys():
        raise UserError(
            f"{state.path} is a checkpoint but no training state; leave --resume out to train from the start"
        )
    return state


class _RaisingParser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def saved_settings(state: checkpoint.Checkpoint) -> dict[str, Any]:
    """The settings in a training state, each held against its flag, as it would be on a command line."""
    words = [f"--{name}={state.settings.get(name)}" for name in KEPT]
    try:
        parsed = vars(build_parser(_RaisingParser).parse_args(words))
    except ValueError as error:
        raise UserError(f"{state.path} holds settings that cannot be ({runtime.one_line(error)})") from error
    return {name: parsed[name] for name in KEPT}


def continue_settings(args: argparse.Namespace, state: checkpoint.Checkpoint) -> None:
    """Fill `args`, in place, with the saved settings, and refuse flags that contradict them."""
    saved = saved_settings(state)
    given = {name for name in args.explicit if getattr(args, name) != "auto"}
    clashing = [name for name in EXPERIMENT if name in given and getattr(args, name) != saved[name]]
    if clashing:
        clashes = ", ".join(f"--{name} {getattr(args, name)} (saved: {saved[name]})" for name in clashing)
        raise UserError(f"{state.path} was trained with other settings: {clashes}; leave them or --resume out")
    for name in ("device", "threads"):
        if name in given and getattr(args, name) != saved[name]:
            print(f"--{name} was {saved[name]} before: the result will not be the same to the bit")
    for name in saved.keys() - given:
        setattr(args, name, saved[name])
    if args.epochs < state.epoch:
        raise UserError(f"{state.path} has {state.epoch} epochs already, more than --epochs {args.epochs}")


def numbered_path(args: argparse.Namespace, stem: str, epoch: int) -> Path:
    return args.checkpoint_dir / f"{stem}_ckpt_epoch{epoch}.pth"


def announce_replacement(args: argparse.Namespace, stem: str) -> None:
    """Say, before anything else is printed, that files of an earlier run will be replaced."""
    epochs = range(1, args.epochs + 1)
    mine = [numbered_path(args, stem, epoch) for epoch in epochs if is_saved(epoch, args)]
    there = [path.name for path in (args.checkpoint_dir / f"{stem}_last.pth", *mine) if path.exists()]
    if there:
        listed = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
        print(f"this run replaces checkpoints of an earlier one in {args.checkpoint_dir}: {listed}")


def is_saved(epoch: int, args: argparse.Namespace) -> bool:
    """Whether a numbered checkpoint is written after this epoch."""
    return epoch % args.save_every == 0 or epoch == args.epochs


def check_folders(args: argparse.Namespace, model: nn.Module, first_epoch: int) -> None:
    """Make sure that what training will write can be written, before it starts."""
    weights = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    files = sum(is_saved(epoch, args) for epoch in range(first_epoch, args.epochs + 1))
    state = 3 * weights  # weights and at most two buffers of the optimizer
    runtime.prepare_folder(args.checkpoint_dir, "--checkpoint_dir", files * weights + 2 * state)
    runtime.prepare_folder(args.images_dir, "--images_dir", 1 << 20)


def train(args: argparse.Namespace, team: Ranks) -> None:
    """The whole run: everything that can fail is checked first, then the epochs, then the pictures."""
    state = find_training_state(args) if args.resume else None
    if state:
        continue_settings(args, state)
    args.image_size = args.image_size or default_image_size(args.dataset)
    source = Source(args.dataset, args.data_dir, args.image_size)
    # A resumed run goes on in its own files, whatever the folder of its images is called by now.
    stem = state.path.name.removesuffix("_last.pth") if state else f"{source.name}_{args.arch}"
    if not state:
        announce_replacement(args, stem)
    device = set_up_machine(args, team)
    runtime.prepare_folder(args.checkpoint_dir, "--checkpoint_dir")
    training, test, data = load_images(source)
    spec = {"arch": args.arch, "num_classes": len(data["classes"]), "width": args.width}
    model = checkpoint.restore(state, Build_Resnet.build, Build_Resnet.spec_of) if state else Build_Resnet.build(spec)
    model = model.to(device, memory_format=memory_format(model))
    optimizer = make_optimizer(args.optimizer, model, args.learning_rate, args.momentum, args.weight_decay)
    schedule = make_schedule(optimizer, args.T_max)
    history = restore_progress(state, data, optimizer, schedule) if state else []
    check_folders(args, model, len(history) + 1)
    dtype = runtime.dtype_of(args.precision)
    inference = inference_copy(model, dtype)
    training, test = training.to(device), test.to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.arch} with {parameters:,} parameters on {device} ({args.precision}, {args.threads} threads)")
    print(f"{source.name}: {len(training):,} training and {len(test):,} test images of {args.image_size} pixels")
    if state:
        print(f"resuming after epoch {state.epoch} of {args.epochs}")

    for epoch in range(len(history) + 1, args.epochs + 1):
        started = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        with progress_bar(len(training), epoch, args.epochs) as bar:
            batches = training_batches(training, args.batch_size, args.seed, epoch)
            result = train_one_epoch(model, batches, optimizer, dtype, epoch, bar.advance)
        schedule.step()
        refresh(inference, model)
        tested = evaluate(inference, test, default_batch_size(device))
        seconds = time.perf_counter() - started
        figures = (epoch, rate, result.loss, result.accuracy, tested.loss, tested.accuracy, seconds)
        history.append(dict(zip(HISTORY_COLUMNS, figures, strict=True)))
        print(
            f"Epoch: {epoch} | Loss: {result.loss:.4f} | Training accuracy: {result.accuracy:.3f}% | "
            f"Test accuracy: {tested.accuracy:.3f}% | Epoch Time: {seconds:.2f} secs",
            flush=True,
        )
        content = describe_network(args, model, spec, data, history)
        if is_saved(epoch, args):
            checkpoint.save(numbered_path(args, stem, epoch), content)
        progress = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "history": history}
        checkpoint.save(args.checkpoint_dir / f"{stem}_last.pth", content | progress)
        args.resume = True  # from here on, an interruption can be continued

    final = evaluate(inference, test, default_batch_size(device))
    draw_pictures(args, stem, history, final, test, data)


def load_images(source: Source) -> tuple[Split, Split, dict[str, Any]]:
    """Training images, test images in the fixed order, and the description of both that a checkpoint keeps."""
    training, classes = load_split(source, train=True)
    if len(training) < 2:
        raise UserError(f"{source.name} has one training image; BatchNorm needs two or more")
    test, _ = load_split(source, train=False, statistics=(training.mean, training.std))
    data = {
        "dataset": source.dataset,
        "data_dir": str(source.data_dir),
        "name": source.name,
        "image_size": source.image_size,
        "mean": list(training.mean),
        "std": list(training.std),
        "classes": classes,
        "training_sha256": training.hash(),
    }
    return training, test.take(class_balanced_order(test.labels)), data


def describe_network(
    args: argparse.Namespace, model: nn.Module, spec: dict, data: dict, history: list
) -> dict[str, Any]:
    """A numbered checkpoint's content: the weights first, as in the reference's format, then plain metadata."""
    return {
        "net": checkpoint.plain_state(model),
        "epoch": len(history),
        "model": spec,
        "data": data,
        "settings": {name: getattr(args, name) for name in KEPT} | {"data_dir": str(args.data_dir)},
        "metrics": {name: value for name, value in history[-1].items() if name != "seconds"},
        "versions": runtime.versions(),
    }


def restore_progress(state: checkpoint.Checkpoint, data: dict, optimizer, schedule) -> list[dict[str, Any]]:
    """Bring optimizer and schedule, in place, to where the saved run stood; returns its history."""
    if (state.data or {}).get("training_sha256") != data["training_sha256"]:
        raise UserError(f"{state.path} was trained on other images than {data['data_dir']} holds now")
    try:
        optimizer.load_state_dict(state.content["optimizer"])
        schedule.load_state_dict(state.content["schedule"])
        kinds = (int, *[float] * (len(HISTORY_COLUMNS) - 1))
        history = [
            {name: kind(row[name]) for name, kind in zip(HISTORY_COLUMNS, kinds, strict=True)}
            for row in state.content["history"]
        ]
        require_progress(optimizer, schedule, state.content["schedule"], [row["epoch"] for row in history], state.epoch)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = runtime.one_line(error)[:120]
        raise UserError(f"{state.path} holds no usable training state ({reason}); leave --resume out") from error
    return history


def draw_pictures(
    args: argparse.Namespace, stem: str, history: list, final: Evaluation, test: Split, data: dict[str, Any]
) -> None:
    """Training curve and confusion matrix, each as CSV and picture, and the test accuracy in words."""
    classes = data["classes"]
    title = f"{args.arch} on {data['name']}, {args.image_size} px, {len(history)} epochs"
    training = args.images_dir / f"{stem}_training.csv"
    report.write_csv(training, HISTORY_COLUMNS, history)
    plots.plot_training(training, training.with_suffix(".png"), f"Training {title}")
    confusion = args.images_dir / f"{stem}_confusion.csv"
    pairs = test.labels.cpu() * len(classes) + final.predictions
    counts = torch.bincount(pairs, minlength=len(classes) ** 2).view(len(classes), -1).tolist()
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    columns = ("true class", *classes)
    report.write_csv(confusion, columns, (dict(zip(columns, row, strict=True)) for row in rows))
    accuracy = f"{final.accuracy:.2f} %"
    plots.plot_confusion(confusion, confusion.with_suffix(".png"), f"{title}: test accuracy {accuracy}")
    print(f"Test accuracy: {accuracy} ({final.correct:,} of {final.total:,} images)")
    written = (numbered_path(args, stem, len(history)), training.with_suffix(".png"), confusion.with_suffix(".png"))
    print(f"wrote {', '.join(map(str, written))}")


class progress_bar(tqdm):
    """Images of one epoch with loss, images/s and time left; silent where stderr is not a terminal."""

    def __init__(self, images: int, epoch: int, epochs: int):
        super().__init__(total=images, desc=f"epoch {epoch}/{epochs}", unit="img", disable=None, leave=False)

    def advance(self, images: int, loss: float) -> None:
        """Move to `images` done so far."""
        self.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.update(images - self.n)


def main(argv: list[str] | None = None) -> int:
    program, words = ("run.py", argv) if argv is not None else (sys.argv[0], sys.argv[1:])
    args = parse_args(argv)
    return runtime.run_main(
        lambda team: train(args, team),
        lambda: runtime.command_line(program, words, *(["--resume"] if args.resume else [])),
    )


if __name__ == "__main__":
    sys.exit(main())
