"""Exported networks that run without this project: made, written with what a user has to know, read back and run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sparsity.data.images import Split
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.inference import inference_copy
from sparsity.networks.onnx_file import READERS, WRITERS, missing, onnx_bytes, require_installed, run_onnx
from sparsity.networks.outputs import TOLERANCE, distance
from sparsity.networks.program import answers, export_program, load_program, program_bytes
from sparsity.system.errors import UserError
from sparsity.system.files import write_atomic
from sparsity.system.machine import DTYPES

NOT_RUN = "file not run, as onnxruntime is not installed"
BATCH = default_batch_size(torch.device("cpu"))  # which programs run on


def require_program(dense: nn.Module, test: Split, precision: str, form: str) -> None:
    """UserError, before long work, where no file of `form` ('program' or 'onnx') can be made of the network."""
    if form == "onnx":
        require_installed("--export_format onnx", WRITERS)
    program = make_program(dense, test, precision)
    if form == "onnx":
        onnx_bytes(program, {"data": dict.fromkeys(("classes", "mean", "std", "image_size"))})


def make_program(model: nn.Module, test: Split, precision: str) -> ExportedProgram:
    """The program of a network, masked or not, for images like those of `test`; errors as of `export_program`."""
    inference = inference_copy(model, DTYPES[precision]).cpu()
    return export_program(inference, test.mean, test.std, test.images.shape[-1], DTYPES[precision])


def predictions_of(program: ExportedProgram, test: Split) -> Tensor:
    """The class that a program predicts for each test image [N]."""
    return answers(program.module(), test.images, BATCH).argmax(1)


def write_program(path: Path, program: ExportedProgram, metadata: dict[str, Any], few: Tensor, form: str) -> list[str]:
    """Write a file, read it back, and run it on `few` uint8 images; returns notes.

    Raises UserError where the outputs are not those of `program`.
    """
    write_atomic(path, program_bytes(program, metadata) if form == "program" else onnx_bytes(program, metadata))
    if form == "onnx" and missing(READERS):
        return [NOT_RUN]
    data = path.read_bytes()
    run = load_program(data) if form == "program" else run_onnx(data)[0]
    expected, found = answers(program.module(), few, BATCH), answers(run, few, BATCH)
    apart = distance(found, expected)
    if not apart <= TOLERANCE:  # also nan
        raise UserError(f"{path} gives other outputs than the network in memory, by {apart:.1e} of the largest")
    return []
