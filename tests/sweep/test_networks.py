"""A checkpoint while it is swept."""

from types import SimpleNamespace

import torch

from sparsity.recover import Means
from sparsity.sweep.networks import Network
from sparsity.system.methods import Curve


def test_random_masks_differ_between_checkpoints_and_repeat_for_each(small_net):
    masks = []
    for sha256 in ("0" * 64, "0" * 64, "1" * 64):
        network = Network("net.pth", SimpleNamespace(sha256=sha256), Means(small_net, ("stem", "down")), 0)
        masks.append(network.pruner.prune(Curve("random", "global", "none"), 50)[0].down.weight_mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
