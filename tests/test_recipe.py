"""The recipes: what their flags are set to, and a training with every part on, whole and in parts."""

import json
import math

import pytest
import torch
from conftest import train_arguments
from test_run import assert_same, change, states, train

import Build_Resnet
import run
from sparsity.data.sources import Source, load_split
from sparsity.networks import checkpoint, families
from sparsity.networks.evaluation import evaluate
from sparsity.networks.inference import inference_copy
from sparsity.recover.finetune import rewound_rates
from sparsity.sweep.inputs import finetuning_rates
from sparsity.system.errors import UserError
from sparsity.training.resume import KEPT

REFERENCE = {
    "batch_size": 128,
    "learning_rate": 0.01,
    "nesterov": False,
    "warmup_epochs": 0,
    "T_max": 20,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "cutout": 0,
    "norm_weight_decay": True,
}
STRONG = {
    "batch_size": 256,
    "learning_rate": 0.2,
    "nesterov": True,
    "warmup_epochs": 5,
    "T_max": 55,
    "label_smoothing": 0.1,
    "ema": 0.999,
    "cutout": 8,
    "norm_weight_decay": False,
}
EVERY_PART = ["--recipe", "strong", "--epochs", "4", "--warmup_epochs", "2", "--ema", "0.6", "--learning_rate", "0.02"]
NEW = ("recipe", "nesterov", "warmup_epochs", "label_smoothing", "ema", "cutout", "norm_weight_decay", "compile")


def settled(*flags):
    args = vars(run.parse_args(list(flags)))
    return {name: args[name] for name in REFERENCE}


def test_recipes_set_the_defaults():
    assert settled() == settled("--recipe", "reference") == REFERENCE
    assert settled("--recipe", "strong") == STRONG
    for name, values in (("reference", REFERENCE), ("strong", STRONG)):
        assert all(type(value) is type(values[key]) for key, value in settled("--recipe", name).items())


def test_what_follows_from_other_flags_follows_them():
    flags = [
        "--recipe",
        "strong",
        "--batch_size",
        "512",
        "--epochs",
        "30",
        "--warmup_epochs",
        "3",
        "--image_size",
        "64",
    ]
    others = {"batch_size": 512, "learning_rate": 0.4, "T_max": 27, "cutout": 16, "warmup_epochs": 3}
    assert settled(*flags) == STRONG | others
    assert settled("--recipe", "strong", "--dataset", "synthetic")["cutout"] == 4


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, value in REFERENCE.items() if not isinstance(value, bool)]
)
def test_a_flag_that_is_given_wins(name, value):
    given = value or 2 if name in ("cutout", "warmup_epochs") else value or 0.5
    assert settled("--recipe", "strong", f"--{name}", str(given))[name] == given
    assert settled(f"--{name}", str(given)) == REFERENCE | {name: given}


def test_switches_are_turned_both_ways():
    off = settled("--recipe", "strong", "--no-nesterov", "--norm_weight_decay")
    assert off == STRONG | {"nesterov": False, "norm_weight_decay": True}
    on = settled("--nesterov", "--no-norm_weight_decay")
    assert on == REFERENCE | {"nesterov": True, "norm_weight_decay": False}


def test_help_tells_both_defaults(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "images a step (128; strong: 256)",
        "(0.01; strong: 0.1 for every 128 of --batch_size)",
        "(off; strong: on)",
        "(20; strong: all epochs after the warm-up)",
        "(0; strong: a quarter of --image_size)",
        "(on; strong: off)",
        "bfloat16 where the hardware is made for it) and channels_last belong to both",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nesterov", "--optimizer", "adam"], "--nesterov needs --optimizer sgd"),
        (["--nesterov", "--momentum", "0"], "a --momentum above 0"),
        (["--recipe", "strong", "--optimizer", "rmsprop"], "--no-nesterov trains without it"),
        (["--recipe", "strong", "--epochs", "5"], "--epochs 5 leaves no epoch after --warmup_epochs 5"),
        (["--cutout", "33"], "--cutout 33 is larger than the images of 32 pixels"),
        (["--ema", "1"], "is not a number"),
        (["--label_smoothing", "1"], "is not a number"),
        (["--recipe", "other"], "invalid choice"),
    ],
)
def test_parts_that_cannot_be_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(flags)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_the_least_that_can_be_is_taken():
    assert settled("--recipe", "strong", "--epochs", "6")["T_max"] == 1
    assert settled("--cutout", "32")["cutout"] == 32


