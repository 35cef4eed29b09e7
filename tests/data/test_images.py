"""The fixed order, augmentation against torchvision, normalisation, batches of an epoch and calibration images."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms import functional as torchvision_functional

from sparsity.data.calibration import draw_calibration
from sparsity.data.images import (
    Split,
    augment,
    batch_bounds,
    class_balanced_order,
    cut_out,
    normalise,
    training_batches,
)


def random_images(count=20, size=12):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [0, 1, 3, 4, 11])
@pytest.mark.parametrize(("border", "mode"), [("zeros", "constant"), ("reflect", "reflect")])
def test_augmentation_equals_torchvision(shift, border, mode):
    images, flips = random_images(), torch.arange(20) % 2 == 0
    offsets = torch.randint(0, 2 * shift + 1, (20, 2), generator=torch.Generator().manual_seed(1))
    offsets[:2] = torch.tensor([[0, 2 * shift], [2 * shift, 0]])  # the corners
    result = augment(images, offsets, flips, shift, border)
    for image, (top, left), flip, found in zip(images, offsets.tolist(), flips.tolist(), result, strict=True):
        padded = torchvision_functional.pad(image, [shift], padding_mode=mode)
        expected = torchvision_functional.crop(padded, top, left, 12, 12)
        assert torch.equal(found, torchvision_functional.hflip(expected) if flip else expected)
    if (shift, border) == (4, "zeros"):
        assert torch.equal(augment(images, offsets, flips), result)


def test_normalisation_equals_torchvision():
    images = random_images()
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = torchvision_functional.normalize(images.float() / 255, mean, std)
    torch.testing.assert_close(normalise(images, mean, std), expected, rtol=0, atol=2e-6)
    assert normalise(images, mean, std, torch.bfloat16).dtype == torch.bfloat16


def test_resized_batches_are_those_of_full_size_resized():
    full, small, same = (list(training_batches(split_of(21), 8, 3, 5, 4, size=size)) for size in (None, 8, 12))
    assert len(full) == len(batch_bounds(21, 8))
    for (images, labels), (resized, resized_labels), (kept, _) in zip(full, small, same, strict=True):
        expected = torchvision_functional.resize(images, [8, 8], antialias=True)
        torch.testing.assert_close(resized, expected)
        assert resized.shape[2:] == (8, 8) and resized.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(kept, images) and torch.equal(labels, resized_labels)


def split_of(count):
    return Split(random_images(count), torch.arange(count) % 5, (0.5,) * 3, (0.25,) * 3)


def test_an_epoch_shows_every_image_once_in_an_order_of_seed_and_epoch_alone():
    split = replace(split_of(53), labels=torch.arange(53))

    def epoch(*keys):
        images, labels = zip(*training_batches(split, 10, *keys), strict=True)
        return torch.cat(images), torch.cat(labels)

    images, order = epoch(3, 1)
    torch.rand(7)  # of the global generator
    again = epoch(3, 1)
    assert torch.equal(images, again[0]) and torch.equal(order, again[1])
    assert torch.equal(order.sort().values, torch.arange(53))
    for keys in ((3, 2), (4, 1)):
        assert not torch.equal(order, epoch(*keys)[1])


@pytest.mark.parametrize(
    ("size", "count", "sizes"),
    [
        *((1, 20, [8, 8, 4]), (1, 17, [8, 9]), (1, 8, [8]), (1, 1, [1])),
        *((3, 26, [8, 8, 10]), (3, 30, [8, 8, 8, 6]), (3, 24, [8, 8, 8])),
    ],
)
def test_a_small_last_batch_joins_the_one_before_and_parts_of_processes_make_up_the_batches_of_one(size, count, sizes):
    whole = list(training_batches(split_of(count), 8, 0, 1, 2))
    parts = [list(training_batches(split_of(count), 8, 0, 1, 2, (rank, size))) for rank in range(size)]
    assert [len(labels) for _, labels in parts[0]] == sizes  # each process has two images of a batch or more
    assert count == 1 or all(len(images) >= 2 for batches in parts for images, _ in batches)
    assert all(torch.equal(labels, batches[0][1]) for batches in zip(*parts, strict=True) for _, labels in batches)
    joined = torch.cat([images for batches in zip(*parts, strict=True) for images, _ in batches])
    assert torch.equal(joined, torch.cat([images for images, _ in whole]))


@pytest.mark.parametrize("side", [0, 1, 2, 3, 12, 23, 24])
def test_cutout_equals_a_plain_loop(side):
    draw = torch.Generator().manual_seed(side)
    images = torch.rand((40, 3, 12, 12), generator=draw) + 1
    centres = torch.randint(0, 12, (40, 2), generator=draw)
    expected = images.clone()
    for image, (row, column) in zip(expected, centres.tolist(), strict=True):
        top, left = row - side // 2, column - side // 2
        image[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    found = cut_out(images, centres, side)
    assert found is images and torch.equal(found, expected)
    if side in (0, 24):  # nothing is cut out, or all, wherever the centre is
        assert bool(found.count_nonzero()) == (side == 0)


def test_cutout_changes_nothing_but_its_squares():
    (pixels, labels), (holes, same) = (next(training_batches(split_of(53), 53, 3, 2, side)) for side in (0, 4))
    holed = (holes == 0).all(dim=1)
    assert torch.equal(labels, same) and torch.equal(holes, pixels.masked_fill(holed[:, None], 0))
    areas = set(holed.sum(dim=(1, 2)).tolist())
    assert min(areas) >= 4 and max(areas) == 16 and len(areas) > 2  # centres inside, some squares stick out


@pytest.mark.parametrize(("counts", "prefixes"), [((30, 30, 30), (3, 30, 60, 89)), ((5, 2, 9), (3, 6))])
def test_the_fixed_order_is_balanced_in_every_prefix_until_a_class_runs_out(counts, prefixes):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    order = class_balanced_order(labels)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    for count in prefixes:
        found = torch.bincount(labels[order[:count]], minlength=3)
        assert found.max() - found.min() <= 1
    assert torch.equal(order, class_balanced_order(labels))


def test_calibration_images_are_of_the_training_split_and_balanced(small_split):
    drawn, again, other = (
        draw_calibration(small_split, 20, seed, torch.device("cpu"), torch.float32) for seed in (3, 3, 4)
    )
    assert torch.bincount(drawn.images.labels).tolist() == [5, 5, 5, 5]
    assert torch.equal(drawn.images.images, again.images.images)
    assert not torch.equal(drawn.images.images, other.images.images)
    # Each is a shifted or mirrored training image: its pixels are among those of one, or black padding.
    for image, label in zip(drawn.images.images, drawn.images.labels, strict=True):
        pixels = set(image.flatten().tolist()) - {0}
        same_class = small_split.images[small_split.labels == label]
        assert any(pixels <= set(candidate.flatten().tolist()) for candidate in same_class)


def test_every_image_is_in_one_batch_and_none_is_alone_at_the_end(small_split):
    drawn = draw_calibration(small_split, 20, 0, torch.device("cpu"), torch.float32)
    everything = normalise(drawn.images.images, small_split.mean, small_split.std)
    for batch_size, sizes in ((8, [8, 8, 4]), (6, [6, 6, 6, 2]), (19, [20]), (50, [20]), (1, [1] * 18 + [2])):
        batches = [images for images, _ in drawn.batches(batch_size=batch_size)]
        assert [len(images) for images in batches] == sizes
        assert torch.equal(torch.cat(batches), everything)
