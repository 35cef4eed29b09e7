"""The flags of run.py, and the defaults that recipes set."""

import re

import pytest

import Build_Resnet
from sparsity.training import optimizer, recipe
from sparsity.training.recipe import DEFAULTS, build_parser, parse_args, training_sizes

REFERENCE, STRONG = ({name: pair[index] for name, pair in DEFAULTS.items()} for index in (0, 1))
STRONG |= {"learning_rate": 0.12, "warmup_epochs": 0, "T_max": 60, "ema": 0.999, "shift": 4, "cutout": 8}
STRONG |= {"zero_init": True, "start_size": 20}
COSINE = "--recipe strong --schedule_shape cosine"


def settled(flags=""):
    args = vars(parse_args(flags.split()))
    return {name: args[name] for name in DEFAULTS}


def test_recipes_set_the_defaults_which_follow_the_flags_that_they_depend_on():
    assert set(recipe.BUILT_IN) == set(Build_Resnet.ARCHITECTURES)
    assert set(recipe.OPTIMIZERS) == set(optimizer.OPTIMIZERS)
    assert settled() == settled("--recipe reference") == REFERENCE
    study = {"batch_size": 128, "learning_rate": 0.01, "schedule_shape": "cosine", "T_max": 20, "shift": 4}
    assert REFERENCE.items() >= (study | {"border": "zeros", "optimizer": "sgd"}).items()
    extras = set(REFERENCE) - set(study) - {"border", "optimizer", "warmup_share", "norm_weight_decay"}
    assert not any(REFERENCE[name] for name in extras)  # the study has none of them
    assert settled("--recipe strong") == STRONG
    assert settled(COSINE) == STRONG | {"schedule_shape": "cosine", "warmup_epochs": 5, "T_max": 55}
    others = {"batch_size": 512, "learning_rate": 0.48, "T_max": 27, "cutout": 16, "warmup_epochs": 3, "start_size": 40}
    flags = "--batch_size=512 --epochs=30 --warmup_epochs=3 --image_size=64"
    assert settled(f"{COSINE} {flags}") == STRONG | others | {"schedule_shape": "cosine"}
    few = {"T_max": 15, "ema": 0.0, "shift": 3, "cutout": 0}
    assert settled("--recipe strong --epochs 15") == STRONG | few
    assert settled("--recipe strong --warmup_share 0.3") == STRONG | {"warmup_share": 0.3}
    assert settled("--recipe strong --epochs 16") == STRONG | {"T_max": 16}
    small = {"cutout": 4, "start_size": 8}
    assert settled("--recipe strong --dataset synthetic").items() >= small.items()


def test_sizes_of_images_follow_the_length_of_the_linear_schedule_or_the_epochs():
    def sizes(flags):
        return training_sizes(parse_args(flags.split()))

    assert sizes("--recipe strong --epochs 5") == [20, 24, 28, 32, 32]
    assert sizes("--recipe strong --epochs 3 --T_max 5") == [20, 24, 28]
    assert sizes("--start_size 20 --epochs 5 --T_max 9") == [20, 24, 28, 32, 32]
    assert sizes("--epochs 2") == [32, 32]


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "warmup_share"])  # of the linear one alone
def test_a_flag_that_is_given_wins(name):
    value = REFERENCE[name]
    if isinstance(value, bool):
        flag, given = f"--{'no-' if value else ''}{name}", not value
    else:
        given = value or (2 if name in ("cutout", "warmup_epochs", "start_size") else 0.5)
        flag = f"--{name} {given}"
    assert settled(flag) == REFERENCE | {name: given}
    assert settled(f"{COSINE} {flag}")[name] == given


def test_the_help_tells_the_defaults_of_both_recipes():
    text = " ".join(build_parser().format_help().split("how to train it:")[1].split())
    for name, pair in DEFAULTS.items():
        entry = rf"--{name}(?: [A-Z]+ | {{|, --no-).*?\((.*?)\)"  # not where another flag's text names it
        told = re.search(entry, text)[1].split("; strong: ")
        told = told * 2 if pair[0] == pair[1] else told
        for shown, value in zip(told, pair, strict=True):
            word = ("off", "on")[value] if isinstance(value, bool) else value
            assert callable(value) or shown == (word if isinstance(word, str) else f"{word:g}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--nesterov --optimizer adam", "--nesterov needs --optimizer sgd or muon"),
        ("--nesterov --momentum 0", "a --momentum above 0"),
        ("--recipe strong --optimizer rmsprop", "--no-nesterov trains without it"),
        (f"{COSINE} --epochs 5", "--epochs 5 leaves no epoch after --warmup_epochs 5"),
        ("--recipe strong --warmup_epochs 2", "the linear schedule has --warmup_share"),
        ("--warmup_share 0.2", "--warmup_share belongs to --schedule_shape linear"),
        ("--recipe strong --epochs 5 --T_max 4", "--epochs 5 goes beyond --T_max 4"),
        ("--shift 32 --border reflect", "--shift 32 is too large to mirror images of 32 pixels"),
        ("--start_size 33", "--start_size 33 is larger than the images of 32 pixels"),
        ("--time_budget 1h --epochs 3", "--epochs and --time_budget both say how long to train"),
        ("--cutout 33", "--cutout 33 is larger than the images of 32 pixels"),
        ("--ema 1", "is not a number"),
        ("--epoch 3", "unrecognized arguments"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
