"""Programs: the network's own outputs, for any number of images; read without running what a hostile file brings."""

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsity.data.images import normalise
from sparsity.networks.inference import inference_copy
from sparsity.networks.program import METADATA, answers, export_program, load_program, program_bytes
from sparsity.networks.program_reader import read_program
from sparsity.system.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
WEIGHTS, MODEL = "data/weights/model_weights_config.json", "models/model.json"


class Pieces(nn.Module):
    """Lists of tensors, a concatenation, a shape that depends on the batch, a constant and a shared weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(36, 4)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = nn.Parameter(torch.eye(4))
        self.last = nn.Linear(4, 4)
        self.last.weight = self.twin.weight

    def forward(self, x):
        first, second, _, last = self.conv(x).chunk(4, dim=1)
        mixed = torch.cat([first * second, last.mean(1, keepdim=True)], 1)[:, [0, 2]]
        tokens = mixed.reshape(x.shape[0] * 2, 36) + torch.tensor([0.25])
        return self.last(self.twin(self.fc(tokens).view(x.shape[0], 2, 4).mean(1)))


@pytest.fixture
def program_file(small_net) -> bytes:
    program = export_program(inference_copy(small_net), MEAN, STD, 8, torch.float32)
    return bytes(program_bytes(program, {"data": {"classes": list("abcd")}}))


@pytest.fixture
def images(small_split):
    return small_split.images[:5]


def rewritten(data: bytes, changes: dict[str, bytes]) -> bytes:
    """A file with other contents of some members, or further ones."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = archive.namelist()[0].split("/")[0]
        members = {name.removeprefix(f"{root}/"): archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (members | changes).items():
            archive.writestr(f"{root}/{name}", content)
    return buffer.getvalue()


def edited(data: bytes, member: str, old: str, new: str) -> bytes:
    """A file with some text of a member replaced, once."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(member)]
        text = archive.read(name).decode()
    assert old in text
    return rewritten(data, {member: text.replace(old, new, 1).encode()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", ["small", "pieces"])
def test_a_program_gives_the_outputs_of_the_network_for_any_number_of_images(small_net, images, network, dtype):
    torch.manual_seed(0)
    model = small_net if network == "small" else Pieces().eval()
    inference = inference_copy(model, dtype)
    data = bytes(program_bytes(export_program(inference, MEAN, STD, 8, dtype), {"a": [1, "b"]}))
    run, metadata = read_program(data)
    assert metadata == {"a": [1, "b"]}
    with torch.no_grad():
        expected = inference(normalise(images, MEAN, STD, dtype)).float()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for load in (load_program(data), run):
        for count in (1, 2, 5):
            found = answers(load, images[:count], 5)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected[:count], **tolerance)
    assert torch.equal(answers(load_program(data), images, 5), answers(run, images, 5))


def test_a_file_names_no_place_of_this_machine_and_holds_no_images(program_file):
    with zipfile.ZipFile(io.BytesIO(program_file)) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert not any(word in content for word in (b".py", b"site-packages", str(Path.cwd()).encode()))
            assert not ("sample_inputs" in name and content)


def test_a_network_that_cannot_be_exported_is_told_in_one_line(capfd):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(192, 4)

        def forward(self, x):
            return self.fc(x.flatten(1) if x.sum() > 0 else -x.flatten(1))

    with pytest.raises(UserError, match=r"cannot export the network \(GuardOnDataDependentSymNode: .*use --exp"):
        export_program(Branch().eval(), MEAN, STD, 8, torch.float32)
    assert capfd.readouterr() == ("", "")


class Hostile:
    """A pickle that makes a folder where it is opened."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_torch_runs_the_pickle_of_a_hostile_file_and_the_reader_refuses_it(program_file, tmp_path):
    payload = io.BytesIO()
    torch.save(Hostile(tmp_path / "ran"), payload)
    hostile = rewritten(program_file, {"data/sample_inputs/model.pt": payload.getvalue()})
    with pytest.raises(ValueError, match="holds a pickle, which could run code"):
        read_program(hostile)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Exception):  # noqa: B017 (it fails after it has run the code)
        torch.export.load(io.BytesIO(hostile))
    assert (tmp_path / "ran").exists()


