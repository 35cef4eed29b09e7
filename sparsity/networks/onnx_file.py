"""A program as an ONNX file: onnx and onnxscript write it, onnxruntime runs it; all three are optional packages."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from sparsity.networks.program import metadata_text, quiet
from sparsity.system.errors import UserError, described

WRITERS, READERS = ("onnx", "onnxscript"), ("onnxruntime",)
INPUT, OUTPUT, BATCH = "input", "output", "batch"
OPSET = 20  # the one that torch 2.14 writes without converting


def missing(packages: tuple[str, ...]) -> list[str]:
    """The packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require_installed(what: str, packages: tuple[str, ...]) -> None:
    """UserError that says what to install where `what` needs packages that are not there."""
    if absent := missing(packages):
        names = " ".join(absent)
        raise UserError(f"{what} needs {' and '.join(absent)}, not installed here: pip install {names}")


def onnx_bytes(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    """The bytes of an ONNX file: the axis of images is dynamic, classes, mean and std are metadata properties.

    All of `metadata` stand as JSON under the property `metadata`. Raises UserError where torch cannot convert the
    program.
    """
    try:
        with quiet():
            names = {"input_names": [INPUT], "output_names": [OUTPUT]}
            model = torch.onnx.export(program, (), **names, opset_version=OPSET, dynamo=True, verbose=False).model_proto
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any of its passes
        problem = f"torch.onnx cannot convert the network ({described(error)})"
        raise UserError(f"{problem}; use --export_format program") from error
    for node in model.graph.node:  # names of modules, calls and files of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]  # shapes between the ends, in terms of torch's symbols
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    for key in ("classes", "mean", "std", "image_size"):
        model.metadata_props.add(key=key, value=metadata_text(metadata["data"][key]))
    model.metadata_props.add(key="metadata", value=metadata_text(metadata))
    return model.SerializeToString()


def run_onnx(data: bytes) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """The network in the bytes of an ONNX file, run by onnxruntime on the CPU, and its metadata properties.

    Raises UserError without onnxruntime, and one of its many exceptions for damaged bytes.
    """
    require_installed("running an ONNX file", READERS)
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4  # no lines of its own
    runner = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(runner.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run, runner.get_modelmeta().custom_metadata_map
