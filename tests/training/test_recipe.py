"""The flags of run.py, and the defaults that recipes set."""

import re

import pytest

import Build_Resnet
from sparsity.training import optimizer, recipe
from sparsity.training.recipe import DEFAULTS, build_parser, parse_args

REFERENCE, STRONG = ({name: pair[index] for name, pair in DEFAULTS.items()} for index in (0, 1))
STRONG |= {"learning_rate": 0.2, "T_max": 55, "cutout": 8}


def settled(flags=""):
    args = vars(parse_args(flags.split()))
    return {name: args[name] for name in DEFAULTS}


def test_recipes_set_the_defaults_which_follow_the_flags_that_they_depend_on():
    assert set(recipe.ARCHITECTURES) == set(Build_Resnet.ARCHITECTURES)
    assert set(recipe.OPTIMIZERS) == set(optimizer.OPTIMIZERS)
    assert settled() == settled("--recipe reference") == REFERENCE
    assert (REFERENCE["batch_size"], REFERENCE["learning_rate"], REFERENCE["T_max"]) == (128, 0.01, 20)
    assert settled("--recipe strong") == STRONG
    others = {"batch_size": 512, "learning_rate": 0.4, "T_max": 27, "cutout": 16, "warmup_epochs": 3}
    flags = "--batch_size=512 --epochs=30 --warmup_epochs=3 --image_size=64 --recipe=strong"
    assert settled(flags) == STRONG | others
    assert settled("--recipe strong --dataset synthetic --epochs 6").items() >= {"cutout": 4, "T_max": 1}.items()


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_flag_that_is_given_wins(name):
    value = REFERENCE[name]
    if isinstance(value, bool):
        flag, given = f"--{'no-' if value else ''}{name}", not value
    else:
        given = value or (2 if name in ("cutout", "warmup_epochs") else 0.5)
        flag = f"--{name} {given}"
    assert settled(flag) == REFERENCE | {name: given}
    assert settled(f"--recipe strong {flag}")[name] == given


def test_the_help_tells_the_defaults_of_both_recipes():
    text = " ".join(build_parser().format_help().split("how to train it:")[1].split())
    for name, pair in DEFAULTS.items():
        told = re.search(rf"--{name}\b.*?\((.*?)\)", text)[1].split("; strong: ")
        for shown, value in zip(told, pair, strict=True):
            word = ("off", "on")[value] if isinstance(value, bool) else value
            assert callable(value) or shown == (word if isinstance(word, str) else f"{word:g}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--nesterov --optimizer adam", "--nesterov needs --optimizer sgd"),
        ("--nesterov --momentum 0", "a --momentum above 0"),
        ("--recipe strong --optimizer rmsprop", "--no-nesterov trains without it"),
        ("--recipe strong --epochs 5", "--epochs 5 leaves no epoch after --warmup_epochs 5"),
        ("--cutout 33", "--cutout 33 is larger than the images of 32 pixels"),
        ("--ema 1", "is not a number"),
        ("--epoch 3", "unrecognized arguments"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
