"""Going on with a training: to the bit, in its own settings, and refused in one line where it cannot."""

import copy
import shutil

import pytest
import torch
from conftest import train, train_arguments
from helpers import assert_same, checkpoints
from torch._subclasses.fake_tensor import FakeTensorMode

import run
from sparsity.networks import checkpoint
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.training.optimizer import make_optimizer, make_schedule
from sparsity.training.recipe import parse_args
from sparsity.training.resume import Training, find_training_state, kept_settings, training_progress

pytestmark = pytest.mark.usefixtures("without_pictures")
STATE = "colours_resnet18_last.pth"
SETTINGS = {
    "bf16": "--T_max 2 --precision bf16",
    "adam": "--T_max 2 --optimizer adam --learning_rate 0.003",
    "rmsprop": "--T_max 2 --optimizer rmsprop --learning_rate 0.003",
    "cosine": "--recipe strong --schedule_shape cosine --warmup_epochs 2 --ema 0.6 --T_max 2 --start_size 0",
    "muon": "--recipe strong --T_max 4 --precision bf16 --image_size 16",
}


def places(folder, out):
    """The flags of the images and of the folders, without those of the network and of the machine."""
    return train_arguments(folder, out)[2:8]


def tensors(content):
    """All tensors in nested dictionaries and lists."""
    if torch.is_tensor(content):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for value in values for tensor in tensors(value)]


def check_resumed(folder, out, *flags):
    """Assert that a training of three epochs that goes on, in the saved settings, ends where one of four ends."""
    whole, parts = (train(folder, out / epochs, "--epochs", epochs, *flags) for epochs in ("4", "3"))
    assert {tensor.device.type for tensor in tensors(checkpoints(parts)[STATE])} == {"cpu"}
    assert run.main(["--resume", "--epochs", "4", *places(folder, parts)]) == 0
    for name in ("colours_resnet18_ckpt_epoch4.pth", STATE):
        assert_same(checkpoints(whole)[name], checkpoints(parts)[name])


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_ends(image_folder, tmp_path, flags):
    check_resumed(image_folder, tmp_path, *flags.split())


def test_a_training_on_growing_images_resumes_to_the_bit_after_each_epoch(image_folder, tmp_path, monkeypatch, capsys):
    sizes, states, save = [4, 4, 8, 12, 16, 16], [], checkpoint.save

    def save_and_keep(path, content):
        save(path, content)
        if path.name == STATE:
            states.append(path.read_bytes())

    monkeypatch.setattr(checkpoint, "save", save_and_keep)
    flags = ["--recipe", "strong", "--epochs", "6", "--image_size", "16", "--start_size", "4", "--ema", "0.6"]
    whole = checkpoints(train(image_folder, tmp_path / "whole", *flags))
    monkeypatch.setattr(checkpoint, "save", save)
    assert [row["image_size"] for row in whole[STATE]["history"]] == sizes
    for epoch, content in enumerate(states[:-1], start=1):
        parts = tmp_path / str(epoch)
        (parts / "checkpoints").mkdir(parents=True)
        (parts / "checkpoints" / STATE).write_bytes(content)
        capsys.readouterr()
        assert run.main(["--resume", *places(image_folder, parts)]) == 0
        lines = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch:")]
        assert lines == [[f"Epoch: {index + 1}", f"{sizes[index]} pixels"] for index in range(epoch, 6)]
        assert_same(whole, checkpoints(parts))
    assert run.main(["--resume", "--epochs", "7", *places(image_folder, tmp_path / "whole")]) == 1
    assert "--epochs 7 goes beyond --T_max 6" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["bf16", "adam", "cosine", "muon"])
def test_a_run_on_a_gpu_resumes_to_the_bit_from_a_state_on_the_cpu(image_folder, tmp_path, name):
    check_resumed(image_folder, tmp_path, *SETTINGS[name].split(), "--device", "cuda", "--deterministic")
    torch.use_deterministic_algorithms(False)


