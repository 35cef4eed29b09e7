"""Exported files through the script: written, read back, continued with, and told of."""

import json
import re
import shutil

import pytest
import torch
from helpers import export, files_of, rows_of, sweep, without_seconds

from sparsity.networks import checkpoint
from sparsity.networks.families import load_network
from sparsity.networks.layers import prunable_layers
from sparsity.sweep import export as exporting

STEM = "colours_resnet18"


def restored(path):
    return load_network(path)[1]


def exported(out, name):
    return out / "files" / f"{STEM}_{name}"


def table(out):
    return rows_of(files_of(out).csv)


def share_of_zeros(network):
    layers = prunable_layers(network, torch.zeros(1, 3, 8, 8)).values()
    return 100 * sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)


def test_one_level_is_exported_without_a_whole_sweep(tiny_checkpoint, tmp_path, capsys):
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "60") == 0
    path = exported(tmp_path, "l1_uniform_none_60.npz")
    (row,) = table(tmp_path)
    assert row["level"] == "60" and int(row["file_bytes"]) == path.stat().st_size
    assert f"{path}: {path.stat().st_size:,} bytes (fp32)" in capsys.readouterr().out
    content = checkpoint.load(path).content
    assert content["pruning"]["level"] == 60 and content["settings"]["batch_size"] == 16
    assert content["pruning"]["sha256"] == checkpoint.load(tiny_checkpoint).sha256
    (entry,) = json.loads(files_of(tmp_path).json.read_text())["exports"].values()
    assert entry["sha256"] == checkpoint.load(path).sha256 and entry["bits_a_weight"] > 0
    assert entry["entropy_and_values"] == pytest.approx(0.971 + 0.4 * 32, abs=0.01)  # bits a weight at 60 %


