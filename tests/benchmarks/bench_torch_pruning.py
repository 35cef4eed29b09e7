"""Whole channels removed by this project and by Torch-Pruning, at the same multiply-adds, on one trained network.

    pip install torch-pruning==1.6.1
    python tests/benchmarks/bench_torch_pruning.py --checkpoint FILE --data_dir FOLDER --out FILE.csv

Torch-Pruning removes a share of the channels of every group of coupled layers, by its group L1 norm, rounded to 8, the
output layer's outputs spared; the channels that it chose become masks on the dense network, so that both sides are
recovered, evaluated and timed by the same code. Ours then removes channels until as few multiply-adds are left. Each row
is one network: multiply-adds of dense over its own, accuracy in percent on the test images as it is, with BatchNorm
re-estimated and refitted, and of the thin network images a second in batches of 32 and 128, over those of the dense one
(`speedup_32`, `speedup_128`), and milliseconds of one image, all three networks timed in turns in one process. A run
draws other calibration images. Rows that are in the file are not measured again.
"""

import argparse
import copy
import csv
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import take_turns

from sparsity.data.calibration import draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, Split
from sparsity.data.sources import Source, load_split
from sparsity.networks import families
from sparsity.networks.census import census
from sparsity.networks.evaluation import default_batch_size, evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import positions_per_image, prunable_layers
from sparsity.prune.masks import apply_masks
from sparsity.recover import RECOVERIES, Means
from sparsity.system import machine
from sparsity.system.files import write_csv

BATCHES = (1, 32, 128)
RECOVERED = ("none", "batchnorm", "reconstruction")
TIMES = ("latency_ms", "images_per_second_32", "speedup_32", "images_per_second_128", "speedup_128")
COLUMNS = ("method", "ratio", "run", "macs_ratio", *RECOVERED, *TIMES, "test_images", "calibration_images")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a ResNet for 32x32 images")
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder dataset")
    parser.add_argument("--out", type=Path, required=True, help="the table, a CSV that is added to")
    parser.add_argument("--test_images", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="calibration images (%(default)s)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.35, 0.5], help="channels Torch-Pruning removes")
    parser.add_argument("--runs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each timing; medians count (%(default)s)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    return parser.parse_args()


def chosen_by_peer(dense: nn.Module, ratio: float) -> nn.Module:
    """A copy of `dense` masked where Torch-Pruning removes `ratio` of the channels."""
    import torch_pruning

    shrinking, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    names = {module: name for name, module in shrinking.named_modules()}
    pruner = torch_pruning.pruner.BasePruner(
        shrinking,
        torch.zeros(2, 3, 32, 32),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[[module for module in shrinking.modules() if isinstance(module, nn.Linear)][-1]],
        round_to=8,
    )
    masks: dict[str, Tensor] = {}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            name = names.get(dependency.target.module)
            if name is None:  # an addition or the like
                continue
            layer, outputs = masked.get_submodule(name), dependency.handler.__name__ == "prune_out_channels"
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.data[channels] = layer.bias.data[channels] = 0
            elif isinstance(layer, nn.Conv2d):
                mask = masks.setdefault(name, torch.ones_like(layer.weight, dtype=torch.bool))
                mask[channels if outputs else (slice(None), channels)] = False
        group.prune()
    apply_masks({name: masked.get_submodule(name) for name in masks}, masks)
    return masked