@pytest.fixture(scope="module")
def strong(image_folder, tmp_path_factory):
    """A training of four epochs with every part of the strong recipe; and one of three epochs, resumed to four."""
    out = tmp_path_factory.mktemp("strong")
    assert train(image_folder, out / "whole", *EVERY_PART) == 0
    shorter = ["3" if word == "4" else word for word in EVERY_PART]
    assert train(image_folder, out / "parts", *shorter, "--T_max", "2") == 0
    places = train_arguments(image_folder, out / "parts")[2:8]
    assert run.main(["--resume", "--epochs", "4", *places]) == 0
    return out


def test_a_strong_run_that_is_resumed_ends_bit_for_bit_where_an_uninterrupted_one_ends(strong):
    for name in ("colours_resnet18_ckpt_epoch4.pth", "colours_resnet18_last.pth"):
        assert_same(*(states(strong / part / "checkpoints" / name) for part in ("whole", "parts")))


def test_the_settings_of_a_strong_run_are_plain_and_settled(strong):
    record = json.loads((strong / "parts" / "images" / "colours_resnet18_training.json").read_text())
    parts = {"recipe": "strong", "batch_size": 16, "cutout": 2, "T_max": 2, "ema": 0.6, "label_smoothing": 0.1}
    assert parts.items() <= record["settings"].items()
    assert set(record["settings"]) == {*KEPT, "processes"}
    saved = checkpoint.load(strong / "parts" / "checkpoints" / "colours_resnet18_ckpt_epoch4.pth").settings
    assert saved == record["settings"]
    assert {type(value) for value in saved.values()} == {int, float, bool, str}


def test_what_is_tested_and_saved_is_the_average(strong, image_folder):
    state = checkpoint.load(strong / "whole" / "checkpoints" / "colours_resnet18_last.pth")
    trained = state.content["trained_net"]
    assert list(trained) == list(state.net)
    differing = [name for name, value in state.net.items() if not torch.equal(value, trained[name])]
    assert all(("num_batches_tracked" in name) != (name in differing) for name in trained)
    assert state.content["averaged_steps"] == 12  # 48 images in batches of 16, four times
    network = families.restore(state, Build_Resnet.build, Build_Resnet.spec_of)
    test, _ = load_split(Source("folder", image_folder, 8), False, (state.data["mean"], state.data["std"]))
    found = evaluate(inference_copy(network), test, 32)
    assert found.loss == pytest.approx(state.content["metrics"]["test_loss"], rel=1e-4)
    assert "trained_net" not in states(strong / "whole" / "checkpoints" / "colours_resnet18_ckpt_epoch4.pth")


def test_rates_of_a_strong_run_are_those_of_its_schedule(strong):
    saved = checkpoint.load(strong / "whole" / "checkpoints" / "colours_resnet18_ckpt_epoch4.pth")
    history = checkpoint.load(strong / "whole" / "checkpoints" / "colours_resnet18_last.pth").content["history"]
    rates = [row["learning_rate"] for row in history]
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.01])
    assert finetuning_rates(saved, "rewind", 3) == pytest.approx(rates[1:])
    assert rewound_rates(0.3, 7, 12, 12, 5)[5] == pytest.approx(0.3)
    assert rewound_rates(0.3, 7, 12, 1, 5)[0] == pytest.approx(0.15 * (1 + math.cos(math.pi * 6 / 7)))
    saved.settings["warmup_epochs"] = -1
    with pytest.raises(UserError, match="does not tell the learning rates"):
        finetuning_rates(saved, "rewind", 3)


def test_a_smoothed_loss_is_called_so(image_folder, tmp_path, capsys):
    assert train(image_folder, tmp_path, "--epochs", "1", "--label_smoothing", "0.1", "--ema", "0.9") == 0
    out = capsys.readouterr().out
    assert "Epoch: 1 | Loss (labels smoothed by 0.1): " in out
    assert "tested and saved is the moving average of the weights (decay 0.9 a step)" in out


