"""Checkpoints travel to and from other code, and what is not one is refused in a line, without running it."""

import hashlib
import io
import os
import pickle
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import same_bits
from torch import nn

import Build_Resnet
from sparsity.networks import checkpoint, families, packed
from sparsity.system.errors import UserError

SPEC = {"arch": "resnet18", "num_classes": 3, "width": 4}
IMAGES = {"dataset": "folder", "image_size": 8, "classes": ["a"], "mean": [0.5] * 3, "std": [0.2] * 3}
METADATA = {"epoch": 7, "model": SPEC, "settings": {"seed": 3}, "data": IMAGES, "metrics": [0.1, None]}
SAVE = {"pth": checkpoint.save, "npz": checkpoint.save_packed, "safetensors": checkpoint.save_safetensors}
all_forms = pytest.mark.parametrize("form", SAVE)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return checkpoint.plain_state(Build_Resnet.build(SPEC).to(memory_format=torch.channels_last))


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("form", "precision"), [("pth", []), ("npz", ["fp32"]), ("npz", ["bf16"]), ("safetensors", [])]
)
def test_a_saved_network_comes_back_bit_for_bit(tmp_path, state, form, precision):
    path = tmp_path / f"net.{form}"
    SAVE[form](path, {"net": state, **METADATA}, *precision)
    saved, network = families.load_network(path)
    expected = packed.stored(state, *precision) if precision else state
    assert same_bits(saved.net, expected) and same_bits(network.state_dict(), expected)
    assert (saved.epoch, saved.model, saved.settings, saved.data) == (7, SPEC, {"seed": 3}, IMAGES)
    assert {key: value for key, value in saved.content.items() if key != "net"} == METADATA
    if form == "pth":  # code that knows only the reference loads it, too
        net = torch.load(path, weights_only=True)["net"]
        Build_Resnet.ResNet(Build_Resnet.BasicBlock, [2, 2, 2, 2], num_classes=3, width=4).load_state_dict(net)
        assert all(tensor.is_contiguous() for tensor in net.values())


class Evil:
    """A pickle that writes a file when it is read carelessly."""

    def __reduce__(self):
        return open, ("pwned", "w")


def saved_bytes(content):
    """The bytes of a file of `torch.save`."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def changed(name, change):
    """A checkpoint with one tensor changed."""
    return lambda state: {"net": state | {name: change(state[name].clone())}}


CONTENTS = {
    "code": (lambda state: {"net": state, "x": Evil()}, "refused.*open.*could run code"),
    "bare pickle of code": (lambda state: pickle.dumps(Evil()), "not written by torch.save"),
    "text": (lambda state: b"hello", "damaged|refused"),
    "cut short": (lambda state: saved_bytes(state)[:-500], "is damaged, cut short"),
    "a tensor": (lambda state: torch.zeros(3), "no state dict"),
    "no tensors": (lambda state: {"net": {"conv1.weight": 5}}, "no state dict"),
    "nan": (changed("bn1.bias", lambda v: v / 0), "bn1.bias holds NaN"),
    "sparse": (changed("bn1.bias", lambda v: v.to_sparse()), "bn1.bias is not a dense tensor"),
    "a billion values": (changed("linear.weight", lambda v: v[:1, :1].expand(10**6, 10**3)), "not a dense tensor"),
    "complex": (changed("conv1.weight", lambda v: v + 1j), "is not a dense tensor of numbers"),
    "whole numbers": (changed("conv1.weight", lambda v: v.long()), "conv1.weight is of type int64, not float32"),
    "a count of floats": (changed("bn1.num_batches_tracked", lambda v: v.float()), "float32, not int64"),
    "two networks": (lambda state: {"net": state, "state_dict": state}, "several networks \\(net, state_dict\\)"),
    "wrong shape": (changed("bn1.bias", lambda v: v[:2]), "size mismatch for bn1.bias"),
    "missing": (lambda state: {"net": {k: state[k] for k in state if k != "bn1.weight"}}, "it lacks bn1.weight$"),
    "unknown": (lambda state: {"net": state | {"extra.weight": torch.zeros(1)}}, "the network has no extra.weight$"),
    "profiled": (
        lambda state: {"net": state | {f"{name}.total_ops": torch.zeros(1).double() for name in ("a", "b", "c", "d")}},
        "the network has no a.total_ops, b.total_ops, c.total_ops and 1 more$",
    ),
    "prefixes that collide": (
        lambda state: {"net": state | {"module.bn1.weight": state["bn1.weight"]}},
        "no module.bn1",
    ),
    "wrong model": (lambda state: {"net": state, "model": {"arch": "vgg"}}, "unknown architecture"),
    "absurd width": (lambda state: {"net": state, "model": SPEC | {"width": 10**12}}, "not fit the network"),
    "model is text": (lambda state: {"net": state, "model": "resnet18"}, "'model' is a str"),
    "images incomplete": (lambda state: {"net": state, "data": {"dataset": "cifar10"}}, "entry 'data'"),
}


@pytest.mark.parametrize(
    ("place", "prefix"),
    [
        (None, ""),
        ("net", "module."),
        ("state_dict", "_orig_mod.module."),
        ("model_state_dict", "model._orig_mod."),
        ("model", "module.model.model."),
    ],
)
def test_files_of_other_code_are_read_wherever_the_weights_stand_and_whatever_wraps_them(
    tmp_path, state, place, prefix
):
    net = {prefix + name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    flags = {
        "args": Namespace(lr=0.1),
        "optimizer": {"step": torch.zeros(2)},
        "settings": "none",
        "data": [1],
        "epoch": 9,
    }
    flags = {"epoch": 9} if place == "net" else flags
    path = write(tmp_path / "net.pth", {place: net} | flags if place else net)
    saved, network = families.load_network(path)
    expected = {name: tensor.half().float() if tensor.dim() > 1 else tensor for name, tensor in state.items()}
    assert same_bits(network.state_dict(), expected) and same_bits(saved.net, expected)
    assert (saved.data, saved.settings, saved.epoch) == (None, {}, 9 if place else None)
    assert saved.model == SPEC


def test_a_file_from_before_zip_files_and_without_counts_of_batches_is_read(tmp_path, state):
    net = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    path = tmp_path / "old.th"
    torch.save({"state_dict": net}, path, _use_new_zipfile_serialization=False)
    assert same_bits(families.load_network(path)[1].state_dict(), state)


class Own(nn.Module):
    """A network that keeps a part as `model`, has buffers of whole numbers, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3, 3, bias=False)
        self.module = nn.Linear(3, 3, bias=False)
        self.module.weight = self.model.weight
        self.register_buffer("index", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True]))


