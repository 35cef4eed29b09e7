"""Checkpoints travel to and from other code, and what is not one is refused in a line, without running it."""

import os
import pickle
import zipfile

import pytest
import torch

import Build_Resnet
from sparsity.networks import checkpoint, families
from sparsity.system.errors import UserError
from sparsity.system.files import file_hash

SPEC = {"arch": "resnet18", "num_classes": 3, "width": 4}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Build_Resnet.build(SPEC).eval()


def restore(path):
    return families.restore(checkpoint.load(path), Build_Resnet.build, Build_Resnet.spec_of)


def same(model, other):
    state, others = model.state_dict(), other.state_dict()
    return list(state) == list(others) and all(torch.equal(state[name], others[name]) for name in state)


def write(path, content):
    torch.save(content, path)
    return path


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, model):
    path = tmp_path / "net.pth"
    checkpoint.save(path, {"net": checkpoint.plain_state(model), "epoch": 7, "model": SPEC, "settings": {"seed": 3}})
    saved = checkpoint.load(path)
    assert (saved.epoch, saved.model, saved.settings["seed"], saved.sha256) == (7, SPEC, 3, file_hash(path))
    assert same(model, restore(path))


def test_weights_in_channels_last_are_saved_in_the_default_format(tmp_path, model):
    path = tmp_path / "net.pth"
    checkpoint.save(path, {"net": checkpoint.plain_state(model.to(memory_format=torch.channels_last)), "epoch": 1})
    net = torch.load(path, weights_only=True)["net"]
    assert all(tensor.is_contiguous() for tensor in net.values())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"net": state, "epoch": 60},
        lambda state: {"net": state, "acc": 93.02, "epoch": 60},
        lambda state: {"state_dict": state},
        lambda state: state,
        lambda state: {"net": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"net": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"net": {name: t.double() if t.is_floating_point() else t for name, t in state.items()}},
    ],
)
def test_foreign_formats_load_without_metadata(tmp_path, model, wrap):
    assert same(model, restore(write(tmp_path / "net.pth", wrap(model.state_dict()))))


def test_files_from_before_pytorch_0_4_1_load(tmp_path, model):
    state = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    assert same(model, restore(write(tmp_path / "net.pth", {"net": state})))


def test_ours_loads_in_code_that_knows_only_the_reference(tiny_checkpoint):
    content = torch.load(tiny_checkpoint, map_location="cpu", weights_only=True)
    reference = Build_Resnet.ResNet(Build_Resnet.BasicBlock, [2, 2, 2, 2], num_classes=3, width=4)
    reference.load_state_dict(content["net"])
    assert content["epoch"] == 3


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


def flip(path):
    """Damage the middle of the file, where the weights are."""
    content = bytearray(path.read_bytes())
    content[:64] = b"\0" * 64
    path.write_bytes(content)


