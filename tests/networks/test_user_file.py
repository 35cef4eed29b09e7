"""Networks of a user's file: run only when built, with its neighbours, and told by file and line where it fails."""

import sys
from pathlib import Path

import pytest
import torch

from sparsity.networks.user_file import build_from_file, file_sha256, is_file
from sparsity.system.errors import UserError

NET = """
import blocks
from torch import nn

def net(num_classes, width=4, name=None):
    return nn.Sequential(blocks.conv(width), nn.Flatten(), nn.LazyLinear(num_classes))

def fixed(width):
    return nn.Linear(width, 2)

def any_arguments(**arguments):
    return nn.Linear(3, arguments["num_classes"])

class Two(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.linear = nn.Linear(2, num_classes)

def raises():
    return blocks.fails()

def leaves():
    raise SystemExit("gone")

number = 3
"""
BLOCKS = """
from torch import nn

def conv(width):
    return nn.Conv2d(3, width, 3)

def fails():
    raise KeyError("stage")
"""


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "blocks.py").write_text(BLOCKS)
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path / "net.py"
    sys.modules.pop("blocks", None)  # of this folder


def test_the_function_gets_the_arguments_that_it_takes_and_the_file_may_import_its_neighbours(file):
    path = list(sys.path)
    assert build_from_file(f"{file}:net", 7, {"width": 5})[0].out_channels == 5
    assert build_from_file(f"{file}:fixed", 7, {"width": 5}).in_features == 5
    assert build_from_file(f"{file}:any_arguments", 7, {}).out_features == 7
    assert build_from_file(f"{file}:Two", 7, {}).linear.out_features == 7
    assert build_from_file(f"{file}:Two", 7, {"num_classes": 3}).linear.out_features == 3
    assert sys.path == path


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("raises", {}, r"net:raises: .*/blocks\.py, line 8: KeyError: 'stage'"),
        ("leaves", {}, r"net\.py, line 23: SystemExit: gone"),
        ("number", {}, r"net\.py has no function number; it has net, fixed, any_arguments, Two, raises, leaves"),
        ("fixed", {}, r"fixed of .*net\.py takes \(width\) \(missing a required argument: 'width'\)"),
        (
            "net",
            {"depth": 3},
            r"takes \(num_classes, width=4, name=None\) \(got an unexpected keyword argument 'depth'",
        ),
        ("net", {"width": "x"}, r"blocks\.py, line 5: TypeError"),
    ],
)
def test_a_function_that_cannot_be_used_is_told_with_its_place(file, function, arguments, said):
    with pytest.raises(UserError, match=said.replace("net:", r"net\.py:", 1)) as caught:
        build_from_file(f"{file}:{function}", 7, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import none_such\n", r"net\.py, line 1: ModuleNotFoundError: No module named 'none_such'"),
        ("a = 1\ndef net(:\n", r"net\.py, line 2: SyntaxError"),
        ("import torch\n\ntorch.zeros(2) @ torch.zeros(3)\n", r"net\.py, line 3: RuntimeError"),
        ("import sys\nsys.path.clear()\ndef net():\n    return 3\n", r"net returns a int, not a torch\.nn\.Module"),
        ("\0", r"SyntaxError|ValueError"),  # as versions of Python call it
    ],
)
def test_a_file_that_cannot_be_run_is_told_with_its_place(tmp_path, code, said, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(code)
    with pytest.raises(UserError, match=said):
        build_from_file(f"{tmp_path}/net.py:net", 7, {})


def test_a_file_is_hashed_without_being_run_and_is_run_once(tmp_path):
    (tmp_path / "net.py").write_text(
        f"from pathlib import Path\nimport torch\nPath({str(tmp_path / 'ran')!r}).open('a').write('x')\n"
        "def net():\n    return torch.nn.Linear(1, 1)\n"
    )
    arch = f"{tmp_path}/net.py:net"
    assert len(file_sha256(arch)) == 64 and not (tmp_path / "ran").exists()
    assert build_from_file(arch, 1, {}) is not build_from_file(arch, 1, {})
    assert (tmp_path / "ran").read_text() == "x"
    (tmp_path / "net.py").write_text("def net():\n    return None\n")  # as changed in a running process
    with pytest.raises(UserError, match="returns a NoneType"):
        build_from_file(arch, 1, {})
    with pytest.raises(UserError, match=r"other\.py cannot be read \(No such file or directory\)"):
        file_sha256(f"{tmp_path}/other.py:net")


def test_names_of_files_are_told_from_others():
    assert is_file("net.py:make") and is_file("/a:b/net.py:make") and not is_file("torchvision:vgg11")
    assert not is_file("resnet18") and not is_file("net.py")


def test_weights_are_drawn_by_the_seed_of_torch(file):
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(build_from_file(f"{file}:net", 7, {})[0].weight)
    assert torch.equal(*weights)
