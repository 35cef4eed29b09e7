"""Work on which all processes of a run are at once: evaluation, and the steps of training."""

from collections.abc import Callable

import torch
from torch import nn

from sparsity.data import Split
from sparsity.evaluation import Evaluation, answer, count
from sparsity.ranks import Ranks, share


def evaluate_shared(
    team: Ranks,
    network: nn.Module,
    split: Split,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """`evaluate`, each process on its part of the images; the whole result in every process.

    Parts are whole batches, so that the result is the same to the bit whatever the number of processes.
    """
    begin, end = share(len(split), team.rank, team.size, batch_size)
    part = split.take(torch.arange(begin, end))
    parts = team.gather(answer(network, part, batch_size, on_batch))
    predictions, losses = (torch.cat(each) for each in zip(*parts, strict=True))
    return count(predictions, losses, split.labels)
