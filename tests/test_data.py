"""Loading, the fixed order, augmentation against torchvision, and batches."""

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from conftest import CLASSES, write_image_folder
from torchvision import datasets
from torchvision.transforms import functional as torchvision_functional

from sparsity.data import images
from sparsity.data.images import Split, augment, class_balanced_order, cut_out, normalise, training_batches
from sparsity.data.sources import Source, load_split
from sparsity.system.errors import UserError


def random_images(count=20, size=12):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_augmentation_equals_torchvision_for_the_same_draws():
    images = random_images()
    draw = torch.Generator().manual_seed(1)
    offsets = torch.randint(0, 9, (20, 2), generator=draw)
    flips = torch.rand(20, generator=draw) < 0.5
    assert 0 < flips.sum() < 20
    result = augment(images, offsets, flips)
    for image, (top, left), flip, found in zip(images, offsets.tolist(), flips.tolist(), result, strict=True):
        expected = torchvision_functional.crop(torchvision_functional.pad(image, [4]), top, left, 12, 12)
        if flip:
            expected = torchvision_functional.hflip(expected)
        assert torch.equal(found, expected)


def test_normalisation_equals_torchvision():
    images = random_images()
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = torchvision_functional.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(normalise(images, mean, std), expected, rtol=0, atol=2e-6)
    assert normalise(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_constants_first_used_while_evaluating_serve_training_too():
    images, mean, std = random_images(2), (0.11, 0.12, 0.13), (0.21, 0.22, 0.23)  # used nowhere else
    with torch.inference_mode():
        evaluated = normalise(images, mean, std)
    trained = normalise(images, mean, std)
    assert torch.equal(evaluated, trained)
    trained.requires_grad_().square().sum().backward()
    floats = images.float().requires_grad_()
    normalise(floats, mean, std).sum().backward()
    expected = (1 / (255 * torch.tensor(std))).view(1, 3, 1, 1).expand_as(floats)
    torch.testing.assert_close(floats.grad, expected, rtol=1e-5, atol=0)


def test_padding_is_black_before_normalisation():
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    corner = augment(white, torch.tensor([[0, 0]]), torch.tensor([False]))
    assert corner[0, :, :4].eq(0).all()
    assert corner[0, :, 4:, 4:].eq(255).all()


def split_of(count):
    return Split(random_images(count), torch.arange(count) % 5, (0.5,) * 3, (0.25,) * 3)


def test_an_epoch_shows_every_image_once_and_another_epoch_another_order():
    split = split_of(53)
    labelled = Split(split.images, torch.arange(53), split.mean, split.std)
    orders = [torch.cat([labels for _, labels in training_batches(labelled, 10, 0, epoch)]) for epoch in (1, 2)]
    assert all(torch.equal(order.sort().values, torch.arange(53)) for order in orders)
    assert not torch.equal(*orders)


def test_batches_depend_on_seed_and_epoch_alone():
    split = split_of(30)
    first = list(training_batches(split, 8, 3, 5))
    torch.rand(7)  # the global generator has no say
    again = list(training_batches(split, 8, 3, 5))
    assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
    other = next(iter(training_batches(split, 8, 4, 5)))
    assert not torch.equal(first[0][0], other[0])


@pytest.mark.parametrize(("count", "sizes"), [(20, [8, 8, 4]), (17, [8, 9]), (8, [8]), (1, [1])])
def test_a_last_batch_of_one_image_joins_the_one_before(count, sizes):
    assert [len(labels) for _, labels in training_batches(split_of(count), 8, 0, 1)] == sizes


@pytest.mark.parametrize("side", [0, 1, 2, 3, 12, 23, 24])
def test_cutout_equals_a_plain_loop(side):
    draw = torch.Generator().manual_seed(side)
    images = torch.rand((40, 3, 12, 12), generator=draw) + 1
    centres = torch.randint(0, 12, (40, 2), generator=draw)
    expected = images.clone()
    for image, (row, column) in zip(expected, centres.tolist(), strict=True):
        top, left = row - side // 2, column - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    found = cut_out(images.clone(), centres, side)
    assert torch.equal(found, expected)
    if side in (0, 24):  # nothing is cut out, or all, wherever the centre is
        assert torch.equal(found, images * (side == 0))


def test_cutout_changes_nothing_but_its_squares():
    plain, again, cut = (list(training_batches(split_of(53), 10, 3, 2, side)) for side in (0, 0, 4))
    areas = []
    for (pixels, labels), (same, _), (holes, cut_labels) in zip(plain, again, cut, strict=True):
        assert torch.equal(pixels, same)
        assert torch.equal(labels, cut_labels)
        holed = (holes == 0).all(dim=1)
        assert torch.equal(holes, pixels.masked_fill(holed[:, None], 0))
        areas += holed.sum(dim=(1, 2)).tolist()
    assert min(areas) >= 4  # the centre is in the image
    assert max(areas) == 16
    assert len(set(areas)) > 2  # some squares stick out


def test_the_fixed_order_is_balanced_in_every_prefix():
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 30)
    order = class_balanced_order(labels)
    assert torch.equal(order.sort().values, torch.arange(90))
    for count in (3, 30, 60, 89):
        counts = torch.bincount(labels[order[:count]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(order, class_balanced_order(labels))


def test_the_fixed_order_copes_with_unequal_classes():
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 9)
    order = class_balanced_order(labels)
    assert torch.equal(order.sort().values, torch.arange(16))
    assert torch.bincount(labels[order[:6]]).tolist() == [2, 2, 2]


def test_a_folder_is_read_with_labels_by_class_name(image_folder):
    split, classes = load_split(Source("folder", image_folder, 8), train=True)
    assert classes == list(CLASSES)
    assert split.images.shape == (48, 3, 8, 8)
    assert split.images.dtype == torch.uint8
    reds = split.images[split.labels == 1].float().mean(dim=(0, 2, 3))
    assert reds[0] > reds[1] + 50
    expected = split.images.double().div(255)
    torch.testing.assert_close(torch.tensor(split.mean), expected.mean(dim=(0, 2, 3)).float(), rtol=0, atol=1e-4)
    std = expected.transpose(0, 1).flatten(1).std(dim=1, correction=0).float()
    torch.testing.assert_close(torch.tensor(split.std), std, rtol=0, atol=1e-4)


def test_images_of_another_size_are_resized_and_that_is_said(image_folder, capsys):
    split, _ = load_split(Source("folder", image_folder, 16), train=False)
    assert split.images.shape == (24, 3, 16, 16)
    assert "24 of 24 test images were resized to 16 pixels" in capsys.readouterr().out


def remove_class(root):
    for path in (root / "test" / "violet").iterdir():
        path.unlink()
    (root / "test" / "violet").rmdir()


def empty_split(root):
    for path in (root / "test").rglob("*.png"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "test").rename(root / "validation"), "test is not there"),
        (remove_class, "different classes"),
        (empty_split, "every class folder needs images"),
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


