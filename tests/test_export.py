"""Exported files through the script: what is written, read back, continued with, and said."""

import json

import pytest
import torch
from test_pruning import rows_of, sweep, without_seconds

import Build_Resnet
import pruning
from sparsity.networks import checkpoint, families
from sparsity.networks.layers import prunable_layers
from sparsity.results.files import SweepFiles
from sparsity.results.store import read_sweep

pytestmark = pytest.mark.usefixtures("undrawn")
STEM = "colours_resnet18"


def export(out, *flags):
    return sweep(out, "--checkpoint_dir", out / "files", *flags)


def restored(path):
    return families.restore(checkpoint.load(path), Build_Resnet.build, Build_Resnet.spec_of)


def table(out):
    return out / f"{STEM}_pruning.csv"


def share_of_zeros(network):
    layers = prunable_layers(network, torch.zeros(1, 3, 8, 8)).values()
    return 100 * sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)


def test_one_level_is_exported_without_a_whole_sweep(tiny_checkpoint, tmp_path, capsys):
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "60") == 0
    path = tmp_path / "files" / f"{STEM}_l1_uniform_none_60.npz"
    (row,) = rows_of(table(tmp_path))
    assert row["level"] == "60"
    assert int(row["file_bytes"]) == path.stat().st_size
    assert share_of_zeros(restored(path)) == pytest.approx(float(row["sparsity"]), abs=1e-4)
    out = capsys.readouterr().out
    assert f"{path}: {path.stat().st_size:,} bytes (fp32)" in out
    content = checkpoint.load(path).content
    assert content["pruning"]["level"] == 60
    assert content["pruning"]["sha256"] == checkpoint.load(tiny_checkpoint).sha256
    assert content["settings"]["batch_size"] == 16


