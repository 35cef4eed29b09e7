"""Flags of pruning.py: defaults, and combinations that have no meaning."""

import pytest

from sparsity.sweep.flags import SENSITIVITY_LEVELS, parse_args
from sparsity.sweep.levels import own_levels, search_path

REFUSED = {
    "--tolerance 101": "from 0 to 100",
    "--max_test_images 0": "from 1",
    "--batch_size 0": "from 1",
    "--name a/b": "not a plain name",
    "--level 5": "unrecognized arguments",
    "--criterion l1 obs l0": "invalid choice: 'l0'",
    "--calibration_images 1": "from 2",
    "--finetune_epochs 0 --recover finetune": "from 1",
    "--finetune_learning_rate 0 --recover finetune": "above 0",
    "--distill_images 1 --recover distill": "neither a whole number from 2 nor all",
    "--distill_learning_rate 0 --recover distill": "above 0",
    "--distill_epochs 3 --recover finetune": "no effect without --recover distill",
    "--finetune_epochs 3": "no effect without --recover finetune",
    "--finetune_learning_rate 0.1 --compare": "no effect without --recover finetune",
    "--calibration_images 64": "no effect without a criterion or --recover that looks at images",
    "--calibration_images 64 --recover finetune": "no effect without a criterion",
    "--sensitivity --tolerance 2": "--tolerance has no effect with --sensitivity",
    "--compare --criterion l1": "--compare is a panel of its own",
    "--compare --recover batchnorm": "--compare is a panel of its own",
    "--compare --schedule iterative": "--compare is a panel of its own",
    "--compare --sensitivity": "--compare is a panel of its own",
    "--sensitivity --allocation global": "--sensitivity prunes one layer at a time",
    "--sensitivity --schedule iterative": "--sensitivity prunes one layer at a time",
    "--sensitivity --criterion l1 random": "--sensitivity takes one --criterion",
    "--sensitivity --recover none batchnorm": "--sensitivity takes one --criterion and one --recover",
    "--criterion filter_l1 --allocation lamp": "which --allocation lamp is not made for; use uniform or global",
    "--couple": "--couple has no effect without a --criterion of filters: filter_l1 or filter_activation",
    "--round_filters 8 --criterion obs": "--round_filters has no effect without a --criterion of filters",
    "--round_filters 0 --criterion filter_l1": "--round_filters",
    "--couple --criterion filter_l1 --sensitivity": "--schedule and --couple",
    "--criterion l1 filter_l1 --allocation uniform erk": "which --allocation erk is not made for",
    "--export sixty": "neither a rising start:stop:step",
    "--export_precision bf16": "--export_precision has no effect without --export",
    "--export_format dense": "--export_format has no effect without --export",
    "--export 60 --export_format zip": "invalid choice: 'zip'",
    "--sensitivity --export 60": "leave out --export and --measure",
    "--sensitivity --measure": "leave out --export and --measure",
    "--checkpoint a.pth b.pth --export 60": "name one --checkpoint",
    "--schedule iterative --export 60": "give them with --export",
    "--controls a.pth --export 60 --export_format program": "--controls are not written as program",
    "--sensitivity --controls a.pth": "leave out --controls",
    "--mean 0.5 0.5 --std half": "argument --mean: takes three numbers, or imagenet or half, not 0.5 0.5",
    "--mean imagenet --std imagenet half 1": "argument --std: 'imagenet' is not a number above 0 to 1",
    "--mean 123.7 116.3 103.5 --std half": "'123.7' is not a number from 0 to 1, as images are in 0..1",
    "--mean half --std 0.5 0 0.5": "'0' is not a number above 0 to 1",
    "--mean half": "--mean and --std belong together",
    "--std half": "--mean and --std belong together",
    "--image_size 2": "from 4",
    "--arch vgg11": "'vgg11' is none of resnet18",
    "--arch net.py": "'net.py' is none of",
    "--arch net.py:a.b": "'net.py:a.b' is none of",
    "--arch torchvision:": "'torchvision:' is none of",
    "--arch net.py:net --arch_args width": "'width' is not key=value",
    "--arch net.py:net --arch_args 3=4": "'3=4' is not key=value",
    "--arch net.py:net --arch_args width=3 width=4": "width is given twice",
    "--arch_args width=3": "--arch_args needs an --arch that is not built in",
    "--predict net.pth": "--predict takes a file of a network and one or more images",
    "--predict net.pth a.png --levels 50": "--predict sweeps nothing; leave out --levels",
    "--predict net.pth a.png --device cpu --checkpoint b.pth": "leave out --checkpoint, --device",
    "--export 50 --export_format onnx --export_precision bf16": "--export_format onnx is written in fp32",
    "--describe --measure": "--describe writes nothing",
    "--describe --restart": "--describe writes nothing",
    "--allocation 4:4": "'4:4' is none of uniform, global, lamp, erk, nor N:M with 1 <= N < M <= 64",
    "--allocation uniform 0:4": "'0:4' is none of",
    "--allocation 2:65": "'2:65' is none of",
    "--allocation 2-4": "'2-4' is none of",
    "--criterion filter_l1 --allocation 2:4": "which --allocation 2:4 is not made for; use uniform or global",
    "--allocation 2:4 --levels 50": "--allocation 2:4 has one level of its own; leave out --levels",
    "--allocation 2:4 4:8 --schedule iterative": "--allocation 2:4 has one level of its own",
    "--allocation 2:4 --search": "--allocation 2:4 has one level of its own",
    "--allocation 2:4 --budget macs": "--allocation 2:4 has one level of its own",
    "--allocation 2:4 --export 60": "name it with --export, or use --export chosen",
    "--search --levels 0,50": "--search finds levels of its own",
    "--search --compare": "--search finds levels of its own",
    "--search --sensitivity": "--search finds levels of its own",
    "--search --schedule iterative": "--search finds levels of its own",
    "--search --export 60": "--search finds levels of its own",
    "--search --checkpoint a.pth b.pth": "--search goes by the accuracy of one network",
    "--export choosen": "nor is it chosen or best",
    "--export chosen --sensitivity": "leave out --export and --measure",
    "--export best --describe": "leave out --export",
    "--export chosen --checkpoint a.pth b.pth": "name one --checkpoint",
    "--budget flops": "invalid choice: 'flops'",
    "--budget macs --sensitivity": "leave out --budget",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_without_a_meaning_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(flags.split())
    assert stop.value.code == 2
    assert REFUSED[flags] in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flags", ["--search", "--export chosen", "--export best", "--measure"])
def test_what_one_process_has_to_do_is_refused_to_several(flags, capsys, monkeypatch):
    monkeypatch.setattr("sparsity.sweep.levels.PROCESSES", 2)
    with pytest.raises(SystemExit):
        parse_args(flags.split())
    assert "leave torchrun out for" in capsys.readouterr().err
    assert parse_args(["--export", "60"]).export == [60]


def test_defaults_are_the_study():
    args = parse_args([])
    assert (args.criterion, args.allocation, args.recover) == (["l1"], ["uniform"], ["none"])
    assert args.levels == list(range(0, 101, 5))
    assert args.engine == "dense"
    assert (args.mean, args.std, args.image_size) == (None, None, None)


def test_constants_of_the_images_are_numbers_or_names():
    args = parse_args(["--mean", "0.1", "0", "1", "--std", "half"])
    assert (args.mean, args.std) == ([0.1, 0.0, 1.0], [0.5, 0.5, 0.5])
    args = parse_args(["--mean", "imagenet", "--std", "imagenet"])
    assert (args.mean, args.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_a_search_and_groups_of_inputs_have_levels_of_their_own():
    path = parse_args(["--search"]).levels
    assert path == search_path() == [50, 75, 87.5, 94, 97, 98.5, 99.5, 100]
    assert parse_args(["--search", "--export", "best"]).export == "best"
    assert search_path(low=100) == search_path(0, 0.5) == search_path(33.3, 33.5) == search_path(0, 0) == []
    assert search_path(33.3, 33.9) == [33.5]
    assert parse_args(["--export", "chosen"]).levels == list(range(0, 101, 5))
    assert parse_args(["--export", "chosen", "--schedule", "iterative"]).levels == list(range(0, 101, 5))
    levels = {"2:4": [50], "1:4": [75], "63:64": [1.5625], "1:3": [66.66666667], "global": [], "only 2:4": []}
    assert {name: own_levels(name) for name in levels} == levels
    args = parse_args(["--allocation", "2:4", "uniform", "--levels", "10"])
    assert (args.allocation, args.levels) == (["2:4", "uniform"], [10])


def test_sensitivity_and_export_have_levels_of_their_own():
    assert parse_args(["--sensitivity"]).levels == SENSITIVITY_LEVELS
    assert parse_args(["--sensitivity"]).max_test_images == 1000
    assert parse_args(["--sensitivity", "--levels", "10"]).levels == [10]
    assert parse_args(["--export", "60"]).levels == [60]
    assert parse_args(["--export", "60", "--levels", "0,50"]).levels == [0, 50, 60]
    assert len(parse_args(["--export", "61", "--compare"]).levels) == 22
