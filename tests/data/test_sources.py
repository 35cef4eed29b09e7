"""Images from folders and from CIFAR's archives, the errors of both, and synthetic images, pinned to the bit."""

import hashlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, write_image_folder
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2 as transforms

from sparsity.data.images import CIFAR10_STATISTICS
from sparsity.data.sources import Source, load_split
from sparsity.system.errors import UserError


def test_a_folder_is_read_with_labels_by_class_name(tmp_path, capsys):
    root = write_image_folder(tmp_path / "images")
    (root / "train" / ".ipynb_checkpoints").mkdir()  # no class
    split, classes = load_split(Source("folder", root, 8), train=True)
    assert classes == list(CLASSES)
    assert (split.images.shape, split.images.dtype) == ((48, 3, 8, 8), torch.uint8)
    reds = split.images[split.labels == 1].float().mean(dim=(0, 2, 3))
    assert reds[0] > reds[1] + 50
    pixels = split.images.double().div(255).transpose(0, 1).flatten(1)
    assert split.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-4)
    assert split.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-4)
    split, _ = load_split(Source("folder", root, 16), train=False)
    assert split.images.shape == (24, 3, 16, 16)
    assert "24 of 24 test images were resized to 16 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("size", [8, 5])
def test_a_folder_is_read_as_torchvision_reads_it_and_a_choice_of_it_too(tmp_path, size):
    """Folders in folders, endings in capitals, files that are no images, grey ones, other sizes."""
    root = write_image_folder(tmp_path / "images", train=2, test=4)
    red = root / "test" / "red"
    (red / "Deeper").mkdir()
    Image.open(red / "001.png").convert("L").resize((9, 6)).save(red / "Deeper" / "GREY.JPG")
    (red / "Thumbs.db").write_bytes(b"no image")
    expected = datasets.ImageFolder(str(root / "test"), transforms.Resize([size, size]))
    images = np.stack([np.asarray(image).transpose(2, 0, 1) for image, _ in expected])
    split, classes = load_split(Source("folder", root, size), train=False)
    assert classes == expected.classes and split.labels.tolist() == expected.targets and len(split) == 13
    assert np.array_equal(split.images.numpy(), images)
    some, _ = load_split(Source("folder", root, size), False, None, lambda labels: (labels == 1).nonzero()[[4, 0], 0])
    assert np.array_equal(some.images.numpy(), images[[8, 4]]) and some.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "test").rename(root / "validation"), "test is not there"),
        (lambda root: shutil.rmtree(root / "test" / "violet"), r"different classes \(violet\)"),
        (lambda root: [path.unlink() for path in (root / "test" / "red").iterdir()], "every class folder needs images"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("t*/*")], "every class folder needs images"),
        (lambda root: (root / "test" / "red" / "002.png").write_bytes(b"\x89PNG not an image"), "red/002.png is not"),
        (lambda root: (root / "test" / "red" / "003.png").write_bytes(b""), "red/003.png is not"),
    ],
)
def test_a_broken_folder_is_told_in_one_line(tmp_path, damage, said):
    root = write_image_folder(tmp_path / "images", train=2, test=4)
    damage(root)
    with pytest.raises(UserError, match=said) as caught:
        load_split(Source("folder", root, 8), train=False)
    assert "\n" not in str(caught.value)


def make_cifar10_archive(folder, monkeypatch):
    """A CIFAR-10 archive of 3 images a batch, in the real layout, which torchvision is told to expect."""
    draw = np.random.default_rng(0)
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    for name in names:
        pixels = draw.integers(0, 256, (3, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {index}" for index in range(10)]}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, base.name)
    shutil.rmtree(base)
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens there
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    return archive


def test_a_cifar_archive_put_there_by_hand_is_used(tmp_path, monkeypatch):
    make_cifar10_archive(tmp_path, monkeypatch)
    split, classes = load_split(Source("cifar10", tmp_path, 32), train=True)
    assert (split.images.shape, split.labels.tolist()) == ((15, 3, 32, 32), [0, 1, 2] * 5)
    assert (split.mean, split.std, len(classes)) == (*CIFAR10_STATISTICS, 10)
    assert load_split(Source("cifar10", tmp_path, 16), train=False)[0].images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("damage", ["missing", "half", "folder is a file"])
def test_cifar_without_network_says_what_to_put_where(tmp_path, monkeypatch, damage):
    archive = make_cifar10_archive(tmp_path, monkeypatch)
    root = archive if damage == "folder is a file" else tmp_path
    if damage == "missing":
        archive.unlink()
    elif damage == "half":
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(UserError, match=r"put the archive cifar-10-python.tar.gz .* or use --dataset synthetic"):
        load_split(Source("cifar10", root, 32), train=True)


SHA256 = {
    True: "ffa6c36aeb7924cbeae80157ec1d3c57885f83d06788dfdeb733b1c65fbc3cec",
    False: "1fbaa49c4522b32a7d87b1b17e8d9af77e8cf8ce0b2d393bec0c8cf342669d43",
}


@pytest.fixture(scope="module")
def splits():
    return [load_split(Source("synthetic", None, 16), train) for train in (True, False)]


def test_both_splits_are_pinned_and_share_no_image(splits):
    (train, classes), (test, _) = splits
    assert (train.hash(), test.hash()) == (SHA256[True], SHA256[False])
    assert train.images.shape == (4000, 3, 16, 16)
    assert torch.bincount(test.labels).tolist() == [100] * 10 and len(set(classes)) == 10
    assert not {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}


def test_synthetic_images_are_not_linearly_separable(splits):
    (train, _), (test, _) = splits
    a, b = (F.pad(split.images.flatten(1) / 255, (0, 1), value=1.0) for split in (train, test))
    weights = torch.linalg.solve(a.T @ a + 100 * torch.eye(a.shape[1]), a.T @ F.one_hot(train.labels).float())
    assert 0.1 < (b @ weights).argmax(1).eq(test.labels).float().mean() < 0.5
