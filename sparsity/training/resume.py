"""Going on with a training: its state is found, held against the flags, and brought back to where it stood."""

import argparse
import math
from typing import Any, NoReturn

import torch
from torch import nn, optim

from sparsity.data.sources import Source
from sparsity.networks.checkpoint import Checkpoint, load, plain_state
from sparsity.system.errors import UserError, one_line
from sparsity.system.processes import launched
from sparsity.training.optimizer import MovingAverage
from sparsity.training.recipe import RECIPES, contradiction

# What makes one experiment differ from another; a resumed run must not change these.
EXPERIMENT = (
    *("dataset", "image_size", "arch", "width", "optimizer", "momentum", "weight_decay", "seed", "precision"),
    *("recipe", *RECIPES["reference"]),
)


MACHINE = ("device", "threads", "compile", "deterministic")  # these change the last bits only; that is said


KEPT = (*EXPERIMENT, "epochs", "save_every", *MACHINE, "data_dir")  # what a checkpoint keeps of the flags


HISTORY_COLUMNS = ("epoch", "learning_rate", "loss", "training_accuracy", "test_loss", "test_accuracy", "seconds")


# What the settings of files mean that were written before these were settings.
ALWAYS_KEPT = ("batch_size", "learning_rate", "T_max")


FORMERLY = {name: value for name, value in RECIPES["reference"].items() if name not in ALWAYS_KEPT} | {
    "recipe": "reference",
    "compile": "off",
    "deterministic": False,
}


class RaisingParser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def find_training_state(args: argparse.Namespace) -> Checkpoint:
    """The training state that `--resume` means: the only one in the folder that fits --dataset and --arch as given.

    Raises UserError when there is none, more than one, or one that is no training state.
    """
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
    state = load(states[0])
    missing = [key for key in ("optimizer", "schedule", "history") if key not in state.content]
    if missing or not state.epoch or not set(EXPERIMENT) <= (state.settings | FORMERLY).keys():
        raise UserError(
            f"{state.path} is a checkpoint but no training state; leave --resume out to train from the start"
        )
    return state


def continue_settings(args: argparse.Namespace, state: Checkpoint, parser: RaisingParser) -> None:
    """Fill `args`, in place, with the saved settings; `parser` knows all flags.

    Raises UserError for flags that contradict the saved settings, and for saved settings that cannot be.
    """
    saved = saved_settings(state, parser)
    given = {name for name in args.explicit if getattr(args, name) != "auto"}
    clashing = [name for name in EXPERIMENT if name in given and getattr(args, name) != saved[name]]
    if clashing:
        words = {name: _flag(name, getattr(args, name)).replace("=", " ") for name in clashing}
        clashes = ", ".join(f"{words[name]} (saved: {saved[name]})" for name in clashing)
        raise UserError(f"{state.path} was trained with other settings: {clashes}; leave them or --resume out")
    for name in MACHINE:
        if name in given and getattr(args, name) != saved[name]:
            print(f"--{name} was {saved[name]} before: the result will not be the same to the bit")
    before, now = state.settings.get("processes", 1), launched()
    if before != now:
        print(f"trained by {before} process(es) before, by {now} now: the result will not be the same to the bit")
    if any(name in given and getattr(args, name) != saved[name] for name in ("device", "deterministic")):
        saved["compile"] = "auto"  # what pays, or may be, with the one does not with the other
    for name in saved.keys() - given:
        setattr(args, name, saved[name])
    if args.epochs < state.epoch:
        raise UserError(f"{state.path} has {state.epoch} epochs already, more than --epochs {args.epochs}")
    if problem := contradiction(args):
        raise UserError(problem)


def saved_settings(state: Checkpoint, parser: RaisingParser) -> dict[str, Any]:
    """The settings in a training state, each held against its flag, as it would be on a command line."""
    saved = FORMERLY | state.settings
    try:
        parsed = parser.parse_args([_flag(name, saved.get(name)) for name in KEPT])
        if problem := contradiction(parsed):
            raise ValueError(problem)
    except ValueError as error:
        raise UserError(f"{state.path} holds settings that cannot be ({one_line(error)})") from error
    return {name: getattr(parsed, name) for name in KEPT}


