"""Every image is counted once, whatever the batch size, the number of processes and the device."""

import copy
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from sparsity.data.images import normalise
from sparsity.networks.evaluation import evaluate, evaluate_shared
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.system import processes


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_every_image_counts_once_whatever_the_batch_size(small_net, small_split, batch_size):
    seen = []
    result = evaluate(small_net, small_split, batch_size, seen.append)
    with torch.no_grad():
        logits = small_net(normalise(small_split.images, small_split.mean, small_split.std))
    assert torch.equal(result.predictions, logits.argmax(1))
    assert (result.correct, result.total) == (int(logits.argmax(1).eq(small_split.labels).sum()), 50)
    assert result.accuracy == 100 * result.correct / 50
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, small_split.labels)), rel=1e-5)
    assert sum(seen) == 50


def test_at_100_percent_the_prediction_is_constant(small_net, small_split):
    prune_l1_uniform(prunable_layers(small_net, torch.zeros(1, 3, 8, 8)), 1)
    assert len(evaluate(inference_copy(small_net), small_split, 16).predictions.unique()) == 1


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_shared_evaluation_is_that_of_one_process_to_the_bit(small_net, small_split, size, monkeypatch):
    """50 images in batches of 16 are four batches, so that of eight processes four have none."""
    parts = []

    def collect(part):
        parts.append(part)
        raise StopIteration  # the other processes follow

    monkeypatch.setattr(processes, "size", lambda: size)
    monkeypatch.setattr(processes, "gather", collect)
    for rank in range(size):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        with suppress(StopIteration):
            evaluate_shared(small_net, small_split, 16)
    monkeypatch.setattr(processes, "gather", lambda part: parts)
    found, expected = evaluate_shared(small_net, small_split, 16), evaluate(small_net, small_split, 16)
    assert torch.equal(found.predictions, expected.predictions)
    assert (found.correct, found.total, found.loss) == (expected.correct, expected.total, expected.loss)


@pytest.mark.cuda
def test_a_gpu_counts_as_a_cpu_does(small_net, small_split):
    here = evaluate(inference_copy(small_net), small_split, 16)
    there = evaluate(inference_copy(copy.deepcopy(small_net).cuda()), small_split.to(torch.device("cuda")), 16)
    assert not there.predictions.is_cuda
    assert there.correct == pytest.approx(here.correct, abs=1)
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
