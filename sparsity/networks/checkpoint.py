"""Checkpoints: written whole, read without running code, in our format and in those of other repositories."""

import hashlib
import io
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.networks.packed import pack, unpack
from sparsity.system.errors import UserError, one_line
from sparsity.system.files import write_atomic

PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DataParallel and torch.compile

IMAGES = {"dataset", "image_size", "mean", "std", "classes"}  # told of the images in the entry 'data'


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: `net` is the state dict in float32 on the CPU, without the prefixes of wrappers.

    `model`, `data`, `settings` are None or empty where the file has none, as in the reference's format; `content` is
    all that the file holds; `sha256` the hash of the bytes that were read.
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
    because of metadata that is not JSON, or values that are not finite.
    """
    metadata = {key: value for key, value in content.items() if key != "net"}
    try:
        packed = pack(content["net"], metadata, precision)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be packed ({one_line(error)[:160]}); use --export_format dense") from error
    write_atomic(path, packed)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model as files hold it: on the CPU, contiguous, detached."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code from it.

    Accepted: {'net': state dict, ...} as the reference and this project write, {'state_dict': ...}, a plain state
    dict, the prefixes `module.` and `_orig_mod.`, and packed files, known by their ending `.npz`. Raises UserError
    that names the file and the reason.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path} is not there; train one with `python run.py`, or name another")
    if not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is a folder, a pipe or a device, not a checkpoint; name a .pth or .npz file")
    data = path.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the readers wonder aloud at a foreign file before they fail
            content, net = _parse(path, data)
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|`(\S+)`? was not an allowed global", str(error))
        problem = f"holds the object {found[1] or found[2]}, which could run code" if found else "is not a checkpoint"
        raise UserError(f"{path} is refused: it {problem}; save only the state_dict() of a network") from error
    except Exception as error:  # damaged bytes surface as almost any exception from the readers of zip, pickle, JSON
        reason = one_line(error)[:120] or type(error).__name__
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


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a file of any accepted format, empty for a plain state dict; and its state dict, see `Checkpoint`.

    Raises UserError where an entry or a tensor is of another kind or not finite; damage raises nearly anything else.
    """
    if path.suffix == ".npz":
        net, metadata = unpack(data)
        content = metadata | {"net": net}
    else:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    net = content.get("net", content.get("state_dict", content)) if isinstance(content, dict) else None
    if not isinstance(net, dict) or not net or not all(isinstance(value, Tensor) for value in net.values()):
        raise UserError(f"{path} is not a checkpoint: it holds no state dict of tensors under 'net' or 'state_dict'")
    state = {}
    for name, tensor in net.items():
        usual = tensor.is_floating_point() or str(name).endswith("num_batches_tracked")
        if not usual or tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():  # expanded
            raise UserError(f"{path}: {name} is not a dense tensor of floats; save the network dense, in float32")
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or Inf; the training that wrote it diverged")
        state[PREFIX.sub("", str(name))] = tensor
    metadata = content if net is not content else {}
    for key in ("model", "data", "settings"):
        if not isinstance(metadata.get(key), dict | None):
            raise UserError(f"{path}: its entry {key!r} is a {type(metadata[key]).__name__}, not a dictionary")
    if metadata.get("data") is not None and (missing := IMAGES - metadata["data"].keys()):
        raise UserError(f"{path}: its entry 'data' lacks {', '.join(sorted(missing))}")
    return metadata, state
