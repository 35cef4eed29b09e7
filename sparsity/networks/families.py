"""The one place that builds a network: from its name, its description, or a checkpoint.

A description is the entry `model` of checkpoints: {'arch', 'num_classes', 'width'} of a built-in network, as
`Build_Resnet.build` takes it; {'arch', 'num_classes', 'arch_args'} of others, and 'sha256' of the file where `arch` is
`path/to/file.py:function`. A checkpoint alone never makes such a file run: the user has to name it as well. A thin
network has an entry more, 'widths': {layer: filters left}, see `narrow`.
"""

import dataclasses
import difflib
import importlib
import json
import re
import shlex
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import Build_Resnet
from sparsity.networks.checkpoint import Checkpoint, bare, fit, load
from sparsity.networks.narrow import narrow
from sparsity.networks.outputs import give_logits
from sparsity.networks.user_file import build_from_file, file_sha256, is_file
from sparsity.system.errors import UserError, described, one_line
from sparsity.system.flags import BUILT_IN

zero_last_norms = Build_Resnet.zero_last_norms  # for built-in networks
Spec = dict[str, Any]


def named(arch: str | None, arch_args: dict[str, Any]) -> Spec | None:
    """The network that --arch and --arch_args name, for `load_network`; None without --arch."""
    return {"arch": arch, "arch_args": arch_args} if arch else None


def describe(arch: str, num_classes: int, width: int, arch_args: dict[str, Any]) -> Spec:
    """The description of the network that flags name; `width` is of built-in ones, `arch_args` of all others."""
    if arch in BUILT_IN:
        return {"arch": arch, "num_classes": num_classes, "width": width}
    spec = {"arch": arch, "num_classes": num_classes, "arch_args": arch_args}
    return spec | ({"sha256": file_sha256(arch)} if is_file(arch) else {})


def short_name(arch: str) -> str:
    """A network in titles: without the folders of its file."""
    return Path(arch).name if is_file(arch) else arch


def network_name(spec: Spec) -> str:
    """A network in words: 'resnet18', 'resnet50 width 32', 'small.py:make width=8', 'thin' without some filters."""
    width = "" if spec.get("width", 64) == 64 else f" width {spec['width']}"
    arguments = f" {argument_words(spec['arch_args'])}" if spec.get("arch_args") else ""
    return f"{short_name(spec['arch'])}{width}{arguments}" + (" thin" if spec.get("widths") else "")


def file_word(arch: str) -> str:
    """A network in names of files: 'resnet18', 'torchvision_vgg11', 'small_make'."""
    return re.sub(r"\.py:|[^\w.-]", "_", short_name(arch))[:100]


def load_network(path: Path, named: Spec | None = None) -> tuple[Checkpoint, nn.Module]:
    """Read a checkpoint and its network, see `restore`."""
    return restore(load(path), named)


def restore(checkpoint: Checkpoint, named: Spec | None = None) -> tuple[Checkpoint, nn.Module]:
    """The checkpoint with `model` as its network was opened, and the network, on the CPU, in eval mode.

    `named` is what the user names (`named`), or a description of a network that was opened. It has to name the file of
    a network that a file builds, and the network of a checkpoint without `model` entry, unless it is a built-in one,
    which is read off the names and shapes. Raises UserError where the network is not named, is another than the
    checkpoint's, or does not fit its weights.
    """
    try:
        spec = _opened(checkpoint, named) if checkpoint.model else _foreign(checkpoint, named)
        model = build_empty(spec, checkpoint.net)
        checkpoint = fit(model, checkpoint)
    except (ValueError, RuntimeError) as error:  # RuntimeError: names, shapes, sizes beyond what a tensor can have
        raise UserError(f"{checkpoint.path} does not fit the network it describes: {one_line(error)[:300]}") from error
    return dataclasses.replace(checkpoint, model=spec), model.eval()


