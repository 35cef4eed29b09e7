"""Checkpoints: written whole, read safely, in our format and in those of other repositories."""

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
from sparsity.system.files import file_hash, write_atomic

PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """A file that was read: `net` in float32 on the CPU, without foreign prefixes, and its plain metadata.

    `model`, `data`, `settings` are None or empty where the file has none, as in the reference's format; `content` is
    all that the file holds.
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
    """Write `content` (plain values and tensors) atomically; tensors go to the file contiguous and on the CPU."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())


def save_packed(path: Path, content: dict[str, Any], precision: str = "fp32") -> None:
    """Write `content`, a state dict under 'net' and metadata that JSON can say, atomically as a packed `.npz`.

    `precision` is 'fp32' or 'bf16'. Raises UserError when the file cannot be written, or could not be read back:
    because of metadata that JSON cannot say, or values that are not finite.
    """
    metadata = {key: value for key, value in content.items() if key != "net"}
    try:
        packed = pack(content["net"], metadata, precision)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be packed ({one_line(error)[:160]}); use --export_format dense") from error
    write_atomic(path, packed)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as files hold it: on the CPU, contiguous, detached."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def load(path: Path) -> Checkpoint:
    """Read a checkpoint without running any code from it.

    Accepted: {'net': state dict, ...} as the reference and this project write, {'state_dict': ...}, a plain state
    dict, the prefixes `module.` and `_orig_mod.`, and packed files, known by their ending `.npz`. Raises UserError
    that names the file and the reason.
    """
    content = _read(path)
    net = content.get("net", content.get("state_dict", content))
    if not isinstance(net, dict) or not net or not all(isinstance(value, Tensor) for value in net.values()):
        raise UserError(f"{path} is not a checkpoint: it holds no state dict of tensors under 'net' or 'state_dict'")
    net = {_without_prefixes(str(name)): tensor for name, tensor in net.items()}
    for name, tensor in net.items():
        net[name] = _checked(path, name, tensor)
    metadata = content if net is not content else {}
    epoch = metadata.get("epoch")
    return Checkpoint(
        path=path,
        sha256=file_hash(path),
        net=net,
        epoch=epoch if isinstance(epoch, int) else None,
        model=_entry(path, metadata, "model"),
        data=_data_entry(path, metadata),
        settings=_entry(path, metadata, "settings") or {},
        content=metadata,
    )


def newest(folder: Path) -> Path:
    """The numbered checkpoint written last in `folder`; UserError, with how to make one, when there is none."""
    numbered = [(path.stat().st_mtime_ns, _epoch_of(path), path) for path in folder.glob("*_ckpt_epoch*.pth")]
    if not numbered:
        raise UserError(f"no checkpoint in {folder}; train one with `python run.py`, or name one with --checkpoint")
    return max(numbered)[2]


def _epoch_of(path: Path) -> int:
    match = re.search(r"_ckpt_epoch(\d+)$", path.stem)
    return int(match[1]) if match else -1


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint; name the .pth file in it")
    if not path.exists():
        raise UserError(f"checkpoint {path} is not there; train one with `python run.py`, or name another")
    if path.suffix == ".npz":
        net, metadata = unpack(path)
        return metadata | {"net": net}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a foreign file makes torch.load wonder aloud before it fails
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {_pickle_problem(error)}") from error
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes surface as almost any exception from the unpickler and the zip reader
        raise UserError(f"{path} is damaged, cut short or not a checkpoint ({one_line(error)[:120]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a state dict")
    return content


def _pickle_problem(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL (\S+)|`(\S+)`? was not an allowed global", str(error))
    if found:
        return f"it holds the object {found[1] or found[2]}, which could run code; save only its state_dict()"
    return "it is not a checkpoint, or its pickle holds more than tensors and plain values"


def _without_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, dense and contiguous, floats as float32; UserError when it is of another kind or not finite."""
    plain = not tensor.is_nested and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_complex():
        raise UserError(f"{path}: {name} is not an ordinary dense tensor; save the network dense")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # a few bytes posing as gigabytes
        raise UserError(f"{path}: {name} claims more values than the file holds; save the network dense")
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or Inf; the training that wrote it diverged")
        if name.endswith("running_var") and (tensor < 0).any():
            raise UserError(f"{path}: {name} holds a negative variance; the file is damaged")
    return tensor.detach().contiguous()


def _entry(path: Path, content: dict, key: str) -> dict | None:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: its entry {key!r} is a {type(value).__name__}, not a dictionary")
    return value


def _data_entry(path: Path, content: dict) -> dict | None:
    """The metadata of the data, with everything in it that is used later checked."""
    data = _entry(path, content, "data")
    if data is None:
        return None
    size, classes = data.get("image_size"), data.get("classes")
    sound = (
        isinstance(data.get("dataset"), str)
        and isinstance(data.get("data_dir", ""), str)
        and type(size) is int
        and 1 <= size <= 4096
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and all(_three_numbers(data.get(key)) for key in ("mean", "std"))
        and min(data["std"]) > 0
    )
    if not sound:
        raise UserError(f"{path}: its entry 'data' (dataset, image_size, mean, std, classes) is incomplete or wrong")
    return data


def _three_numbers(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(number, int | float) and abs(number) < 1e3 for number in value)
    )
