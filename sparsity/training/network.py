"""The network of a training: new or that of a training state, and whether it can be trained on the images."""

from argparse import Namespace
from typing import Any

import torch
from torch import nn

from sparsity.networks import families
from sparsity.networks.checkpoint import Checkpoint
from sparsity.networks.inference import choose_way, precision_problem
from sparsity.networks.layers import memory_format
from sparsity.networks.outputs import require_logits, training_problem
from sparsity.system.errors import UserError
from sparsity.system.machine import DTYPES


def build_network(
    args: Namespace, num_classes: int, state: Checkpoint | None, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The network, new or that of `state`, on its device, and its description.

    It is run once before long work. Where it takes images of --image_size only, --start_size becomes 0, which is
    printed. Raises UserError where it cannot be built or trained on the images.
    """
    spec = families.describe(args.arch, num_classes, args.width, args.arch_args)
    if state:
        state, model = families.restore(state, spec)
        spec = state.model
    else:
        model = families.build(spec)
        if args.zero_init:
            families.zero_last_norms(model)
    require_logits(model, args.arch, args.image_size, num_classes)
    if not state:
        require_trainable(args, model)
    choose_how_to_test(args, model)
    return model.to(device, memory_format=memory_format(model)), spec


def choose_how_to_test(args: Namespace, model: nn.Module) -> None:
    """Choose how copies of `model` are made for testing it; may set --precision to fp32, which is printed."""
    noise = torch.randn(2, 3, args.image_size, args.image_size, generator=torch.Generator())
    way = choose_way(model, noise)
    if not way.traced:
        print(f"torch.fx cannot copy {args.arch} ({way.reason}): it is tested as it is, unfolded, which is slower")
    if problem := args.precision != "fp32" and precision_problem(model, noise, DTYPES[args.precision]):
        print(f"{args.arch} does not run in {args.precision} ({problem}): all is computed in fp32")
        args.precision = "fp32"


def require_trainable(args: Namespace, model: nn.Module) -> None:
    """Raise UserError unless a copy of `model` can be trained on images of all sizes; may set --start_size to 0."""
    sizes = range(args.start_size or args.image_size, args.image_size, 4)
    problems = {size: training_problem(model, args.arch, size) for size in sorted({*sizes, args.image_size})}
    if problem := problems.pop(args.image_size):
        raise UserError(problem)
    if problem := next(filter(None, problems.values()), None):
        if "start_size" in args.given:
            raise UserError(f"{problem}; use --start_size 0")
        print(f"{problem}: all epochs have images of {args.image_size} pixels")
        args.start_size = 0
        args.given.add("start_size")  # --time_budget settles the others again
