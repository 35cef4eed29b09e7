"""Networks by name and from checkpoints: no file runs and nothing is downloaded unless the user says so."""

import socket

import pytest
import torch
from helpers import same_bits

from sparsity.networks import checkpoint, families
from sparsity.system.errors import UserError

NET = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").write_text("")

class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.linear(self.bn(self.conv(x)).relu().mean((2, 3)))

def net(width=4, num_classes=10):
    return Net(width, num_classes)

def other(num_classes=10):
    return Net(4, num_classes)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with a file of a network that leaves a file `ran` beside it where it is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """A machine on which every connection is an error of the test."""

    def connect(*address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def saved(path, spec, **entries):
    """A checkpoint of a new network, which is returned with it."""
    model = families.build(spec)
    content = {"net": checkpoint.plain_state(model), "epoch": 1, "model": spec}
    torch.save(content | entries, path)
    return path, model


def spec_of(arch="net.py:net", **arguments):
    return families.describe(arch, 3, 0, arguments)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "arguments"), [("mnasnet0_5", {"dropout": 0.1}), ("shufflenet_v2_x0_5", {})])
def test_a_network_of_torchvision_is_built_new_and_rebuilt_from_its_checkpoint_alone(tmp_path, name, arguments):
    spec = families.describe(f"torchvision:{name}", 3, 0, arguments)
    assert spec == {"arch": f"torchvision:{name}", "num_classes": 3, "arch_args": arguments}
    path, model = saved(tmp_path / "net.pth", spec)
    before = torch.get_rng_state()
    found, network = families.load_network(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.model == spec and same_bits(network.state_dict(), model.state_dict()) and not network.training


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("arch", "arguments", "said"),
    [
        ("torchvision:vgg11x", {}, "torchvision has no classification network 'vgg11x'; it has vgg11"),
        ("torchvision:quantized_resnet18", {}, "has no classification network"),
        ("torchvision:deeplabv3_resnet50", {}, "has no classification network"),
        ("torchvision:vgg11", {"weights": "DEFAULT"}, "--arch_args cannot set weights of torchvision:vgg11"),
        ("torchvision:vgg11", {"pretrained": True}, "cannot set pretrained"),
        ("torchvision:vgg11", {"num_classes": 4}, "cannot set num_classes"),
        ("torchvision:vgg11", {"depth": 4}, r"cannot be built with --arch_args depth=4 \(TypeError: .* 'depth'"),
        ("timm:resnet18", {}, "needs timm, which is not installed here"),
    ],
)
def test_a_library_gives_networks_without_weights_of_others(tmp_path, arch, arguments, said):
    spec = families.describe(arch, 3, 0, arguments)
    torch.save({"net": {"a.weight": torch.zeros(1)}, "epoch": 1, "model": spec}, tmp_path / "net.pth")
    for opened in (lambda: families.build(spec), lambda: families.load_network(tmp_path / "net.pth")):
        with pytest.raises(UserError, match=said):
            opened()


@pytest.mark.parametrize(
    "wrong",
    [
        {"arch": "models:resnet18"},
        {"arch": "resnet19"},
        {"arch": 3},
        {"num_classes": True},
        {"num_classes": 0},
        {"arch_args": [1]},
        {"arch_args": {1: 2}},
        {"arch_args": {"norm": torch.zeros(1)}},
    ],
)
def test_a_checkpoint_that_describes_no_network_is_refused(tmp_path, wrong):
    spec = {"arch": "torchvision:squeezenet1_1", "num_classes": 3, "arch_args": {}} | wrong
    torch.save({"net": {"a.weight": torch.zeros(1)}, "epoch": 1, "model": spec}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="does not fit the network it describes"):
        families.load_network(tmp_path / "net.pth")


