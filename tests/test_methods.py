"""Criteria, allocations, recoveries and schedules through the script, end to end on a small network."""

import itertools
import json
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import train_arguments
from PIL import Image
from test_interruption import kill_after, start
from test_pruning import rows_of, sweep, without_seconds

import pruning
import run
from sparsity.figures import heatmaps
from sparsity.networks import checkpoint
from sparsity.prune.allocation import ALLOCATIONS
from sparsity.prune.criteria import CRITERIA
from sparsity.prune.pruner import Pruner
from sparsity.recover import RECOVERIES
from sparsity.results.files import SweepFiles
from sparsity.results.store import read_sweep
from sparsity.sweep import chain
from sparsity.sweep.inputs import finetuning_rates, training_recipe
from sparsity.sweep.panel import RECONSTRUCTED_LEVELS, missing_curves, product_panel, sensitivity_panel, standard_panel
from sparsity.system.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")
STEM = "colours_resnet18_pruning"


def files_of(folder, name=STEM):
    return SweepFiles(folder / name)


@pytest.fixture(scope="module")
def everything(tiny_checkpoint, tmp_path_factory):
    """Every criterion with every allocation, plain and with batchnorm; and every recovery of l1 with global."""
    out = tmp_path_factory.mktemp("everything")
    levels = ["--checkpoint", tiny_checkpoint, "--levels", "0,50,99.9,100"]
    assert sweep(out, *levels, "--criterion", *CRITERIA, "--allocation", *ALLOCATIONS, "--recover", "none") == 0
    assert sweep(out, *levels, "--allocation", "global", "--recover", *RECOVERIES) == 0
    return out


def test_every_combination_has_its_rows(everything):
    curves = read_sweep(files_of(everything)).curves()
    expected = [(c, a, "none") for c in CRITERIA for a in ALLOCATIONS]
    expected += [("l1", "global", r) for r in RECOVERIES if r != "none"]
    assert list(curves) == expected
    assert all(list(levels) == [0, 50, 99.9, 100] for levels in curves.values())


def test_the_level_is_met_exactly_but_for_one_weight(everything):
    found = read_sweep(files_of(everything))
    total = sum(found.layers.values())
    for row in found.table():
        zeros = int(found.zeros[row.key].sum())
        if row.allocation == "uniform":
            expected = sum(round(row.level / 100 * count) for count in found.layers.values())
        else:
            expected = round(row.level / 100 * total)
        assert zeros == expected, row.key
        if row.allocation != "uniform" and row.level < 100:
            assert (found.zeros[row.key] < list(found.layers.values())).all()  # no layer is empty


def test_swaps_are_reported(everything):
    notes = [row["notes"] for row in rows_of(files_of(everything).csv) if row["level"] == "99.9"]
    assert any("swapped so that no layer is empty" in note for note in notes)


def test_recovery_leaves_the_dense_rows_and_the_masks(everything):
    found = read_sweep(files_of(everything))
    rows = {(row.recover, row.level): row for row in found.table() if row.curve[:2] == ("l1", "global")}
    for recover in RECOVERIES:
        for level in (0, 50, 100):
            assert (found.zeros[rows[recover, level].key] == found.zeros[rows["none", level].key]).all()
    assert rows["none", 0].agreement == 100
    assert len({rows[recover, 50].loss for recover in RECOVERIES}) == len(RECOVERIES)  # each does something else


def test_everything_is_drawn_and_the_table_is_written(everything):
    files = files_of(everything)
    for name in (".png", "_tradeoff.png", "_classes.png", "_layers.png"):
        assert Image.open(files.with_suffix(name)).size[0] > 600
    table = files.with_suffix(".md").read_text()
    assert sum(line.startswith("| ") for line in table.splitlines()) >= len(CRITERIA) * len(ALLOCATIONS)


