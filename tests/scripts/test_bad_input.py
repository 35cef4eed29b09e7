"""Bad input: one clear line on stderr, exit status 1, no traceback, and no file that was there changed."""

import signal
from pathlib import Path

import pytest
import torch
from conftest import write_image_folder
from helpers import contents, kill_when, launch, sweep

import pruning
import run
from sparsity.system.files import lock


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint):
    """A working folder with a good checkpoint, good images, and several bad ones."""
    root = tmp_path_factory.mktemp("made")
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["data"]["data_dir"] = "colours"
    net = content["net"]
    broken = {
        "good": content,
        "bare": {"net": net, "epoch": 1},
        "huge": content | {"net": net | {"linear.weight": torch.full_like(net["linear.weight"], 3e38)}},
        "larger": content | {"data": content["data"] | {"image_size": 16}},
        "widths": content | {"model": content["model"] | {"widths": {"layer1.0.conv1": 300}}},
    }
    for name, damaged in broken.items():
        torch.save(damaged, root / f"{name}.pth")
    (root / "file").write_text("a file where a folder should be")
    for name in ("colours", "renamed", "torn"):
        write_image_folder(root / name, train=16, test=8)
    (root / "torn" / "train" / "red" / "001.png").write_bytes(b"no image")
    for split in ("train", "test"):
        (root / "renamed" / split / "red").rename(root / "renamed" / split / "orange")
    (root / "states").mkdir()
    torch.save(content, root / "states" / "colours_resnet18_last.pth")
    return root


SMALL = "--arch resnet18 --width 2 --image_size 8 --epochs 1"
FOLDER = f"--dataset folder --data_dir colours {SMALL}"
RUN = {
    f"{FOLDER} --resume --checkpoint_dir states": "no training state",
    f"{FOLDER} --checkpoint_dir file": "--checkpoint_dir file cannot be written to",
    f"{FOLDER} --images_dir file/images": "--images_dir file/images cannot be written to",
}
SWEEP = {
    f"--checkpoint {'c' * 300}.pth": "File name too long",
    "--checkpoint widths.pth": "does not fit the network it describes: the width of layer1.0.conv1",
    "--checkpoint good.pth good.pth": "is the same as",
    "--checkpoint good.pth bare.pth": "differ in network or data",
    "--checkpoint good.pth --dataset synthetic": "has 3 output classes, synthetic has 10",
    "--checkpoint good.pth --data_dir renamed": "other classes",
    "--checkpoint good.pth --max_test_images 5": "too few for 3 classes",
    "--checkpoint good.pth --images_dir file": "--images_dir file cannot be written to",
    "--checkpoint huge.pth": "gives NaN or Inf for an image of 8 pixels",
    "--checkpoint good.pth --controls larger.pth": "larger.pth was trained on other images",
}
CASES = [(run, *item) for item in RUN.items()] + [(pruning, *item) for item in SWEEP.items()]


@pytest.mark.parametrize(("script", "flags", "said"), CASES, ids=[f"{c[0].__name__} {c[1]}" for c in CASES])
def test_bad_input_is_told_in_one_line(place, capfd, script, flags, said):
    before = contents(place)
    assert script.main(flags.split()) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert {path: content for path, content in contents(place).items() if path in before} == before


def test_a_full_disk_is_told_before_training(place, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert run.main(FOLDER.split()) == 1
    assert "--checkpoint_dir checkpoints has 0 MB free" in capsys.readouterr().err
    assert not list((place / "checkpoints").iterdir())


def test_a_run_that_cannot_start_loses_no_rows(place, capsys):
    images, swept = place / "images", ["--checkpoint", "good.pth", "--levels", "0,50"]
    assert sweep(images, *swept) == 0
    tables = {path: path.read_bytes() for path in images.iterdir() if path.suffix != ".json"}
    for flags, said in (
        ("--data_dir torn", "torn/train/red/001.png is not a readable image"),
        ("--calibration_images 49", "more than the 48 images"),
        ("--export 50 --checkpoint_dir file", "--checkpoint_dir file cannot be written to"),
    ):
        for restart in ([], ["--restart"]):
            capsys.readouterr()
            assert sweep(images, *swept, "--recover", "batchnorm", *flags.split(), *restart) == 1
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert said in line
            assert {path: path.read_bytes() for path in tables} == tables
    assert sweep(images, *swept) == 0
    assert "2 rows in" in capsys.readouterr().out
    with lock(images / ".colours_resnet18_pruning.lock"):
        assert sweep(images, *swept, "--restart") == 1
    assert "another run is writing to the files of colours_resnet18_pruning" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tables} == tables


def test_an_interruption_while_torch_is_imported_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = launch("pruning.py")
    maps = Path(f"/proc/{process.pid}/maps")  # the libraries that the process has opened so far
    err = kill_when(process, lambda: "libtorch" in maps.read_text(), signal.SIGINT)
    assert (process.returncode, err.strip()) == (130, "interrupted before anything was done")
