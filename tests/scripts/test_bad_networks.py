"""Networks that cannot be used: one clear line on stderr, no traceback, no file of theirs run, none changed."""

import sys

import pytest
import torch
from conftest import write_image_folder
from helpers import contents

import pruning
import run
from sparsity.networks import checkpoint, families

NETS = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").write_text("")

def make(num_classes, width=4, pool=1, last=lambda logits: logits):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.linear = nn.Conv2d(3, width, 3), pool, nn.Linear(width, num_classes)
        def forward(self, x):
            x = self.conv(x).relu()
            return last(self.linear(x.mean((2, 3)) if self.pool else x.flatten(1)))
    return Net()

def good(num_classes=10, width=4):
    return make(num_classes, width)

def raises(num_classes):
    raise ValueError("not\\nyet")

def one_size(num_classes):
    return make(num_classes, pool=0)

def no_gradient(num_classes):
    return make(num_classes, last=lambda logits: logits.detach())

def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

kept = make(3)

def same():
    return kept
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A working folder with images, files of networks, good and bad, and checkpoints."""
    root = tmp_path_factory.mktemp("made")
    write_image_folder(root / "colours", train=16, test=8)
    (root / "nets.py").write_text(NETS)
    (root / "folder.py").mkdir()
    data = {"dataset": "folder", "data_dir": "colours", "name": "colours", "image_size": 8}
    data |= {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": ["green", "red", "violet"]}

    for name, function, arguments in (
        ("good", "good", {}),
        ("wide", "good", {"width": 8}),
        ("same", "same", {}),
        ("linear", "linear", {}),
    ):
        spec = families.describe(f"{root}/nets.py:{function}", 3, 0, arguments)
        state = checkpoint.plain_state(families.build(spec))
        spec["arch"] = spec["arch"].removeprefix(f"{root}/")
        torch.save({"net": state, "epoch": 1, "model": spec, "data": data}, root / f"{name}.pth")
    (root / "ran").unlink()
    return root


IMAGES = "--dataset folder --data_dir colours --image_size 8 --epochs 1 --threads 1"
RUN = {
    "--arch folder.py:net": "folder.py cannot be read (Is a directory)",
    "--arch nets.py:raises": "nets.py, line 21: ValueError: not yet",
    "--arch nets.py:one_size": "cannot take images of 8 pixels",
    "--arch nets.py:lazy": "it has layers without a size, such as LazyLinear; run it once in the function",
    "--arch nets.py:no_gradient": "cannot be trained: in training mode it returns no tensor with gradients",
}
SWEEP = {
    "good.pth": "which no checkpoint makes run: look into that file, then add --arch nets.py:good",
    "good.pth wide.pth --arch nets.py:good": "differ in network or data",
    "same.pth --arch nets.py:same": "gives the same network at every call; build a new one in the function",
    "linear.pth --arch nets.py:linear": "no layer that can be pruned: its output layer stays dense",
}
CASES = [(run, f"{IMAGES} {flags}", said) for flags, said in RUN.items()]
CASES += [(pruning, f"--levels 0 --threads 1 --checkpoint {flags}", said) for flags, said in SWEEP.items()]


@pytest.mark.parametrize(("script", "flags", "said"), CASES, ids=[f"{c[0].__name__} {c[1]}" for c in CASES])
def test_a_network_that_cannot_be_used_is_told_in_one_line(place, capfd, script, flags, said):
    before = contents(place)
    assert script.main(flags.split()) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    after = contents(place)
    assert {path: after[path] for path in before} == before
    if "nets.py" not in flags:
        assert place / "ran" not in after
    sys.modules.pop("user_file_nets", None)