def _flag(name: str, value: Any) -> str:
    """A setting as the word of a command line; a switch that is not on or off becomes a word that no parser takes."""
    switches = {True: f"--{name}", False: f"--no-{name}"}
    return switches[value] if isinstance(value, bool) else f"--{name}={value}"


def kept_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What files keep of the flags, as plain values."""
    kept = {name: getattr(args, name) for name in KEPT}
    return kept | {"data_dir": str(args.data_dir), "processes": launched()}


def training_progress(
    model: nn.Module,
    average: MovingAverage | None,
    optimizer: optim.Optimizer,
    schedule: optim.lr_scheduler.LRScheduler,
    history: list[dict[str, Any]],
) -> dict[str, Any]:
    """What a training state holds beside a numbered checkpoint, where `net` is the average if there is one."""
    progress = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "history": history}
    if average:
        progress |= {"trained_net": plain_state(model), "averaged_steps": int(average.n_averaged)}
    return progress


def restore_progress(
    state: Checkpoint,
    data: dict[str, Any],
    model: nn.Module,
    average: MovingAverage | None,
    optimizer: optim.Optimizer,
    schedule: optim.lr_scheduler.LRScheduler,
) -> list[dict[str, Any]]:
    """Bring model, average, optimizer and schedule, in place, to where the saved run stood; returns its history.

    `model`, and with it `average`, hold the weights of the state's `net` already; `data` describes the images of now.
    Raises UserError when these are others, or the state is damaged.
    """
    content = state.content
    if (state.data or {}).get("training_sha256") != data["training_sha256"]:
        raise UserError(f"{state.path} was trained on other images than {data['data_dir']} holds now")
    try:
        if average:
            model.load_state_dict(content["trained_net"])
            if type(content["averaged_steps"]) is not int or content["averaged_steps"] < 1:
                raise ValueError("the average counts no steps")
            average.n_averaged.fill_(content["averaged_steps"])
        optimizer.load_state_dict(_with_own_options(content["optimizer"], optimizer))
        names = schedule.state_dict().keys()  # before loading, which may add whatever the file holds
        schedule.load_state_dict(content["schedule"])
        kinds = (int, *[float] * (len(HISTORY_COLUMNS) - 1))
        history = [
            {name: kind(row[name]) for name, kind in zip(HISTORY_COLUMNS, kinds, strict=True)}
            for row in content["history"]
        ]
        if [row["epoch"] for row in history] != list(range(1, state.epoch + 1)):
            raise ValueError(f"the history is not that of {state.epoch} epochs")
        if content["schedule"].keys() != names or schedule.last_epoch != state.epoch:
            raise ValueError("the schedule stands elsewhere")
        require_progress(optimizer, schedule)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = one_line(error)[:120]
        raise UserError(f"{state.path} holds no usable training state ({reason}); leave --resume out") from error
    return history


def require_progress(optimizer: optim.Optimizer, schedule: optim.lr_scheduler.LRScheduler) -> None:
    """ValueError unless every group of a loaded optimizer has the schedule's learning rate and its buffers."""
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        if not math.isclose(float(group["lr"]), rate, rel_tol=1e-9, abs_tol=1e-30):
            raise ValueError("learning rate and schedule disagree")
        buffers = group["momentum"] > 0 if isinstance(optimizer, optim.SGD) else True
        for parameter in group["params"]:
            tensors = [value for value in optimizer.state.get(parameter, {}).values() if torch.is_tensor(value)]
            wide = [tensor for tensor in tensors if tensor.dim()]  # apart from counts of steps
            if (buffers and not wide) or any(tensor.shape != parameter.shape for tensor in wide):
                raise ValueError("the optimizer lacks its buffers")


def _with_own_options(saved: dict[str, Any], optimizer: optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state with the options, but rates, of `optimizer`: `fused` is another on other devices."""
    own = [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]
    return saved | {
        "param_groups": [group | options for group, options in zip(saved["param_groups"], own, strict=True)]
    }
