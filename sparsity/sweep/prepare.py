"""The network of a sweep before the first level: how it is evaluated, and which of its weights stay dense."""

import argparse

import torch
from torch import nn

from sparsity.data.images import normalise
from sparsity.networks.fused import SAMPLE
from sparsity.networks.inference import choose_way, inference_copy, precision_problem
from sparsity.networks.layers import dense_parameters, require_plain_weights, unprunable
from sparsity.prune.channel_graph import OUTPUTS
from sparsity.prune.coupling import Coupling, couple
from sparsity.prune.filters import inner_convs
from sparsity.sweep.inputs import Inputs
from sparsity.system.errors import UserError, by_reason, few
from sparsity.system.machine import DTYPES


def prepare_inference(args: argparse.Namespace, given: Inputs) -> nn.Module:
    """The inference copy in which all networks of the sweep are evaluated; chooses how copies are made.

    Its outputs are compared with those of the network itself, on a few test images. Says where it cannot be traced, and
    where it does not run in bfloat16, and --precision becomes fp32. Raises UserError for networks that cannot be used.
    """
    device, test = torch.device(args.device), given.test
    require_plain_weights(given.dense)
    dense, sample = given.dense.to(device), normalise(test.images[:SAMPLE].to(device), test.mean, test.std)
    way = choose_way(dense, sample)
    if not way.traced:
        print(f"torch.fx cannot copy the network ({way.reason}): it is tested as it is, unfolded, which is slower")
        if args.measure:
            raise UserError("--measure needs a network that torch.fx can trace; leave it out")
    if problem := args.precision != "fp32" and precision_problem(dense, sample, DTYPES[args.precision]):
        print(f"the network does not run in {args.precision} ({problem}): all is computed in fp32")
        args.precision = "fp32"
    return inference_copy(dense, DTYPES[args.precision])


def say_what_stays_dense(model: nn.Module, example: torch.Tensor) -> None:
    """Print, in one line, which weights are never pruned beside the output layer, biases and normalisation."""
    found = unprunable(model, example)
    reasons = by_reason({name: reason for name, reason in found.items() if reason != "output layer"})
    if loose := [name for name in dense_parameters(model) if not name.endswith("bias")]:
        reasons["in no convolution or linear layer"] = loose
    told = [f"{few(names)} ({reason})" for reason, names in reasons.items()]
    if told:
        print(f"not pruned by themselves: {', '.join(told)}")


def filter_layers(model: nn.Module, layers: list[str], coupled: bool) -> list[str]:
    """The convolutions of `layers` whose filters may be removed by themselves, or the groups of `coupled` channels."""
    return list(couple(model, layers).groups) if coupled else [name for name in inner_convs(model) if name in layers]


def coupled_text(coupling: Coupling) -> str:
    """How many channels can be removed, and why others stay."""
    reasons = by_reason({name: reason for name, reason in coupling.kept.items() if reason != OUTPUTS})
    told = "".join(f"; channels of {few(names)} stay: {reason}" for reason, names in reasons.items())
    return f"{coupling.units:,} channels can be removed, in {len(coupling.groups)} groups{told}"
