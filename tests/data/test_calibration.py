"""Calibration images are augmented as asked, by draws that stay the same."""

import pytest
import torch

from sparsity.data.calibration import AUGMENTATIONS, Augmentation, augmented_batches, draw_calibration
from sparsity.data.images import class_balanced_order, normalise

CPU = torch.device("cpu")
SHA256 = {
    "flips, zeros 4": "69fb2e1d66b58e141d272408fa7baafe45edd22ad5ac85a3a0b7a64ce536ea52",
    "flips, reflect 3": "a4f2c27ee98d52a9e7c01cd486d335443613ff041ebe6cca7fcc6e86530dcb40",
}


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(3, "reflect")])
def test_the_draw_is_the_same_for_ever(small_split, augmentation):
    found = draw_calibration(small_split, 30, 7, CPU, torch.float32, augmentation)
    assert found.images.hash() == SHA256[str(augmentation)] and found.augmentation == augmentation


def test_without_shifts_and_flips_images_stay_as_they_are(small_split):
    still, flipped = (
        draw_calibration(small_split, 30, 7, CPU, torch.float32, Augmentation(0, flip=flip)).images.images
        for flip in (False, True)
    )
    assert torch.equal(still, small_split.images[class_balanced_order(small_split.labels, 7)[:30]])
    turned = (flipped == still.flip(3)).flatten(1).all(1)
    assert 5 < turned.sum() < 25 and torch.equal(flipped[~turned], still[~turned])


def test_every_augmentation_has_a_name_of_its_own():
    names = [str(augmentation) for augmentation in AUGMENTATIONS]
    assert len(set(names)) == len(names) == 8
    assert names[:3] == ["none", "flips", "flips, zeros 2"] and str(Augmentation(3, "reflect", False)) == "reflect 3"


@pytest.mark.parametrize("augmentation", [Augmentation(0, flip=False), Augmentation(2, "reflect")])
def test_an_epoch_shows_every_image_once_and_each_epoch_augments_anew(small_split, augmentation):
    split, plain = small_split, normalise(small_split.images, small_split.mean, small_split.std)
    split.labels.copy_(torch.arange(50))

    def epoch(number):
        images, order = zip(*augmented_batches(split, augmentation, 8, 3, number), strict=True)
        assert [len(labels) for labels in order] == [8] * 6 + [2]
        order = torch.cat(order).argsort()
        return torch.cat(images)[order], order

    (first, order), (again, _), (second, another) = epoch(1), epoch(1), epoch(2)
    assert torch.equal(order.sort().values, torch.arange(50)) and not torch.equal(order, another)
    assert torch.equal(first, again)
    assert torch.equal(first, plain) == torch.equal(first, second) == (augmentation.shift == 0)
