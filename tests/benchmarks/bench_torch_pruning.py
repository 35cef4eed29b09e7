"""Whole channels removed by this project and by Torch-Pruning, at the same multiply-adds, on one trained network.

    pip install torch-pruning==1.6.1
    python tests/benchmarks/bench_torch_pruning.py --checkpoint FILE --data_dir FOLDER --out FILE.csv

Torch-Pruning removes a share of the channels of every group of coupled layers, by its group L1 norm, rounded to 8, the
output layer's outputs spared; the channels that it chose become masks on the dense network, so that both sides are
recovered, evaluated and timed by the same code. Ours then removes channels until as few multiply-adds are left. Each
row is one network: multiply-adds of dense over its own, accuracy in percent on the test images as it is, with BatchNorm
re-estimated and refitted, and of the thin network images a second in batches of 32 and 128, over those of the dense one
(`speedup_32`, `speedup_128`), and milliseconds of one image, all networks timed in turns in one process. A run draws
other calibration images. Rows that are in the file are not measured again; the medians over the runs go into a file
whose name ends in `_medians.csv`.
"""

import argparse
import copy
import csv
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import take_turns

from sparsity.data.calibration import AUGMENTATIONS, draw_calibration
from sparsity.data.images import CIFAR10_STATISTICS, class_balanced_order
from sparsity.data.sources import Source, load_split
from sparsity.networks import families
from sparsity.networks.census import census
from sparsity.networks.evaluation import evaluate
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import positions_per_image, prunable_layers
from sparsity.prune.masks import apply_masks
from sparsity.prune.pruner import Pruner
from sparsity.recover import RECOVERIES, Means
from sparsity.recover.batchnorm import augmentation_distances
from sparsity.sweep.export import thin_network
from sparsity.system import machine
from sparsity.system.files import write_csv
from sparsity.system.methods import Curve

BATCHES = (1, 32, 128)
RECOVERED = ("none", "batchnorm", "reconstruction")
LEVEL_STEP = 0.2  # percent, to which a level is found
# Name -> curve, and options of `Pruner`.
OURS = {
    "coupled channels": (Curve("filter_l1", "uniform", "none"), {"couple": True, "multiple": 8}),
    "inner filters": (Curve("filter_l1", "uniform", "none"), {"multiple": 8}),
}
TIMES = ("latency_ms", "images_per_second_32", "speedup_32", "images_per_second_128", "speedup_128")
COLUMNS = ("method", "ratio", "run", "macs_ratio", *RECOVERED, *TIMES, "test_images", "calibration_images")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a ResNet for 32x32 images")
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder dataset")
    parser.add_argument("--out", type=Path, required=True, help="the table, a CSV that is added to")
    parser.add_argument("--test_images", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="calibration images (%(default)s)")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.3, 0.35, 0.5], help="channels Torch-Pruning removes"
    )
    parser.add_argument("--runs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--only", nargs="+", choices=OURS, default=list(OURS), help="of our methods (all)")
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


