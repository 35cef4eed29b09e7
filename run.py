"""Train a network on CIFAR, a folder of images or synthetic images, and save the checkpoints that pruning.py reads."""

from sparsity.data.images import Split, class_balanced_order, training_batches
from sparsity.data.sources import DATASETS, Source, default_image_size, load_split
from sparsity.figures.record import draw_pictures, write_record
from sparsity.networks import checkpoint, families
from sparsity.networks.evaluation import Evaluation, default_batch_size, evaluate_shared
from sparsity.networks.inference import inference_copy, refresh
from sparsity.networks.layers import memory_format
from sparsity.system import errors, machine, processes
from sparsity.system.files import prepare_folder
from sparsity.system.errors import UserError
from sparsity.system.flags import add_machine_flags, integer, number, parse_with_explicit
from sparsity.system.machine import set_up_machine
from sparsity.system.processes import Ranks
from sparsity.system.startup import answer_interrupts
from sparsity.training.distributed import (
    average_statistics,
    replicate,
    require_enough,
    share_batchnorm,
    share_size,
    start_group,
)
from sparsity.training.epoch import step_function, train_one_epoch
from sparsity.training.optimizer import OPTIMIZERS, MovingAverage, make_optimizer, make_schedule
from sparsity.training.recipe import add_recipe_flags, contradiction, settle_recipe
from sparsity.training.resume import (
    HISTORY_COLUMNS,
    RaisingParser,
    continue_settings,
    find_training_state,
    kept_settings,
    restore_progress,
    training_progress,
)

if __name__ == "__main__":
    answer_interrupts()

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from tqdm import tqdm

import Build_Resnet


def build_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = kind(description=__doc__, allow_abbrev=False)
    add_recipe_flags(parser)
    parser.add_argument(
        "--momentum", type=number(0, 0.9999), default=0.9, help="for adam: its first beta (%(default)s)"
    )
    parser.add_argument("--weight_decay", type=number(0, 1e30), default=5e-4, help="L2 regularisation (%(default)s)")
    parser.add_argument("--epochs", type=integer(1), default=60, help="passes over the training images (%(default)s)")
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
    parser = build_parser()
    args, explicit = parse_with_explicit(parser, argv)
    args.explicit = explicit
    args.image_size = args.image_size or default_image_size(args.dataset)
    settle_recipe(args)
    if not args.resume and (problem := contradiction(args)):  # of a resumed run's settings, most are saved ones
        parser.error(problem)
    return args


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
    state = (4 if args.ema else 3) * weights  # weights, their average, and at most two buffers of the optimizer
    prepare_folder(args.checkpoint_dir, "--checkpoint_dir", files * weights + 2 * state)
    prepare_folder(args.images_dir, "--images_dir", 1 << 20)


def train(args: argparse.Namespace, team: Ranks) -> None:
    """The whole run: everything that can fail is checked first, then the epochs, then the pictures."""
    state = find_training_state(args) if args.resume else None
    if state:
        continue_settings(args, state, build_parser(RaisingParser))
    source = Source(args.dataset, args.data_dir, args.image_size)
    # A resumed run goes on in its own files, whatever the folder of its images is called by now.
    stem = state.path.name.removesuffix("_last.pth") if state else f"{source.name}_{args.arch}"
    if not state:
        announce_replacement(args, stem)
    if team.size > 1 and args.compile == "auto":
        args.compile = "off"  # never tried around collectives; --compile on does
    device = set_up_machine(args, team)
    prepare_folder(args.checkpoint_dir, "--checkpoint_dir")
    with team.in_turn("images"):
        training, test, data = load_images(source)
    require_enough(team, device, args.batch_size, len(training))
    spec = {"arch": args.arch, "num_classes": len(data["classes"]), "width": args.width}
    model, average, optimizer, schedule = build_training(args, spec, state, device)
    history = restore_progress(state, data, model, average, optimizer, schedule) if state else []
    check_folders(args, model, len(history) + 1)
    tested_network = average.module if average else model  # what is evaluated, and saved as the network
    after_step = partial(average.update_parameters, model) if average else lambda: None
    dtype = machine.dtype_of(args.precision)
    inference = inference_copy(tested_network, dtype)
    training, test = training.to(device), test.to(device)
    announce(args, source.name, model, training, test, len(history))
    start_group(team, device)
    share_batchnorm(model, team)
    step = step_function(model, args.compile == "on", share_size(args.batch_size, team))

    for epoch in range(len(history) + 1, args.epochs + 1):
        started = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        with progress_bar(len(training), epoch, args.epochs) as bar:
            batches = training_batches(training, args.batch_size, args.seed, epoch, args.cutout, team)
            result = train_one_epoch(
                model, batches, optimizer, dtype, epoch, bar.advance, after_step, args.label_smoothing,
                forward=replicate(step, team), team=team,
            )  # fmt: skip
        schedule.step()
        average_statistics(team, model, tested_network)
        refresh(inference, tested_network)
        tested = evaluate_shared(team, inference, test, default_batch_size(device))
        seconds = time.perf_counter() - started
        figures = (epoch, rate, result.loss, result.accuracy, tested.loss, tested.accuracy, seconds)
        history.append(dict(zip(HISTORY_COLUMNS, figures, strict=True)))
        print_epoch(history[-1], args.label_smoothing)
        if team.first:
            content = describe_network(args, tested_network, spec, data, history)
            save_epoch(args, stem, content, training_progress(model, average, optimizer, schedule, history))
        team.gather("saved")
        args.resume = True  # from here on, an interruption can be continued

    final = evaluate_shared(team, inference, test, default_batch_size(device))
    if team.first:
        conclude(args, stem, describe_network(args, tested_network, spec, data, history), history, final, test)


