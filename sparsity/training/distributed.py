"""Training by several processes: averaged gradients, and BatchNorm over all of a batch, or averaged afterwards."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsity.system import processes
from sparsity.system.errors import UserError


def replicate(network: nn.Module) -> nn.Module:
    """`network` for one epoch of training in which all processes average their gradients in each step.

    The weights of the first process go to all others. It is made anew for each epoch, because DistributedDataParallel
    sums gradients in another order after its first step, and a resumed run has to sum as an undisturbed one. BatchNorm
    statistics stay those of each process until `average_statistics`. A single process gets `network` itself.
    """
    if processes.size() == 1:
        return network
    return DistributedDataParallel(network, gradient_as_bucket_view=True, forward_sync_buffers=False)


def share_batchnorm(model: nn.Module) -> None:
    """Let BatchNorm of `model`, in place, see the batch of all processes; without CUDA it cannot, which is printed."""
    if processes.size() > 1 and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif processes.size() > 1:
        print("BatchNorm: each process has the statistics of its own part of a batch (SyncBatchNorm needs CUDA)")


@torch.no_grad()
def average_statistics(*networks: nn.Module) -> None:
    """Average the running statistics of BatchNorm over all processes, in place, so that they are the same in each."""
    networks = dict.fromkeys(networks)
    buffers = [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]
    if processes.size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    sizes = [buffer.numel() for buffer in buffers]
    for buffer, mean in zip(buffers, (flat / processes.size()).split(sizes), strict=True):
        buffer.copy_(mean.view_as(buffer))


def require_enough(device: torch.device, batch_size: int, images: int) -> None:
    """Raise UserError where images are too few for BatchNorm, or processes too many for the GPUs of this machine."""
    size = processes.size()
    for name, number in (("--batch_size", batch_size), ("images in the training split:", images)):
        if number < 2 * size:  # BatchNorm cannot be trained on one value a channel
            raise UserError(f"{name} {number} is too small for {size} process(es); each needs two images in a batch")
    if size > 1 and device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type} trains in one process; leave torchrun out, or use --device cpu")
    if size > 1 and device.type == "cuda":
        # By its identity: where each process sees only one GPU, they all call it number 0.
        gpu = os.environ.get("GROUP_RANK"), str(torch.cuda.get_device_properties(device).uuid)
        if len(set(processes.gather(gpu))) < size:
            raise UserError("two processes would train on one GPU; start no more than there are, without --device")