def copy_state(source, out, *changes):
    """The training state of a finished run in a folder of its own, changed."""
    content = states(source / "checkpoints" / "colours_resnet18_last.pth")
    for path, value in changes:
        change(content, path, value)
    (out / "checkpoints").mkdir(parents=True)
    torch.save(content, out / "checkpoints" / "colours_resnet18_last.pth")
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trained_net", None),
        ("trained_net", {}),
        ("trained_net/conv1.weight", torch.zeros(2)),
        ("averaged_steps", -1),
        ("averaged_steps", "x"),
        ("settings/nesterov", "x"),
        ("settings/optimizer", "adam"),
        ("settings/cutout", 9),
        ("settings/warmup_epochs", 4),
        ("settings/ema", 1.0),
        ("optimizer/param_groups", []),
        ("optimizer/param_groups/1/lr", 5.0),
        ("schedule/last_epoch", 3),
        ("schedule/lr_lambdas", None),
    ],
)
def test_a_damaged_strong_state_is_refused(strong, image_folder, tmp_path, capsys, path, value):
    copy_state(strong / "whole", tmp_path, (path, value))
    places = train_arguments(image_folder, tmp_path)[2:8]
    assert run.main(["--resume", *places]) == 1
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert "colours_resnet18_last.pth holds" in err


@pytest.mark.parametrize(
    "flags", [["--recipe", "reference"], ["--ema", "0.9"], ["--no-nesterov"], ["--norm_weight_decay"], ["--T_max", "9"]]
)
def test_a_flag_that_contradicts_a_strong_run_is_named(strong, image_folder, tmp_path, capsys, flags):
    copy_state(strong / "whole", tmp_path)
    places = train_arguments(image_folder, tmp_path)[2:8]
    assert run.main(["--resume", "--epochs", "5", *places, *flags]) == 1
    assert flags[0] in capsys.readouterr().err


def test_a_state_from_before_the_recipes_resumes(trained, image_folder, tmp_path):
    """Its settings are fewer; what they lack is the reference's."""
    for name in ("old", "new"):
        content = copy_state(trained, tmp_path / name)
        assert {key: content["settings"][key] for key in REFERENCE} == REFERENCE | {"batch_size": 16}
        if name == "old":
            for key in NEW:
                del content["settings"][key]
            torch.save(content, tmp_path / name / "checkpoints" / "colours_resnet18_last.pth")
        places = train_arguments(image_folder, tmp_path / name)[2:8]
        assert run.main(["--resume", "--epochs", "4", *places]) == 0
    ends = [states(tmp_path / name / "checkpoints" / "colours_resnet18_last.pth") for name in ("old", "new")]
    assert_same(*ends)


def test_the_kernels_of_another_device_are_not_taken_over(trained, image_folder, tmp_path):
    """A state that CUDA wrote says that its optimizer is fused, with other bits than those of a CPU."""
    for name in ("cuda", "cpu"):
        copy_state(trained, tmp_path / name, *([("optimizer/param_groups/0/fused", True)] if name == "cuda" else []))
        places = train_arguments(image_folder, tmp_path / name)[2:8]
        assert run.main(["--resume", "--epochs", "4", *places]) == 0
    ends = [states(tmp_path / name / "checkpoints" / "colours_resnet18_last.pth") for name in ("cuda", "cpu")]
    assert not ends[0]["optimizer"]["param_groups"][0]["fused"]
    assert_same(*ends)


def test_compiling_is_said_and_not_refused(trained, image_folder, tmp_path, capsys, monkeypatch):
    copy_state(trained, tmp_path)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: compiled.append(mode) or model)
    places = train_arguments(image_folder, tmp_path)[2:8]
    assert run.main(["--resume", "--epochs", "4", "--compile", "on", *places]) == 0
    assert compiled == [None]
    out = capsys.readouterr().out
    assert "--compile was off before: the result will not be the same to the bit" in out
    assert "threads, compiled)" in out
    assert checkpoint.load(tmp_path / "checkpoints" / "colours_resnet18_last.pth").settings["compile"] == "on"
