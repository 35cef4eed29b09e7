"""families"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsity.networks.checkpoint import Checkpoint
from sparsity.system.errors import UserError, one_line


def restore(checkpoint: Checkpoint, build: Callable[[dict], nn.Module], spec_of: Callable[[dict], dict]) -> nn.Module:
    """The network of a checkpoint, on the CPU, in eval mode; its weights are those of `checkpoint.net`, not copies.

    `build` makes a network from a description, `spec_of` reads the description off a state dict without metadata.
    Raises UserError when names or shapes do not fit, naming the first few.
    """
    try:
        spec = checkpoint.model or spec_of(checkpoint.net)
        with torch.device("meta"):
            model = build(spec)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes beyond what a tensor can have
        raise UserError(f"{checkpoint.path} does not describe a network: {one_line(error)}") from error
    net = dict(checkpoint.net)
    expected = model.state_dict()
    for name in expected:
        if name.endswith(".num_batches_tracked"):  # files from before PyTorch 0.4.1 have none
            net.setdefault(name, torch.zeros((), dtype=torch.int64))
    if problems := _misfits(expected, net):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{checkpoint.path} does not fit the network: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(net, assign=True)
    return model.eval()


def _misfits(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in found]
    foreign = [f"{name} is unknown" for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    types = [
        f"{name} is of type {str(found[name].dtype).removeprefix('torch.')}"
        for name, tensor in expected.items()
        if name in found and found[name].is_floating_point() != tensor.is_floating_point()
    ]
    return shapes + missing + foreign + types
