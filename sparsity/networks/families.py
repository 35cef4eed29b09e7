"""The one place that builds a network: from a description, a state dict, or a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

import Build_Resnet
from sparsity.networks.checkpoint import Checkpoint, load
from sparsity.system.errors import UserError, one_line

build = Build_Resnet.build


def load_network(path: Path) -> tuple[Checkpoint, nn.Module]:
    """Read a checkpoint (its `model` entry filled in where the file has none) and its network, see `restore`."""
    checkpoint = load(path)
    model = restore(checkpoint)
    if checkpoint.model is None:
        checkpoint = dataclasses.replace(checkpoint, model=Build_Resnet.spec_of(checkpoint.net))
    return checkpoint, model


def restore(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint, on the CPU, in eval mode; its weights are those of `checkpoint.net`, not copies.

    Without a `model` entry the architecture is read off the names and shapes. Raises UserError where these do not
    describe a network, or do not fit it, naming which.
    """
    try:
        model = build_empty(checkpoint.model or Build_Resnet.spec_of(checkpoint.net))
        model.load_state_dict(checkpoint.net, assign=True)
    except (ValueError, RuntimeError) as error:  # RuntimeError: names, shapes, sizes beyond what a tensor can have
        raise UserError(f"{checkpoint.path} does not fit the network it describes: {one_line(error)[:300]}") from error
    return model.eval()


def build_empty(spec: dict[str, Any]) -> nn.Module:
    """The network that `spec` describes, with weights on the meta device; ValueError where it describes none."""
    with torch.device("meta"):
        return build(spec)