def load_control(path: Path, main: Spec) -> tuple[Checkpoint, nn.Module]:
    """Read a control and its network; a Python file is run only if it is the one that built `main`, which was named."""
    checkpoint = load(path)
    arch = (checkpoint.model or {}).get("arch")
    if not isinstance(arch, str) or not is_file(arch):
        return restore(checkpoint)
    if not _same_network(checkpoint.model, main):
        raise UserError(f"--controls {path} needs {one_line(arch)[:300]} to be run; only the network of --arch is")
    return restore(checkpoint, {"arch": main["arch"]})


def require_named(checkpoint: Checkpoint, named: Spec | None) -> None:
    """UserError where the checkpoint's network is built by a file that the user does not name, or by another one."""
    if checkpoint.model:
        _opened(checkpoint, named)


def build_empty(spec: Spec, state: dict[str, Tensor]) -> nn.Module:
    """The network that `spec` describes, for the weights `state` to be put into; ValueError where it describes none.

    Built-in ones are on the meta device. Others may hold tensors that no file has, and are built as they are. With an
    entry `widths` the network becomes as thin as `state`.
    """
    # Draws in the middle of a sweep would change what is drawn after them.
    with torch.device("meta") if spec.get("arch") in BUILT_IN else torch.random.fork_rng(devices=[]):
        model = build(spec)
    return narrow(model, state, spec["widths"]) if "widths" in spec else model


def build(spec: Spec) -> nn.Module:
    """The network that `spec` describes, on the CPU, in float32, with logits as its output.

    Runs the file that `spec` names, which is therefore one that the user has named. Raises ValueError where `spec`
    describes no network, UserError where the network cannot be built here.
    """
    arch = spec.get("arch")
    if not isinstance(arch, str) or ":" not in arch:
        return Build_Resnet.build(spec)
    classes, arguments = spec.get("num_classes"), spec.get("arch_args")
    if type(classes) is not int or classes < 1:
        raise ValueError(f"num_classes is {classes!r}, not a positive whole number")
    if not isinstance(arguments, dict) or not _is_json(arguments):
        raise ValueError("arch_args is no dictionary of plain values")
    if is_file(arch):
        model = build_from_file(arch, classes, arguments)
    else:
        source, name = arch.split(":", 1)
        if source not in LIBRARIES:
            raise ValueError(f"unknown architecture {arch!r}")
        model = LIBRARIES[source](name, classes, arguments)
    try:
        model = model.cpu().float()
    except RuntimeError as error:
        raise UserError(f"{arch} gives a network that cannot be used ({one_line(error)[:160]})") from error
    return give_logits(model, arch)


def _opened(checkpoint: Checkpoint, named: Spec | None) -> Spec:
    """The description of a checkpoint's network as it is opened: by the file of `named`, not the recorded path."""
    path, entry = checkpoint.path, checkpoint.model
    arch = entry.get("arch")
    if not isinstance(arch, str):
        return entry  # which `build` refuses
    if named is None:
        if is_file(arch):
            way = f"look into that file, then add --arch {shlex.quote(one_line(arch)[:300])}"
            raise UserError(f"{path} holds a network of a Python file, which no checkpoint makes run: {way}")
        return entry
    if not _same_network(entry, named):
        way = f"type --arch {shlex.quote(one_line(arch)[:300])}" if is_file(arch) else "leave --arch out"
        raise UserError(f"{path} holds a network {one_line(arch)[:300]}, not {named['arch']}; {way}")
    arguments = entry.get("arch_args", {})
    if named.get("arch_args") and named["arch_args"] != arguments:
        raise UserError(f"{path} holds a network of --arch_args {argument_words(arguments)}; leave --arch_args out")
    if not is_file(arch):
        return entry
    now, recorded = file_sha256(named["arch"]), entry.get("sha256")
    if named.get("sha256", now) != now:
        raise UserError(f"{named['arch']} was changed while it was in use; start again")
    if recorded != now:
        was = f"{path} was written (SHA-256 {str(recorded)[:12]} then, {now[:12]} now)"
        _say_once(f"the file of {named['arch']} is another one than when {was}")
    return entry | {"arch": named["arch"], "sha256": now}


