"""Size and time of packed checkpoints of a pruned ResNet-50, and whether they come back bit for bit.

    python tests/benchmarks/bench_storage.py [--checkpoint FILE] [--levels 0,40,60,80,90,95]

Each level is cut uniformly by magnitude, as in a sweep. Bits are those of the whole file, BatchNorm and output layer
included, for each prunable weight; the yardstick beside them is the entropy of the mask plus full values, of the
prunable weights alone. Without a checkpoint the network is untrained, and its weights are random.
"""

import argparse
import copy
import resource
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import seconds

import Build_Resnet
from sparsity.networks import checkpoint, families, packed
from sparsity.networks.census import zeros_by_layer
from sparsity.networks.layers import prunable_layers
from sparsity.prune.masks import prune_l1_uniform
from sparsity.prune.pruner import baked
from sparsity.system.machine import apply_threads, describe_machine

CPU = torch.device("cpu")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a ResNet for 32x32 images (an untrained ResNet-50)")
    parser.add_argument("--levels", default="0,40,60,80,90,95", help="percent of the weights that go, a list")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    return parser.parse_args()


def pruned(dense: nn.Module, level: float) -> tuple[dict[str, Tensor], int, int]:
    """The state dict of a level with its zeros baked in, their number, and that of the prunable weights."""
    masked = copy.deepcopy(dense)
    layers = prunable_layers(masked, torch.zeros(1, 3, 32, 32))
    prune_l1_uniform(layers, level / 100)
    zeros = sum(zeros_by_layer(layers).values())
    return checkpoint.plain_state(baked(masked, dense)), zeros, sum(layer.weight.numel() for layer in layers.values())


def row(path: Path, net: dict[str, Tensor], zeros: int, weights: int, precision: str, value_bits: int) -> list[str]:
    """The columns of one file: bytes, bits, yardstick, ratio, seconds to pack and to load, whether nothing changed."""
    packing = seconds(lambda: checkpoint.save_packed(path, {"net": net, "epoch": 1}, precision), CPU)
    loaded: list[checkpoint.Checkpoint] = []
    loading = seconds(lambda: loaded.append(checkpoint.load(path)), CPU)
    bits, yardstick = 8 * path.stat().st_size / weights, packed.entropy_bits(zeros, weights, value_bits)
    expected, found = packed.stored(net, precision), loaded[0].net
    same = all(found[name].numpy().tobytes() == tensor.numpy().tobytes() for name, tensor in expected.items())
    numbers = [f"{number:.3f}" for number in (bits, yardstick, bits / yardstick)]
    return [f"{path.stat().st_size:,}", *numbers, f"{packing:.1f}", f"{loading:.1f}", "yes" if same else "NO"]


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    threads = apply_threads(args.threads)
    dense = families.load_network(args.checkpoint)[1] if args.checkpoint else Build_Resnet.resnet50().eval()
    print(f"{describe_machine(CPU)['device']}, {threads} threads, torch {torch.__version__}\n")
    print("| level | precision | bytes | bits/weight | yardstick | ratio | pack,s | load,s | same |\n|" + "---|" * 9)
    with tempfile.TemporaryDirectory() as folder:
        for level in (float(text) for text in args.levels.split(",")):
            state, zeros, weights = pruned(dense, level)
            for precision, value_bits in (("fp32", 32), ("bf16", 16)):
                columns = row(Path(folder) / "net.npz", state, zeros, weights, precision, value_bits)
                print(f"| {level:g} % | {precision} | " + " | ".join(columns) + " |", flush=True)
    print(f"\npeak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
