"""Training end to end: the files, lines and records that it leaves, and the same bits again."""

import hashlib
import json
import re

import pytest
import torch
from conftest import train, train_arguments
from helpers import assert_same, checkpoints, rows_of

import run
from sparsity.data.images import class_balanced_order, training_batches
from sparsity.data.sources import Source, load_split
from sparsity.networks import checkpoint, families
from sparsity.networks.evaluation import evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import memory_format
from sparsity.system import machine

STRONG = ["--recipe", "strong", "--epochs", "3", "--ema", "0.6", "--cutout", "2"]


@pytest.fixture(scope="module")
def strong(image_folder, tmp_path_factory):
    """The folder of a training with every part of the strong recipe, on deterministic algorithms."""
    out = train(image_folder, tmp_path_factory.mktemp("strong"), *STRONG, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    machine.make_deterministic(False)
    return out


def test_a_run_leaves_its_files_and_a_record_of_how_to_make_them_again(trained, tiny_checkpoint, image_folder):
    written = {path.name for folder in ("checkpoints", "images") for path in (trained / folder).iterdir()}
    ends = ("ckpt_epoch2.pth", "ckpt_epoch3.pth", "last.pth", "confusion.csv", "confusion.png")
    ends += ("training.csv", "training.json", "training.png")
    assert written == {f"colours_resnet18_{end}" for end in ends}
    record = json.loads((trained / "images" / "colours_resnet18_training.json").read_text())
    saved = checkpoint.load(tiny_checkpoint)
    assert (saved.epoch, saved.model) == (3, {"arch": "resnet18", "num_classes": 3, "width": 4})
    assert record["command"].startswith("python run.py --dataset folder --data_dir ")
    assert (record["settings"], record["versions"]) == (saved.settings, saved.content["versions"])
    assert {type(value) for value in saved.settings.values()} == {int, float, bool, str}
    sha256 = hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert record["checkpoint"] == {"file": tiny_checkpoint.name, "sha256": sha256}
    test, classes = load_split(Source("folder", image_folder, 8), train=False)
    test = test.take(class_balanced_order(test.labels))
    assert record["images"] == {"training_sha256": saved.data["training_sha256"], "test_sha256": test.hash()}
    assert record["test_accuracy"] == saved.content["metrics"]["test_accuracy"]
    assert record["machine"]["threads"] == record["machine"]["processes"] == 1
    confusion = rows_of(trained / "images" / "colours_resnet18_confusion.csv")
    assert [sum(int(row[name]) for name in classes) for row in confusion] == [8, 8, 8]
    correct = sum(int(row[row["true class"]]) for row in confusion)
    assert record["test_accuracy"] == pytest.approx(100 * correct / 24)


def test_the_tested_and_saved_network_is_the_moving_average(strong, image_folder):
    state = checkpoint.load(strong / "checkpoints" / "colours_resnet18_last.pth")
    trained = state.content["trained_net"]
    differing = [name for name, value in state.net.items() if not torch.equal(value, trained[name])]
    assert all(("num_batches_tracked" in name) != (name in differing) for name in trained)
    assert state.content["averaged_steps"] == 9  # 48 images in batches of 16, three times
    test, _ = load_split(Source("folder", image_folder, 8), False, (state.data["mean"], state.data["std"]))
    found = evaluate(inference_copy(families.restore(state)[1]), test, 32)
    assert found.loss == pytest.approx(state.content["metrics"]["test_loss"], rel=1e-4)
    rates = [0.015 * part / 0.85 for part in (5 / 6, 0.5, 1 / 6)]  # in the middle of each epoch
    assert [row["learning_rate"] for row in state.content["history"]] == pytest.approx(rates)
    record = json.loads((strong / "images" / "colours_resnet18_training.json").read_text())
    table = rows_of(strong / "images" / "colours_resnet18_training.csv")
    assert record["image_sizes"] == [int(row["image_size"]) for row in table] == [4, 4, 8]
    assert record["settings"].items() >= {"start_size": 4, "border": "reflect", "schedule_shape": "linear"}.items()


def test_the_reference_recipe_is_a_plain_loop_to_the_bit(trained, image_folder):
    saved = checkpoint.load(trained / "checkpoints" / "colours_resnet18_last.pth")
    torch.manual_seed(0)
    model = families.build(saved.model)
    layout = memory_format(model)
    model = model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    split, _ = load_split(Source("folder", image_folder, 8), train=True)
    for epoch in (1, 2, 3):
        for images, labels in training_batches(split, 16, 0, epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images.contiguous(memory_format=layout)), labels).backward()
            optimizer.step()
        schedule.step()
    assert_same(saved.net, dict(model.state_dict()))


def test_one_seed_gives_the_same_bits_again_and_another_others(strong, image_folder, tmp_path):
    again = checkpoints(train(image_folder, tmp_path / "again", *STRONG, "--deterministic"))
    other = checkpoints(train(image_folder, tmp_path / "other", *STRONG, "--seed", "1"))
    assert not torch.are_deterministic_algorithms_enabled()  # what another run asked for is given back
    assert_same(checkpoints(strong), again)
    assert not torch.equal(*(out["colours_resnet18_last.pth"]["net"]["conv1.weight"] for out in (again, other)))


def test_epochs_print_their_lines_and_resuming_a_finished_run_makes_its_last_files(image_folder, tmp_path, capfd):
    flags = ["--epochs", "2", "--label_smoothing", "0.1", "--ema", "0.9"]
    before = checkpoints(train(image_folder, tmp_path, *flags))
    out, err = capfd.readouterr()
    pattern = (
        r"^Epoch: (\d) \| Loss \(labels smoothed by 0\.1\): \d+\.\d{4} \| Training accuracy: \d+\.\d{3}% \| "
        r"Test accuracy: \d+\.\d{3}% \| Epoch Time: \d+\.\d\d secs$"
    )
    assert re.findall(pattern, out, re.MULTILINE) == ["1", "2"]
    assert err == "" and "replaces" not in out and "Test accuracy: " in out.splitlines()[-2]
    assert "tested and saved is the moving average of the weights (decay 0.9 a step)" in out
    picture = tmp_path / "images" / "colours_resnet18_confusion.png"
    drawn = picture.read_bytes()
    picture.unlink()
    (tmp_path / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth").unlink()  # as if it was to train for longer
    train(image_folder, tmp_path, *flags, "--resume")
    assert picture.read_bytes() == drawn
    assert_same(before, checkpoints(tmp_path))


def test_a_new_run_says_first_that_it_replaces_an_earlier_one_and_diverging_leaves_it(image_folder, tmp_path, capsys):
    before = checkpoints(train(image_folder, tmp_path, "--epochs", "1"))
    capsys.readouterr()
    assert run.main(train_arguments(image_folder, tmp_path, "--epochs", "9", "--learning_rate", "1e30")) == 1
    out, err = capsys.readouterr()
    assert out.startswith("this run replaces checkpoints of an earlier one in ")
    assert re.fullmatch(r"error: the loss is (nan|inf) at epoch 1, step \d, learning rate 1e\+30; .*\n", err)
    assert_same(before, checkpoints(tmp_path))


def test_an_interruption_right_after_the_first_save_says_resume(image_folder, tmp_path, monkeypatch, capsys):
    save = checkpoint.save

    def save_and_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    assert run.main(train_arguments(image_folder, tmp_path, "--epochs", "2")) == 130
    assert capsys.readouterr().err.rstrip().endswith("--resume")
