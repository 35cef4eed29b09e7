"""Reads a `.pt2` file and runs its graph without `torch.export.load`, which runs code that a file brings along.

That loader unpickles weights, constants and sample inputs, loads compiled libraries, gives text of the file to `eval`
(sympy, guards) and calls whatever function of torch a node names. Here a graph is a list of calls of operators of ATen,
each looked up by name, on tensors that are made from raw bytes; all else is refused.
"""

import io
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.networks.program import METADATA

# The numbers of torch's schema.
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
STRIDED = 7
OPERATOR = re.compile(r"torch\.ops\.aten\.((?:_assert_)?[a-z]\w*)\.(\w+)")
# Operators that write files, or trust indices and storages that they are given.
UNSAFE = re.compile(r"from_file|unsafe|sparse|coo|cs[rc]|bs[rc]|storage|set_$|resize|record_stream|quantize")
ON_NUMBERS = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")


class Name(NamedTuple):
    """A value that an earlier call, or the file, gave a name."""

    text: str


class Call(NamedTuple):
    """One node of a graph; `outputs` names what the function returns: one value, or where it is a list, several."""

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: str | list[str | None] | None


@dataclass(frozen=True)
class Graph:
    """A program as it was read: `tensors` by the names in its calls, the names of its input and its output.

    `shape` is that of an image.
    """

    calls: list[Call]
    tensors: dict[str, Tensor]
    images: str
    logits: str
    shape: list[int]

    def __call__(self, images: Tensor) -> Tensor:
        """The output for `images` [B, 3, S, S], float32 in 0..1; ValueError for those of another size."""
        if list(images.shape[1:]) != self.shape:
            raise ValueError(f"it takes images {self.shape}")
        values: dict[str, Any] = self.tensors | {self.images: images}
        for call in self.calls:
            args = [_resolved(arg, values) for arg in call.args]
            result = call.function(*args, **{key: _resolved(arg, values) for key, arg in call.kwargs.items()})
            if isinstance(call.outputs, list):
                values |= {name: each for name, each in zip(call.outputs, result, strict=True) if name}
            elif call.outputs:
                values[call.outputs] = result
        return values[self.logits]


def read_program(data: bytes) -> tuple[Graph, dict[str, Any]]:
    """The graph and the metadata in the bytes of a `.pt2` file that this project wrote.

    Raises ValueError that says what is refused; damaged bytes raise nearly any other exception of the readers of zip
    and JSON.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if len({info.filename for info in infos}) < len(infos) or any(info.compress_type for info in infos):
            raise ValueError("it holds a file twice, or compressed")
        root = infos[0].filename.split("/")[0]
        names = {info.filename.removeprefix(f"{root}/") for info in infos}
        for word, places in (("compiled code", ("data/aotinductor/", "executorch/")), ("a pickle", ("data/sample",))):
            if any(archive.getinfo(f"{root}/{name}").file_size for name in names if name.startswith(places)):
                raise ValueError(f"it holds {word}, which could run code")
        if f"extra/{METADATA}" not in names:
            raise ValueError(f"it has no {METADATA}, as programs of this project have")

        def read(name: str) -> bytes:
            return archive.read(f"{root}/{name}")

        module = json.loads(read("models/model.json"))["graph_module"]
        tensors = _tensors(read, "weights") | _tensors(read, "constants")
        return _graph(module, tensors), json.loads(read(f"extra/{METADATA}"))


def _tensors(read: Callable[[str], bytes], place: str) -> dict[str, Tensor]:
    """The tensors of a folder of the archive, by the names in its list."""
    found, payloads = {}, {}
    for name, entry in json.loads(read(f"data/{place}/model_{place}_config.json"))["config"].items():
        meta, file = entry["tensor_meta"], entry["path_name"]
        if entry["use_pickle"] or meta is None:
            raise ValueError(f"its {name} is a pickle, which could run code")
        dtype = DTYPES[meta["dtype"]]
        if (file, dtype) not in payloads:
            data = read(f"data/{place}/{file}")
            payloads[file, dtype] = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0).to(dtype)
        size, stride = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
        if math.prod(size) > len(payloads[file, dtype]):
            raise ValueError(f"its {name} is larger than the bytes that it has")
        if not math.prod(size):
            found[name] = torch.empty(size, dtype=dtype)
        else:  # which checks that it stays within the bytes
            found[name] = torch.as_strided(payloads[file, dtype], size, stride, meta["storage_offset"]["as_int"])
    return found


def _graph(module: dict[str, Any], stored: dict[str, Tensor]) -> Graph:
    """The graph of a module in the file, whose parameters and buffers are in `stored`."""
    graph, signature, tensors, images = module["graph"], module["signature"], {}, []
    for spec in signature["input_specs"]:
        ((kind, about),) = spec.items()
        if kind == "user_input":
            images.append(about["arg"]["as_tensor"]["name"])
        else:
            tensors[about["arg"]["name"]] = stored[about[f"{kind}_name"]]
    (logits,) = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
    (image,) = images
    shape = [each["as_int"] for each in graph["tensor_values"][image]["sizes"][1:]]
    return Graph([_call(node) for node in graph["nodes"]], tensors, image, logits, shape)


def _call(node: dict[str, Any]) -> Call:
    """A node as a call; `kind` 1 marks positional arguments, 2 those by keyword."""
    args = [_argument(each["arg"]) for each in node["inputs"] if each["kind"] == 1]
    kwargs = {each["name"]: _argument(each["arg"]) for each in node["inputs"] if each["kind"] == 2}
    outputs = [_output(each) for each in node["outputs"]]
    return Call(_function(node["target"]), args, kwargs, outputs[0] if len(outputs) == 1 else outputs or None)


def _function(target: str) -> Callable[..., Any]:
    """The operator that a node names; ValueError for any other function."""
    place, _, name = target.rpartition(".")
    if place == "_operator" and name in ON_NUMBERS:
        return getattr(operator, name)
    found = OPERATOR.fullmatch(target)
    if not found or UNSAFE.search(found[1]):
        raise ValueError(f"it calls {target[:80]}, which is not known to be safe")
    return getattr(getattr(torch.ops.aten, found[1]), found[2])


def _argument(arg: dict[str, Any]) -> Any:
    """The value of an argument, or names in its place."""
    ((kind, value),) = arg.items()
    if kind in ("as_int", "as_float", "as_bool", "as_string", "as_ints", "as_floats", "as_bools"):
        return value
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return Name(value["name"])
    if kind == "as_tensors":
        return [Name(each["name"]) for each in value]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return Name(value["as_name"]) if "as_name" in value else next(iter(value.values()))
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools", "as_optional_tensors"):
        single = kind.removesuffix("s")
        return [_argument(each if kind == "as_optional_tensors" else {single: each}) for each in value]
    if kind == "as_scalar_type":
        return DTYPES[value]
    if kind == "as_memory_format":
        return FORMATS[value]
    if kind == "as_device" and value["type"] == "cpu":
        return torch.device("cpu")
    if kind == "as_layout" and value == STRIDED:
        return torch.strided
    raise ValueError(f"it has an argument {kind[:40]}, which is not known to be safe")


def _output(output: dict[str, Any]) -> str | list[str] | None:
    """The name of one output, or the names of a list of tensors; None for none."""
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return [each["name"] for each in value]
    return None if kind == "as_none" else value["name"] if kind == "as_tensor" else value["as_name"]


def _resolved(arg: Any, values: dict[str, Any]) -> Any:
    """An argument with values in the place of names."""
    if isinstance(arg, Name):
        return values[arg.text]
    return [_resolved(each, values) for each in arg] if isinstance(arg, list) else arg
