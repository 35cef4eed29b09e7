"""`--predict`: the same answers from every kind of file, and one line for whatever cannot be read."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import pruning
from sparsity.data.images import normalise
from sparsity.data.sources import read_image
from sparsity.networks import checkpoint
from sparsity.networks.families import load_network


def predict(*words) -> int:
    return pruning.main(["--predict", *map(str, words)])


@pytest.fixture(scope="module")
def pictures(image_folder, tmp_path_factory) -> list[Path]:
    """Three images of 8 pixels, and a larger one that is not square."""
    large = tmp_path_factory.mktemp("pictures") / "a large one.png"
    shutil.copy(image_folder / "test" / "red" / "001.png", large)
    with Image.open(large) as image:
        image.resize((31, 23)).save(large)
    return [image_folder / "test" / name / "000.png" for name in ("green", "red", "violet")] + [large]


@pytest.fixture
def program(program_sweep) -> Path:
    return program_sweep / "files" / "colours_resnet18_filter_l1_uniform_none_0.pt2"


def test_every_kind_of_file_gives_the_probabilities_of_the_network_a_line_an_image(
    tiny_checkpoint, program, pictures, tmp_path, capsys
):
    content = checkpoint.load(tiny_checkpoint).content
    checkpoint.save_packed(tmp_path / "net.npz", content)
    checkpoint.save_safetensors(tmp_path / "net.safetensors", content)
    data, model = content["data"], load_network(tiny_checkpoint)[1]
    pixels = torch.stack([torch.tensor(read_image(str(path), 8)[0]).permute(2, 0, 1) for path in pictures])
    with torch.no_grad():
        shares = 100 * model(normalise(pixels, data["mean"], data["std"])).softmax(1)
    order = shares.argsort(1, descending=True)
    for file in (tiny_checkpoint, tmp_path / "net.npz", tmp_path / "net.safetensors", program):
        assert predict(file, *pictures) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(pictures)
        for line, path, share, best in zip(lines, pictures, shares, order.tolist(), strict=True):
            named, told = line.split(": ")
            assert named == str(path)
            words = [part.split() for part in told.split(", ")]
            assert [word[0] for word in words] == [data["classes"][index] for index in best]
            assert [float(word[1]) for word in words] == pytest.approx(share[best].tolist(), abs=0.011)


def test_a_file_that_tells_no_classes_is_answered_by_numbers_and_the_three_best_are_shown(tmp_path, pictures, capsys):
    from Build_Resnet import build

    torch.manual_seed(0)
    torch.save(build({"arch": "resnet18", "num_classes": 10, "width": 4}).state_dict(), tmp_path / "net.pth")
    for flags, first in ((["--mean", "half", "--std", "half"], "class "), (["--dataset", "cifar10"], "")):
        assert predict(tmp_path / "net.pth", pictures[0], *flags) == 0
        told = capsys.readouterr()
        (line,) = told.out.splitlines()
        parts = line.split(": ")[1].split(", ")
        assert len(parts) == 3 and all(part.startswith(first) for part in parts)
        assert "images of 32 pixels" in told.err
    assert not any(part.startswith("class ") for part in parts)


def test_nothing_is_written(tiny_checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predict(tiny_checkpoint, pictures[0]) == 0
    assert not list(tmp_path.iterdir())


def damage(program: Path, folder: Path, kind: str) -> Path:
    """A damaged copy of a program."""
    path, data = folder / f"{kind}.pt2", program.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        path.write_text("no program")
    elif kind == "flipped":
        path.write_bytes(data[:20_000] + bytes([data[20_000] ^ 255]) + data[20_001:])
    else:
        old, new = {
            "classes": (b'["green", "red", "violet"]', b'["green", "red"]'),
            "size": (b'"image_size": 8', b'"image_size": -8'),
            "name": (b'"green"', b"5"),
            "small": (b'"image_size": 8', b'"image_size": 4'),
        }[kind]
        with zipfile.ZipFile(program) as archive, zipfile.ZipFile(path, "w") as other:
            for name in archive.namelist():
                content = archive.read(name)
                other.writestr(name, content.replace(old, new) if name.endswith("metadata.json") else content)
    return path


BAD_PROGRAMS = {
    "cut": "is refused, damaged or not written by this project (BadZipFile",
    "text": "is refused, damaged or not written by this project (BadZipFile",
    "flipped": "is refused, damaged or not written by this project (BadZipFile: Bad CRC-32",
    "size": "its image size or class names are not valid",
    "name": "its image size or class names are not valid",
    "classes": "gives no finite logits of its classes",
    "small": "cannot be run on images of 4 pixels",
}


@pytest.mark.parametrize("kind", BAD_PROGRAMS)
def test_a_damaged_program_is_told_in_one_line(program, pictures, tmp_path, capsys, kind):
    assert predict(damage(program, tmp_path, kind), pictures[0]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and BAD_PROGRAMS[kind] in told.err and not told.out


def test_files_and_flags_that_do_not_go_together_are_told_in_one_line(
    tiny_checkpoint, program, pictures, tmp_path, capsys, image_folder
):
    (tmp_path / "note.png").write_text("no image")
    shutil.copy(program, tmp_path / "net.onnx")
    cases = (
        ([tmp_path / "none.pt2", pictures[0]], "none.pt2 is not there; write one with --export"),
        ([tmp_path / "none.pth", pictures[0]], "none.pth is not there"),
        ([program, tmp_path / "none.png"], "none.png is not there; name files of images"),
        ([program, image_folder], f"{image_folder} is no file; name files of images"),
        ([pictures[0], program], f"{program} is no image; the file of the network comes first"),
        ([pictures[0], tiny_checkpoint], f"{tiny_checkpoint} is no image; the file of the network comes first"),
        ([program, tmp_path / "note.png"], "note.png is not a readable image"),
        ([program, pictures[0], "--mean", "half", "--std", "half"], "itself; leave out --mean, --std"),
        ([program, pictures[0], "--arch", "resnet18"], "tells its network and its images itself; leave out --arch"),
        ([tiny_checkpoint, pictures[0], "--arch", "resnet34"], "not resnet34; leave --arch out"),
        ([tmp_path / "net.onnx", pictures[0]], "net.onnx" if onnxruntime_is_there() else "pip install onnxruntime"),
    )
    for words, said in cases:
        assert predict(*words) == 1
        told = capsys.readouterr()
        assert said in told.err.splitlines()[-1] and not told.out and "Traceback" not in told.err
    assert pruning.main(["--checkpoint", str(program)]) == 1
    assert "is a network to be run, not one to be pruned" in capsys.readouterr().err


def onnxruntime_is_there() -> bool:
    from sparsity.networks.onnx_file import READERS, missing

    return not missing(READERS)
