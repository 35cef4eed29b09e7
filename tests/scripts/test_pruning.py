"""The study's sweep end to end: the plain loop's numbers, files that continue, several checkpoints, foreign ones."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, train
from helpers import files_of, rows_of, sweep, without_seconds
from PIL import Image
from plain_loop import load_images, plain_result

import run
from sparsity.networks import checkpoint
from sparsity.networks.evaluation import evaluate
from sparsity.results.statistics import wilson_interval
from sparsity.results.store import read_sweep
from sparsity.sweep import evaluator

TABLE = "colours_resnet18_pruning.csv"


@pytest.fixture(scope="module")
def swept(tiny_checkpoint, tmp_path_factory):
    """The files of a finished sweep of 21 levels."""
    out = tmp_path_factory.mktemp("swept")
    assert sweep(out, "--checkpoint", tiny_checkpoint, drawn=True) == 0
    return files_of(out)


@pytest.fixture(scope="module")
def other_checkpoint(image_folder, tmp_path_factory):
    """A network of the same kind, trained from another seed."""
    out = train(image_folder, tmp_path_factory.mktemp("other"), "--epochs", "1", "--seed", "1")
    return out / "checkpoints" / "colours_resnet18_ckpt_epoch1.pth"


def test_the_rows_of_21_levels_are_those_of_the_plain_loop(swept, tiny_checkpoint, image_folder):
    rows = rows_of(swept.csv)
    assert [row["level"] for row in rows] == [str(level) for level in range(0, 101, 5)]
    assert [float(row["sparsity"]) for row in rows] == pytest.approx(range(0, 101, 5), abs=0.2)
    assert (rows[0]["sparsity"], rows[-1]["sparsity"]) == ("0.0", "100.0")
    assert float(rows[0]["agreement"]) == 100
    assert all({row["criterion"], row["allocation"], row["recover"]} == {"l1", "uniform", "none"} for row in rows)
    data = checkpoint.load(tiny_checkpoint).data
    images, labels = load_images(image_folder / "test", None, data["mean"], data["std"])
    for row in rows:
        accuracy, loss = plain_result(tiny_checkpoint, images, labels, float(row["level"]))
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=0.1)
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-3)


def test_everything_in_a_row_follows_from_the_predictions(swept):
    found = read_sweep(swept)
    for row in found.table():
        correct = int(found.correct(row).sum())
        low, high = wilson_interval(correct, 24)
        assert (row.accuracy, row.ci_low, row.ci_high) == pytest.approx((100 * correct / 24, 100 * low, 100 * high))
        agreement = 100 * (found.predictions[row.key] == found.dense[row.checkpoint]).mean()
        assert row.agreement == pytest.approx(agreement)
    last = found.table()[-1]  # at 100 % the network says one class
    assert len(np.unique(found.predictions[last.key])) == 1
    assert last.accuracy == pytest.approx(100 / 3)


def test_the_settings_tell_how_to_make_it_again(swept, tiny_checkpoint):
    header = json.loads(swept.json.read_text())
    assert header["checkpoints"][tiny_checkpoint.name]["sha256"] == checkpoint.load(tiny_checkpoint).sha256
    assert (header["settings"]["precision"], header["settings"]["threads"]) == ("fp32", 1)
    assert "--checkpoint" in header["command"]
    assert {"torch", "torchvision", "numpy", "matplotlib", "python"} <= header["versions"].keys()
    summary = header["summary"][0]
    assert summary["images"] == 12
    assert "within 1 point of dense" in summary["sentence"] or "no measured level" in summary["sentence"]
    assert tiny_checkpoint.name in header["title"]
    assert Image.open(swept.png).size[0] >= 800
    assert "\n| l1 uniform | " in swept.with_suffix(".md").read_text()
    assert not list(swept.csv.parent.glob("*part*"))


def test_the_demo_ends_in_a_table_without_a_flag_of_the_sweep(tmp_path, monkeypatch, capsys):
    """The commands at the top of README.md, for a tiny network and one epoch: the newest checkpoint is swept."""
    monkeypatch.chdir(tmp_path)
    small = [*TINY, "--batch_size", "128", "--threads", "1"]
    assert run.main(["--dataset", "synthetic", *small, "--epochs", "1", "--T_max", "8"]) == 0
    assert sweep(tmp_path / "images") == 0
    rows = rows_of(tmp_path / "images" / "synthetic_resnet18_pruning.csv")
    assert [row["level"] for row in rows] == [str(level) for level in range(0, 101, 5)]
    assert {row["checkpoint"] for row in rows} == {"synthetic_resnet18_ckpt_epoch1.pth"}
    assert "l1 uniform: " in capsys.readouterr().out


def test_a_finished_sweep_takes_more_levels_and_keeps_its_rows(swept, tiny_checkpoint, tmp_path, capsys):
    files = files_of(tmp_path)
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "0:100:50") == 0
    first = rows_of(files.csv)
    assert "%  (" not in capsys.readouterr().out
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint) == 0
    assert "3 rows in" in capsys.readouterr().out
    assert without_seconds(files.csv) == without_seconds(swept.csv)
    assert [row for row in rows_of(files.csv) if row["level"] in ("0", "50", "100")] == first
    with np.load(files.npz) as mine, np.load(swept.npz) as other:
        assert all(np.array_equal(mine[name], other[name]) for name in other.files)


def test_rows_of_other_settings_need_another_name_or_a_restart(swept_at_two, tiny_checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for flags, named in (
        (["--max_test_images", 12], "test_images (24 there, 12 now)"),
        (["--seed", 5], "seed (0 there"),
    ):
        assert sweep(tmp_path, *arguments, *flags) == 1
        assert named in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert sweep(tmp_path, *arguments, "--seed", 5, "--name", "other") == 0
    table = swept_at_two.read_text()
    swept_at_two.write_text(table.replace("l1,uniform,none,50,", "l1,uniform,none,55,"))  # a row to be rid of
    assert sweep(tmp_path, *arguments, "--max_test_images", 12, "--restart") == 0
    assert [row["level"] for row in rows_of(swept_at_two)] == ["0", "50"]
    assert not list(tmp_path.glob("*.old"))


def test_a_level_that_does_nothing_is_not_evaluated_and_has_the_same_row(tiny_checkpoint, tmp_path, monkeypatch):
    evaluated = []
    monkeypatch.setattr(evaluator, "evaluate", lambda *given: evaluated.append(1) or evaluate(*given))
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,0.001,50", "--criterion", "l1", "filter_l1"]
    flags += ["--recover", "none", "batchnorm", "--calibration_images", "16"]
    assert sweep(tmp_path / "once", *flags) == 0
    assert len(evaluated) == 12 - 4
    monkeypatch.setattr(evaluator, "_is_dense", lambda pruned: False)
    assert sweep(tmp_path / "again", *flags) == 0
    assert len(evaluated) == 12 - 4 + 12
    assert without_seconds(tmp_path / "once" / TABLE) == without_seconds(tmp_path / "again" / TABLE)


def test_several_checkpoints_are_seeds_of_one_experiment(tiny_checkpoint, other_checkpoint, tmp_path, capsys):
    capsys.readouterr()
    flags = ["--levels", "0,50,100", "--criterion", "l1", "random"]
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, other_checkpoint, *flags) == 0
    rows = rows_of(tmp_path / TABLE)
    assert [row["checkpoint"] for row in rows] == [tiny_checkpoint.name] * 6 + [other_checkpoint.name] * 6
    out = capsys.readouterr().out
    assert "+/- sd" in out
    assert "the checkpoints differ in more than the seed of their training: epochs" in out
    mean = np.mean([float(row["accuracy"]) for row in rows if (row["level"], row["criterion"]) == ("50", "l1")])
    line = next(line for line in out.splitlines() if line.split()[:1] == ["50"] and "pruned" not in line)
    assert f"{mean:.2f}" in line


def test_a_foreign_checkpoint_is_swept(tiny_checkpoint, image_folder, tmp_path, capsys):
    path, net = tmp_path / "foreign.pth", torch.load(tiny_checkpoint, weights_only=True)["net"]
    torch.save({"net": {f"module.{name}": tensor for name, tensor in net.items()}, "acc": 93.0, "epoch": 60}, path)
    data = ["--dataset", "folder", "--data_dir", image_folder]
    assert sweep(tmp_path, "--checkpoint", path, *data, "--levels", "0,60") == 0
    assert "has no metadata" in capsys.readouterr().out
    images, labels = load_images(image_folder / "test", None)
    # Without metadata images are brought to 32 pixels, and normalised with the constants of CIFAR-10.
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear", antialias=True)
    row = rows_of(tmp_path / TABLE)[1]
    _, loss = plain_result(tiny_checkpoint, images, labels, 60)
    assert float(row["loss"]) == pytest.approx(loss, rel=0.02)  # there resized before, here after scaling from bytes
    assert float(row["sparsity"]) == pytest.approx(60, abs=0.2)


def test_outputs_that_are_not_finite_are_told(tiny_checkpoint, tmp_path, capsys):
    """Fused kernels may make 0 of nan, so that the outputs of the network would look sound."""
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["net"]["bn1.running_var"] -= 1e3  # its root is nan
    torch.save(content, tmp_path / "nan.pth")
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, tmp_path / "nan.pth", "--levels", "0") == 1
    assert "outputs that are not finite" in capsys.readouterr().err


def test_a_renamed_checkpoint_and_another_under_its_old_name(tiny_checkpoint, other_checkpoint, tmp_path):
    old, new = tmp_path / "net.pth", tmp_path / "net_old.pth"
    old.write_bytes(tiny_checkpoint.read_bytes())
    assert sweep(tmp_path, "--checkpoint", old, "--levels", "0,50") == 0
    old.rename(new)
    old.write_bytes(other_checkpoint.read_bytes())
    first = rows_of(tmp_path / TABLE)
    assert sweep(tmp_path, "--checkpoint", old, new, "--levels", "0,50") == 0
    rows = rows_of(tmp_path / TABLE)
    assert [row for row in rows if row["checkpoint"] == "net.pth"] == first
    assert len(rows) == 4
    assert sweep(tmp_path, "--checkpoint", old, "--levels", "0,50") == 1  # the rows of the other would be lost
