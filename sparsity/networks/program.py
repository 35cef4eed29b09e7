"""A network as a `torch.export` program: images in 0..1 in, logits out, run by plain PyTorch from one `.pt2` file."""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sparsity.system.errors import UserError, described, one_line

METADATA = "metadata.json"  # of the extra files
TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")  # of nodes; they name files of this machine


class FromPixels(nn.Module):
    """A network that takes images in 0..1, in float32, and normalises them itself; its logits are float32 too."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network, dtype
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, S, S]."""
        images = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.dtype == torch.float32:  # casts that change nothing would tie the program to this device
            return self.network(images)
        return self.network(images.to(self.dtype)).float()


def export_program(
    inference: nn.Module, mean: Sequence[float], std: Sequence[float], image_size: int, dtype: torch.dtype
) -> ExportedProgram:
    """The program of a network behind `FromPixels`; `inference` is an inference copy of it in `dtype`, on the CPU.

    It takes any number of images of `image_size` pixels, computes in `dtype`, and holds no path of this machine. Raises
    UserError, with torch's reason, where torch cannot export the network.
    """
    whole = FromPixels(inference, mean, std, dtype).eval()
    blank = torch.zeros(2, 3, image_size, image_size)  # of a batch of one image torch.export would make a constant
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
            program = torch.export.export(whole, (blank,), dynamic_shapes={"images": {0: Dim("batch", min=1)}})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the network is anybody's
        problem = f"torch.export cannot export the network ({described(error)})"
        raise UserError(f"{problem}; use --export_format dense") from error
    for node in program.graph.nodes:
        for trace in TRACES:
            node.meta.pop(trace, None)
    program.example_inputs = None
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters of torch print, log and warn of: whole graphs, where they fail, and the error says why."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def program_bytes(program: ExportedProgram, metadata: dict[str, Any]) -> memoryview:
    """The bytes of a `.pt2` file, with `metadata` as JSON in its extra file METADATA."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={METADATA: metadata_text(metadata)})
    return buffer.getbuffer()


def metadata_text(metadata: dict[str, Any]) -> str:
    """Metadata as JSON; UserError where they are not JSON."""
    try:
        return json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the metadata of the checkpoint are not JSON ({one_line(error)[:160]})") from error


def load_program(data: bytes) -> Callable[[Tensor], Tensor]:
    """The network in the bytes of a file of our own, as every user of PyTorch loads it, which trusts the file."""
    return torch.export.load(io.BytesIO(data)).module()


@torch.no_grad()
def answers(run: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    """Logits [N, classes], on the CPU, that `run` gives for uint8 images [N, 3, S, S] as floats in 0..1."""
    return torch.cat([run(part.float() / 255) for part in images.cpu().split(batch_size)])
