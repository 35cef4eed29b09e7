"""Networks of the user and of torchvision through both scripts, to a file that plain torch reads."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import files_of, rows_of, sweep
from torch import nn
from torchvision import models

import run
from sparsity.networks.evaluation import evaluate
from sparsity.networks.families import load_network, named
from sparsity.sweep.inputs import Source, load_test_images

NET = """
from pathlib import Path
from torch import nn
import blocks

Path(__file__).with_name("ran").write_text("")

def small(num_classes, width=4):
    layers = blocks.block(3, width) + blocks.block(width, width) + [nn.Flatten(), nn.Linear(4 * width, num_classes)]
    return nn.Sequential(*layers)
"""
BLOCKS = """
from torch import nn

def block(inside, out):
    return [nn.Conv2d(inside, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working folder with a network in a file, which leaves a file `ran` where it is run, and its neighbour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # for runpy
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    yield tmp_path
    sys.modules.pop("blocks", None)  # of this folder


def train(folder: Path, *flags: str, size: int = 8) -> int:
    """Exit status of a training of one epoch."""
    images = ["--dataset", "folder", "--data_dir", str(folder), "--image_size", str(size), "--batch_size", "16"]
    return run.main([*images, "--epochs", "1", "--precision", "fp32", "--threads", "1", *flags])


def test_a_network_of_a_file_is_trained_swept_exported_and_read_by_plain_torch(place, image_folder, capsys):
    arch = ["--arch", "net.py:small"]
    assert train(image_folder, *arch, "--arch_args", "width=8") == 0
    path = place / "checkpoints" / "colours_net_small_ckpt_epoch1.pth"
    spec = torch.load(path, weights_only=True)["model"]
    assert (spec["arch"], spec["arch_args"]) == ("net.py:small", {"width": 8})
    (place / "ran").unlink()

    assert sweep(place / "images", "--levels", "0,50") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "then add --arch net.py:small" in said
    assert not (place / "ran").exists() and not files_of(place / "images", "colours_net_small_pruning").csv.exists()

    export = ["--levels", "0,50", "--export", "50", "--export_format", "dense"]
    assert sweep(place / "images", *arch, *export) == 0
    rows = rows_of(files_of(place / "images", "colours_net_small_pruning").csv)
    saved, dense = load_network(path, named("net.py:small", {}))
    test, _ = load_test_images(Source("folder", image_folder, 8), saved, None)
    assert float(rows[0]["accuracy"]) == pytest.approx(evaluate(dense, test, 24).accuracy)
    exported = place / "checkpoints" / "colours_net_small_l1_uniform_none_50.pth"
    plain = runpy.run_path("net.py")["small"](num_classes=3, width=8)
    plain.load_state_dict(torch.load(exported, weights_only=True)["net"])
    assert sum(int((plain[index].weight == 0).sum()) for index in (0, 3)) == (3 * 8 * 9 + 8 * 8 * 9) // 2
    assert evaluate(plain.eval(), test, 24).accuracy == pytest.approx(float(rows[1]["accuracy"]))

    capsys.readouterr()
    assert sweep(place / "again", "--checkpoint", exported, "--levels", "0", "--arch", f"{place}/net.py:small") == 0
    assert float(rows_of(files_of(place / "again", "colours_net_small_pruning").csv)[0]["accuracy"]) == float(
        rows[1]["accuracy"]
    )
    (place / "net.py").write_text(NET + "\n# changed\n")
    assert sweep(place / "images", *arch, *export) == 1  # rows of another file are not mixed in
    told = capsys.readouterr()
    assert "is another one than when" in told.out and "arch_sha256" in told.err
    assert sweep(place / "changed", *arch, "--levels", "50") == 0
    (again,) = rows_of(files_of(place / "changed", "colours_net_small_pruning").csv)
    assert {**again, "seconds": "", "file_bytes": ""} == {**rows[1], "seconds": "", "file_bytes": ""}


def test_a_training_of_a_file_is_resumed_when_the_file_is_named_again(place, image_folder, capsys):
    arch = ["--arch", "net.py:small"]
    assert train(image_folder, *arch, "--arch_args", "width=8") == 0
    (place / "ran").unlink()
    last = (place / "checkpoints" / "colours_net_small_last.pth").read_bytes()
    for flags, said in (
        ([], "then add --arch net.py:small"),
        ([*arch, "--arch_args", "width=4"], "holds a network of --arch_args width=8; leave --arch_args out"),
    ):
        assert run.main(["--resume", *flags]) == 1
        assert said in capsys.readouterr().err and not (place / "ran").exists()
        assert (place / "checkpoints" / "colours_net_small_last.pth").read_bytes() == last
    assert run.main(["--resume", "--epochs", "2", *arch]) == 0
    assert torch.load(place / "checkpoints" / "colours_net_small_ckpt_epoch2.pth", weights_only=True)["epoch"] == 2


def test_a_network_of_torchvision_is_swept_from_its_checkpoint_alone(tmp_path, image_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(image_folder, "--arch", "torchvision:squeezenet1_1", size=32) == 0
    flags = ["--levels", "0,90", "--export", "90", "--export_format", "dense"]
    assert sweep(tmp_path / "images", *flags) == 0
    rows = rows_of(files_of(tmp_path / "images", "colours_torchvision_squeezenet1_1_pruning").csv)
    assert [row["level"] for row in rows] == ["0", "90"]
    network = models.squeezenet1_1(num_classes=3)
    exported = tmp_path / "checkpoints" / "colours_torchvision_squeezenet1_1_l1_uniform_none_90.pth"
    network.load_state_dict(torch.load(exported, weights_only=True)["net"])
    pruned = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][:-1]  # the last is the output layer
    zeros = sum(int((layer.weight == 0).sum()) for layer in pruned)
    assert zeros == pytest.approx(0.9 * sum(layer.weight.numel() for layer in pruned), rel=1e-4)
