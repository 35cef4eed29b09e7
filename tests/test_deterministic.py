"""The same bits again, and everything on disk that making them again takes."""

import hashlib
import json

import pytest
import torch
from conftest import train_arguments
from test_pruning import without_seconds
from test_run import assert_same

import pruning
import run
from sparsity.networks import checkpoint
from sparsity.system import errors, machine
from sparsity.system.errors import UserError


@pytest.fixture(autouse=True)
def algorithms_as_found():
    yield
    machine.make_deterministic(False)


@pytest.fixture(scope="module")
def twice(image_folder, tmp_path_factory):
    """The folders of one training and sweep, made two times in one process."""
    folders = [tmp_path_factory.mktemp(name) for name in ("once", "again")]
    for out in folders:
        assert run.main(train_arguments(image_folder, out, "--epochs", "2", "--deterministic", "--seed", "3")) == 0
        assert torch.are_deterministic_algorithms_enabled()
        places = ["--checkpoint_dir", str(out / "checkpoints"), "--images_dir", str(out / "images")]
        levels = ["--levels", "0,50,100", "--recover", "batchnorm", "finetune", "--precision", "fp32"]
        assert pruning.main([*places, *levels, "--threads", "1", "--deterministic"]) == 0
    machine.make_deterministic(False)
    return folders


def test_training_and_sweep_give_the_same_bits(twice):
    one, other = ([checkpoint.load(path).content for path in sorted((out / "checkpoints").iterdir())] for out in twice)
    assert len(one) == 2
    assert_same(one, other)
    tables = [without_seconds(out / "images" / "colours_resnet18_pruning.csv") for out in twice]
    assert tables[0] == tables[1] and len(tables[0]) == 6


@pytest.mark.parametrize("stem", ["colours_resnet18_training", "colours_resnet18_pruning"])
def test_the_json_tells_what_making_it_again_takes(twice, stem):
    out = twice[0]
    found = json.loads((out / "images" / f"{stem}.json").read_text())
    program = "run.py" if "training" in stem else "pruning.py"
    assert found["command"].startswith(f"python {program} ") and "--deterministic" in found["command"]
    settings = found["settings"]
    assert settings["deterministic"] is True and settings["threads"] == 1
    assert settings["seed"] == (3 if "training" in stem else 0)
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["machine"]["threads"] == found["machine"]["processes"] == 1 and found["machine"]["device"]
    path = out / "checkpoints" / "colours_resnet18_ckpt_epoch2.pth"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256 in (found["checkpoint"]["sha256"] if "training" in stem else str(found["checkpoints"]))
    images = found["images"] if "training" in stem else found["data"]
    trained_on = checkpoint.load(path).data["training_sha256"]
    assert len(images["test_sha256"]) == 64
    assert trained_on == (images if "training" in stem else found)["training_sha256"]


def test_the_promise_is_given_back(image_folder, tmp_path):
    machine.make_deterministic(True)
    assert run.main(train_arguments(image_folder, tmp_path, "--epochs", "1")) == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiling_is_left_out(capsys):
    cuda = torch.device("cuda")
    assert [machine.resolve_compile("auto", cuda, wanted) for wanted in (False, True)] == ["on", "off"]
    with pytest.raises(UserError, match="--compile on may give other bits"):
        machine.resolve_compile("on", cuda, deterministic=True)


def test_an_operation_that_cannot_keep_the_promise_is_a_user_error(capsys):
    def body(team):
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or ..."
        )

    assert errors.run_main(body, lambda: "") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cumsum_cuda_kernel does not have") and said.count("\n") == 1
    assert "leave --deterministic out" in said