@all_forms
def test_names_whole_numbers_and_shared_weights_of_a_network_stay(tmp_path, form):
    torch.manual_seed(0)
    source, path = Own(), tmp_path / f"net.{form}"
    SAVE[form](path, {"net": checkpoint.plain_state(source)})
    for prefix in ("", "module.", "model."):
        saved = checkpoint.load(path)
        network = Own()
        fitted = checkpoint.fit(network, replace(saved, net={prefix + name: saved.net[name] for name in saved.net}))
        assert same_bits(network.state_dict(), source.state_dict()) and same_bits(fitted.net, saved.net)
        assert network.model.weight is network.module.weight
    once = {name: tensor for name, tensor in saved.net.items() if name != "model.weight"}
    network = Own()
    checkpoint.fit(network, replace(saved, net=once))
    assert torch.equal(network.model.weight, source.model.weight)
    for change, said in (
        ({"module.weight": torch.zeros(3, 3)}, "has other values for model.weight than for module.weight"),
        ({"index": torch.zeros(3)}, "index is of type float32, not int64"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "size mismatch for mask"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.fit(Own(), replace(saved, net=saved.net | change))


def assert_refused(path, said):
    with pytest.raises(UserError, match=said) as caught:
        families.load_network(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_without_a_network_is_refused_in_one_line_and_not_run(tmp_path, monkeypatch, state, kind):
    monkeypatch.chdir(tmp_path)
    make, said = CONTENTS[kind]
    assert_refused(write(tmp_path / "bad.pth", make(state)), said)
    for form in ("npz", "safetensors"):
        assert_refused(write(tmp_path / f"bad.{form}", make(state)), "is damaged, cut short")
    assert not (tmp_path / "pwned").exists()


@all_forms
def test_places_that_are_no_file_are_told_and_not_waited_for(tmp_path, form):
    (tmp_path / f"folder.{form}").mkdir()
    (tmp_path / f"loop.{form}").symlink_to(tmp_path / f"loop.{form}")
    os.mkfifo(tmp_path / f"pipe.{form}")
    for name, said in (("folder", "is a folder"), ("loop", "not there"), ("pipe", "a pipe"), ("none", "train one")):
        assert_refused(tmp_path / f"{name}.{form}", said)


def test_the_hash_is_that_of_the_network_even_if_the_file_is_replaced_meanwhile(tmp_path, monkeypatch, state):
    path = write(tmp_path / "net.pth", state)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()

    def replace(*args, **kwargs):
        path.write_bytes(b"another training has written here")
        return state

    monkeypatch.setattr(torch, "load", replace)
    assert checkpoint.load(path).sha256 == expected


def damaged(content, draw):
    """A copy with bytes overwritten, spliced in, removed or cut off, often in the records of the zip format."""
    length, last = int(draw.integers(1, 40)), len(content) - 40
    start, other = int(draw.choice([draw.integers(last), last - draw.integers(400), 0])), int(draw.integers(last))
    middle = (draw.bytes(length), content[other : other + length], b"")[draw.integers(3)]
    return content[:start] + middle + (content[start + length :] if draw.integers(4) else b"")


@all_forms
def test_a_damaged_file_is_refused_or_means_the_same(tmp_path, state, form):
    """Of all but packed files only the refusal is checked, because nothing looks at a checksum."""
    path = tmp_path / f"net.{form}"
    some = {name: state[name] for name in state if name.startswith(("conv1", "bn1"))}
    SAVE[form](path, {"net": some, **METADATA})
    content, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(600):
        path.write_bytes(damaged(content, draw))
        try:
            found = checkpoint.load(path)
            same = same_bits(found.net, some) and (found.settings, found.data) == (METADATA["settings"], IMAGES)
            assert same or form != "npz"
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 200 < refused < 600  # the others: damage where no reader looks


def test_the_newest_numbered_checkpoint_is_found(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.newest(tmp_path)
    for age, name in enumerate(["a_ckpt_epoch9.pth", "b_ckpt_epoch10.pth", "b_last.pth"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert checkpoint.newest(tmp_path).name == "b_ckpt_epoch10.pth"
    os.utime(tmp_path / "a_ckpt_epoch9.pth", (2000, 2000))
    assert checkpoint.newest(tmp_path).name == "a_ckpt_epoch9.pth"