CALL = '"target": "torch.ops.aten.conv2d.default"'
BAD = {
    "a pickled weight": (WEIGHTS, '"use_pickle": false', '"use_pickle": true', "is a pickle"),
    "any function of torch": (MODEL, CALL, '"target": "torch.os.system"', "calls torch.os.system, which is not known"),
    "a loader": (MODEL, CALL, '"target": "torch.hub.load"', "calls torch.hub.load"),
    "an operator that writes": (
        MODEL,
        CALL,
        '"target": "torch.ops.aten.from_file.default"',
        "calls torch.ops.aten.f",
    ),
    "a library's operator": (MODEL, CALL, '"target": "torch.ops.mine.conv2d.default"', "calls torch.ops.mine"),
    "attributes": (MODEL, CALL, '"target": "torch.ops.aten.conv2d.default.__class__"', "calls torch.ops.aten.conv2d"),
    "a subgraph": (MODEL, '"as_ints"', '"as_graph"', "has an argument as_graph"),
    "a weight beyond the file": (
        WEIGHTS,
        '"sizes": [{"as_int": 6}',
        '"sizes": [{"as_int": 60000}',
        "stem.weight is larger than the bytes",
    ),
    "a weight that begins late": (
        WEIGHTS,
        '"storage_offset": {"as_int": 0}',
        '"storage_offset": {"as_int": 9}',
        "out of",
    ),
    "a weight of no bytes": (WEIGHTS, '"path_name": "weight_0"', '"path_name": "../models/model.json"', "named"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_could_run_code_or_reach_beyond_the_file_is_refused(program_file, kind):
    *change, said = BAD[kind]
    read_program(program_file)
    with pytest.raises((ValueError, RuntimeError, KeyError), match=said):
        read_program(edited(program_file, *change))


def test_text_that_torch_would_evaluate_is_not_looked_at(program_file, images, tmp_path):
    evil = f"__import__('os').mkdir('{tmp_path}/ran')"
    with zipfile.ZipFile(io.BytesIO(program_file)) as archive:
        model = json.loads(next(archive.read(name) for name in archive.namelist() if name.endswith(MODEL)))
    model["guards_code"] = [evil]
    for value in model["graph_module"]["graph"]["tensor_values"].values():
        value["sizes"][0] = {"as_expr": {"expr_str": evil, "hint": None}}
    hostile = rewritten(program_file, {MODEL: json.dumps(model).encode()})
    assert torch.equal(answers(read_program(hostile)[0], images, 5), answers(read_program(program_file)[0], images, 5))
    assert not (tmp_path / "ran").exists()


def test_members_that_two_readers_of_zip_may_read_differently_are_refused(program_file):
    for compression, names in ((zipfile.ZIP_DEFLATED, ["a/b"]), (zipfile.ZIP_STORED, ["a/b", "a/b"])):
        buffer = io.BytesIO(program_file)
        with zipfile.ZipFile(buffer, "a", compression) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                archive.writestr(name, b"0" * 100)
        with pytest.raises(ValueError, match="holds a file twice, or compressed"):
            read_program(buffer.getvalue())


def test_compiled_code_pickled_constants_and_files_of_others_are_refused(program_file):
    constants = {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    config = {"data/constants/model_constants_config.json": json.dumps({"config": constants}).encode()}
    for changes, said in (
        ({"data/aotinductor/model/a.so": b"\x7fELF"}, "holds compiled code"),
        (config | {"data/constants/opaque_obj_0": pickle.dumps(1)}, "its c is a pickle"),
    ):
        with pytest.raises(ValueError, match=said):
            read_program(rewritten(program_file, changes))
    foreign = rewritten(program_file, {})
    assert read_program(foreign)[1] == {"data": {"classes": list("abcd")}}
    with pytest.raises(ValueError, match=f"has no {METADATA}"):
        read_program(foreign.replace(METADATA.encode(), b"metadata_json"))