def test_hidden_folders_are_no_classes(tmp_path):
    root = write_image_folder(tmp_path / "images", train=2, test=2)
    (root / "train" / ".ipynb_checkpoints").mkdir()
    split, classes = load_split(Source("folder", root, 8), train=True)
    assert classes == list(CLASSES)
    assert len(split) == 6


def test_a_class_name_that_cannot_be_printed_is_told(tmp_path):
    root = write_image_folder(tmp_path / "images", train=2, test=2)
    for split in ("train", "test"):
        (root / split / "red").rename(root / split / b"r\xffd".decode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="cannot be printed; rename it"):
        load_split(Source("folder", root, 8), train=True)


def test_synthetic_images_are_made_the_same_each_time_and_apart_from_the_other_split():
    source = Source("synthetic", None, 16)
    first, classes = load_split(source, train=False)
    again, _ = load_split(source, train=False)
    assert len(classes) == len(set(classes)) == 10
    assert first.hash() == again.hash()
    assert torch.bincount(first.labels).tolist() == [100] * 10
    train, _ = load_split(source, train=True)
    assert train.images.shape == (4000, 3, 16, 16)
    assert not {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in first.images}


def test_synthetic_images_are_not_linearly_separable():
    source = Source("synthetic", None, 16)
    (train, _), (test, _) = load_split(source, train=True), load_split(source, train=False)

    def features(split):
        return torch.cat([split.images.flatten(1).float() / 255, torch.ones(len(split), 1)], dim=1)

    a = features(train)
    targets = torch.nn.functional.one_hot(train.labels).float()
    weights = torch.linalg.solve(a.T @ a + 100 * torch.eye(a.shape[1]), a.T @ targets)
    accuracy = (features(test) @ weights).argmax(1).eq(test.labels).float().mean()
    assert 0.1 < accuracy < 0.5


def make_cifar10_archive(folder, monkeypatch):
    """A CIFAR-10 archive of 3 images a batch, in the real layout, which torchvision is told to expect."""
    draw = np.random.default_rng(0)
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    sums = {}
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    for name in names:
        pixels = draw.integers(0, 256, (3, 3072), dtype=np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {index}" for index in range(10)]}))
    for path in base.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, base.name)
    for path in base.iterdir():
        path.unlink()
    base.rmdir()
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
    assert split.images.shape == (15, 3, 32, 32)
    assert split.labels.tolist() == [0, 1, 2] * 5
    assert (split.mean, split.std) == images.CIFAR10_STATISTICS
    assert len(classes) == 10
    small, _ = load_split(Source("cifar10", tmp_path, 16), train=False)
    assert small.images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("damage", ["missing", "half", "folder is a file"])
def test_cifar_without_network_says_what_to_put_where(tmp_path, monkeypatch, damage):
    archive = make_cifar10_archive(tmp_path / "there", monkeypatch)
    root = tmp_path / "there"
    if damage == "missing":
        archive.unlink()
    elif damage == "half":
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    else:
        root = archive
    with pytest.raises(UserError, match=r"put the archive cifar-10-python.tar.gz .* or use --dataset synthetic"):
        load_split(Source("cifar10", root, 32), train=True)
