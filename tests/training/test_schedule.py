"""The learning rate and the image size in the course of a training, as plain numbers."""

import pytest

from sparsity.training.schedule import image_sizes, linear_factor


def test_the_learning_rate_is_zero_at_both_ends_and_full_after_the_warmup():
    for share in (0.01, 0.15, 0.99):
        assert (linear_factor(0, share), linear_factor(1, share)) == (0, 0)
        assert linear_factor(share, share) == 1 and linear_factor(share / 2, share) == pytest.approx(0.5)
        assert linear_factor((1 + share) / 2, share) == pytest.approx(0.5)
    assert (linear_factor(0, 0), linear_factor(0.25, 0), linear_factor(1.5, 0)) == (1, 0.75, 0)


def test_images_grow_to_their_size_over_three_fifths_of_the_epochs():
    assert image_sizes(20, 32, 16) == [20] * 4 + [24] * 3 + [28] * 3 + [32] * 6
    assert image_sizes(20, 32, 5) == [20, 24, 28, 32, 32]
    assert image_sizes(0, 32, 3) == image_sizes(32, 32, 3) == [32] * 3
    assert image_sizes(21, 32, 1000)[::200] == [21, 25, 29, 32, 32]
    for epochs in range(1, 40):
        sizes = image_sizes(20, 32, epochs)
        assert len(sizes) == epochs and sizes == sorted(sizes) and sizes[-1] == 32
        assert sizes.count(32) == max(1, 2 * epochs // 5)
