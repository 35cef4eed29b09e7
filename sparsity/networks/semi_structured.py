"""Linear layers by the kernels of GPUs that skip two of every four inputs."""

import torch
from torch import nn

# Multiples of rows and columns that all of torch's kernels take of 16-bit weights.
ROWS, COLUMNS = 32, 64


def semi_structured_layers(network: nn.Module) -> list[str]:
    """The linear layers of an inference copy that `use_semi_structured` converts.

    Their weights have at most two values in every four inputs, are of 16 bits, and on a GPU of compute capability 8.0
    or newer.
    """
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and _fits(module.weight)]


def _fits(weight: torch.Tensor) -> bool:
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    if weight.dtype not in (torch.float16, torch.bfloat16) or weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return False
    return bool(((weight.unflatten(1, (-1, 4)) != 0).sum(dim=-1) <= 2).all())


def use_semi_structured(network: nn.Module) -> None:
    """Convert, in place, the weights of `semi_structured_layers`."""
    for name in semi_structured_layers(network):
        layer = network.get_submodule(name)
        converted = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        layer.weight = nn.Parameter(converted, requires_grad=False)