def test_the_same_flags_give_the_same_rows(everything, tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--criterion", "random", "obs", "--allocation", "lamp"]
    assert sweep(tmp_path, *flags) == 0
    mine = without_seconds(files_of(tmp_path).csv)
    assert len(mine) == 2
    assert all(row in without_seconds(files_of(everything).csv) for row in mine)


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
    dense_nonzero = found.table()[0].nonzero
    spared = dense_nonzero - sum(found.layers.values())
    assert all(row.nonzero == spared for row in found.table() if row.level == 100)


def test_other_calibration_images_are_not_mixed_in(swept_at_two, tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    assert sweep(tmp_path, *flags, "--recover", "batchnorm") == 0  # a curve more, beside the plain one
    assert len(rows_of(files_of(tmp_path).csv)) == 4
    assert sweep(tmp_path, *flags, "--recover", "batchnorm", "--calibration_images", "24") == 1
    assert "calibration_images (2048 there, 24 now)" in capsys.readouterr().err
    header = json.loads(files_of(tmp_path).json.read_text())
    header["calibration_sha256"] = "0" * 64
    files_of(tmp_path).json.write_text(json.dumps(header))
    assert sweep(tmp_path, *flags, "--recover", "reconstruction") == 1
    assert "rows of other calibration images" in capsys.readouterr().err


def test_the_standard_panel_says_how_long_and_continues_after_a_kill(tiny_checkpoint, tmp_path, capsys):
    flags = ["--compare", "--checkpoint", tiny_checkpoint, "--levels", "0:100:50"]
    assert sweep(tmp_path / "whole", *flags) == 0
    out = capsys.readouterr().out
    assert out.index("about ") < out.index("% pruned")
    assert "29 networks x 24 images" in out  # dense, 8 curves of 3 levels, one of 4
    whole = without_seconds(files_of(tmp_path / "whole").csv)
    assert len(whole) == 28
    again = ["--images_dir", str(tmp_path / "killed"), "--precision", "fp32", "--threads", "1", *map(str, flags)]
    kill_after(start("pruning.py", again), random.Random(0).uniform(0.1, 2.0), signal.SIGKILL)
    assert sweep(tmp_path / "killed", *flags) == 0
    assert without_seconds(files_of(tmp_path / "killed").csv) == whole
    with np.load(files_of(tmp_path / "killed").npz) as mine, np.load(files_of(tmp_path / "whole").npz) as other:
        assert all(np.array_equal(mine[name], other[name]) for name in other.files)
    summary = json.loads(files_of(tmp_path / "killed").json.read_text())["summary"]
    assert [entry["sentence"] for entry in summary] == [
        entry["sentence"] for entry in json.loads(files_of(tmp_path / "whole").json.read_text())["summary"]
    ]


def test_sensitivity_prunes_one_layer_at_a_time(tiny_checkpoint, tmp_path, capsys):
    assert sweep(tmp_path, "--sensitivity", "--checkpoint", tiny_checkpoint) == 0
    files = files_of(tmp_path, "colours_resnet18_sensitivity")
    found = read_sweep(files)
    assert len(found.table()) == 20 * 4
    for row in found.table():
        touched = [name for name, zeros in zip(found.layers, found.zeros[row.key], strict=True) if zeros]
        assert touched == [row.allocation.removeprefix("only ")]
        index = list(found.layers).index(touched[0])
        assert found.zeros[row.key][index] == round(row.level / 100 * found.layers[touched[0]])
    assert Image.open(files.png).size[1] > 600
    assert "the layers that suffer most (of 20)" in capsys.readouterr().out


def test_sensitivity_takes_a_criterion_that_reads_images(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "90", "--criterion", "obs", "--recover", "batchnorm"]
    assert sweep(tmp_path, "--sensitivity", *flags) == 0
    assert len(rows_of(tmp_path / "colours_resnet18_sensitivity.csv")) == 20


ITERATIVE = ["--schedule", "iterative", "--levels", "50,80,95", "--criterion", "random", "--allocation", "global"]


@pytest.fixture(scope="module")
def iterated(tiny_checkpoint, tmp_path_factory):
    """A finished iterative sweep without recovery."""
    out = tmp_path_factory.mktemp("iterated")
    assert sweep(out, "--checkpoint", tiny_checkpoint, *ITERATIVE) == 0
    return out


@pytest.mark.parametrize("recover", ["reconstruction", "finetune"])
def test_iterative_masks_are_nested_and_a_killed_curve_ends_the_same(tiny_checkpoint, tmp_path, recover, monkeypatch):
    flags = ["--checkpoint", tiny_checkpoint, *ITERATIVE, "--recover", recover]
    states = []
    save = pruning.chain.save_state
    monkeypatch.setattr(pruning.chain, "save_state", lambda *state: (states.append(state[-1]), save(*state)))
    assert sweep(tmp_path / "whole", *flags) == 0
    assert not list((tmp_path / "whole").glob("*_state.pth"))
    weights = [dict(network.named_parameters()) for network in states]
    for earlier, later in itertools.pairwise(weights):
        for name in earlier:
            if name.endswith("weight") and earlier[name].dim() > 1:
                assert not later[name][earlier[name] == 0].any()

    class Killed(BaseException):
        pass

    def dies(*state):
        save(*state)
        if state[1].endswith("|80"):
            raise Killed

    monkeypatch.setattr(pruning.chain, "save_state", dies)
    with pytest.raises(Killed):
        sweep(tmp_path / "killed", *flags)
    pruned = []
    monkeypatch.setattr(pruning.chain, "save_state", lambda *state: pruned.append(state))
    assert sweep(tmp_path / "killed", *flags) == 0
    assert len(pruned) == 1  # the levels before were not pruned again
    assert without_seconds(files_of(tmp_path / "killed").csv) == without_seconds(files_of(tmp_path / "whole").csv)


def test_an_iterative_curve_without_its_state_starts_from_its_first_level(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, *ITERATIVE, "--recover", "reconstruction"]
    assert sweep(tmp_path, *flags) == 0
    files = files_of(tmp_path)
    rows = files.csv.read_text().splitlines(keepends=True)
    files.csv.write_text("".join(rows[:-1]))  # the last level is lost, and the state went with the end of the sweep
    assert sweep(tmp_path, *flags) == 0
    assert without_seconds(files.csv)[-1]["level"] == "95"
    assert files.csv.read_text().startswith("".join(rows[:-1]))  # what was measured is not measured again
    mine = files.csv.read_text().splitlines(keepends=True)[-1]
    assert mine.split(",")[4:14] == rows[-1].split(",")[4:14]


@pytest.mark.parametrize("allocation", ["uniform", "global", "lamp", "erk"])
def test_zeros_of_the_level_before_go_first_whatever_the_criterion(small_net, monkeypatch, allocation):
    """Even under a criterion that likes zeros best."""
    monkeypatch.setitem(
        CRITERIA,
        "smallest",
        lambda evidence: {name: 1 / (0.01 + layer.weight.abs()) - 1 for name, layer in evidence.layers.items()},
    )
    with torch.no_grad():
        for name in ("stem", "down", "hidden"):
            weight = small_net.get_submodule(name).weight
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2] = 0
    pruner = Pruner(small_net, ["stem", "down", "hidden"], None, 0, nested=True)
    model, _ = pruner.prune(("smallest", allocation, "batchnorm"), 60)
    for name in ("stem", "down", "hidden"):
        before, layer = small_net.get_submodule(name).weight, model.get_submodule(name)
        assert (before == 0).any()
        if int((layer.weight_mask == 0).sum()) >= int((before == 0).sum()):
            assert not layer.weight_mask[before == 0].any()
        else:
            assert (before[layer.weight_mask == 0] == 0).all()


def test_the_state_of_another_sweep_is_left_alone(small_net, tmp_path):
    path, keys = tmp_path / "state.pth", ["a", "b", "c"]
    assert chain.load_state(path, keys, "mine", small_net) == 0
    chain.save_state(path, "b", "mine", small_net)
    kept = {name: value.clone() for name, value in small_net.state_dict().items()}
    with torch.no_grad():
        small_net.stem.weight.zero_()
    assert chain.load_state(path, keys, "other", small_net) == 0
    assert chain.load_state(path, ["a", "c"], "mine", small_net) == 0
    assert not small_net.stem.weight.any()
    assert chain.load_state(path, keys, "mine", small_net) == 2
    assert all(torch.equal(value, kept[name]) for name, value in small_net.state_dict().items())
    with pytest.raises(UserError, match="remove it"):
        chain.load_state(path, keys, "mine", torch.nn.Linear(1, 1))


def test_iterative_levels_are_a_setting(iterated, tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(iterated, tmp_path, dirs_exist_ok=True)
    flags = ["--checkpoint", tiny_checkpoint, *ITERATIVE]
    flags[flags.index("50,80,95")] = "50,95"
    assert sweep(tmp_path, *flags) == 1
    assert "schedule (" in capsys.readouterr().err


def test_rewinding_uses_the_rates_of_the_training(image_folder, tmp_path):
    assert run.main(train_arguments(image_folder, tmp_path, "--epochs", "2", "--T_max", "2")) == 0
    path = tmp_path / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth"
    assert finetuning_rates(checkpoint.load(path), "rewind", 2) == pytest.approx((0.01, 0.005))
    assert finetuning_rates(checkpoint.load(path), 0.3, 2) == (0.3, 0.3)
    flags = ["--checkpoint", path, "--levels", "50", "--recover", "finetune", "--finetune_epochs", "2"]
    assert sweep(tmp_path / "a", *flags, "--finetune_learning_rate", "rewind") == 0
    assert sweep(tmp_path / "b", *flags, "--finetune_learning_rate", "0.01") == 0
    losses = [rows_of(files_of(tmp_path / name).csv)[0]["loss"] for name in "ab"]
    assert losses[0] != losses[1]


def test_several_checkpoints_are_recovered_each_with_its_own_dense_network(tiny_checkpoint, other_checkpoint, tmp_path):
    flags = ["--levels", "60", "--recover", "reconstruction", "--allocation", "lamp"]
    assert sweep(tmp_path / "both", "--checkpoint", tiny_checkpoint, other_checkpoint, *flags) == 0
    assert sweep(tmp_path / "alone", "--checkpoint", other_checkpoint, *flags) == 0
    both, alone = (without_seconds(files_of(tmp_path / name).csv) for name in ("both", "alone"))
    assert both[1] == alone[0]


def test_every_checkpoint_is_finetuned_as_it_was_trained(image_folder, tiny_checkpoint, tmp_path):
    other = ["--epochs", "2", "--learning_rate", "0.05", "--momentum", "0.5", "--batch_size", "9", "--seed", "1"]
    assert run.main(train_arguments(image_folder, tmp_path, *other)) == 0
    paths = [tiny_checkpoint, tmp_path / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth"]
    flags = ["--levels", "60", "--recover", "finetune", "--finetune_learning_rate", "rewind"]
    assert sweep(tmp_path / "there", "--checkpoint", *paths, *flags) == 0
    assert sweep(tmp_path / "back", "--checkpoint", *paths[::-1], *flags) == 0
    there, back = (without_seconds(files_of(tmp_path / name).csv) for name in ("there", "back"))
    assert there == back[::-1]
    recipe = {"batch_size": 9, "momentum": 0.5, "weight_decay": 5e-4}
    assert training_recipe(checkpoint.load(paths[1])) == recipe


def test_the_layers_of_an_iterative_sweep_are_shown_for_each_curve(tiny_checkpoint, tmp_path, monkeypatch):
    panels = []
    draw = heatmaps._draw
    monkeypatch.setattr(
        heatmaps, "_draw", lambda found, *rest, **more: (panels.append(found), draw(found, *rest, **more))[1]
    )
    flags = ["--levels", "50,90", "--allocation", "global", "--recover", "none", "batchnorm"]
    for schedule, count in (("oneshot", 1), ("iterative", 2)):
        out = tmp_path / schedule
        assert sweep(out, "--checkpoint", tiny_checkpoint, *flags, "--schedule", schedule) == 0
        panels.clear()
        heatmaps.plot_layers(files_of(out))
        assert len(panels[0]) == count


def test_panels():
    assert list(product_panel(["l1", "l1"], ["uniform"], ["none", "batchnorm"], [0, 50])) == [
        ("l1", "uniform", "none"),
        ("l1", "uniform", "batchnorm"),
    ]
    panel = standard_panel([0.0, 100.0])
    assert len(panel) == 9
    assert panel["l1", "global", "reconstruction"] == RECONSTRUCTED_LEVELS
    assert panel["random", "uniform", "batchnorm"] == [0, 100]
    assert sensitivity_panel(["a", "b"], "l1", "none", [90.0]) == {
        ("l1", "only a", "none"): [90.0],
        ("l1", "only b", "none"): [90.0],
    }


def test_missing_curves(everything):
    found = read_sweep(files_of(everything))
    name = found.table()[0].checkpoint
    panel = product_panel(["l1"], ["global"], ["none"], [0.0, 25.0, 50.0])
    assert missing_curves(found, name, panel, whole=False) == {("l1", "global", "none"): [25.0]}
    assert missing_curves(found, name, panel, whole=True) == panel
    assert missing_curves(found, name, product_panel(["l1"], ["global"], ["none"], [50.0]), whole=True) == {}


def test_calibration_does_not_touch_the_test_images(tiny_checkpoint, image_folder, tmp_path):
    """The same training images with other test images give the same calibration."""
    other = tmp_path / "colours"
    shutil.copytree(image_folder, other)
    for path in (other / "test").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--recover", "batchnorm"]
    assert sweep(tmp_path / "a", *flags) == 0
    assert sweep(tmp_path / "b", *flags, "--data_dir", other) == 0
    hashes = [json.loads(files_of(tmp_path / name).json.read_text())["calibration_sha256"] for name in "ab"]
    assert hashes[0] == hashes[1] is not None
    tests = [json.loads(files_of(tmp_path / name).json.read_text())["data"]["test_sha256"] for name in "ab"]
    assert tests[0] != tests[1]


def test_torch_is_left_as_it_was(tiny_checkpoint, tmp_path):
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "50", "--recover", "reconstruction") == 0
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (grad, dtype)
