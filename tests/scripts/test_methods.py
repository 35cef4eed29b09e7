"""Criteria, allocations, recoveries and schedules through the script, end to end on a small network."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import train
from helpers import files_of, rows_of, sweep, without_seconds
from PIL import Image

import pruning
from sparsity.data.calibration import AUGMENTATIONS
from sparsity.prune.criteria import CRITERIA, add_criterion
from sparsity.results.store import read_sweep
from sparsity.sweep import networks as swept_networks
from sparsity.system import methods
from sparsity.system.methods import ALLOCATIONS, RECOVERIES

TABLE = "colours_resnet18_pruning.csv"


@pytest.fixture(scope="module")
def everything(tiny_checkpoint, tmp_path_factory):
    """Every criterion with every allocation at one level, and every recovery of l1 with global at three."""
    out = tmp_path_factory.mktemp("everything")
    flags = ["--checkpoint", tiny_checkpoint, "--levels"]
    assert sweep(out, *flags, "50", "--criterion", *CRITERIA, "--allocation", *ALLOCATIONS) == 0
    assert sweep(out, *flags, "0,50,100", "--allocation", "global", "--recover", *RECOVERIES) == 0
    return out


def test_every_combination_has_its_rows(everything):
    curves = read_sweep(files_of(everything)).curves()
    expected = [(c, a, "none") for c in CRITERIA for a in ALLOCATIONS]
    expected += [("l1", "global", r) for r in RECOVERIES if r != "none"]
    assert list(curves) == expected


def test_recovery_leaves_the_dense_rows_and_the_masks(everything):
    found = read_sweep(files_of(everything))
    rows = {(row.recover, row.level): row for row in found.table() if row.curve[:2] == ("l1", "global")}
    for recover in RECOVERIES:
        for level in (0, 50, 100):
            assert (found.zeros[rows[recover, level].key] == found.zeros[rows["none", level].key]).all()
    assert rows["none", 0].agreement == 100
    assert len({rows[recover, 50].loss for recover in RECOVERIES}) == len(RECOVERIES)  # each does something else


def test_the_same_flags_give_the_same_rows(everything, tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--criterion", "random", "obs", "--allocation", "lamp"]
    assert sweep(tmp_path, *flags) == 0
    mine = without_seconds(tmp_path / TABLE)
    assert len(mine) == 2
    assert all(row in without_seconds(everything / TABLE) for row in mine)


def test_labels_that_are_read_are_told(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50"]
    assert sweep(tmp_path, *flags, "--criterion", "obs", "--recover", "reconstruction") == 0
    assert "reads the labels" not in capsys.readouterr().out
    assert sweep(tmp_path, *flags, "--criterion", "gradient") == 0
    assert "gradient reads the labels" in capsys.readouterr().out
    assert sweep(tmp_path, *flags, "--recover", "finetune") == 0
    assert "fine-tuning reads the labels of 48 training images" in capsys.readouterr().out


def test_excluded_weights_stay_dense(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,60,100", "--exclude", "layer1.*", "conv1"]
    assert sweep(tmp_path, *flags, "--allocation", *ALLOCATIONS) == 0
    found = read_sweep(files_of(tmp_path))
    assert not any(name == "conv1" or name.startswith("layer1.") for name in found.layers)
    assert [row.sparsity for row in found.table() if row.level == 100] == [100] * len(ALLOCATIONS)
    spared = found.table()[0].nonzero - sum(found.layers.values())
    assert all(row.nonzero == spared for row in found.table() if row.level == 100)


def test_other_calibration_images_are_not_mixed_in(swept_at_two, tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    assert sweep(tmp_path, *flags, "--recover", "batchnorm") == 0  # a curve more, beside the plain one
    assert len(rows_of(swept_at_two)) == 4
    assert sweep(tmp_path, *flags, "--recover", "batchnorm", "--calibration_images", "24") == 1
    assert "calibration_images (2048 there, 24 now)" in capsys.readouterr().err
    header = json.loads(files_of(tmp_path).json.read_text())
    header["calibration_sha256"] = "0" * 64
    files_of(tmp_path).json.write_text(json.dumps(header))
    assert sweep(tmp_path, *flags, "--recover", "reconstruction") == 1
    assert "rows of other calibration images" in capsys.readouterr().err


def test_calibration_images_are_augmented_as_the_network_was_trained(tiny_checkpoint, tmp_path, capsys):
    def swept(checkpoint, levels="0"):
        flags = ["--checkpoint", checkpoint, "--levels", levels, "--recover", "batchnorm"]
        status = sweep(tmp_path / checkpoint.stem, *flags)
        files = files_of(tmp_path / checkpoint.stem)
        return status, json.loads(files.json.read_text()), files.json, capsys.readouterr()

    status, header, _, said = swept(tiny_checkpoint)
    assert status == 0 and header["settings"]["calibration_augmentation"] == "flips, zeros 4"
    assert "does not tell" not in said.out
    saved = torch.load(tiny_checkpoint, weights_only=True)
    del saved["settings"]
    torch.save(saved, tmp_path / "silent.pth")
    status, header, path, said = swept(tmp_path / "silent.pth")
    chosen = header["settings"]["calibration_augmentation"]
    names = [str(augmentation) for augmentation in AUGMENTATIONS]
    assert status == 0 and chosen in names
    assert (
        f"does not tell the augmentation of its training; nearest to its BatchNorm statistics: {chosen}\n" in said.out
    )
    status, again, path, said = swept(tmp_path / "silent.pth", "0,50")
    assert status == 0 and again["settings"] == header["settings"]
    assert "nearest" not in said.out  # chosen once
    names.remove(chosen)
    path.write_text(json.dumps(again | {"settings": again["settings"] | {"calibration_augmentation": names[0]}}))
    status, _, _, said = swept(tmp_path / "silent.pth", "0,50,90")
    assert status == 1 and "rows of other calibration images" in said.err


def test_calibration_does_not_touch_the_test_images(tiny_checkpoint, image_folder, tmp_path):
    """The same training images with other test images give the same calibration."""
    other = tmp_path / "colours"
    shutil.copytree(image_folder, other)
    for path in (other / "test").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--recover", "batchnorm"]
    assert sweep(tmp_path / "a", *flags) == 0
    assert sweep(tmp_path / "b", *flags, "--data_dir", other) == 0
    one, two = (json.loads(files_of(tmp_path / name).json.read_text()) for name in "ab")
    assert one["calibration_sha256"] == two["calibration_sha256"] is not None
    assert one["data"]["test_sha256"] != two["data"]["test_sha256"]


def test_the_standard_panel_is_announced(tiny_checkpoint, tmp_path, capsys):
    assert sweep(tmp_path, "--compare", "--checkpoint", tiny_checkpoint, "--levels", "0:100:50") == 0
    out = capsys.readouterr().out
    assert out.index("about ") < out.index("% pruned")
    assert "29 networks x 24 images" in out  # dense, 8 curves of 3 levels, one of 4
    assert len(rows_of(tmp_path / TABLE)) == 28


def test_sensitivity_prunes_one_layer_at_a_time(tiny_checkpoint, tmp_path, capsys):
    assert sweep(tmp_path, "--sensitivity", "--checkpoint", tiny_checkpoint, "--levels", "50,95") == 0
    files = files_of(tmp_path, "colours_resnet18_sensitivity")
    found = read_sweep(files)
    assert len(found.table()) == 20 * 2
    for row in found.table():
        zeros = {name: count for name, count in zip(found.layers, found.zeros[row.key], strict=True) if count}
        pruned = row.allocation.removeprefix("only ")
        assert zeros == {pruned: round(row.level / 100 * found.layers[pruned])}
    assert Image.open(files.png).size[1] > 600
    assert "the layers that suffer most (of 20)" in capsys.readouterr().out


ITERATIVE = ["--schedule", "iterative", "--levels", "50,80,95", "--criterion", "random", "--allocation", "global"]


@pytest.mark.parametrize("recover", ["reconstruction", "finetune"])
def test_iterative_masks_are_nested_and_a_killed_curve_ends_the_same(tiny_checkpoint, tmp_path, recover, monkeypatch):
    flags = ["--checkpoint", tiny_checkpoint, *ITERATIVE, "--recover", recover]
    networks, killed_at, save = [], [], swept_networks.save_step

    class Killed(BaseException):
        pass

    def watched(sweep_, network, curve, level, pruner):
        networks.append({name: value.clone() for name, value in pruner.network.named_parameters()})
        save(sweep_, network, curve, level, pruner)
        if level in killed_at:
            raise Killed

    monkeypatch.setattr(pruning, "save_step", watched)
    assert sweep(tmp_path / "whole", *flags) == 0
    assert not list((tmp_path / "whole").glob("*_state.pth"))
    for earlier, later in itertools.pairwise(networks):
        for name in earlier:
            if name.endswith("weight") and earlier[name].dim() > 1:
                assert not later[name][earlier[name] == 0].any()
    killed_at.append(80)
    with pytest.raises(Killed):
        sweep(tmp_path / "killed", *flags)
    networks.clear()
    killed_at.clear()
    assert sweep(tmp_path / "killed", *flags) == 0
    assert len(networks) == 1  # the levels before were not pruned again
    assert without_seconds(tmp_path / "killed" / TABLE) == without_seconds(tmp_path / "whole" / TABLE)


def test_an_iterative_curve_without_its_state_starts_from_its_first_level(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, *ITERATIVE, "--recover", "reconstruction"]
    assert sweep(tmp_path, *flags) == 0
    table = tmp_path / TABLE
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join(rows[:-1]))  # the last level is lost, and the state went with the end of the sweep
    assert sweep(tmp_path, *flags) == 0
    assert table.read_text().startswith("".join(rows[:-1]))  # what was measured is not measured again
    mine = table.read_text().splitlines(keepends=True)[-1]
    assert mine.split(",")[3:14] == rows[-1].split(",")[3:14]
    flags[flags.index("50,80,95")] = "50,95"  # levels depend on those before
    assert sweep(tmp_path, *flags) == 1
    assert "schedule (" in capsys.readouterr().err


def test_every_checkpoint_is_recovered_as_it_was_trained(image_folder, tiny_checkpoint, tmp_path):
    other = ["--epochs", "2", "--learning_rate", "0.05", "--momentum", "0.5", "--batch_size", "9", "--seed", "1"]
    train(image_folder, tmp_path, *other)
    paths = [tiny_checkpoint, tmp_path / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth"]
    flags = ["--levels", "60", "--recover", "reconstruction", "finetune", "--finetune_learning_rate", "rewind"]
    assert sweep(tmp_path / "there", "--checkpoint", *paths, *flags) == 0
    assert sweep(tmp_path / "back", "--checkpoint", *paths[::-1], *flags) == 0
    there, back = (without_seconds(tmp_path / name / TABLE) for name in ("there", "back"))
    assert there == back[2:] + back[:2]


def test_a_criterion_of_ones_own_is_swept(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsity.prune.criteria.CRITERIA", dict(CRITERIA))
    monkeypatch.setattr(methods, "CRITERIA", methods.CRITERIA)
    for table in (CRITERIA, methods.CRITERIA):
        monkeypatch.setitem(table, "spread", None)  # put back afterwards

    def spread(evidence):
        return {name: (layer.weight - layer.weight.mean()).abs() for name, layer in evidence.layers.items()}

    add_criterion("spread", spread)
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--criterion", "spread", "--levels", "0,50,100") == 0
    assert [row["sparsity"] for row in rows_of(tmp_path / TABLE)][::2] == ["0.0", "100.0"]
