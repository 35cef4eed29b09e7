"""Going on with a training: its state is found, held against the flags, and brought back to the epoch it stopped at."""

import glob
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsity.data.sources import Source
from sparsity.networks import families
from sparsity.networks.checkpoint import Checkpoint, load, plain_state
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.training.optimizer import Training
from sparsity.training.recipe import DEFAULTS, contradiction

# The settings that a resumed run must not change.
EXPERIMENT = ("dataset", "image_size", "arch", "width", "momentum", "weight_decay", "seed", "precision")
EXPERIMENT += ("recipe", *DEFAULTS, "time_budget")
MACHINE = ("device", "threads", "compile", "deterministic")  # these change the last bits only; that is said
KEPT = (*EXPERIMENT, "epochs", "save_every", *MACHINE, "data_dir")  # the settings in a checkpoint


def find_training_state(args: Namespace) -> Checkpoint:
    """The training state that `--resume` means, the only one in the folder that fits --dataset and --arch as given.

    Its settings go into `args`, see `continue_settings`. Raises UserError when there is none, more than one, or one
    that is no training state.
    """
    named = "dataset" in args.given and (args.dataset != "folder" or "data_dir" in args.given)
    name = glob.escape(Source(args.dataset, args.data_dir, 0).name) if named else "*"
    arch = glob.escape(families.file_word(args.arch)) if "arch" in args.given else "*"
    states = sorted(args.checkpoint_dir.glob(f"{name}_{arch}_last.pth"))
    if not states:
        raise UserError(f"nothing to resume: {args.checkpoint_dir} has no state of this run; leave --resume out")
    if len(states) > 1:
        names = ", ".join(path.name for path in states)
        raise UserError(f"--resume could mean {names}; say which with --dataset and --arch")
    state = load(states[0])
    if {"epoch", "optimizer", "schedule", "history"} - state.content.keys() or set(KEPT) - state.settings.keys():
        raise UserError(f"{state.path} is a checkpoint but no training state; leave --resume out to start anew")
    families.require_named(state, families.named(args.arch, args.arch_args) if "arch" in args.given else None)
    continue_settings(args, state)
    return state


def resume_words(args: Namespace, started: float) -> list[str]:
    """The words that a command needs in addition to resume its run, if the run has saved a state since `started`."""
    states = args.checkpoint_dir.glob(f"*_{glob.escape(families.file_word(args.arch))}_last.pth")
    if not args.resume and not any(path.stat().st_mtime > started for path in states):
        return []
    which = ("dataset", "arch", *["data_dir"] * (args.dataset == "folder"))
    return ["--resume", *(f"--{name}={getattr(args, name)}" for name in which if name not in args.given)]


def continue_settings(args: Namespace, state: Checkpoint) -> None:
    """Give the flags that are not on the command line, or are 'auto' there, their saved settings, in place.

    Raises UserError for flags that contradict the experiment's saved settings; says which differ of the machine's.
    """
    saved = state.settings | {"data_dir": Path(state.settings["data_dir"])}
    saved |= {"arch_args": (state.model or {}).get("arch_args", {})}
    if "arch" in args.given:
        saved["arch"] = args.arch  # the same network, whatever the path of its file is by now
    given = {name: getattr(args, name) for name in args.given if getattr(args, name) != "auto"}
    given["processes"] = processes.size()
    changed = {name for name in given.keys() & saved.keys() if given[name] != saved[name]}
    if clashing := [
        f"{name} {given[name]} (saved: {saved[name]})" for name in (*EXPERIMENT, "arch_args") if name in changed
    ]:
        raise UserError(f"{state.path} was trained otherwise: {', '.join(clashing)}; leave these flags or --resume out")
    for name in (*MACHINE, "processes"):
        if name in changed:
            print(f"{name}: {given[name]} now, {saved[name]} before; the result will not be the same to the bit")
    if changed & {"device", "deterministic", "processes"}:
        saved["compile"] = "auto"  # compiling that pays on the one machine may not on the other
    vars(args).update({name: saved[name] for name in (*KEPT, "arch_args") if name not in given})
    if args.epochs < state.epoch:
        raise UserError(f"{state.path} has {state.epoch} epochs already, more than --epochs {args.epochs}")
    if problem := contradiction(args):
        raise UserError(problem)


def kept_settings(args: Namespace) -> dict[str, Any]:
    """The settings that files keep, as plain values, and the number of processes."""
    kept = {name: getattr(args, name) for name in KEPT}
    return kept | {"data_dir": str(args.data_dir), "processes": processes.size()}


def training_progress(training: Training, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries of a training state beside those of a numbered checkpoint, whose `net` is the average if any.

    All tensors are on the CPU, so that a machine without the GPU can read them.
    """
    state = training.optimizer.state_dict()
    state["state"] = {
        index: {name: value.cpu() if isinstance(value, Tensor) else value for name, value in buffers.items()}
        for index, buffers in state["state"].items()
    }
    progress = {"optimizer": state, "schedule": training.schedule.state_dict(), "history": history}
    if training.average:
        steps = int(training.average.n_averaged)
        progress |= {"trained_net": plain_state(training.model), "averaged_steps": steps}
    return progress


def restore_progress(state: Checkpoint, data: dict[str, Any], training: Training) -> list[dict[str, Any]]:
    """Bring `training`, in place, to where the saved run stood; returns its history.

    The model, and with it the average, holds the weights of the state's `net` already; `data` describes the images of
    now, and UserError is raised when these are others.
    """
    content, saved = state.content, state.content["optimizer"]
    if (state.data or {}).get("training_sha256") != data["training_sha256"]:
        raise UserError(f"{state.path} was trained on other images than {data['data_dir']} holds now")
    if training.average:
        training.model.load_state_dict(content["trained_net"])
        training.average.n_averaged.fill_(content["averaged_steps"])
    for group, own in zip(saved["param_groups"], training.optimizer.param_groups, strict=True):
        group |= {"fused": own["fused"]} if "fused" in own else {}  # as it is on the device of now
    training.optimizer.load_state_dict(saved)
    training.schedule.load_state_dict(content["schedule"])
    return content["history"]