def test_the_weights_in_the_file_are_those_that_were_measured(tiny_checkpoint, tmp_path):
    flags = ["--allocation", "global", "--recover", "batchnorm", "--levels", "0,50", "--export", "50"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    assert [row["level"] for row in rows_of(table(tmp_path))] == ["0", "50"]
    assert [bool(row["file_bytes"]) for row in rows_of(table(tmp_path))] == [False, True]
    path = tmp_path / "files" / f"{STEM}_l1_global_batchnorm_50.npz"
    again = tmp_path / "again"
    assert sweep(again, "--checkpoint", path, "--levels", "0") == 0
    first, second = rows_of(table(tmp_path))[1], rows_of(again / f"{STEM}_pruning.csv")[0]
    assert (first["accuracy"], first["loss"]) == (second["accuracy"], second["loss"])
    assert first["sparsity"] == second["sparsity"]


def test_a_dense_file_is_read_by_code_that_knows_the_reference_only(tiny_checkpoint, tmp_path):
    flags = ["--export", "90", "--export_format", "dense"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    path = tmp_path / "files" / f"{STEM}_l1_uniform_none_90.pth"
    reference = Build_Resnet.ResNet(Build_Resnet.BasicBlock, [2, 2, 2, 2], num_classes=3, width=4)
    reference.load_state_dict(torch.load(path, weights_only=True)["net"])
    assert share_of_zeros(reference) == pytest.approx(90, abs=0.2)
    assert int(rows_of(table(tmp_path))[0]["file_bytes"]) == path.stat().st_size


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_bf16_files_hold_rounded_values_and_say_what_they_are_worth(tiny_checkpoint, tmp_path, form):
    flags = ["--checkpoint", tiny_checkpoint, "--export", "40", "--export_format", form]
    assert export(tmp_path / "a", *flags) == 0
    assert export(tmp_path / "b", *flags, "--export_precision", "bf16") == 0
    name = f"{STEM}_l1_uniform_none_40" + {"packed": ".npz", "dense": ".pth"}[form]
    full, rounded = restored(tmp_path / "a" / "files" / name), restored(tmp_path / "b" / "files" / name)
    for key, value in full.state_dict().items():
        wanted = value.bfloat16().float() if value.is_floating_point() else value
        assert torch.equal(rounded.state_dict()[key], wanted)
    sizes = [int(rows_of(table(tmp_path / part))[0]["file_bytes"]) for part in "ab"]
    assert sizes[1] < 0.75 * sizes[0]
    assert "predictions differ" in rows_of(table(tmp_path / "b"))[0]["notes"]


def test_filters_are_removed_from_the_file(tiny_checkpoint, tmp_path):
    flags = ["--criterion", "filter_l1", "--export", "50,100", "--export_format", "dense"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    half, none = rows_of(table(tmp_path))
    assert half["level"] == "50" and 40 < float(half["sparsity"]) < 60
    small = restored(tmp_path / "files" / f"{STEM}_filter_l1_uniform_none_50.pth")
    assert small.layer3[1].conv1.out_channels == 8
    assert share_of_zeros(small) == 0
    nonzero = sum(int(torch.count_nonzero(parameter)) for parameter in small.parameters())
    assert nonzero == int(half["nonzero"])
    assert "0 predictions differ" in half["notes"] and "0 predictions differ" in none["notes"]
    assert not restored(tmp_path / "files" / f"{STEM}_filter_l1_uniform_none_100.pth").layer1[0].has_branch


def test_sweeps_recovery_and_finetuning_go_on_from_a_thin_network(tiny_checkpoint, tmp_path):
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--criterion", "filter_l1", "--export", "50,100") == 0
    for level in ("50", "100"):
        path = tmp_path / "files" / f"{STEM}_filter_l1_uniform_none_{level}.npz"
        out = tmp_path / level
        flags = [
            "--checkpoint",
            path,
            "--levels",
            "0,50",
            "--recover",
            "none",
            "batchnorm",
            "reconstruction",
            "finetune",
        ]
        assert export(out, *flags, "--criterion", "l1") == 0
        rows = rows_of(table(out))
        assert len(rows) == 8
        assert int(rows[0]["parameters"]) < 48_000
    twice = ["--checkpoint", tmp_path / "files" / f"{STEM}_filter_l1_uniform_none_50.npz", "--criterion", "filter_l1"]
    assert export(tmp_path / "twice", *twice, "--recover", "reconstruction", "finetune", "--export", "50") == 0
    small = restored(tmp_path / "twice" / "files" / f"{STEM}_filter_l1_uniform_finetune_50.npz")
    assert small.layer4[0].conv1.out_channels == 8
    assert share_of_zeros(small) == 0


def test_a_network_without_filters_to_remove_is_told(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--criterion", "filter_l1"]
    assert export(tmp_path, *flags, "--export", "100") == 0
    empty = tmp_path / "files" / f"{STEM}_filter_l1_uniform_none_100.npz"
    assert sweep(tmp_path / "again", "--checkpoint", empty, "--criterion", "filter_l1") == 1
    assert "no filters that can be removed" in capsys.readouterr().err
    assert sweep(tmp_path / "again", *flags, "--exclude", "layer?.?.conv1") == 1
    assert "no filters that can be removed" in capsys.readouterr().err


def test_an_export_never_replaces_what_it_is_made_of(tiny_checkpoint, tmp_path, capsys):
    flags = ["--criterion", "filter_l1", "--export", "50", "--name", "x"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    path = tmp_path / "files" / "x_filter_l1_uniform_none_50.npz"
    content = path.read_bytes()
    assert sweep(tmp_path / "again", "--checkpoint_dir", tmp_path / "files", "--checkpoint", path, *flags) == 1
    assert "would be replaced by what is made of it" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_a_restart_that_cannot_export_leaves_the_rows(swept_at_two, tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (tmp_path / "file").write_text("no folder")
    assert sweep(tmp_path, *flags, "--restart", "--export", "50", "--checkpoint_dir", tmp_path / "file") == 1
    assert sweep(tmp_path, *flags, "--restart", "--engine", "sparse", "--precision", "bf16") == 1
    assert {path: path.read_bytes() for path in before} == before
    assert not list(tmp_path.glob("*.old"))


def test_metadata_that_json_cannot_say_is_told(tiny_checkpoint, tmp_path, capsys):
    content = torch.load(tiny_checkpoint, weights_only=True)
    torch.save(content | {"settings": content["settings"] | {"odd": torch.zeros(2)}}, tmp_path / "odd.pth")
    assert export(tmp_path, "--checkpoint", tmp_path / "odd.pth", "--export", "50") == 1
    assert "cannot be packed" in capsys.readouterr().err
    assert export(tmp_path, "--checkpoint", tmp_path / "odd.pth", "--export", "50", "--export_format", "dense") == 0


def test_finetuned_filters_do_not_come_back(tiny_checkpoint, tmp_path):
    flags = ["--criterion", "filter_l1", "--recover", "finetune", "--finetune_learning_rate", "0.1", "--export", "50"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags) == 0
    small = restored(tmp_path / "files" / f"{STEM}_filter_l1_uniform_finetune_50.npz")
    assert small.layer2[0].conv1.out_channels == 4


def test_filters_in_steps_are_nested(tiny_checkpoint, tmp_path):
    flags = ["--criterion", "filter_l1", "--allocation", "global", "--recover", "batchnorm", "--schedule", "iterative"]
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, *flags, "--levels", "25,50,75", "--export", "75") == 0
    sparsity = [float(row["sparsity"]) for row in rows_of(table(tmp_path))]
    assert sparsity == sorted(sparsity) and len(sparsity) == 3
    assert (tmp_path / "files" / f"{STEM}_filter_l1_global_batchnorm_75.npz").exists()


def test_an_export_that_is_there_is_kept_and_one_that_is_not_is_made_again(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50", "--export", "50"]
    assert export(tmp_path, *flags) == 0
    path = tmp_path / "files" / f"{STEM}_l1_uniform_none_50.npz"
    rows, content, stamp = rows_of(table(tmp_path)), path.read_bytes(), path.stat().st_mtime_ns
    assert export(tmp_path, *flags) == 0
    assert path.stat().st_mtime_ns == stamp
    assert rows_of(table(tmp_path)) == rows
    path.write_bytes(b"something else")
    capsys.readouterr()
    assert export(tmp_path, *flags) == 0
    assert "1 rows in" in capsys.readouterr().out
    assert path.read_bytes() == content
    assert without_seconds(table(tmp_path)) == [
        {key: value for key, value in row.items() if key != "seconds"} for row in rows
    ]
    assert export(tmp_path, *flags, "--export_precision", "bf16") == 0
    assert path.stat().st_size < 0.8 * len(content)


def test_a_level_is_exported_from_a_sweep_that_is_there(swept_at_two, tiny_checkpoint, tmp_path):
    before = without_seconds(table(tmp_path))
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "50") == 0
    after = without_seconds(table(tmp_path))
    assert [row | {"file_bytes": ""} for row in after] == before
    assert after[1]["file_bytes"]


def test_exports_of_others_are_announced_before_they_are_replaced(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / f"{STEM}_l1_uniform_none_50.npz"
    path.write_bytes(b"of somebody")
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "50") == 0
    assert f"replacing {path}" in capsys.readouterr().out
    path.unlink()
    path.mkdir()
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "50", "--restart") == 1
    assert "is a folder where a file is to be exported" in capsys.readouterr().err


def test_a_file_that_comes_back_wrong_is_told(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    save = checkpoint.save_packed

    def wrong(path, content, precision):
        net = {name: value + 1 if name == "conv1.weight" else value for name, value in content["net"].items()}
        save(path, content | {"net": net}, precision)

    monkeypatch.setattr(checkpoint, "save_packed", wrong)
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "50") == 1
    assert "came back with other values of conv1.weight" in capsys.readouterr().err
    assert not table(tmp_path).exists()


def test_sensitivity_takes_filters_one_convolution_at_a_time(tiny_checkpoint, tmp_path):
    flags = ["--sensitivity", "--checkpoint", tiny_checkpoint, "--criterion", "filter_l1", "--levels", "50"]
    assert sweep(tmp_path, *flags) == 0
    found = read_sweep(SweepFiles(tmp_path / f"{STEM}_sensitivity"))
    assert len(found.table()) == 8
    for row in found.table():
        touched = {name for name, zeros in zip(found.layers, found.zeros[row.key], strict=True) if zeros}
        conv = row.allocation.removeprefix("only ")
        assert touched == {conv, conv.replace("conv1", "conv2")}


def test_packed_checkpoints_go_wherever_others_do(tiny_checkpoint, other_checkpoint, tmp_path):
    assert export(tmp_path, "--checkpoint", tiny_checkpoint, "--export", "0") == 0
    packed = tmp_path / "files" / f"{STEM}_l1_uniform_none_0.npz"
    for name, path in (("pth", tiny_checkpoint), ("npz", packed)):
        assert sweep(tmp_path / name, "--checkpoint", path, "--levels", "0,50", "--recover", "batchnorm") == 0
    one, other = (without_seconds(table(tmp_path / name)) for name in ("pth", "npz"))
    assert [row | {"checkpoint": ""} for row in one] == [row | {"checkpoint": ""} for row in other]
    assert sweep(tmp_path / "seeds", "--checkpoint", packed, other_checkpoint, "--levels", "0") == 0


def test_the_exports_stand_in_the_json(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--export", "50", "--allocation", "uniform", "lamp"]
    assert export(tmp_path, *flags) == 0
    entries = json.loads(table(tmp_path).with_suffix(".json").read_text())["exports"]
    assert len(entries) == 2
    for entry in entries.values():
        assert checkpoint.load(tmp_path / "files" / entry["file"].rpartition("/")[2]).sha256 == entry["sha256"]
        assert entry["bits_a_weight"] > 0
        assert entry["entropy_and_values"] == pytest.approx(1 + 16, abs=0.01)


@pytest.mark.parametrize(
    ("flags", "levels"),
    [
        (["--export", "60"], [60]),
        (["--export", "60,40"], [40, 60]),
        (["--export", "60", "--levels", "0,50"], [0, 50, 60]),
        (["--export", "60", "--compare", "--levels", "0,50"], [0, 50, 60]),
        (["--levels", "0,50"], [0, 50]),
    ],
)
def test_which_levels_are_measured(flags, levels):
    assert pruning.parse_args(flags).levels == levels
