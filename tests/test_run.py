"""Training end to end: files, lines, resumption to the bit, and what contradicts a saved run."""

import csv
import json
import re

import pytest
import torch
from conftest import train_arguments

import run
from sparsity.data.images import class_balanced_order
from sparsity.data.sources import Source, load_split
from sparsity.networks import checkpoint


def states(path):
    return torch.load(path, weights_only=True)


def assert_same(one, other):
    """Equal in every tensor and count; only stored seconds may differ."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            if key != "seconds":
                assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def train(folder, out, *extra):
    return run.main(train_arguments(folder, out, *extra))


def test_a_run_leaves_what_it_promises(trained):
    files = {path.name for folder in ("checkpoints", "images") for path in (trained / folder).iterdir()}
    assert files == {
        "colours_resnet18_ckpt_epoch2.pth",
        "colours_resnet18_ckpt_epoch3.pth",
        "colours_resnet18_last.pth",
        "colours_resnet18_training.csv",
        "colours_resnet18_training.json",
        "colours_resnet18_training.png",
        "colours_resnet18_confusion.csv",
        "colours_resnet18_confusion.png",
    }
    with (trained / "images" / "colours_resnet18_confusion.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [sum(int(row[name]) for name in ("green", "red", "violet")) for row in rows] == [8, 8, 8]


def test_a_checkpoint_tells_what_it_is(tiny_checkpoint, image_folder):
    saved = checkpoint.load(tiny_checkpoint)
    assert saved.epoch == 3
    assert saved.model == {"arch": "resnet18", "num_classes": 3, "width": 4}
    assert saved.data["dataset"] == "folder"
    assert saved.data["data_dir"] == str(image_folder)
    assert saved.data["classes"] == ["green", "red", "violet"]
    assert saved.settings["threads"] == 1
    assert saved.content["versions"]["torch"] == torch.__version__
    json.dumps({key: value for key, value in saved.content.items() if key != "net"})


def test_a_record_tells_what_the_result_was_made_of(trained, tiny_checkpoint, image_folder):
    record = json.loads((trained / "images" / "colours_resnet18_training.json").read_text())
    saved = checkpoint.load(tiny_checkpoint)
    assert record["command"].startswith("python run.py --dataset folder --data_dir ")
    assert record["command"].endswith("--epochs 3 --save_every 2")
    assert (record["seed"], record["settings"]) == (0, saved.settings)
    assert record["checkpoint"] == {"file": tiny_checkpoint.name, "sha256": saved.sha256}
    test, _ = load_split(Source("folder", image_folder, 8), train=False)
    test_sha256 = test.take(class_balanced_order(test.labels)).hash()
    assert record["images"] == {"training_sha256": saved.data["training_sha256"], "test_sha256": test_sha256}
    assert record["test_accuracy"] == saved.content["metrics"]["test_accuracy"]
    assert record["versions"] == saved.content["versions"]
    assert record["machine"]["threads"] == 1


def test_each_epoch_prints_its_line_and_a_log_holds_no_progress_bar(image_folder, tmp_path, capfd):
    assert train(image_folder, tmp_path, "--epochs", "2") == 0
    out, err = capfd.readouterr()
    pattern = (
        r"Epoch: (\d) \| Loss: \d+\.\d{4} \| Training accuracy: \d+\.\d{3}% \| Test accuracy: \d+\.\d{3}% \| "
        r"Epoch Time: \d+\.\d\d secs"
    )
    lines = [line for line in out.splitlines() if line.startswith("Epoch")]
    assert [re.fullmatch(pattern, line)[1] for line in lines] == ["1", "2"]
    assert err == ""
    assert "replaces" not in out
    assert "Test accuracy: " in out.splitlines()[-2]


def test_a_fresh_run_says_first_that_it_replaces_an_earlier_one(image_folder, tmp_path, capsys):
    assert train(image_folder, tmp_path, "--epochs", "1") == 0
    capsys.readouterr()
    assert train(image_folder, tmp_path, "--epochs", "1", "--seed", "1") == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("this run replaces checkpoints of an earlier one")


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("sgd", "fp32"), ("adam", "fp32"), ("rmsprop", "fp32"), ("sgd", "bf16")]
)
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(image_folder, tmp_path, optimizer, precision):
    flags = ["--optimizer", optimizer, "--precision", precision, "--learning_rate", "0.003", "--T_max", "2"]
    assert train(image_folder, tmp_path / "whole", "--epochs", "4", *flags) == 0
    assert train(image_folder, tmp_path / "parts", "--epochs", "2", *flags) == 0
    places = train_arguments(image_folder, tmp_path / "parts")[2:8]
    assert run.main(["--resume", "--epochs", "4", *places]) == 0  # the other flags come from the saved state
    for name in ("colours_resnet18_ckpt_epoch4.pth", "colours_resnet18_last.pth"):
        whole, parts = (states(tmp_path / part / "checkpoints" / name) for part in ("whole", "parts"))
        assert_same(whole, parts)


def test_runs_with_one_seed_are_the_same_and_with_another_differ(image_folder, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train(image_folder, tmp_path / name, "--epochs", "1", "--seed", seed) == 0
    nets = [states(tmp_path / name / "checkpoints" / "colours_resnet18_ckpt_epoch1.pth")["net"] for name in "abc"]
    assert_same(nets[0], nets[1])
    assert not torch.equal(nets[0]["conv1.weight"], nets[2]["conv1.weight"])


def test_resuming_a_finished_run_draws_its_pictures_again(image_folder, tmp_path, capsys):
    assert train(image_folder, tmp_path, "--epochs", "1") == 0
    picture = tmp_path / "images" / "colours_resnet18_confusion.png"
    before = picture.read_bytes()
    picture.unlink()
    assert train(image_folder, tmp_path, "--resume", "--epochs", "1") == 0
    assert picture.read_bytes() == before


def test_a_run_that_is_resumed_where_it_shall_end_leaves_its_network(image_folder, tmp_path):
    assert train(image_folder, tmp_path, "--epochs", "2") == 0
    network = tmp_path / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth"
    whole = states(network)
    network.unlink()  # as when a longer run was interrupted after its second epoch
    assert train(image_folder, tmp_path, "--resume", "--epochs", "2") == 0
    assert_same(whole, states(network))


def test_a_contradicting_flag_is_named_and_nothing_is_touched(image_folder, tmp_path, capsys):
    assert train(image_folder, tmp_path, "--epochs", "2") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(image_folder, tmp_path, "--resume", "--epochs", "3", "--learning_rate", "0.5", "--seed", "4") == 1
    err = capsys.readouterr().err
    assert "--learning_rate 0.5 (saved: 0.01)" in err
    assert "--seed 4 (saved: 0)" in err
    assert train(image_folder, tmp_path, "--resume", "--epochs", "1") == 1
    assert "2 epochs already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_with_automatic_choices_keeps_the_saved_ones(image_folder, tmp_path):
    assert train(image_folder, tmp_path, "--epochs", "1") == 0  # in float32
    assert train(image_folder, tmp_path, "--epochs", "2", "--resume", "--precision", "auto", "--device", "auto") == 0
    saved = checkpoint.load(tmp_path / "checkpoints" / "colours_resnet18_last.pth")
    assert (saved.epoch, saved.settings["precision"]) == (2, "fp32")


def test_a_run_goes_on_in_its_own_files_when_the_images_moved(image_folder, tmp_path):
    assert train(image_folder, tmp_path, "--epochs", "1") == 0
    moved = tmp_path / "elsewhere"
    moved.symlink_to(image_folder)
    places = train_arguments(image_folder, tmp_path)[4:8]
    assert run.main(["--resume", "--epochs", "2", "--data_dir", str(moved), *places]) == 0
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {f"colours_resnet18_{end}.pth" for end in ("last", "ckpt_epoch1", "ckpt_epoch2")}


def change(content, path, value):
    """Put a value into nested dictionaries and lists, for a path such as 'settings/batch_size'."""
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    for key in parents:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("settings/batch_size", -5),
        ("settings/batch_size", None),
        ("settings/optimizer", "foo"),
        ("settings/optimizer", []),
        ("settings/precision", "fp8"),
        ("settings/seed", "x"),
        ("settings/arch", "resnet999"),
        ("settings/weight_decay", None),
        ("settings/dataset", ["x"]),
        ("settings/image_size", 10**9),
        ("optimizer", None),
        ("optimizer/state", {}),
        ("optimizer/state/0/momentum_buffer", torch.zeros(2)),
        ("optimizer/param_groups/0/lr", "x"),
        ("optimizer/param_groups/0/params", [0]),
        ("schedule", {}),
        ("schedule", None),
        ("schedule/last_epoch", 9),
        ("schedule/step", 5),
        ("history", []),
        ("history/0/epoch", "x"),
        ("history/0/loss", None),
        ("history/0", 5),
        ("data/training_sha256", "other"),
        ("epoch", 2),
        ("net", {}),
    ],
)
def test_a_damaged_training_state_is_refused_and_stays(image_folder, trained_once, tmp_path, capsys, path, value):
    content = states(trained_once / "checkpoints" / "colours_resnet18_last.pth")
    change(content, path, value)
    (tmp_path / "checkpoints").mkdir()
    state = tmp_path / "checkpoints" / "colours_resnet18_last.pth"
    torch.save(content, state)
    before = state.read_bytes()
    places = train_arguments(image_folder, tmp_path)[4:8]
    assert run.main(["--resume", "--epochs", "3", *places]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert str(state) in err
    assert state.read_bytes() == before


@pytest.fixture(scope="module")
def trained_once(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("once")
    assert train(image_folder, out, "--epochs", "1") == 0
    return out


def test_a_diverging_run_stops_and_the_last_good_files_stay(image_folder, tmp_path, capsys):
    assert train(image_folder, tmp_path, "--epochs", "1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert train(image_folder, tmp_path, "--epochs", "9", "--learning_rate", "1e30") == 1
    assert re.search(r"error: the loss is (nan|inf) at epoch 1, step \d, learning rate 1e\+30", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_synthetic_images_are_named_so_in_every_file(tmp_path):
    flags = ["--arch", "resnet18", "--width", "1", "--image_size", "4", "--epochs", "1"]
    places = ["--checkpoint_dir", str(tmp_path), "--images_dir", str(tmp_path)]
    assert run.main(["--dataset", "synthetic", *flags, *places]) == 0
    assert len(list(tmp_path.iterdir())) == 7
    assert all(path.name.startswith("synthetic_resnet18_") for path in tmp_path.iterdir())