def test_a_state_holds_no_tensor_of_a_gpu():
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2, device="cuda")  # which these tensors only claim to be on
        optimizer = make_optimizer("rmsprop", model, 0.1, 0.9, 0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found = training_progress(Training(model, None, optimizer, make_schedule(optimizer, 2)), [])
    assert optimizer.state[model.weight]["momentum_buffer"].device.type == "cuda" and len(tensors(found)) == 6
    assert {tensor.device.type for tensor in tensors(found)} == {"cpu"}


@pytest.fixture
def state(trained, tmp_path):
    """The training state of a run of three epochs, alone in a folder of its own: its path, and its content."""
    path = tmp_path / "checkpoints" / STATE
    path.parent.mkdir()
    shutil.copy(trained / "checkpoints" / STATE, path)
    return path, torch.load(path, weights_only=True)


def resume(state, image_folder, *flags):
    """Save a changed state and resume from it to four epochs; the exit status."""
    path, content = state
    torch.save(content, path)
    return run.main(["--resume", "--epochs", "4", *places(image_folder, path.parents[1]), *flags])


def test_contradicting_flags_are_named_and_nothing_is_touched(state, image_folder, capsys):
    path, content = state
    for flags, said in (
        ("--seed 4 --learning_rate 0.5", "seed 4 (saved: 0), learning_rate 0.5 (saved: 0.01); leave these flags"),
        ("--nesterov --ema 0.9", "nesterov True (saved: False), ema 0.9 (saved: 0.0); leave these flags"),
        ("--epochs 1", "has 3 epochs already, more than --epochs 1"),
        ("--arch resnet50", "nothing to resume"),
    ):
        assert resume(state, image_folder, *flags.split()) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
        assert [path.name for path in path.parent.iterdir()] == [STATE]
        assert_same(content, torch.load(path, weights_only=True))


def test_automatic_choices_keep_the_saved_ones_and_files_their_names(state, image_folder, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(image_folder)
    assert resume(state, image_folder, "--precision", "auto", "--device", "auto", "--data_dir", str(moved)) == 0
    saved = checkpoint.load(state[0])
    assert (saved.epoch, saved.settings["precision"], saved.settings["data_dir"]) == (4, "fp32", str(moved))
    assert {path.name for path in state[0].parent.iterdir()} == {STATE, "colours_resnet18_ckpt_epoch4.pth"}


def test_a_state_of_other_images_or_without_its_entries_is_refused_in_one_line(state, image_folder, capsys):
    path, whole = state
    for entry, value in (
        ("data", whole["data"] | {"training_sha256": "other"}),
        ("net", {}),
        ("settings", {"arch": "resnet18"}),
    ):
        assert resume((path, whole | {entry: value}), image_folder) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and str(path) in err
    (path.parent / "other_resnet18_last.pth").touch()
    with pytest.raises(UserError, match=r"could mean colours_resnet18_last\.pth, other_resnet18_last\.pth; say which"):
        find_training_state(parse_args(["--resume", "--checkpoint_dir", str(path.parent)]))


def test_a_state_of_a_gpu_goes_on_with_the_kernels_of_the_cpu(state, image_folder, tmp_path):
    path, content = state
    assert resume((path, copy.deepcopy(content)), image_folder) == 0
    expected = torch.load(path, weights_only=True)
    content["optimizer"]["param_groups"][0]["fused"] = True
    assert resume((path, content), image_folder) == 0
    assert_same(expected, torch.load(path, weights_only=True))


def test_another_machine_is_said_and_not_refused(state, image_folder, capsys, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: modes.append(mode) or model)
    assert resume(state, image_folder, "--compile", "on") == 0
    assert "compile: on now, off before; the result will not be the same to the bit" in capsys.readouterr().out
    assert modes == ["reduce-overhead"] and checkpoint.load(state[0]).settings["compile"] == "on"


@pytest.mark.parametrize(("before", "now", "restored"), [(1, 1, "on"), (1, 2, "auto"), (2, 2, "on"), (4, 1, "auto")])
def test_compiling_is_restored_for_as_many_processes_alone(state, monkeypatch, capsys, before, now, restored):
    path, content = state
    content["settings"] |= {"compile": "on", "processes": before}
    torch.save(content, path)
    monkeypatch.setattr(processes, "size", lambda: now)
    args = parse_args(["--resume", "--checkpoint_dir", str(path.parent)])
    find_training_state(args)
    assert args.compile == restored
    assert (f"processes: {now} now, {before} before" in capsys.readouterr().out) == (before != now)
    assert kept_settings(args).items() >= ({"epochs": 3, "batch_size": 16, "processes": now}).items()