def test_a_checkpoint_makes_no_file_run_and_tells_what_to_type(place):
    path, model = saved(place / "net.pth", spec_of(width=5))
    plain, _ = saved(place / "plain.pth", spec_of())
    (place / "ran").unlink()
    for arch in ("net.py:net", f"{place}/net.py:net", "net.py:net; rm x"):
        torch.save(torch.load(path) | {"model": spec_of(width=5) | {"arch": arch}}, place / "named.pth")
        with pytest.raises(UserError, match=r"which no checkpoint makes run: .* then add --arch '?[^ ]*net\.py:net"):
            families.load_network(place / "named.pth")
        with pytest.raises(UserError, match=r"--controls .* needs .* to be run"):
            families.load_control(place / "named.pth", {"arch": "torchvision:vgg11", "num_classes": 3, "arch_args": {}})
    for named, said in (
        ("net.py:other", "holds a network net.py:net, not net.py:other; type --arch net.py:net"),
        ("torchvision:vgg11", "not torchvision:vgg11; type --arch net.py:net"),
        ("resnet18", "not resnet18; type"),
    ):
        with pytest.raises(UserError, match=said):
            families.load_network(path, families.named(named, {}))
    for there, words in ((path, "width=5"), (plain, r"\(none\)")):
        with pytest.raises(UserError, match=f"holds a network of --arch_args {words}; leave --arch_args out"):
            families.load_network(there, families.named("net.py:net", {"width": 6}))
    assert not (place / "ran").exists()
    found, network = families.load_network(path, families.named("net.py:net", {}))
    assert found.model == spec_of(width=5) and same_bits(network.state_dict(), model.state_dict())
    assert families.load_control(path, found.model)[0].model == found.model


def test_another_file_than_that_of_the_training_is_said_and_used(place, capsys):
    path, _ = saved(place / "net.pth", spec_of())
    families.load_network(path, families.named("net.py:net", {}))
    assert capsys.readouterr().out == ""
    (place / "moved").mkdir()
    moved = (place / "net.py").rename(place / "moved" / "renamed.py")
    found, _ = families.load_network(path, families.named("moved/renamed.py:net", {}))  # the same content
    assert found.model["arch"] == "moved/renamed.py:net" and capsys.readouterr().out == ""
    moved.write_text(NET + "# more\n")
    with pytest.raises(UserError, match=r"not moved/renamed\.py:net; type --arch net\.py:net"):
        families.load_network(path, families.named("moved/renamed.py:net", {}))
    moved.rename(place / "net.py")
    with pytest.raises(UserError, match="was changed while it was in use"):
        families.load_network(path, found.model | {"arch": "net.py:net"})
    opened, _ = families.load_network(path, families.named("net.py:net", {}))
    assert "is another one than when net.pth was written (SHA-256" in capsys.readouterr().out.replace(f"{place}/", "")
    families.load_network(path, opened.model)
    assert capsys.readouterr().out == ""  # said once


def test_a_checkpoint_of_other_code_gets_the_network_that_is_named(place):
    model = families.build(spec_of("net.py:net", width=5)).eval()
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 9}, place / "net.pth")
    named = families.named("net.py:net", {"width": 5})
    found, network = families.load_network(place / "net.pth", named)
    assert found.model == spec_of(width=5) and found.epoch == 9
    assert same_bits(network.state_dict(), model.state_dict())
    torch.save({"net": wrapped | {"module.total_ops": torch.zeros(1)}}, place / "more.pth")
    for path, arch, said in (
        ("net.pth", None, "does not tell its network .* name it with --arch"),
        ("net.pth", families.named("net.py:net", {}), r"size mismatch for conv\.weight"),
        ("net.pth", families.named("torchvision:squeezenet1_1", {}), "does not fit the network"),
        ("net.pth", families.named("resnet18", {}), "does not tell its network"),
        ("more.pth", named, "the network has no module.total_ops|the network has no total_ops"),
    ):
        with pytest.raises(UserError, match=said):
            families.load_network(place / path, arch)


def test_the_classes_of_a_checkpoint_of_other_code_can_be_told(place):
    """The last matrix of a state dict need not be that of the output layer."""
    code = NET.replace("self.conv, self.bn, self.linear = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear",
                       "self.linear, self.bn, self.conv = nn.Linear")  # fmt: skip
    code = code.replace(
        "nn.Linear(width, num_classes)", "nn.Linear(6, num_classes), nn.BatchNorm2d(6), nn.Linear(3, 6)"
    )
    (place / "net.py").write_text(code)
    torch.save(families.build(families.describe("net.py:net", 3, 0, {})).state_dict(), place / "net.pth")
    with pytest.raises(UserError, match="size mismatch for linear"):
        families.load_network(place / "net.pth", families.named("net.py:net", {}))
    found, _ = families.load_network(place / "net.pth", families.named("net.py:net", {"num_classes": 3}))
    assert found.model["num_classes"] == 3


def test_names_of_networks_in_titles_and_files():
    assert families.short_name("some/where/net.py:make") == "net.py:make"
    words = [families.file_word(arch) for arch in ("resnet18", "torchvision:vgg11", "some/where/net.py:make")]
    assert words == ["resnet18", "torchvision_vgg11", "net_make"]
    assert families.argument_words({"width": 8, "norm": "batch", "a": [1, None]}) == "width=8 norm=batch 'a=[1, null]'"