def test_the_weights_in_the_file_are_those_that_were_evaluated(tiny_checkpoint, tmp_path):
    flags = ["--allocation", "global", "--recover", "batchnorm", "--levels", "0,50", "--export", "0,50"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    for row in table(tmp_path):
        path, out = exported(tmp_path, f"l1_global_batchnorm_{row['level']}.npz"), tmp_path / row["level"]
        assert int(row["file_bytes"]) == path.stat().st_size
        assert sweep(out, "--checkpoint", path, "--levels", "0") == 0
        assert all(row[name] == table(out)[0][name] for name in ("accuracy", "loss", "sparsity"))


@pytest.mark.parametrize(("form", "ending"), [("packed", ".npz"), ("dense", ".pth"), ("safetensors", ".safetensors")])
def test_bf16_files_hold_rounded_values_and_tell_their_accuracy(tiny_checkpoint, tmp_path, form, ending):
    flags = ["--checkpoint", tiny_checkpoint, "--export", "40", "--export_format", form]
    assert export(tmp_path / "a", *flags) == 0
    assert export(tmp_path / "b", *flags, "--export_precision", "bf16") == 0
    full, rounded = (restored(exported(tmp_path / part, f"l1_uniform_none_40{ending}")) for part in "ab")
    assert share_of_zeros(full) == pytest.approx(40, abs=0.2)
    for key, value in full.state_dict().items():
        assert torch.equal(rounded.state_dict()[key], value.bfloat16().float() if value.is_floating_point() else value)
    sizes = [int(table(tmp_path / part)[0]["file_bytes"]) for part in "ab"]
    assert sizes[1] < 0.75 * sizes[0]
    assert re.search(r"\d (prediction differs|predictions differ)$", table(tmp_path / "b")[0]["notes"])
    assert export(tmp_path / "b", *flags) == 0 and table(tmp_path / "b")[0]["notes"] == ""  # another file by now


@pytest.mark.parametrize(("form", "ending"), [("packed", ".npz"), ("safetensors", ".safetensors")])
def test_a_file_made_of_one_that_tells_nothing_is_swept_again_alone(
    tiny_checkpoint, image_folder, tmp_path, capsys, form, ending
):
    bare = tmp_path / "bare.pth"
    torch.save({f"module.{name}": tensor for name, tensor in checkpoint.load(tiny_checkpoint).net.items()}, bare)
    images = ["--dataset", "folder", "--data_dir", image_folder, "--image_size", "12"]
    flags = ["--mean", "half", "--std", "0.25", "0.5", "0.25", "--criterion", "filter_l1", "--export", "40"]
    assert export(tmp_path / "a", "--checkpoint", bare, *images, *flags, "--export_format", form) == 0
    said = "images of 12 pixels, mean 0.5 0.5 0.5, std 0.25 0.5 0.25, the constants of"
    assert capsys.readouterr().out.count(f"{bare}: {said} --mean and --std\n") == 1
    path = exported(tmp_path / "a", f"filter_l1_uniform_none_40{ending}")
    assert sweep(tmp_path / "b", "--checkpoint", path, "--levels", "0") == 0
    assert f"{path}: {said} its training\n" in capsys.readouterr().out
    first, again = (json.loads(files_of(tmp_path / part).json.read_text())["data"] for part in "ab")
    assert first == again and (first["image_size"], first["std"]) == (12, [0.25, 0.5, 0.25])
    assert all(table(tmp_path / "a")[0][name] == table(tmp_path / "b")[0][name] for name in ("accuracy", "loss"))


def test_a_file_names_the_images_of_its_accuracy(tiny_checkpoint, image_folder, tmp_path):
    other = tmp_path / "others"
    shutil.copytree(image_folder, other)
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--data_dir", other, "--export", "50") == 0
    (path,) = (tmp_path / "files").iterdir()
    data = checkpoint.load(path).data
    assert (data["dataset"], data["name"], data["data_dir"]) == ("folder", "others", str(other))


def test_filters_are_removed_from_the_file(tiny_checkpoint, tmp_path):
    flags = ["--criterion", "filter_l1", "--export", "50,100", "--export_format", "dense"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    half, none = table(tmp_path)
    assert half["level"] == "50" and 40 < float(half["sparsity"]) < 60
    small = restored(exported(tmp_path, "filter_l1_uniform_none_50.pth"))
    assert small.layer3[1].conv1.out_channels == 8
    assert share_of_zeros(small) == 0
    assert sum(int(torch.count_nonzero(parameter)) for parameter in small.parameters()) == int(half["nonzero"])
    assert "0 predictions differ" in half["notes"] and "0 predictions differ" in none["notes"]
    assert restored(exported(tmp_path, "filter_l1_uniform_none_100.pth")).layer3[1].conv1.out_channels == 1


def test_sweeps_and_recovery_go_on_from_a_thin_network(tiny_checkpoint, tmp_path):
    flags = ["--criterion", "filter_l1", "--export", "50,100"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    half, empty = (exported(tmp_path, f"filter_l1_uniform_none_{level}.npz") for level in (50, 100))
    for path in (half, empty):
        out, recoveries = tmp_path / path.stem, ("none", "batchnorm", "reconstruction", "finetune")
        assert export(out, "--checkpoint", path, "--levels", "0,50", "--recover", *recoveries) == 0
        assert len(table(out)) == 8 and int(table(out)[0]["parameters"]) < 48_000
    twice = ["--criterion", "filter_l1", "--recover", "reconstruction", "finetune", "--export", "50"]
    twice += ["--finetune_learning_rate", "0.1"]  # removed filters do not come back
    assert export(tmp_path / "twice", "--checkpoint", half, *twice) == 0
    small = restored(exported(tmp_path / "twice", "filter_l1_uniform_finetune_50.npz"))
    assert small.layer4[0].conv1.out_channels == 8 and share_of_zeros(small) == 0


def test_an_export_is_kept_unless_it_is_damaged_or_another_one_is_wanted(swept_at_two, tiny_checkpoint, tmp_path):
    before = without_seconds(swept_at_two)
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50", "--export", "50"]
    assert export(tmp_path, *flags) == 0
    rows, path = without_seconds(swept_at_two), exported(tmp_path, "l1_uniform_none_50.npz")
    assert [row | {"file_bytes": ""} for row in rows] == before and rows[1]["file_bytes"]
    content, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert export(tmp_path, *flags) == 0
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(b"something else")
    assert export(tmp_path, *flags) == 0
    assert path.read_bytes() == content
    assert without_seconds(swept_at_two) == rows
    assert export(tmp_path, *flags, "--export_precision", "bf16") == 0
    assert path.stat().st_size < 0.8 * len(content)


def test_a_file_that_comes_back_wrong_is_told(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    def wrong(path, content, precision):
        net = {name: value + 1 if name == "conv1.weight" else value for name, value in content["net"].items()}
        checkpoint.save_packed(path, content | {"net": net}, precision)

    monkeypatch.setattr(exporting, "save_packed", wrong)
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "50") == 1
    assert "came back with other values of conv1.weight" in capsys.readouterr().err
    assert not files_of(tmp_path).csv.exists()
