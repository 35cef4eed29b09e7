"""Exported networks that run by themselves: from a checkpoint to a file in one command, and run by torch alone."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from helpers import export, files_of, rows_of
from torchvision import models

import pruning
from sparsity.data.sources import Source, load_split
from sparsity.networks import checkpoint
from sparsity.networks.families import build, load_network
from sparsity.networks.layers import unmasked_state
from sparsity.networks.onnx_file import run_onnx
from sparsity.networks.program import METADATA, FromPixels, answers
from sparsity.results.store import read_sweep
from sparsity.sweep.export import ExportFiles

STEM = "colours_resnet18"
WRITES_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
ALONE = """
import json, sys
sys.modules.update(dict.fromkeys(("torchvision", "sparsity", "Build_Resnet", "pruning")))  # not to be imported
import torch
told = {"metadata.json": ""}
network = torch.export.load(sys.argv[1], extra_files=told).module()
with torch.no_grad():
    predictions = network(torch.load(sys.argv[2])).argmax(1).tolist()
print(json.dumps([predictions, json.loads(told["metadata.json"])]))
"""


def exported(out, curve, ending=".pt2"):
    return out / "files" / f"{STEM}_{curve}{ending}"


def run_alone(path, split, folder):
    """Predictions and metadata of a program, in a process that cannot import this project, from another folder."""
    torch.save(split.images.float() / 255, folder / "images.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(path), "images.pt"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_one_command_makes_a_program_that_torch_alone_runs_with_the_predictions_of_the_sweep(
    program_sweep, tiny_checkpoint, image_folder, tmp_path
):
    data = checkpoint.load(tiny_checkpoint).data
    mean, std = data["mean"], data["std"]
    test, classes = load_split(Source("folder", image_folder, 8), False, (mean, std))
    dense, half, none = (exported(program_sweep, f"filter_l1_uniform_none_{level}") for level in (0, 50, 100))
    assert none.stat().st_size < half.stat().st_size < dense.stat().st_size
    predictions, told = run_alone(half, test, tmp_path)
    row = next(row for row in read_sweep(files_of(program_sweep)).table() if row.level == 50)
    right = 100 * float((torch.tensor(predictions) == test.labels).double().mean())
    assert told["metrics"]["test_accuracy"] == pytest.approx(right)
    assert told["metrics"]["test_images"] == 2 * told["metrics"]["reporting_images"] == len(test)
    assert row.accuracy == pytest.approx(right) and "0 predictions differ" in row.notes
    assert (told["data"]["classes"], told["data"]["mean"], told["data"]["std"]) == (classes, mean, std)
    assert told["pruning"]["level"] == 50 and told["model"]["widths"]
    with torch.no_grad():
        whole = FromPixels(load_network(tiny_checkpoint)[1], mean, std, torch.float32)
        program = torch.export.load(dense).module()
        torch.testing.assert_close(answers(program, test.images, 7), answers(whole, test.images, 24))
        constant = answers(torch.export.load(none).module(), test.images, 24)
    assert constant.isfinite().all() and len(constant.argmax(1).unique()) == 1


def test_bf16_programs_take_and_give_float32_and_their_accuracy_is_measured(
    program_sweep, tiny_checkpoint, image_folder, tmp_path
):
    flags = ["--export", "40", "--export_format", "program", "--export_precision", "bf16"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    full, rounded = exported(program_sweep, "filter_l1_uniform_none_0"), exported(tmp_path, "l1_uniform_none_40")
    assert rounded.stat().st_size < 0.75 * full.stat().st_size
    told = {METADATA: ""}
    network = torch.export.load(rounded, extra_files=told).module()
    test, _ = load_split(Source("folder", image_folder, 8), False, ((0,) * 3, (1,) * 3))
    logits = answers(network, test.images, 24)
    assert logits.dtype == torch.float32
    right = 100 * float((logits.argmax(1) == test.labels).double().mean())
    assert json.loads(told[METADATA])["metrics"]["test_accuracy"] == pytest.approx(right)


UNEXPORTABLE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.conv(x).flatten(1)
        return self.fc(x if x.sum() > -1e9 else -x)
"""


