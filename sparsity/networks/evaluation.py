"""Accuracy and loss of a network on a test split."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity.data.images import Split, normalise
from sparsity.system import processes


@dataclass(frozen=True)
class Evaluation:
    """The answers of a network: `predictions` [N] (int64, on the CPU), `correct` of `total` images, mean loss."""

    predictions: Tensor
    correct: int
    total: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.correct / self.total


def default_batch_size(device: torch.device) -> int:
    """Images at a time: on a CPU as many as keep the activations near its caches, on a GPU enough to fill it."""
    return 32 if device.type == "cpu" else 500


def evaluate(
    network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], object] = lambda images: None
) -> Evaluation:
    """Run `network` over every image of `split` in order; correct answers and losses are counted, then divided once.

    `network` maps normalised images [B, C, H, W], in the type of its weights, to logits [B, classes], and is in eval
    mode already. A GPU is waited for once, at the end. `on_batch` gets the number of images after each batch. The
    mean loss is that of cross-entropy, summed in float64.
    """
    return _count(split, [_predict(network, split, batch_size, on_batch)])


def evaluate_shared(
    network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], object] = lambda images: None
) -> Evaluation:
    """`evaluate`, each process of the run on its part of the images; every process gets the whole result.

    Parts are whole batches, so that the result is the same to the bit whatever the number of processes.
    """
    begin, end = processes.share(len(split), (processes.rank(), processes.size()), batch_size)
    part = replace(split, images=split.images[begin:end], labels=split.labels[begin:end])
    return _count(split, processes.gather(_predict(network, part, batch_size, on_batch)))


def _predict(
    network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """The predicted class of each image [N], and the summed loss of each batch in float64; both on the CPU."""
    dtype = next(network.parameters()).dtype
    predictions, losses = [], []
    with torch.inference_mode():
        for start in range(0, len(split), batch_size):
            images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
            logits = network(normalise(images, split.mean, split.std, dtype)).float()
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            predictions.append(logits.argmax(dim=1))
            on_batch(len(labels))
    if not predictions:  # more processes than batches
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    return torch.cat(predictions).cpu(), torch.stack(losses).cpu().double()  # not every device has float64


def _count(split: Split, parts: list[tuple[Tensor, Tensor]]) -> Evaluation:
    """The result on `split` of the predictions and losses of its parts."""
    predictions, losses = (torch.cat(each) for each in zip(*parts, strict=True))
    correct = int((predictions == split.labels.cpu()).sum())
    return Evaluation(predictions, correct, len(split), float(losses.sum()) / len(split))
