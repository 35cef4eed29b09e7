"""`--couple` through the script: rows, files that rebuild themselves, recoveries, networks of a file."""

import json

import torch
from helpers import files_of, rows_of, sweep

from sparsity.networks.families import load_network

FLAGS = ["--criterion", "filter_l1", "--couple"]


def test_files_of_coupled_channels_rebuild_themselves(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--checkpoint_dir", tmp_path, *FLAGS, "--round_filters", "4"]
    assert sweep(tmp_path, *flags, "--export", "0,40,100") == 0
    assert "coupled: 180 channels can be removed, in 12 groups\n" in capsys.readouterr().out
    dense, half, none = rows_of(files_of(tmp_path).csv)
    assert all("0 predictions differ" in row["notes"] for row in (half, none))
    header = json.loads(files_of(tmp_path).json.read_text())
    assert header["settings"]["round_filters"] == 4
    assert header["title"].endswith("24 test images, fp32, coupled channels, filters in multiples of 4")
    (path,) = tmp_path.glob("*filter_l1_uniform_none_40*")
    small = load_network(path)[1]
    assert [small.conv1.out_channels, small.layer2[0].conv2.out_channels, small.linear.in_features] == [4, 4, 20]
    assert sum(int(torch.count_nonzero(parameter)) for parameter in small.parameters()) == int(half["nonzero"])
    out = tmp_path / "again"
    assert sweep(out, "--checkpoint", path, "--levels", "0,50", *FLAGS, "--recover", "none", "finetune") == 0
    assert rows_of(files_of(out).csv)[0]["loss"] == half["loss"]
    assert float(dense["sparsity"]) == 0 and float(none["sparsity"]) == 100


def test_recoveries(tiny_checkpoint, tmp_path):
    recoveries = ["--recover", "none", "batchnorm", "reconstruction", "distill"]
    flags = ["--checkpoint", tiny_checkpoint, "--criterion", "filter_activation", "--couple", *recoveries]
    assert sweep(tmp_path, *flags, "--levels", "0,50,100", "--calibration_images", "24") == 0
    rows = rows_of(files_of(tmp_path).csv)
    assert len(rows) == 12 and not any("not refitted" in row["notes"] for row in rows)
    assert len({row["nonzero"] for row in rows if row["level"] == "50"}) == 1  # what is gone stays gone
    assert len({row["loss"] for row in rows if row["level"] == "50"}) == 4
    assert len({row["loss"] for row in rows if row["level"] == "100" and row["recover"] != "distill"}) == 1


def test_rows_of_coupled_and_of_inner_filters_are_not_mixed(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--criterion", "filter_l1"]
    assert sweep(tmp_path, *flags) == 0
    assert sweep(tmp_path, *flags, "--couple") == 1
    assert "couple (not set there, on now)" in capsys.readouterr().err


NET = """
from torch import nn
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()
def net(num_classes, width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), Block(width),
        nn.Flatten(), nn.Linear(width * 16, num_classes))
"""


def test_the_network_of_a_file_becomes_thin(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(NET)
    import run

    images = ["--dataset", "folder", "--data_dir", str(image_folder), "--image_size", "8"]
    assert run.main([*images, "--arch", "small.py:net", "--epochs", "1", "--threads", "1"]) == 0
    (checkpoint,) = (tmp_path / "checkpoints").glob("*epoch1.pth")
    flags = ["--checkpoint", checkpoint, "--arch", "small.py:net"]
    assert sweep(tmp_path / "a", *flags, *FLAGS, "--levels", "50", "--export", "50") == 0
    (path,) = (tmp_path / "checkpoints").glob("*filter_l1_uniform_none_50.npz")
    flags = ["--checkpoint", path, "--arch", "small.py:net", "--levels", "0"]
    assert sweep(tmp_path / "b", *flags) == 0
    first, again = (rows_of(next((tmp_path / part).glob("*.csv"))) for part in "ab")
    assert first[0]["loss"] == again[0]["loss"] and int(again[0]["parameters"]) < 0.5 * int(first[0]["parameters"])
    assert sweep(tmp_path / "c", "--checkpoint", path, "--levels", "0") == 1
    assert "holds a network of a Python file" in capsys.readouterr().err
