"""Bad input: one clear line on stderr, the right exit status, no traceback, and no file that was there changed."""

import os
import pickle
import shutil

import pytest
import torch
from conftest import write_image_folder

import Build_Resnet
import pruning
import run
from sparsity.networks import checkpoint


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_checkpoint):
    """A working folder with a good checkpoint, good images, and several bad ones."""
    root = tmp_path_factory.mktemp("made")
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["data"]["data_dir"] = "colours"
    write_image_folder(root / "colours")
    torch.save(content, root / "good.pth")
    (root / "cut.pth").write_bytes((root / "good.pth").read_bytes()[:-500])
    (root / "text.pth").write_text("these are no weights")
    (root / "evil.pth").write_bytes(pickle.dumps({"net": Evil()}))
    (root / "file").write_text("a file where a folder should be")
    net = content["net"]
    torch.save({"net": net | {"linear.weight": net["linear.weight"] * float("nan")}}, root / "nan.pth")
    torch.save({"net": {name: value for name, value in net.items() if name != "bn1.weight"}}, root / "misfit.pth")
    torch.save({"net": net, "epoch": 1}, root / "bare.pth")
    torch.save(content | {"model": content["model"] | {"width": 8}}, root / "width.pth")
    write_image_folder(root / "broken")
    (root / "broken" / "test" / "red" / "001.png").write_bytes(b"no image")
    write_image_folder(root / "uneven")
    shutil.rmtree(root / "uneven" / "train" / "red")
    write_image_folder(root / "renamed")
    for split in ("train", "test"):
        (root / "renamed" / split / "red").rename(root / "renamed" / split / "orange")
    torch.save(content | {"settings": content["settings"] | {"batch_size": 0}}, root / "badrecipe.pth")
    torch.save({"net": Build_Resnet.resnet18(width=2).state_dict()}, root / "ten.pth")
    torch.save(content | {"model": content["model"] | {"widths": {"layer1.0.conv1": 3}}}, root / "thin.pth")
    torch.save(content | {"model": content["model"] | {"widths": {"layer1.0.conv1": 300}}}, root / "widths.pth")
    checkpoint.save_packed(root / "torn.npz", content)
    (root / "torn.npz").write_bytes((root / "torn.npz").read_bytes()[:-100])
    (root / "text.npz").write_text("these are no weights")
    (root / "folder.npz").mkdir()
    torch.save(content | {"epoch": 2, "settings": content["settings"] | {"T_max": 1}}, root / "zerorate.pth")
    write_image_folder(root / "torn")
    (root / "torn" / "train" / "red" / "001.png").write_bytes(b"no image")
    (root / "states").mkdir()
    torch.save(content, root / "states" / "colours_resnet18_last.pth")
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of that folder, of its own, to work in."""
    return work_in(made, tmp_path / "place", monkeypatch)


def work_in(source, copy, monkeypatch):
    shutil.copytree(source, copy)
    monkeypatch.chdir(copy)
    return copy


SMALL = "--arch resnet18 --width 2 --image_size 8 --epochs 1"
FOLDER = f"--dataset folder --data_dir colours {SMALL}"
RUN = {
    "--epochs 0": (2, "'0' is not a whole number from 1"),
    "--epochs many": (2, "'many' is not a whole number"),
    "--batch_size 1": (2, "from 2"),
    "--batch_size 1e3": (2, "'1e3' is not a whole number"),
    "--learning_rate nan": (2, "'nan' is not a number above 0"),
    "--learning_rate 0": (2, "above 0"),
    "--learning_rate -1": (2, "above 0"),
    "--momentum 1": (2, "from 0 to 0.9999"),
    "--weight_decay inf": (2, "'inf' is not a number"),
    "--T_max 0": (2, "from 1"),
    "--optimizer lion": (2, "invalid choice: 'lion'"),
    "--arch vgg16": (2, "invalid choice: 'vgg16'"),
    "--width 0": (2, "from 1"),
    "--dataset imagenet": (2, "invalid choice: 'imagenet'"),
    "--image_size 3": (2, "from 4 to 512"),
    "--save_every 0": (2, "from 1"),
    "--seed -1": (2, "from 0"),
    "--threads 0": (2, "from 1"),
    "--device quantum": (2, "neither auto nor a torch device"),
    "--precision fp16": (2, "invalid choice: 'fp16'"),
    "--epoch_count 3": (2, "unrecognized arguments"),
    "--epoch 3": (2, "unrecognized arguments"),
    "--weight_decay 1e300": (2, "to 1e+30"),
    f"{FOLDER} --device privateuseone": (1, "cannot be used here"),
    f"--dataset folder --data_dir {'x' * 300} {SMALL}": (1, "File name too long"),
    f"{FOLDER} --device cuda:99": (1, "--device cuda:99 cannot be used here"),
    f"{FOLDER} --resume": (1, "nothing to resume"),
    f"{FOLDER} --resume --checkpoint_dir states": (1, "no training state"),
    f"{FOLDER} --checkpoint_dir file": (1, "--checkpoint_dir file cannot be written to"),
    f"{FOLDER} --images_dir file/images": (1, "--images_dir file/images cannot be written to"),
    f"--dataset folder --data_dir nowhere {SMALL}": (1, "nowhere/train is not there"),
    f"--dataset folder --data_dir broken {SMALL}": (1, "broken/test/red/001.png is not a readable image"),
    f"--dataset folder --data_dir uneven {SMALL}": (1, "different classes (red)"),
}
SWEEP = {
    "--levels": (2, "expected one argument"),
    "--levels 0:100": (2, "neither start:stop:step"),
    "--levels 0:100:0": (2, "neither start:stop:step"),
    "--levels 50:0:5": (2, "neither start:stop:step"),
    "--levels 0,101": (2, "outside 0 to 100"),
    "--levels=-5,0": (2, "outside 0 to 100"),
    "--levels 0,nan": (2, "'0,nan'"),
    "--levels 0:100:0.001": (2, "more than 10,000 levels"),
    "--levels forty": (2, "neither start:stop:step"),
    "--levels 0:9e999999:1e-999999": (2, "neither start:stop:step"),
    f"--name {'n' * 300}": (2, "not a plain name"),
    f"--checkpoint {'c' * 300}.pth": (1, "File name too long"),
    "--tolerance 101": (2, "from 0 to 100"),
    "--max_test_images 0": (2, "from 1"),
    "--batch_size 0": (2, "from 1"),
    "--name a/b": (2, "not a plain name"),
    "--criterion l7": (2, "invalid choice: 'l7'"),
    "--checkpoint": (2, "expected at least one argument"),
    "": (1, "no checkpoint in checkpoints"),
    "--checkpoint none.pth": (1, "none.pth is not there; train one"),
    "--checkpoint colours": (1, "colours is a folder"),
    "--checkpoint cut.pth": (1, "cut.pth is damaged, cut short"),
    "--checkpoint text.pth": (1, "text.pth"),
    "--checkpoint evil.pth": (1, "evil.pth is refused"),
    "--checkpoint nan.pth": (1, "linear.weight holds NaN"),
    "--checkpoint misfit.pth": (1, "bn1.weight is missing"),
    "--checkpoint width.pth": (1, "does not fit the network"),
    "--checkpoint good.pth good.pth": (1, "is the same as"),
    "--checkpoint good.pth bare.pth": (1, "differ in network or data"),
    "--checkpoint good.pth --dataset synthetic": (1, "tells 3 classes apart, synthetic has 10"),
    "--checkpoint good.pth --data_dir nowhere": (1, "nowhere/train is not there"),
    "--checkpoint good.pth --data_dir broken": (1, "broken/test/red/001.png"),
    "--checkpoint good.pth --data_dir renamed": (1, "other classes"),
    "--checkpoint good.pth --max_test_images 5": (1, "too few for 3 classes"),
    "--checkpoint bare.pth": (1, "does not tell its dataset"),
    "--checkpoint good.pth --images_dir file": (1, "--images_dir file cannot be written to"),
    "--checkpoint good.pth --device cuda:99": (1, "cannot be used here"),
}
METHODS = {
    "--criterion": (2, "expected at least one argument"),
    "--criterion l1 obs l0": (2, "invalid choice: 'l0'"),
    "--allocation equal": (2, "invalid choice: 'equal'"),
    "--allocation lamp,erk": (2, "invalid choice: 'lamp,erk'"),
    "--recover retrain": (2, "invalid choice: 'retrain'"),
    "--schedule gradual": (2, "invalid choice: 'gradual'"),
    "--exclude": (2, "expected at least one argument"),
    "--calibration_images 1": (2, "from 2"),
    "--calibration_images all": (2, "'all' is not a whole number"),
    "--finetune_epochs 0 --recover finetune": (2, "from 1"),
    "--finetune_learning_rate 0 --recover finetune": (2, "above 0"),
    "--finetune_learning_rate fast --recover finetune": (2, "'fast' is neither a number above 0 nor rewind"),
    "--finetune_learning_rate nan --recover finetune": (2, "'nan' is neither a number above 0 nor rewind"),
    "--finetune_epochs 3": (2, "no effect without --recover finetune"),
    "--finetune_learning_rate 0.1 --compare": (2, "no effect without --recover finetune"),
    "--calibration_images 64": (2, "no effect without a criterion or --recover that looks at images"),
    "--sensitivity --tolerance 2": (2, "--tolerance has no effect with --sensitivity"),
    "--checkpoint good.pth badrecipe.pth --recover finetune": (1, "was trained with batch_size 0"),
    "--checkpoint zerorate.pth --recover finetune --finetune_learning_rate rewind": (1, "of its training are 0"),
    "--compare --criterion l1": (2, "--compare is a panel of its own"),
    "--compare --recover batchnorm": (2, "--compare is a panel of its own"),
    "--compare --schedule iterative": (2, "--compare is a panel of its own"),
    "--compare --sensitivity": (2, "--compare is a panel of its own"),
    "--sensitivity --allocation global": (2, "--sensitivity prunes one layer at a time"),
    "--sensitivity --schedule iterative": (2, "--sensitivity prunes one layer at a time"),
    "--sensitivity --criterion l1 random": (2, "--sensitivity takes one --criterion"),
    "--sensitivity --recover none batchnorm": (2, "--sensitivity takes one --criterion and one --recover"),
    "--checkpoint good.pth --exclude linear.weight": (1, "--exclude linear.weight names no prunable weight"),
    "--checkpoint good.pth --exclude layer9.*": (1, "--exclude layer9.* names no prunable weight"),
    "--checkpoint good.pth --exclude *": (1, "leaves no layer to prune"),
    "--checkpoint good.pth --recover batchnorm --calibration_images 49": (1, "more than the 48 images"),
    "--checkpoint good.pth --recover batchnorm --data_dir torn": (1, "torn/train/red/001.png is not a readable"),
    "--checkpoint bare.pth --dataset folder --data_dir colours --recover finetune --finetune_learning_rate rewind": (
        1,
        "does not tell the learning rates of its training",
    ),
}
SAVINGS = {
    "--criterion filter_l1 --allocation lamp": (2, "which --allocation lamp is not made for; use uniform or global"),
    "--criterion l1 filter_l1 --allocation uniform erk": (2, "which --allocation erk is not made for"),
    "--export": (2, "expected one argument"),
    "--export sixty": (2, "neither start:stop:step"),
    "--export 101": (2, "outside 0 to 100"),
    "--export_precision bf16": (2, "--export_precision has no effect without --export"),
    "--export_format dense": (2, "--export_format has no effect without --export"),
    "--export 60 --export_format zip": (2, "invalid choice: 'zip'"),
    "--export 60 --export_precision fp16": (2, "invalid choice: 'fp16'"),
    "--sensitivity --export 60": (2, "leave out --export and --measure"),
    "--sensitivity --measure": (2, "leave out --export and --measure"),
    "--checkpoint good.pth bare.pth --export 60": (2, "name one --checkpoint"),
    "--schedule iterative --export 60": (2, "give them with --export"),
    "--sensitivity --controls good.pth": (2, "leave out --controls"),
    "--checkpoint good.pth --engine sparse --precision bf16": (1, "--engine sparse cannot run this network"),
    "--engine fast": (2, "invalid choice: 'fast'"),
    "--controls": (2, "expected at least one argument"),
    "--checkpoint good.pth --controls none.pth": (1, "none.pth is not there"),
    "--checkpoint good.pth --controls cut.pth": (1, "cut.pth is damaged"),
    "--checkpoint good.pth --controls ten.pth": (1, "ten.pth was trained on other images"),
    "--checkpoint good.pth --export 60 --checkpoint_dir file": (1, "--checkpoint_dir file cannot be written to"),
    "--checkpoint thin.pth": (1, "does not fit the network"),
    "--checkpoint widths.pth": (1, "does not describe a network: the width of layer1.0.conv1"),
    "--checkpoint torn.npz": (1, "torn.npz"),
    "--checkpoint text.npz": (1, "text.npz"),
    "--checkpoint folder.npz": (1, "folder.npz is a folder"),
    "--checkpoint none.npz": (1, "none.npz is not there"),
}
CASES = [(run, *item) for item in RUN.items()] + [(pruning, *item) for item in (SWEEP | METHODS | SAVINGS).items()]


def files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("script", "flags", "expected"), CASES, ids=[f"{c[0].__name__} {c[1]}" for c in CASES])
def test_bad_input_is_told_in_one_line(place, capfd, script, flags, expected):
    status, said = expected
    before = files(place)
    try:
        found = script.main(flags.split())
    except SystemExit as stop:  # argparse
        found = stop.code
    err = capfd.readouterr().err
    assert found == status
    last = err.strip().splitlines()[-1]
    assert said in last
    assert "error: " in last
    assert "Traceback" not in err
    if status == 1:
        assert len(err.strip().splitlines()) == 1
    assert {path: content for path, content in files(place).items() if path in before} == before
    assert not (place / "pwned").exists()


def test_a_full_disk_is_told_before_training(place, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert run.main(FOLDER.split()) == 1
    assert "--checkpoint_dir checkpoints has 0 MB free" in capsys.readouterr().err
    assert not list((place / "checkpoints").iterdir())


SWEPT = ["--checkpoint", "good.pth", "--levels", "0,50", "--threads", "1"]


@pytest.fixture(scope="module")
def made_and_swept(made, tmp_path_factory):
    """That folder with a sweep that is done."""
    with pytest.MonkeyPatch.context() as patch:
        folder = work_in(made, tmp_path_factory.mktemp("swept") / "place", patch)
        assert pruning.main(SWEPT) == 0
    return folder


@pytest.fixture
def swept_place(made_and_swept, tmp_path, monkeypatch):
    return work_in(made_and_swept, tmp_path / "place", monkeypatch)


def test_damaged_rows_are_told_and_left(swept_place, capsys):
    table = swept_place / "images" / "colours_resnet18_pruning.csv"
    table.write_text(table.read_text()[:-40])
    before = files(swept_place)
    assert pruning.main(SWEPT) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert files(swept_place) == before
    assert pruning.main([*SWEPT, "--restart"]) == 0


@pytest.mark.parametrize(
    "flags", ["--recover batchnorm --data_dir torn", "--recover batchnorm --calibration_images 49"]
)
@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_a_run_that_cannot_start_loses_no_rows(swept_place, capsys, flags, restart):
    tables = {path: path.read_bytes() for path in (swept_place / "images").iterdir() if path.suffix != ".json"}
    assert pruning.main([*SWEPT, "--recover", "batchnorm", *flags.split(), *restart]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in tables} == tables
    assert pruning.main(SWEPT) == 0
    assert "2 rows in" in capsys.readouterr().out
