"""Safetensors files come back to the bit, and those that lie about themselves are refused before a tensor is made."""

import json

import pytest
import torch
from helpers import same_bits

from sparsity.networks import checkpoint, safetensors
from sparsity.system.errors import UserError

METADATA = {"epoch": 3, "model": {"arch": "resnet18"}, "settings": {"name": "Grüße", "rates": [0.1, None]}}


def network():
    """Tensors of every type and of awkward shapes and bits."""
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    return {str(dtype): (3 * values).to(dtype) for dtype in safetensors.NAMES} | {
        "count": torch.tensor(-(2**63)),
        "empty": torch.zeros(0, 3),
        "odd": torch.tensor([True, False, True]),
        "payload and -0.0": torch.tensor([0x7FC00001, -0x80000000], dtype=torch.int32).view(torch.float32),
        "": values[None].contiguous(memory_format=torch.channels_last).requires_grad_(),
    }


def encode(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_everything_comes_back_in_its_order_with_metadata():
    state = network()
    data = safetensors.pack(state, METADATA)
    found, metadata = safetensors.unpack(data)
    assert metadata == METADATA and same_bits(found, state)
    found["odd"].fill_(False)  # a copy of the file's bytes, which nobody may write to
    assert safetensors.unpack(data)[0]["odd"].any()
    assert safetensors.unpack(safetensors.pack({}, {})) == ({}, {})


def test_the_bytes_are_those_of_the_format():
    data = safetensors.pack({"a": torch.tensor([1, 0, 1], dtype=torch.bool), "b": torch.tensor([1.0, -2.0])}, {"x": 1})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt", safetensors.KEY: '{"x":1}'}
    assert header == {"a": entry(8, 11, (3,), "BOOL"), "b": entry(0, 8, (2,))}  # each aligned to its values
    assert data[8 + length :] == bytes.fromhex("0000803f000000c0") + b"\1\0\1"


def test_a_file_of_other_code_has_no_metadata():
    for told in ({}, {"__metadata__": {"format": "pt", "model": "resnet"}}):
        found, metadata = safetensors.unpack(encode(told | {"w": entry(4, 8), "v": entry()}, bytes(8)))
        assert metadata == {} and list(found) == ["w", "v"]


HOSTILE = {
    "nothing": (b"", "header of 0 bytes"),
    "a header of 4 GB": ((1 << 32).to_bytes(8, "little") + b"{}", "longer than the file"),
    "a header beyond the file": ((99).to_bytes(8, "little") + b"{}", "longer than the file"),
    "not JSON": (encode(b"hello world"), "Expecting value"),
    "not text": (encode(b"{\xff}"), "can't decode"),
    "a list": (encode([1]), "not a JSON object"),
    "deep nesting": (encode(b"[" * 100_000), "recursion"),
    "a name twice": (encode(b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)), "a key twice"),
    "a key twice": (
        encode(b'{"w":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', bytes(4)),
        "a key twice",
    ),
    "metadata of numbers": (encode({"__metadata__": {"a": 1}}), "text to text"),
    "metadata that is none": (encode({"__metadata__": {safetensors.KEY: "[]"}}), "not a JSON object"),
    "an entry of text": (encode({"w": "F32"}), "w lacks dtype"),
    "an entry too many": (encode({"w": entry() | {"x": 1}}, bytes(4)), "or has more"),
    "an unknown dtype": (encode({"w": entry(dtype="F4")}, bytes(4)), "unknown dtype F4"),
    "a dtype that is none": (encode({"w": entry(dtype=["F32"])}, bytes(4)), "unknown dtype"),
    "beyond the file": (encode({"w": entry(0, 8, (2,))}, bytes(4)), "beyond the file"),
    "overlapping": (encode({"v": entry(), "w": entry(2, 6)}, bytes(6)), "overlap"),
    "the same bytes": (encode({"v": entry(), "w": entry()}, bytes(4)), "overlap"),
    "a hole": (encode({"v": entry(), "w": entry(8, 12)}, bytes(12)), "leave holes"),
    "bytes at the end": (encode({"w": entry()}, bytes(5)), "leave holes"),
    "another size": (encode({"w": entry(shape=(2,))}, bytes(4)), "another size"),
    "backwards": (encode({"w": entry(4, 0)}, bytes(4)), "another size"),
    "one offset": (encode({"w": entry() | {"data_offsets": [0]}}, bytes(4)), "another size"),
    "a negative side": (encode({"w": entry(shape=(-1, -1))}, bytes(4)), "shape of w"),
    "a side of text": (encode({"w": entry(shape=("1",))}, bytes(4)), "shape of w"),
    "a side of truth": (encode({"w": entry(shape=(True,))}, bytes(4)), "shape of w"),
    "an absurd side": (encode({"w": entry(0, 0, (0, 10**30))}), "shape of w"),
    "absurdly many sides": (encode({"w": entry(shape=[1] * 1000)}, bytes(4)), "shape of w"),
    "a terabyte": (encode({"w": entry(0, 1 << 40, (1 << 38,))}, bytes(4)), "beyond the file"),
    "an offset of a fraction": (encode({"w": entry(0, 4.0)}, bytes(4)), "data_offsets of w"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_lies_is_refused_in_one_line_before_a_tensor_is_made(tmp_path, monkeypatch, kind):
    data, said = HOSTILE[kind]
    path = tmp_path / "net.safetensors"
    path.write_bytes(data)
    monkeypatch.setattr(safetensors, "_tensor", lambda *args: pytest.fail("a tensor was made"))
    with pytest.raises(UserError, match=said) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_cannot_be_written_is_said_and_leaves_no_file(tmp_path):
    path = tmp_path / "net.safetensors"
    for content, said in (
        ({"net": {"w": torch.zeros(1, dtype=torch.complex64)}}, "w is of type torch.complex64"),
        ({"net": {"w": torch.zeros(1)}, "x": torch.zeros(1)}, "not JSON"),
        ({"net": {"w": torch.zeros(1)}, "x": float("nan")}, "not JSON"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.save_safetensors(path, content)
    assert not list(tmp_path.iterdir())