def test_a_network_that_cannot_be_exported_is_found_out_before_the_sweep(image_folder, tmp_path, capsys):
    (tmp_path / "net.py").write_text(UNEXPORTABLE)
    arch = f"{tmp_path}/net.py:Net"
    network = build({"arch": arch, "num_classes": 3, "arch_args": {}})
    torch.save(network.state_dict(), tmp_path / "net.pth")
    images = ["--dataset", "folder", "--data_dir", image_folder, "--image_size", "8", "--mean", "half", "--std", "half"]
    flags = ["--checkpoint", tmp_path / "net.pth", "--arch", arch, *images, "--export", "50"]
    assert export(tmp_path, *flags, "--export_format", "program") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "torch.export cannot export the network (GuardOnDataDependentSymNode" in told
    assert not list(tmp_path.glob("*.csv")) and not list((tmp_path / "files").glob("*"))
    assert export(tmp_path, *flags, "--export_format", "dense") == 0


def test_a_disk_that_changes_a_program_is_told(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    from sparsity.sweep import programs

    other = FromPixels(load_network(tiny_checkpoint)[1], (0.0,) * 3, (9.0,) * 3, torch.float32)
    monkeypatch.setattr(programs, "load_program", lambda data: other)
    flags = ["--checkpoint", tiny_checkpoint, "--export", "50", "--export_format", "program"]
    assert export(tmp_path, *flags) == 1
    assert "gives other outputs than the network in memory" in capsys.readouterr().err
    assert not files_of(tmp_path).csv.exists()


@pytest.mark.skipif(WRITES_ONNX, reason="the packages of ONNX are installed")
def test_without_the_packages_of_onnx_it_is_said_what_to_install(tiny_checkpoint, tmp_path, capsys):
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "50", "--export_format", "onnx") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--export_format onnx needs onnx" in told and "pip install onnx" in told
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.skipif(not WRITES_ONNX, reason="needs onnx, onnxscript and onnxruntime")
def test_an_onnx_file_gives_the_predictions_of_the_sweep_in_onnxruntime(
    tiny_checkpoint, image_folder, tmp_path, capsys
):
    flags = ["--criterion", "filter_l1", "--export", "50", "--export_format", "onnx"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    path = exported(tmp_path, "filter_l1_uniform_none_50", ".onnx")
    run, told = run_onnx(path.read_bytes())
    data = checkpoint.load(tiny_checkpoint).data
    test, classes = load_split(Source("folder", image_folder, 8), False, (data["mean"], data["std"]))
    assert [json.loads(told[key]) for key in ("classes", "mean", "std")] == [classes, data["mean"], data["std"]]
    (row,) = rows_of(files_of(tmp_path).csv)
    assert "0 predictions differ" in row["notes"]
    for count in (1, 24):
        predictions = answers(run, test.images, count).argmax(1)
        assert 100 * float((predictions == test.labels).double().mean()) == pytest.approx(float(row["accuracy"]))
    capsys.readouterr()
    image = min((image_folder / "test" / "red").iterdir())
    assert pruning.main(["--predict", str(path), str(image)]) == 0
    index = test.labels.tolist().index(classes.index("red"))
    assert f"{image}: {classes[int(predictions[index])]} " in capsys.readouterr().out
    assert b".py" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_torchvision_loads_dense_files_of_a_network_that_asks_for_the_version_it_was_saved_by(
    tmp_path, precision
):
    network = build({"arch": "torchvision:mnasnet0_5", "num_classes": 3, "arch_args": {}})
    files = ExportFiles(tmp_path, "net", precision, "dense")
    files.write(tmp_path / "exported.pth", {"net": unmasked_state(network)})
    checkpoint.save(tmp_path / "trained.pth", {"net": checkpoint.plain_state(network)})
    for name in ("exported.pth", "trained.pth"):
        plain = models.mnasnet0_5(num_classes=3)
        plain.load_state_dict(torch.load(tmp_path / name, weights_only=True)["net"])
        assert torch.equal(plain.classifier[1].bias.bfloat16(), network.classifier[1].bias.bfloat16())
