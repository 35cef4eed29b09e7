"""Networks that cannot be used: one clear line on stderr, no traceback, no file of theirs run, none changed."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import write_image_folder

import pruning
import run
from sparsity.networks import checkpoint, families

NETS = """
from pathlib import Path
from torch import nn
import torch

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

def none(num_classes):
    pass

def five():
    return make(5)

def one_size(num_classes):
    return make(num_classes, pool=0)

def nan(num_classes):
    network = make(num_classes)
    network.conv.weight.data[0] = torch.nan
    return network

def maps(num_classes):
    return make(num_classes, last=lambda logits: logits[..., None])

def text(num_classes):
    return make(num_classes, last=str)

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
    (root / "broken.py").write_text("from torch import nn\n\ndef net(:\n")
    (root / "imports.py").write_text("import none_such\n")
    (root / "folder.py").mkdir()
    (root / "one.npz").write_bytes(b"PK")
    data = {"dataset": "folder", "data_dir": "colours", "name": "colours", "image_size": 8}
    data |= {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": ["green", "red", "violet"]}

    def save(name, function="good", arch=None, net=(), **arguments):
        spec = families.describe(f"{root}/nets.py:{function}", 3, 0, arguments)
        state = checkpoint.plain_state(families.build(spec)) | dict(net)
        spec["arch"] = arch or spec["arch"].removeprefix(f"{root}/")
        torch.save({"net": state, "epoch": 1, "model": spec, "data": data}, root / f"{name}.pth")
        return state

    state = save("good")
    save("wide", width=8)
    save("same", "same")
    save("linear", "linear")
    save("elsewhere", arch="/elsewhere/evil.py:evil")
    save("mnasnet", arch="torchvision:mnasnet0_5")
    save("unknown", arch="torchvision:lenet")
    save("extra", net={"conv.total_ops": torch.zeros(1)})
    save("nan", net={"conv.bias": torch.full((4,), torch.nan)})
    torch.save({f"module.{name}": value for name, value in state.items()}, root / "foreign.pth")
    torch.save({name: value for name, value in state.items() if name != "conv.bias"}, root / "lacking.pth")
    cut = checkpoint.safetensors.pack(state, {})
    (root / "cut.safetensors").write_bytes(cut[:-4])
    (root / "huge.safetensors").write_bytes((1 << 32).to_bytes(8, "little") + cut[8:])
    (root / "ran").unlink()
    return root


IMAGES = "--dataset folder --data_dir colours --image_size 8 --epochs 1 --threads 1"
RUN = {
    "--arch none.py:net": "none.py cannot be read (No such file or directory)",
    "--arch folder.py:net": "folder.py cannot be read (Is a directory)",
    "--arch broken.py:net": "broken.py, line 3: SyntaxError",
    "--arch imports.py:net": "imports.py, line 1: ModuleNotFoundError: No module named 'none_such'",
    "--arch nets.py:lenet": "nets.py has no function lenet; it has make, good, raises",
    "--arch nets.py:raises": "nets.py, line 22: ValueError: not yet",
    "--arch nets.py:none": "none returns a NoneType, not a torch.nn.Module",
    "--arch nets.py:five": "tells 5 classes apart, not the 3 that are asked of it",
    "--arch nets.py:one_size": "cannot take images of 8 pixels",
    "--arch nets.py:nan": "its conv.weight holds NaN or Inf",
    "--arch nets.py:maps": "returns a tensor [1, 3, 1]",
    "--arch nets.py:text": "returns a str; it has to return logits",
    "--arch nets.py:lazy": "it has layers without a size, such as LazyLinear; run it once in the function",
    "--arch nets.py:no_gradient": "cannot be trained: in training mode it returns no tensor with gradients",
    "--arch nets.py:good --arch_args depth=3": "unexpected keyword argument 'depth'",
    "--arch nets.py:good --arch_args width=wide": "nets.py, line 12: TypeError",
    "--arch torchvision:lenet": "torchvision has no classification network 'lenet'",
    "--arch torchvision:mnasnet0_5 --arch_args depth=3": "cannot be built with --arch_args depth=3 (TypeError",
    "--arch torchvision:vgg11 --arch_args weights=DEFAULT": "--arch_args cannot set weights",
    "--arch torchvision:alexnet": "torchvision:alexnet cannot take images of 8 pixels (RuntimeError",
    "--arch timm:resnet18": "needs timm, which is not installed",
}
SWEEP = {
    "good.pth": "which no checkpoint makes run: look into that file, then add --arch nets.py:good",
    "elsewhere.pth": "then add --arch /elsewhere/evil.py:evil",
    "good.pth --arch nets.py:five": "holds a network nets.py:good, not nets.py:five; type --arch nets.py:good",
    "good.pth --arch torchvision:vgg11": "holds a network nets.py:good, not torchvision:vgg11",
    "good.pth --arch nets.py:good --arch_args width=8": "holds a network of --arch_args (none); leave --arch_args out",
    "good.pth wide.pth --arch nets.py:good": "differ in network or data",
    "good.pth --arch nets.py:good --controls elsewhere.pth": "--controls elsewhere.pth needs /elsewhere/evil.py:evil",
    "mnasnet.pth": "mnasnet.pth does not fit the network: ",
    "mnasnet.pth --arch nets.py:good": "holds a network torchvision:mnasnet0_5, not nets.py:good; leave --arch out",
    "unknown.pth": "torchvision has no classification network 'lenet'",
    "same.pth --arch nets.py:same": "gives the same network at every call; build a new one in the function",
    "linear.pth --arch nets.py:linear": "no layer that can be pruned: its output layer stays dense",
    "extra.pth --arch nets.py:good": "the network has no conv.total_ops",
    "nan.pth --arch nets.py:good": "conv.bias holds NaN or Inf",
    "foreign.pth": "does not tell its network",
    "foreign.pth --arch nets.py:good --arch_args width=8": "size mismatch for conv.weight",
    "foreign.pth --arch nets.py:good": "does not tell its dataset; name one of",
    "foreign.pth --arch resnet18": "does not tell its network",
    "lacking.pth --arch nets.py:good": "it lacks conv.bias",
    "cut.safetensors --arch nets.py:good": "cut.safetensors is damaged, cut short",
    "huge.safetensors --arch nets.py:good": "header of 4,294,967,296 bytes is longer than the file",
}
CASES = [(run, f"{IMAGES} {flags}", said) for flags, said in RUN.items()]
CASES += [(pruning, f"--levels 0 --threads 1 --checkpoint {flags}", said) for flags, said in SWEEP.items()]


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}


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


USAGE = {
    "--mean 0.5 0.5": "--mean: takes three numbers, or imagenet or half, not 0.5 0.5",
    "--mean 0.5 0.5 x --std half": "'x' is not a number from 0 to 1",
    "--mean 127 127 127 --std half": "'127' is not a number from 0 to 1, as images are in 0..1",
    "--std half": "--mean and --std belong together",
    "--image_size 2": "'2' is not a whole number from 4",
    "--arch vgg11": "'vgg11' is none of resnet18",
    "--arch net.py": "'net.py' is none of",
    "--arch net.py:a.b": "'net.py:a.b' is none of",
    "--arch torchvision:": "'torchvision:' is none of",
    "--arch net.py:net --arch_args width": "'width' is not key=value",
    "--arch net.py:net --arch_args 3=4": "'3=4' is not key=value",
    "--arch net.py:net --arch_args width=3 width=4": "width is given twice",
    "--arch_args width=3": "--arch_args needs an --arch that is not built in",
}


@pytest.mark.parametrize("flags", USAGE)
def test_flags_that_name_no_network_are_wrong_usage(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        pruning.main(flags.split())
    assert stop.value.code == 2 and USAGE[flags] in capsys.readouterr().err.splitlines()[-1]
