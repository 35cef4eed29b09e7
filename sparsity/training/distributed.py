"""Work on which all processes of a run are at once: evaluation, and the steps of training."""

import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsity.system.errors import UserError
from sparsity.system.processes import Ranks, share

# What leaves each process its own BatchNorm statistics within an epoch has got another name.
KEEP_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def start_group(team: Ranks, device: torch.device) -> None:
    """Make the process group that training on several processes needs: nccl for GPUs, gloo otherwise."""
    if team.size == 1:
        return
    store, rank, size = next(dist.rendezvous("env://"))  # a connection of its own, because a collective blocks it
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)


def share_size(batch_size: int, team: Ranks) -> int:
    """How many images of a full batch fall to this process."""
    begin, end = share(batch_size, team.rank, team.size)
    return end - begin


def replicate(network: nn.Module, team: Ranks) -> nn.Module:
    """`network` for one epoch of training in which all processes average their gradients in each step.

    The weights of the first process go to all others. It is made anew for each epoch, because after its first step
    DistributedDataParallel sums gradients in another order than in it, and a run that is resumed has to sum as one
    that was not interrupted. A single process gets `network` itself.
    """
    if team.size == 1:
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True, **{KEEP_BUFFERS: False})


def share_batchnorm(model: nn.Module, team: Ranks) -> nn.Module:
    """`model` with BatchNorm over the whole batch of all processes where that can be, on CUDA; said where it cannot.

    The parameters stay the same tensors.
    """
    if team.size == 1:
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print("BatchNorm: each process has the statistics of its own part of a batch (SyncBatchNorm needs CUDA)")
    return model


@torch.no_grad()
def average_statistics(team: Ranks, *networks: nn.Module) -> None:
    """Average the running statistics of BatchNorm over all processes, in place; they are then the same in each."""
    if team.size == 1:
        return
    buffers = [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, mean in zip(buffers, (flat / team.size).split(sizes), strict=True):
        buffer.copy_(mean.view_as(buffer))


def require_enough(team: Ranks, device: torch.device, batch_size: int, images: int) -> None:
    """UserError where processes are too many for a training: for its batches, or for the GPUs of this machine."""
    if team.size == 1:
        return
    least = 2 * team.size  # BatchNorm cannot be trained on one value a channel
    for what, number in (("--batch_size", batch_size), ("images in the training split:", images)):
        if number < least:
            raise UserError(f"{what} {number} is too small for {team.size} processes; each needs two images in a batch")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type} trains in one process; leave torchrun out, or use --device cpu")
    if device.type == "cuda":
        # Where each process sees only one card, they all call it number 0.
        card = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
        cards = team.gather((team.node, str(card)))
        if len(set(cards)) < team.size:
            raise UserError(
                "two processes would train on one GPU; start no more than there are, and leave --device out"
            )