def save_epoch(args: argparse.Namespace, stem: str, content: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write the numbered checkpoint, where it is the turn of one, and the training state."""
    if is_saved(content["epoch"], args):
        checkpoint.save(numbered_path(args, stem, content["epoch"]), content)
    checkpoint.save(args.checkpoint_dir / f"{stem}_last.pth", content | progress)


def conclude(
    args: argparse.Namespace, stem: str, content: dict[str, Any], history: list, final: Evaluation, test: Split
) -> None:
    """Pictures, the record, and the test accuracy in words."""
    last = numbered_path(args, stem, args.epochs)
    if not last.exists():  # a run that is resumed where --epochs ends it now
        checkpoint.save(last, content)
    pictures = draw_pictures(args, stem, history, final, test, content["data"])
    record = write_record(args, stem, last, final, test, content["data"])
    print(f"Test accuracy: {final.accuracy:.2f} % ({final.correct:,} of {final.total:,} images)")
    print(f"wrote {', '.join(map(str, (last, record, *pictures)))}")


def build_training(
    args: argparse.Namespace, spec: dict[str, Any], state: checkpoint.Checkpoint | None, device: torch.device
) -> tuple[nn.Module, MovingAverage | None, optim.Optimizer, optim.lr_scheduler.LRScheduler]:
    """Network (new, or the saved one of `state`), its average if there is to be one, optimizer and schedule."""
    model = families.restore(state, Build_Resnet.build, Build_Resnet.spec_of) if state else Build_Resnet.build(spec)
    model = model.to(device, memory_format=memory_format(model))
    average = MovingAverage(model, args.ema) if args.ema else None
    rule = (args.learning_rate, args.momentum, args.weight_decay, args.nesterov, args.norm_weight_decay)
    optimizer = make_optimizer(args.optimizer, model, *rule)
    return model, average, optimizer, make_schedule(optimizer, args.T_max, args.warmup_epochs)


def announce(args: argparse.Namespace, name: str, model: nn.Module, training: Split, test: Split, done: int) -> None:
    """Say what is trained, on what, from which epoch on, and what of the network is tested."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    how = f"{args.precision}, {args.threads} threads" + (", compiled" if args.compile == "on" else "")
    how += f", {processes.launched()} processes" * (processes.launched() > 1)
    print(f"{args.arch} with {parameters:,} parameters on {args.device} ({how})")
    print(f"{name}: {len(training):,} training and {len(test):,} test images of {args.image_size} pixels")
    if args.ema:
        print(f"tested and saved is the moving average of the weights (decay {args.ema:g} a step)")
    if done:
        print(f"resuming after epoch {done} of {args.epochs}")


def print_epoch(row: dict[str, Any], label_smoothing: float) -> None:
    """An epoch's line; a loss against smoothed labels is called so."""
    loss = f"Loss (labels smoothed by {label_smoothing:g})" if label_smoothing else "Loss"
    print(
        f"Epoch: {row['epoch']} | {loss}: {row['loss']:.4f} | Training accuracy: {row['training_accuracy']:.3f}% | "
        f"Test accuracy: {row['test_accuracy']:.3f}% | Epoch Time: {row['seconds']:.2f} secs",
        flush=True,
    )


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
        "settings": kept_settings(args),
        "metrics": {name: value for name, value in history[-1].items() if name != "seconds"},
        "versions": machine.versions(),
    }


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
    with errors.usage_errors():
        args = parse_args(argv)
    args.command = errors.command_line(program, words)
    return errors.run_main(
        lambda team: train(args, team),
        lambda: errors.command_line(program, words, *(["--resume"] if args.resume else [])),
    )


if __name__ == "__main__":
    sys.exit(main())
