"""evaluation"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsity.data.images import Split, normalise
from sparsity.system.errors import UserError, one_line
from sparsity.system.processes import Ranks, share


@dataclass(frozen=True)
class Evaluation:
    """What a network said: `predictions` [N] (int64, on the CPU), `correct` and `total` images, mean loss."""

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
    network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], None] = lambda images: None
) -> Evaluation:
    """Run `network` over every image of `split` in order; correct answers and losses are counted, then divided once.

    `network` maps normalised images [B, C, H, W], in the type of its weights, to logits [B, classes], and is in eval
    mode already. A GPU is waited for once, at the end. `on_batch` is told the number of images after each batch. The
    mean loss is that of cross-entropy, summed in float64.
    """
    return count(*answer(network, split, batch_size, on_batch), split.labels)


def answer(network: nn.Module, split: Split, batch_size: int, on_batch: Callable[[int], None]) -> tuple[Tensor, Tensor]:
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
    if not predictions:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    return torch.cat(predictions).cpu(), torch.stack(losses).cpu().double()  # not every device has float64


def count(predictions: Tensor, losses: Tensor, labels: Tensor) -> Evaluation:
    """The result of what `answer` gave for all images of these `labels` [N]."""
    correct = int((predictions == labels.cpu()).sum())
    return Evaluation(predictions, correct, len(labels), float(losses.sum()) / len(labels))


class CompiledNetwork(nn.Module):
    """An inference copy that runs full batches by `torch.compile`; images [B, C, H, W] to logits. Made by `compiled`.

    The weights are those of `inference` itself, so `refresh` of it is all that another network takes. Batches of any
    other size run by `inference` as it is, so that nothing is compiled twice.
    """

    def __init__(self, inference: fx.GraphModule, batch_size: int):
        super().__init__()
        self.inference, self.batch_size = inference, batch_size
        # On a GPU this mode records CUDA graphs: one launch a batch. They keep the addresses of the weights, not
        # their values.
        self.fast = torch.compile(inference, mode="reduce-overhead", dynamic=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], in memory of their own."""
        if len(images) != self.batch_size:
            return self.inference(images)
        if images.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self.fast(images).clone()  # the next replay of a CUDA graph overwrites its outputs


def compiled(inference: fx.GraphModule, split: Split, batch_size: int) -> CompiledNetwork:
    """A compiled network of the weights of `inference`, for `evaluate` with batches of `batch_size` of `split`.

    Compiling takes place here, on the first images, in up to a minute or two; made once, it serves a whole sweep.
    Raises UserError where torch cannot compile (no C++ compiler on a CPU, no Triton on a GPU).
    """
    size = min(batch_size, len(split))
    network = CompiledNetwork(inference, size).eval()
    first = split.take(torch.arange(size))
    try:
        for _ in range(3):  # compiles; warms up; records a CUDA graph
            evaluate(network, first, size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the parent of all that torch raises while it compiles
        raise UserError(f"torch.compile does not work here ({one_line(error)[:160]}); use --compile off") from error
    return network


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
    part = replace(split, images=split.images[begin:end], labels=split.labels[begin:end])
    parts = team.gather(answer(network, part, batch_size, on_batch))
    predictions, losses = (torch.cat(each) for each in zip(*parts, strict=True))
    return count(predictions, losses, split.labels)
