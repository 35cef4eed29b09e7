"""Checkpoints: written whole, read without running code, in our format and in those of other repositories."""

import argparse
import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.networks import packed, safetensors
from sparsity.networks.layers import with_versions
from sparsity.system.errors import UserError, few, one_line
from sparsity.system.files import write_atomic

PLACES = ("net", "state_dict", "model_state_dict", "model")  # entries that hold the state dict; it may also stand alone
# Left by DataParallel, by torch.compile, and by classes that keep a network as `self.model`.
WRAPPER = re.compile(r"^(module|_orig_mod|model)\.")
READERS = {".npz": packed.unpack, ".safetensors": safetensors.unpack}
IMAGES = {"dataset", "image_size", "mean", "std", "classes"}  # told of the images in the entry 'data'


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: `net` is the state dict on the CPU, floats as float32, under the names of the file.

    `model`, `data`, `settings` are None or empty where the file has none, as in the reference's format and in all
    others; `content` is all that a file of this project or of the reference holds, and the epoch of others; `sha256`
    the hash of the bytes that were read.
    """

    path: Path
    sha256: str
    net: dict[str, Tensor]
    epoch: int | None = None
    model: dict | None = None
    data: dict | None = None
    settings: dict = field(default_factory=dict)
    content: dict = field(default_factory=dict)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` (plain values and tensors) atomically, as `torch.save` does."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())


def save_packed(path: Path, content: dict[str, Any], precision: str = "fp32") -> None:
    """Write `content`, a state dict under 'net' and metadata that is JSON, atomically as a packed `.npz`.

    `precision` is 'fp32' or 'bf16'. Raises UserError when the file cannot be written, or could not be read back:
    because of metadata that is not JSON, or values that are not finite. A tensor with several names is written once.
    """
    _write(path, content, lambda net, metadata: packed.pack(_once(net), metadata, precision))


def _once(net: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the first name alone of each tensor that has several; `fit` knows the others."""
    first = {id(tensor): name for name, tensor in reversed(net.items())}
    return {name: tensor for name, tensor in net.items() if first[id(tensor)] == name}


def save_safetensors(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically as a safetensors file, its tensors to the bit; errors as those of `save_packed`."""
    _write(path, content, safetensors.pack)


def _write(
    path: Path,
    content: dict[str, Any],
    encode: Callable[[dict[str, Tensor], dict[str, Any]], bytes | memoryview],
) -> None:
    metadata = {key: value for key, value in content.items() if key != "net"}
    try:
        encoded = encode(content["net"], metadata)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be written ({one_line(error)[:160]}); use --export_format dense") from error
    write_atomic(path, encoded)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model as files hold it: on the CPU, contiguous, detached."""
    state = model.state_dict()
    return with_versions({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, state)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code from it.

    Accepted: a state dict, plain or under one of PLACES, as `torch.save` writes it now and did before it wrote zip
    files; packed and safetensors files, known by their endings `.npz` and `.safetensors`. Raises UserError that names
    the file and the reason.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path} is not there; train one with `python run.py`, or name another")
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is a folder, a pipe or a device, not a checkpoint; name a file of a network")
    if path.suffix in (".pt2", ".onnx"):
        raise UserError(f"{path} is a network to be run, not one to be pruned; name the checkpoint that it was made of")
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the readers wonder aloud at a foreign file before they fail
            content, net = _parse(path, data)
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|`(\S+)`? was not an allowed global", str(error))
        if not found:
            raise UserError(f"{path} is damaged or was not written by torch.save") from error
        held = f"the object {found[1] or found[2]}, which could run code"
        raise UserError(f"{path} is refused: it holds {held}; save only the state_dict() of a network") from error
    except Exception as error:  # damaged bytes surface as almost any exception from the readers of zip, pickle, JSON
        reason = one_line(error).split(". ")[0][:120] or type(error).__name__
        raise UserError(f"{path} is damaged, cut short or not a checkpoint ({reason})") from error
    epoch = content.get("epoch")
    return Checkpoint(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        net=net,
        epoch=epoch if isinstance(epoch, int) else None,
        model=content.get("model"),
        data=content.get("data"),
        settings=content.get("settings") or {},
        content=content,
    )


def newest(folder: Path) -> Path:
    """Return the numbered checkpoint written last in `folder`; UserError, with how to make one, if there is none."""
    numbered = folder.glob("*_ckpt_epoch*.pth")
    found = max(numbered, key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name), default=None)
    if not found:
        raise UserError(f"no checkpoint in {folder}; train one with `python run.py`, or name one with --checkpoint")
    return found