class Bench:
    """The dense network, its images, and what is measured of networks that are pruned from it."""

    def __init__(self, args: argparse.Namespace):
        self.images, cpu = args.images, torch.device("cpu")
        self.dtype = machine.DTYPES[machine.resolve_precision(args.precision, cpu)]
        self.saved, dense = families.load_network(args.checkpoint)
        self.dense, self.repeats = dense.eval(), args.repeats
        blank = torch.zeros(1, 3, 32, 32)
        self.layers, self.positions = tuple(prunable_layers(dense, blank)), positions_per_image(dense, blank)
        source = Source("folder", args.data_dir, 32)
        self.train, test = (load_split(source, training, CIFAR10_STATISTICS)[0] for training in (True, False))
        self.test = test.take(class_balanced_order(test.labels)[: args.test_images])
        draws = {each: draw_calibration(self.train, 512, 0, cpu, self.dtype, each) for each in AUGMENTATIONS}
        distances = augmentation_distances(inference_copy(dense, self.dtype, fold=False), draws.values())
        self.augmentation = min(distances, key=distances.get)  # as a sweep does where a checkpoint does not tell

    def draw(self, run: int) -> None:
        """Recover by the calibration images of a run from now on."""
        cpu = torch.device("cpu")
        self.calibration = draw_calibration(self.train, self.images, run, cpu, self.dtype, self.augmentation)
        self.means = Means(self.dense, self.layers, self.calibration)

    def macs_ratio(self, model: nn.Module) -> float:
        """Multiply-adds of the dense network over those of a masked copy."""
        return census(model, {name: model.get_submodule(name) for name in self.layers}, self.positions).macs_ratio

    def remove(self, method: str, macs_ratio: float) -> nn.Module:
        """The masked copy of the dense network by one of OURS, at the lowest level with so few multiply-adds."""
        curve, options = OURS[method]
        pruner = Pruner(self.dense, list(self.layers), self.calibration, **options)
        low, high = 0.0, 100.0
        while high - low > LEVEL_STEP:
            level = (low + high) / 2
            enough = self.macs_ratio(pruner.prune(curve, level)[0]) >= macs_ratio
            low, high = (low, level) if enough else (level, high)
        return pruner.prune(curve, high)[0]

    def recovered(self, masked: nn.Module) -> dict[str, float]:
        """Accuracy in percent on the test images after each recovery, all of them of the same masked network."""
        figures, before = {}, {name: value.clone() for name, value in masked.state_dict().items()}
        for recovery in RECOVERED:
            masked.load_state_dict(before)
            RECOVERIES[recovery](masked, self.means, 0)
            figures[recovery] = round(evaluate(inference_copy(masked, self.dtype), self.test, BATCHES[1]).accuracy, 2)
        return figures

    @torch.inference_mode()
    def times(self, networks: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
        """Method -> TIMES of its thin network, of which the dense one, the first, is the reference."""
        copies = {name: inference_copy(network, self.dtype) for name, network in networks.items()}
        figures: dict[str, dict[str, float]] = {name: {} for name in networks}
        for count in BATCHES:
            images = torch.randn(count, 3, 32, 32).to(self.dtype, memory_format=torch.channels_last)
            runs = {name: partial(network, images) for name, network in copies.items()}
            for run in runs.values():  # warm-up
                run()
            spent = take_turns(runs, self.repeats, torch.device("cpu"))
            median = {name: statistics.median(times) for name, times in spent.items()}
            for name, took in median.items():
                speed = {f"images_per_second_{count}": count / took, f"speedup_{count}": median["dense"] / took}
                figures[name] |= speed if count > 1 else {"latency_ms": 1000 * took}
        return {name: {key: round(value, 3) for key, value in each.items()} for name, each in figures.items()}


def measure_ratio(bench: Bench, args: argparse.Namespace, ratio: float, run: int) -> list[dict[str, object]]:
    """The rows of one share of channels in one run: Torch-Pruning, and ours at its multiply-adds."""
    masked = {"Torch-Pruning": chosen_by_peer(bench.dense, ratio)}
    target = bench.macs_ratio(masked["Torch-Pruning"])
    masked |= {method: bench.remove(method, target) for method in args.only}
    thin = {name: thin_network(model, bench.saved.model)[0] for name, model in masked.items()}
    times = bench.times({"dense": bench.dense} | thin)
    about = {"ratio": ratio, "run": run, "test_images": args.test_images, "calibration_images": args.images}
    rows = []
    for name, model in masked.items():
        found = {"method": name, "macs_ratio": round(bench.macs_ratio(model), 3)} | bench.recovered(model)
        rows.append(found | times[name] | about)
        print(" ".join(f"{rows[-1][column]}" for column in COLUMNS), flush=True)
    return rows


def medians(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """A row for each method and ratio: the median of every figure over the runs, whose number is in `run`."""
    found = []
    for method, ratio in dict.fromkeys((row["method"], float(row["ratio"])) for row in rows):
        runs = [row for row in rows if (row["method"], float(row["ratio"])) == (method, ratio)]
        middle = {column: f"{statistics.median(float(row[column]) for row in runs):.6g}" for column in COLUMNS[3:]}
        found.append({"method": method, "ratio": ratio, "run": len(runs)} | middle)
    return found


def main() -> None:
    args = parse_args()
    machine.apply_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    if args.out.exists():
        with args.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    print(" ".join(COLUMNS))
    bench = Bench(args)
    for run in range(args.runs):
        bench.draw(run)
        for ratio in args.ratios:
            if not any((float(row["ratio"]), int(row["run"])) == (ratio, run) for row in rows):
                rows += measure_ratio(bench, args, ratio, run)
                write_csv(args.out, COLUMNS, rows)
    write_csv(args.out.with_name(f"{args.out.stem}_medians.csv"), COLUMNS, medians(rows))


if __name__ == "__main__":
    main()