def _foreign(checkpoint: Checkpoint, named: Spec | None) -> Spec:
    """The description of the network of a checkpoint without one: as `named`, or read off a built-in network."""
    path = checkpoint.path
    if named is not None and named["arch"] not in BUILT_IN:
        arguments = named.get("arch_args", {})
        told = named.get("num_classes", arguments.get("num_classes"))
        return describe(named["arch"], told or _classes(checkpoint), 0, arguments)
    try:
        spec = Build_Resnet.spec_of(bare(checkpoint.net))
    except ValueError as error:
        raise UserError(f"{path} does not tell its network ({error}); name it with --arch") from error
    if named is not None and named["arch"] != spec["arch"]:
        raise UserError(f"{path} holds a network {spec['arch']}, not {named['arch']}; leave --arch out")
    return spec


def _classes(checkpoint: Checkpoint) -> int:
    """The number of classes of a checkpoint: those of its images, or the rows of its last matrix or convolution."""
    if checkpoint.data:
        return len(checkpoint.data["classes"])
    tensors = list(checkpoint.net.values())
    matrices = [tensor for tensor in tensors if tensor.dim() == 2] or [each for each in tensors if each.dim() > 2]
    if not matrices:
        raise ValueError("it holds no weight of a linear layer or convolution")
    return len(matrices[-1])


def _same_network(entry: Spec, named: Spec) -> bool:
    """Whether what the user names is the network of an entry: for a file, the function, and its name or content."""
    archs = entry["arch"], named["arch"]
    if archs[0] == archs[1] or not all(map(is_file, archs)):
        return archs[0] == archs[1]
    if short_name(archs[0]) == short_name(archs[1]):
        return True
    functions = {arch.rpartition(":")[2] for arch in archs}
    return len(functions) == 1 and entry.get("sha256") == file_sha256(named["arch"])


def _from_torchvision(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """A classification network of torchvision, without weights of others."""
    from torchvision import models

    known = models.list_models(module=models)  # beside these are networks that download parts of themselves
    if name not in known:
        raise UserError(f"torchvision has no classification network {name!r}{_similar(name, known)}")
    return _make(f"torchvision:{name}", models.get_model, name, num_classes, arguments, weights=None)


def _from_timm(name: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """A network of timm, without weights of others; UserError where timm is not installed."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"--arch timm:{name} needs timm, which is not installed here (pip install timm)") from error
    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}{_similar(name, timm.list_models())}")
    return _make(f"timm:{name}", timm.create_model, name, num_classes, arguments, pretrained=False)


LIBRARIES = {"torchvision": _from_torchvision, "timm": _from_timm}
# Arguments that would read weights from a file or the web.
WEIGHTS = re.compile("weights|pretrained|checkpoint_path|num_classes")


def _make(
    arch: str, make: Callable[..., nn.Module], name: str, num_classes: int, arguments: dict[str, Any], **fixed: Any
) -> nn.Module:
    """A network of a library, whose errors are those of its arguments."""
    if refused := next(filter(WEIGHTS.match, arguments), None):
        raise UserError(f"--arch_args cannot set {refused} of {arch}: it is built new, for the classes of the images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initial weights of old networks
            return make(name, num_classes=num_classes, **fixed, **arguments)
    except MemoryError:
        raise
    except Exception as error:  # constructors check little: nearly anything may come of wrong arguments
        words = argument_words(arguments)
        raise UserError(f"{arch} cannot be built with --arch_args {words} ({described(error)})") from error


def _similar(name: str, known: list[str]) -> str:
    """Names like one that is not known, as the end of a sentence."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; it has {', '.join(near)}" if near else ""


def argument_words(arguments: Any) -> str:
    """Arguments as they are typed after --arch_args."""
    if not isinstance(arguments, dict) or not arguments:
        return "(none)"
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return one_line(shlex.join(f"{key}={value}" for key, value in values.items()))[:200]


def _is_json(arguments: dict) -> bool:
    """Whether arguments, which may come from a file, are named by text and hold what JSON can."""
    try:
        json.dumps(arguments)
    except (TypeError, ValueError, RecursionError):
        return False
    return all(isinstance(key, str) for key in arguments)


@cache
def _say_once(line: str) -> None:
    print(line)