def bare(net: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of wrappers."""
    return list(_unwrapped(net))[-1]


def _unwrapped(net: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A state dict, and without one prefix after the other, as long as no two names become one."""
    yield net
    stripped = {WRAPPER.sub("", name): tensor for name, tensor in net.items()}
    if len(stripped) == len(net) and stripped.keys() != net.keys():
        yield from _unwrapped(stripped)


def fit(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Load a checkpoint into `model`, in place; return the checkpoint with `net` under the names of the model.

    On the meta device `model` gets the tensors themselves, elsewhere copies. Prefixes of wrappers go where more names
    fit without them. A file may hold a parameter that has several names once. Raises UserError that names the first
    tensors that are missing, too many, of another shape or of another kind.
    """
    own, path = model.state_dict(), checkpoint.path
    state = dict(max(_unwrapped(checkpoint.net), key=lambda net: len(net.keys() & own.keys())))
    for names in _shared_parameters(model):
        first, *others = [state[name] for name in names if name in state] or [None]
        if not all(torch.equal(first, other) for other in others):
            raise UserError(f"{path} has other values for {names[0]} than for {names[1]}, one weight of the network")
        state |= {} if first is None else dict.fromkeys(names, first)
    for name in state.keys() & own.keys():
        if state[name].is_floating_point() != own[name].is_floating_point():
            kinds = f"{state[name].dtype}, not {own[name].dtype}".replace("torch.", "")
            raise UserError(f"{path}: {name} is of type {kinds}; save the network dense, in float32")
    try:
        empty = any(tensor.is_meta for tensor in own.values())
        missing, extra = model.load_state_dict(state, strict=False, assign=empty)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network: {one_line(error)[:300]}") from error
    parts = {"it lacks": missing, "the network has no": extra}
    if told := [f"{words} {one_line(few([name[:80] for name in names]))}" for words, names in parts.items() if names]:
        raise UserError(f"{path} does not fit the network: {'; '.join(told)}")
    return replace(checkpoint, net=state)


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a file of any accepted format, and its state dict; see `Checkpoint` for both.

    Raises UserError where an entry or a tensor is of another kind or not finite; damage raises nearly anything else.
    """
    if path.suffix in READERS:
        net, metadata = READERS[path.suffix](data)
        content = metadata | {"net": net}
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the flags of other trainings; runs no code
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    place, net = _find_state(path, content)
    state = {str(name): _usual_tensor(path, str(name), tensor) for name, tensor in net.items()}
    if place != "net":  # entries of other code mean other things
        return {"epoch": content["epoch"]} if place and "epoch" in content else {}, state
    for key in ("model", "data", "settings"):
        if not isinstance(content.get(key), dict | None):
            raise UserError(f"{path}: its entry {key!r} is a {type(content[key]).__name__}, not a dictionary")
    if content.get("data") is not None and (missing := IMAGES - content["data"].keys()):
        raise UserError(f"{path}: its entry 'data' lacks {', '.join(sorted(missing))}")
    return content, state


def _find_state(path: Path, content: Any) -> tuple[str | None, dict[str, Tensor]]:
    """The state dict in a file, and the one of PLACES where it stands; None where it stands alone."""

    def is_state(value: Any) -> bool:
        return isinstance(value, dict) and bool(value) and all(isinstance(each, Tensor) for each in value.values())

    if is_state(content):
        return None, content
    found = [place for place in PLACES if isinstance(content, dict) and is_state(content.get(place))]
    if not found:
        raise UserError(f"{path} is not a checkpoint: it holds no state dict of tensors under {', '.join(PLACES)}")
    if len(found) > 1:
        raise UserError(f"{path} holds several networks ({', '.join(found)}); save the state_dict() of one")
    return found[0], content[found[0]]


def _usual_tensor(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file, checked, contiguous; floats as float32."""
    usual = (tensor.is_floating_point() or tensor.dtype in packed.WHOLE.values()) and tensor.layout == torch.strided
    if not usual or tensor.nbytes > tensor.untyped_storage().nbytes():  # expanded
        raise UserError(f"{path}: {name} is not a dense tensor of numbers; save the network dense, in float32")
    tensor = (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: {name} holds NaN or Inf; the training that wrote it diverged")
    return tensor
