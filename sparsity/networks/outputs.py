"""Logits, whatever a network returns, and the check that it gives them for images of a size."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sparsity.networks.user_file import folder_of, is_file, place
from sparsity.system import processes
from sparsity.system.errors import UserError, one_line

NAMES = ("logits", "out")  # entries of a dict or named tuple that hold the logits


def give_logits(model: nn.Module, arch: str) -> nn.Module:
    """Make `model` return the logits alone, see `logits_of`, in place; the names of its modules stay.

    Its class becomes a subclass, so that calls, copies and `torch.fx` all see the same forward pass. Raises UserError
    for networks of which a subclass cannot be made to do that.
    """
    if isinstance(model, torch.jit.ScriptModule) or "forward" in vars(model):
        raise UserError(f"--arch {arch}: its forward pass is scripted or set on the instance; return the plain module")
    whole = type(model).forward

    def forward(self: nn.Module, images: Tensor) -> Tensor:
        return logits_of(whole(self, images))

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward, "_whole_forward": whole})
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
    """Run the network once, on one image of noise, and say which part of its output is taken if there are several.

    Raises UserError where it cannot take images of `image_size` pixels, returns anything but logits [1, num_classes],
    or holds or gives values that are not finite.
    """
    training = model.training
    with torch.no_grad():
        output = _run(model.eval(), arch, torch.randn(1, 3, image_size, image_size, generator=torch.Generator()))
    model.train(training)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{arch} cannot be used: its {name} holds NaN or Inf")
    logits, entry = logits_of(output), _entry(output)
    if not isinstance(logits, Tensor):
        raise UserError(
            f"{arch} returns a {type(logits).__name__}; it has to return logits, a tensor [images, classes]"
        )
    if logits.dim() != 2 or len(logits) != 1:
        raise UserError(f"{arch} returns a tensor {list(logits.shape)} for one image; logits are [1, classes]")
    if logits.shape[1] != num_classes:
        raise UserError(f"{arch} tells {logits.shape[1]} classes apart, not the {num_classes} that are asked of it")
    if not logits.isfinite().all():
        raise UserError(f"{arch} gives NaN or Inf for an image of {image_size} pixels; check its weights and the size")
    if entry is not None:
        print(f"{arch} returns a {type(output).__name__}; its logits are {f'number {entry}' if entry == 0 else entry}")


def training_problem(model: nn.Module, arch: str, image_size: int) -> str | None:
    """Why a network cannot be trained on images of a size, in words; None where it can.

    A copy is run on two images of noise in training mode; backwards as well where there are several processes, each of
    which needs gradients of all parameters.
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
    if processes.size() > 1:
        logits.sum().backward()
        for name, parameter in trial.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                return f"{arch} cannot be trained by several processes, as its {name} gets no gradient"
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
        where = place(error, folder_of(arch)) if is_file(arch) else ""
        problem = f"{where}{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(f"{arch} cannot take images of {images.shape[-1]} pixels ({problem})") from error
