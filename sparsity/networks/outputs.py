"""Logits, whatever a network returns; whether it gives them for images of a size, and how far they are from others."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsity.networks.user_file import is_file, place
from sparsity.system import processes
from sparsity.system.errors import UserError, described, one_line

NAMES = ("logits", "out")  # entries of a dict or named tuple that hold the logits
TOLERANCE = 1e-3  # the largest `distance` of a network and its copy, in float32


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest absolute value of `expected`, of the same shape; nan where one is nan."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def give_logits(model: nn.Module, arch: str) -> nn.Module:
    """Make `model` return the logits alone, see `logits_of`, in place; the names of its modules stay.

    Its class becomes a subclass, so that calls, copies and `torch.fx` all see the same forward pass. Raises UserError
    for networks of which a subclass cannot be made to do that, that have layers without a size, or that the user's
    function returned before.
    """
    if isinstance(model, torch.jit.ScriptModule) or "forward" in vars(model):
        raise UserError(f"--arch {arch}: its forward pass is scripted or set on the instance; return the plain module")
    if hasattr(model, "_whole_forward"):  # its weights would be those of the checkpoint that was read last
        raise UserError(f"--arch {arch}: it gives the same network at every call; build a new one in the function")
    if any(map(is_lazy, model.parameters())):
        way = "run it once in the function, on torch.zeros(1, 3, size, size)"
        raise UserError(f"--arch {arch}: it has layers without a size, such as LazyLinear; {way}")
    kind = type(model)

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        return logits_of(kind.forward(self, images))

    def read(self: nn.Module, state: dict, prefix: str, metadata: dict, *rest: Any) -> None:
        # A plain dictionary does not tell the version that some networks (MNASNet) ask for: it is that of now.
        kind._load_from_state_dict(self, state, prefix, {"version": self._version} | metadata, *rest)

    own = {"forward": forward, "_load_from_state_dict": read, "_whole_forward": kind.forward}
    model.__class__ = type(kind.__name__, (kind,), own)
    return model


def logits_of(output: Any) -> Any:
    """The logits in the output of a network: `logits` or `out` of a dict or named tuple, the first of a tuple."""
    name = _entry(output)
    if name is None:
        return output
    return output[name] if isinstance(output, dict) or isinstance(name, int) else getattr(output, name)


def _entry(output: Any) -> str | int | None:
    """The name or index of the logits in an output; None where the output is no collection of tensors."""
    if not isinstance(output, dict | tuple | list) or not output:
        return None
    fields = output.keys() if isinstance(output, dict) else getattr(output, "_fields", ())
    first = None if isinstance(output, dict) else 0
    return next((name for name in NAMES if name in fields), first)


def require_logits(model: nn.Module, arch: str, image_size: int, num_classes: int) -> None:
    """Run the network on one and on two images of noise; say which part of its output is taken if there are several.

    Raises UserError where it cannot take images of `image_size` pixels, returns anything but logits [images,
    num_classes], or holds or gives values that are not finite.
    """
    training = model.training
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator())
    with torch.no_grad():
        outputs = [_run(model.eval(), arch, images[:count]) for count in (1, 2)]
    model.train(training)
    if not any(True for _ in model.parameters()):
        raise UserError(f"{arch} holds no parameters, so that there is nothing to train or prune")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{arch} cannot be used: its {name} holds NaN or Inf")
    for count, logits in enumerate(map(logits_of, outputs), 1):
        _require(logits, arch, count, image_size, num_classes)
    if (entry := _entry(outputs[0])) is not None:
        kind = type(outputs[0]).__name__
        print(f"{arch} returns a {kind}; its logits are {'number 0' if entry == 0 else entry}")


def _require(logits: Any, arch: str, count: int, image_size: int, num_classes: int) -> None:
    """UserError unless `logits` are those of `count` images."""
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{arch} returns a {type(logits).__name__}; it has to return logits, a tensor [images, classes]"
        )
    if logits.dim() != 2 or len(logits) != count:
        raise UserError(
            f"{arch} returns a tensor {list(logits.shape)} for a batch of {count}; logits are [images, classes]"
        )
    if logits.shape[1] != num_classes:
        raise UserError(f"{arch} has {logits.shape[1]} output classes, not the {num_classes} that are asked of it")
    if not logits.isfinite().all():
        raise UserError(f"{arch} gives NaN or Inf for an image of {image_size} pixels; check its weights and the size")


def training_problem(model: nn.Module, arch: str, image_size: int) -> str | None:
    """Why a network cannot be trained on images of a size, in words; None where it can.

    A copy is run on two images of noise in training mode, and backwards. Several processes need gradients of all
    parameters.
    """
    try:
        trial = copy.deepcopy(model).train()
    except (RuntimeError, TypeError) as error:
        return f"{arch} cannot be copied ({one_line(error)[:160]})"
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator())
    try:
        logits = logits_of(_run(trial, arch, images))
    except UserError as error:
        return f"{error} in training mode"
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        return f"{arch} cannot be trained: in training mode it returns no tensor with gradients"
    try:
        logits.sum().backward()
    except RuntimeError as error:
        return f"{arch} cannot be trained ({one_line(error)[:160]})"
    idle = [name for name, each in trial.named_parameters() if each.requires_grad and each.grad is None]
    if idle and processes.size() > 1:
        return f"{arch} cannot be trained by several processes, as its {idle[0]} gets no gradient"
    return None


def _run(model: nn.Module, arch: str, images: Tensor) -> Any:
    """The whole output of the network for images; UserError, with the line of the user's file, where it fails.

    Draws that it makes do not move the random state.
    """
    forward = getattr(type(model), "_whole_forward", type(model).forward)
    try:
        with torch.random.fork_rng(devices=[]):
            return forward(model, images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = place(error, arch) if is_file(arch) else ""
        problem = f"{where}{described(error)}"
        raise UserError(f"{arch} cannot take images of {images.shape[-1]} pixels ({problem})") from error
