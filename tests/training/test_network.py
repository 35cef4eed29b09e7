"""The network of a training: as its flags name it, tried on images of all sizes before the first epoch."""

import pytest
import torch

from sparsity.system.errors import UserError
from sparsity.training.network import build_network
from sparsity.training.recipe import parse_args

NET = """
from torch import nn

def net(num_classes, size=32):
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (size // 4) ** 2, num_classes))
"""


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return ["--arch", f"{tmp_path}/net.py:net", "--recipe", "strong", "--precision", "fp32"]


def test_a_network_for_one_size_of_images_is_trained_on_that_size_which_is_said(flags, capsys):
    args = parse_args(flags)
    assert args.start_size == 20
    model, spec = build_network(args, 3, None, torch.device("cpu"))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3) and spec["arch"] == args.arch
    said = capsys.readouterr().out
    assert "cannot take images of 20 pixels" in said and "all epochs have images of 32 pixels" in said
    assert args.start_size == 0
    with pytest.raises(UserError, match=r"cannot take images of 24 pixels .* use --start_size 0"):
        build_network(parse_args([*flags, "--start_size", "24"]), 3, None, torch.device("cpu"))
    with pytest.raises(UserError, match="cannot take images of 32 pixels"):
        build_network(parse_args([*flags, "--arch_args", "size=16"]), 3, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "start_size", "zero"),
    [(["--recipe", "strong"], 20, True), ([], 0, False), (["--zero_init"], 0, True)],
)
def test_a_built_in_network_takes_the_sizes_of_the_recipe_and_starts_its_branches_at_zero(flags, start_size, zero):
    args = parse_args(["--arch", "resnet18", "--width", "4", "--precision", "fp32", *flags])
    model, spec = build_network(args, 3, None, torch.device("cpu"))
    assert args.start_size == start_size and spec == {"arch": "resnet18", "num_classes": 3, "width": 4}
    assert all(bool(block.bn2.weight.any()) != zero for block in model.layer3)