class Evil:
    """A pickle that runs a command when it is read carelessly."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def with_entry(state, name, change):
    return {"net": {key: change(value) if key == name else value for key, value in state.items()}}


def spoil(value):
    value = value.clone()
    value.view(-1)[1] = float("nan")
    return value


BAD = {
    "text": (lambda state, path: path.write_text("hello"), "damaged|not a checkpoint"),
    "empty": (lambda state, path: path.write_bytes(b""), "damaged"),
    "cut short": (lambda state, path: (write(path, {"net": state}), cut(path)), "damaged, cut short"),
    "head gone": (lambda state, path: (write(path, {"net": state}), flip(path)), "damaged|refused"),
    "code": (lambda state, path: write(path, {"net": state, "x": Evil()}), "refused.*system"),
    "bare pickle of code": (lambda state, path: path.write_bytes(pickle.dumps(Evil())), "refused"),
    "other zip": (lambda state, path: zipfile.ZipFile(path, "w").writestr("a.txt", "b"), "damaged"),
    "a tensor": (lambda state, path: write(path, torch.zeros(3)), "holds a Tensor"),
    "a number": (lambda state, path: write(path, {"net": 5}), "no state dict"),
    "no tensors": (lambda state, path: write(path, {"net": {"conv1.weight": 5}}), "no state dict"),
    "nothing": (lambda state, path: write(path, {}), "no state dict"),
    "nan": (
        lambda state, path: write(path, with_entry(state, "layer1.0.conv1.weight", spoil)),
        "layer1.0.conv1.weight",
    ),
    "inf": (
        lambda state, path: write(path, with_entry(state, "bn1.bias", lambda v: v + torch.inf)),
        "bn1.bias holds NaN",
    ),
    "wrong shape": (
        lambda state, path: write(path, with_entry(state, "bn1.bias", lambda v: v[:2])),
        r"bn1.bias is \(2,\) instead of \(4,\)",
    ),
    "missing": (
        lambda state, path: write(path, {"net": {k: v for k, v in state.items() if k != "layer2.0.bn2.weight"}}),
        "layer2.0.bn2.weight is missing",
    ),
    "unknown": (
        lambda state, path: write(path, {"net": state | {"extra.weight": torch.zeros(1)}}),
        "extra.weight is unk",
    ),
    "other network": (lambda state, path: write(path, {"net": {"fc.weight": torch.zeros(2, 2)}}), "not a ResNet"),
    "sparse": (
        lambda state, path: write(path, with_entry(state, "bn1.bias", lambda v: v.to_sparse())),
        "dense tensor",
    ),
    "a billion values from four bytes": (
        lambda state, path: write(
            path, with_entry(state, "linear.weight", lambda v: torch.zeros(1).expand(10**6, 10**3))
        ),
        "claims more values",
    ),
    "wrong model": (lambda state, path: write(path, {"net": state, "model": {"arch": "vgg"}}), "unknown architecture"),
    "absurd width": (
        lambda state, path: write(path, {"net": state, "model": SPEC | {"width": 10**12}}),
        "does not describe a network|does not fit",
    ),
    "whole numbers": (lambda state, path: write(path, with_entry(state, "conv1.weight", lambda v: v.long())), "int64"),
    "negative variance": (
        lambda state, path: write(path, with_entry(state, "bn1.running_var", lambda v: v - 5)),
        "bn1.running_var holds a negative variance",
    ),
    "arch is a list": (
        lambda state, path: write(path, {"net": state, "model": SPEC | {"arch": ["x"]}}),
        "unknown arch",
    ),
    "size is true": (
        lambda state, path: write(
            path,
            {
                "net": state,
                "data": {"dataset": "folder", "image_size": True, "classes": [], "mean": [0, 0, 0], "std": [1, 1, 1]},
            },
        ),
        "entry 'data'",
    ),
    "model is text": (lambda state, path: write(path, {"net": state, "model": "resnet18"}), "'model' is a str"),
    "data incomplete": (
        lambda state, path: write(path, {"net": state, "data": {"dataset": "cifar10"}}),
        "entry 'data'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, model, kind):
    monkeypatch.chdir(tmp_path)
    make, said = BAD[kind]
    path = tmp_path / "bad.pth"
    make(model.state_dict(), path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=said) as caught:
        restore(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    assert path.read_bytes() == before


def test_a_missing_checkpoint_tells_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"not there; train one with `python run.py`"):
        checkpoint.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.newest(tmp_path)


def test_the_newest_numbered_checkpoint_is_found(tmp_path):
    for age, name in enumerate(["a_ckpt_epoch9.pth", "b_ckpt_epoch10.pth", "b_last.pth"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert checkpoint.newest(tmp_path).name == "b_ckpt_epoch10.pth"
    os.utime(tmp_path / "a_ckpt_epoch9.pth", (2000, 2000))
    assert checkpoint.newest(tmp_path).name == "a_ckpt_epoch9.pth"
