"""The sweep end to end: the plain loop's numbers, files that continue, several checkpoints, foreign checkpoints."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plain_loop import load_images, plain_result

import pruning
from sparsity.data.sources import Source
from sparsity.networks import checkpoint
from sparsity.results.files import SweepFiles
from sparsity.results.statistics import wilson_interval
from sparsity.results.store import read_sweep
from sparsity.sweep.inputs import distinct_names, output_name
from sparsity.system.flags import levels_type


def sweep(out, *extra):
    return pruning.main(["--images_dir", str(out), "--precision", "fp32", "--threads", "1", *map(str, extra)])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept")
    assert sweep(out, "--checkpoint", tiny_checkpoint) == 0
    return out / "colours_resnet18_pruning"


def test_all_21_levels_are_measured(swept):
    rows = rows_of(swept.with_suffix(".csv"))
    assert [row["level"] for row in rows] == [str(level) for level in range(0, 101, 5)]
    assert [float(row["sparsity"]) for row in rows] == pytest.approx(range(0, 101, 5), abs=0.2)
    assert rows[0]["sparsity"] == "0.0"
    assert rows[-1]["sparsity"] == "100.0"
    assert float(rows[0]["agreement"]) == 100
    assert all({row["criterion"], row["allocation"], row["recover"]} == {"l1", "uniform", "none"} for row in rows)


def test_the_rows_are_those_of_the_plain_loop(swept, tiny_checkpoint, image_folder):
    data = checkpoint.load(tiny_checkpoint).data
    images, labels = load_images(image_folder / "test", None, data["mean"], data["std"])
    for row in rows_of(swept.with_suffix(".csv")):
        accuracy, loss = plain_result(tiny_checkpoint, images, labels, float(row["level"]))
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=0.1)
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-3)


def test_everything_in_a_row_follows_from_the_predictions(swept):
    found = read_sweep(SweepFiles(swept))
    for row in found.table():
        correct = int(found.correct(row).sum())
        low, high = wilson_interval(correct, 24)
        assert (row.accuracy, row.ci_low, row.ci_high) == pytest.approx((100 * correct / 24, 100 * low, 100 * high))
        agreement = 100 * (found.predictions[row.key] == found.dense[row.checkpoint]).mean()
        assert row.agreement == pytest.approx(agreement)


def test_at_100_percent_the_network_says_one_class(swept):
    found = read_sweep(SweepFiles(swept))
    last = found.table()[-1]
    assert len(np.unique(found.predictions[last.key])) == 1
    assert last.accuracy == pytest.approx(100 / 3)


def test_the_settings_tell_how_to_make_it_again(swept, tiny_checkpoint):
    header = json.loads(swept.with_suffix(".json").read_text())
    assert header["checkpoints"][tiny_checkpoint.name]["sha256"] == checkpoint.load(tiny_checkpoint).sha256
    assert header["settings"]["precision"] == "fp32"
    assert header["settings"]["threads"] == 1
    assert "--checkpoint" in header["command"]
    assert {"torch", "torchvision", "numpy", "matplotlib", "python"} <= header["versions"].keys()
    summary = header["summary"][0]
    assert summary["images"] == 12
    assert "within 1 point of dense" in summary["sentence"] or "no measured level" in summary["sentence"]
    assert tiny_checkpoint.name in header["title"]


def test_the_plot_is_there(swept):
    picture = Image.open(swept.with_suffix(".png"))
    assert picture.size[0] >= 800


def without_seconds(path):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(path)]


def test_a_finished_sweep_takes_more_levels_and_keeps_its_rows(swept, tiny_checkpoint, tmp_path, capsys):
    stem = tmp_path / "colours_resnet18_pruning"
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "0:100:50") == 0
    first = rows_of(stem.with_suffix(".csv"))
    assert "%  (" not in capsys.readouterr().out
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint) == 0
    out = capsys.readouterr().out
    assert "3 rows in" in out
    assert without_seconds(stem.with_suffix(".csv")) == without_seconds(swept.with_suffix(".csv"))
    assert [row for row in rows_of(stem.with_suffix(".csv")) if row["level"] in ("0", "50", "100")] == first
    with np.load(stem.with_suffix(".npz")) as mine, np.load(swept.with_suffix(".npz")) as other:
        assert all(np.array_equal(mine[name], other[name]) for name in other.files)


def test_rows_of_other_settings_are_never_mixed_in(swept_at_two, tiny_checkpoint, tmp_path, capsys):
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
    assert sweep(tmp_path, *arguments, "--max_test_images", 12, "--restart") == 0
    assert len(rows_of(swept_at_two)) == 2


def test_a_restart_measures_again(swept_at_two, tiny_checkpoint, tmp_path):
    path = swept_at_two
    path.write_text(path.read_text().replace("l1,uniform,none,50,", "l1,uniform,none,55,"))  # a row to be rid of
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "0,50", "--restart") == 0
    assert [row["level"] for row in rows_of(path)] == ["0", "50"]


def test_several_checkpoints_are_seeds_of_one_experiment(tiny_checkpoint, other_checkpoint, tmp_path, capsys):
    other = other_checkpoint
    capsys.readouterr()
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, other, "--levels", "0,50,100") == 0
    rows = rows_of(tmp_path / "colours_resnet18_pruning.csv")
    assert [row["checkpoint"] for row in rows] == [tiny_checkpoint.name] * 3 + [other.name] * 3
    out = capsys.readouterr().out
    assert "+/- sd" in out
    moved = tmp_path / "renamed.pth"
    moved.write_bytes(tiny_checkpoint.read_bytes())
    assert sweep(tmp_path, "--checkpoint", moved, other, "--levels", "0,50,100") == 0
    assert rows_of(tmp_path / "colours_resnet18_pruning.csv") == rows  # known by its hash, nothing measured again
    mean = np.mean([float(row["accuracy"]) for row in rows if row["level"] == "50"])
    line = next(line for line in out.splitlines() if line.split()[:1] == ["50"] and "pruned" not in line)
    assert f"{mean:.2f}" in line


def test_checkpoints_go_by_the_shortest_ends_of_their_paths_that_tell_them_apart():
    for paths, names in [
        (["/far/a/net.pth", "other.pth"], ["net.pth", "other.pth"]),
        (["/far/a/net.pth", "/far/b/net.pth"], ["a/net.pth", "b/net.pth"]),
        (["/far/a/x/net.pth", "/far/b/x/net.pth", "net.pth"], ["a/x/net.pth", "b/x/net.pth", "net.pth"]),
        (["net.pth", "/net.pth"], ["net.pth", "/net.pth"]),
        (["a/net.pth", "a/net.pth"], ["a/net.pth", "a/net.pth"]),
        (["net.pth"], ["net.pth"]),
    ]:
        assert distinct_names([Path(path) for path in paths]) == names


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: {"net": net, "epoch": 60},
        lambda net: {"net": net, "acc": 93.0, "epoch": 60},
        lambda net: {"net": {f"module.{name}": tensor for name, tensor in net.items()}, "epoch": 60},
        lambda net: net,
    ],
)
def test_foreign_checkpoints_are_swept(tiny_checkpoint, image_folder, tmp_path, capsys, wrap):
    path = tmp_path / "foreign.pth"
    torch.save(wrap(torch.load(tiny_checkpoint, weights_only=True)["net"]), path)
    data = ["--dataset", "folder", "--data_dir", image_folder]
    assert sweep(tmp_path, "--checkpoint", path, *data, "--levels", "0,60") == 0
    assert "has no metadata" in capsys.readouterr().out
    images, labels = load_images(image_folder / "test", None)
    # Without metadata images are brought to 32 pixels, and normalised with the constants of CIFAR-10.
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear", antialias=True)
    row = rows_of(tmp_path / "colours_resnet18_pruning.csv")[1]
    _, loss = plain_result(tiny_checkpoint, images, labels, 60)
    assert float(row["loss"]) == pytest.approx(loss, rel=0.02)  # there resized before, here after scaling from bytes
    assert float(row["sparsity"]) == pytest.approx(60, abs=0.2)


def test_a_checkpoint_that_has_zeros_is_swept_like_any_other(tiny_checkpoint, tmp_path):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["net"]["layer4.0.conv2.weight"].zero_()
    torch.save(content, tmp_path / "zeros.pth")
    assert sweep(tmp_path, "--checkpoint", tmp_path / "zeros.pth", "--levels", "0,50,100") == 0
    sparsity = [float(row["sparsity"]) for row in rows_of(tmp_path / "colours_resnet18_pruning.csv")]
    assert 5 < sparsity[0] < 50 < sparsity[1] < 100 == sparsity[2]


def test_a_renamed_checkpoint_and_another_under_its_old_name(tiny_checkpoint, other_checkpoint, tmp_path):
    old, new = tmp_path / "net.pth", tmp_path / "net_old.pth"
    old.write_bytes(tiny_checkpoint.read_bytes())
    assert sweep(tmp_path, "--checkpoint", old, "--levels", "0,50") == 0
    old.rename(new)
    old.write_bytes(other_checkpoint.read_bytes())
    table = tmp_path / "colours_resnet18_pruning.csv"
    first = rows_of(table)
    assert sweep(tmp_path, "--checkpoint", old, new, "--levels", "0,50") == 0
    rows = rows_of(table)
    assert [row for row in rows if row["checkpoint"] == "net.pth"] == first
    assert len(rows) == 4
    assert sweep(tmp_path, "--checkpoint", old, "--levels", "0,50") == 1  # the rows of the other would be lost


def test_weights_beyond_all_bounds_are_told(tiny_checkpoint, tmp_path, capsys):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["net"]["linear.weight"].fill_(3e38)
    torch.save(content, tmp_path / "huge.pth")
    assert sweep(tmp_path, "--checkpoint", tmp_path / "huge.pth", "--levels", "0") == 1
    assert "outputs that are not finite" in capsys.readouterr().err


def test_synthetic_stays_in_the_name(tiny_checkpoint):
    source = Source("synthetic", None, 16)
    spec = {"arch": "resnet18"}
    assert output_name(None, source, spec) == "synthetic_resnet18"
    assert output_name("mine", source, spec) == "synthetic_mine"


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("0:100:50", [0, 50, 100]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("90,0,40,40", [0, 40, 90]),
        ("99.5", [99.5]),
        ("50,50.00000000001", [50]),
        ("0,1e-400", [0]),
        ("0:99:50", [0, 50]),
    ],
)
def test_levels_are_read_as_written(text, levels):
    assert levels_type(text) == levels
