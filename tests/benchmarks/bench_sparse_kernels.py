"""Where sparse arithmetic beats dense in a ResNet-50 on 32x32 images: layer by layer, then in the whole network.

    python tests/benchmarks/bench_sparse_kernels.py [--levels 50,70,90,95] [--batch_size 32] [--checkpoint FILE]

Part 1 takes one convolution of every shape in a bottleneck at its real size, zeroes the weights of smallest magnitude,
and lets the products of `sparsity/networks/sparse.py`, in CSR and in blocks, take turns with the dense convolution.
Every contestant must first give the dense result. `bsr` zeroes whole blocks, the same share, because scattered zeros
hardly ever fill one. `csr, converted` is the cost of a layer alone between dense ones: activations come from
channels_last and go back.

Part 2 runs the network with every convolution in CSR, as `--engine sparse` does, against the dense inference copy at
its best batch size; logits must agree. Without a checkpoint the network is untrained.
"""

import argparse
import copy
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import take_turns

import Build_Resnet
from sparsity.figures.style import COLOURS, save_figure
from sparsity.networks.families import load_network
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.networks.sparse import Plane, PlaneConv, sparse_network, to_csr
from sparsity.prune.allocation import Allocator
from sparsity.prune.masks import apply_masks
from sparsity.system import files, machine
from sparsity.system.flags import level_text, levels_type, stem_type

COLUMNS = ("part", "subject", "kind", "kernel", "level", "milliseconds", "dense_milliseconds", "ratio")
IMAGES = 64  # per timing of the whole network, whatever the batch size
SAMPLE = 8  # images on which sparse and dense networks must agree
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output
PANELS = {  # kernel -> title of its panel
    "csr, planes": "one layer, CSR in planes",
    "csr, converted": "one layer, CSR, images converted",
    "bsr 16x16, planes": "one layer, 16x16 blocks in planes",
    "csr everywhere": "whole network",
}
# Kernel -> side of its blocks of zeros, and how a matrix is packed.
PACK: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "csr, planes": (1, to_csr),
    "csr, converted": (1, to_csr),
    "bsr 4x4, planes": (4, lambda matrix: matrix.to_sparse_bsr((4, 4))),
    "bsr 16x16, planes": (16, lambda matrix: matrix.to_sparse_bsr((16, 16))),
}


def pruned(weight: Tensor, level: float, block: int = 1) -> Tensor:
    """Zero `level` percent of the blocks of `block` x `block` (output x input channels), those of smallest norm."""
    out_channels, in_channels, size, _ = weight.shape
    blocks = weight.view(out_channels // block, block, in_channels // block, block, size, size)
    scores = blocks.square().sum(dim=(1, 3), keepdim=True)
    mask = torch.ones_like(scores).flatten()
    mask[scores.flatten().argsort()[: round(level / 100 * len(mask))]] = 0
    return (blocks * mask.view_as(scores)).view_as(weight)


def contestant(name: str, weight: Tensor, x: Tensor, level: float) -> Callable[[], Plane | Tensor]:
    """The work of a kernel, after its result was compared with that of the dense convolution of the same weight."""
    side, pack = PACK.get(name, (1, None))
    weight = pruned(weight, level, side)
    out_channels, in_channels, size, _ = weight.shape
    conv = nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, size, padding=size // 2, bias=False)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    if pack:
        # Without a bias, whose row would not fill blocks.
        plane, product = Plane(x.shape[1], x.shape[-1], len(x)).load(x), PlaneConv(conv, x.shape[-1], len(x), {}, pack)
        work = (lambda: product(plane)) if "planes" in name else (lambda: product(plane.load(x)).images())
    else:
        conv, images = (conv.bfloat16(), x.bfloat16()) if name == "dense bf16" else (conv, x)
        work = lambda: conv(images)  # noqa: E731
    result, expected = work(), F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    result = result.images() if isinstance(result, Plane) else result
    off = float((result.float() - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCES[result.dtype]:
        raise AssertionError(f"{name} at {level} % is off by {off:.1e} of the largest output")
    return work


def layer_rows(inner: int, outer: int, side: int, kind: str, args: argparse.Namespace) -> Iterator[dict]:
    """One row per level and kernel of one convolution, the dense one in the same turns, at stride 1."""
    size = 3 if kind == "3x3" else 1
    out_channels, in_channels = (outer, inner) if kind == "1x1 expand" else (inner, inner if size == 3 else outer)
    x = torch.randn(args.batch_size, in_channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, in_channels, size, size)
    for level in args.levels:
        works = {name: contestant(name, weight, x, level) for name in ("dense fp32", "dense bf16", *PACK)}
        times = take_turns(works, args.repeats, x.device)
        yield from rows_of("layer", f"{kind} {in_channels}-{out_channels} {side}px", kind, level, times, "dense fp32")


def rows_of(part: str, subject: str, kind: str, level: float, times: dict[str, list[float]], base: str) -> list[dict]:
    """Rows of the CSV from one round of turns; the ratio says how many times faster than `base` a kernel is."""
    medians = {kernel: 1000 * statistics.median(runs) for kernel, runs in times.items()}
    rows = []
    for kernel, median in medians.items():
        numbers = (f"{median:.4g}", f"{medians[base]:.4g}", f"{medians[base] / median:.3f}")
        rows.append(dict(zip(COLUMNS, (part, subject, kind, kernel, level_text(level), *numbers), strict=True)))
    return rows


def network_rows(model: nn.Module, dealt: str, args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows of one level after another, weights of smallest magnitude gone by allocation `dealt`."""
    example, images = torch.zeros(1, 3, 32, 32), torch.randn(IMAGES, 3, 32, 32)
    images = images.contiguous(memory_format=torch.channels_last)
    allocator = Allocator(dealt, {name: layer.weight.abs() for name, layer in prunable_layers(model, example).items()})
    for level in args.network_levels:
        masked = copy.deepcopy(model)
        apply_masks(prunable_layers(masked, example), allocator.masks(level / 100)[0])
        inference = inference_copy(masked)
        networks = [(f"dense fp32 @{batch}", inference, batch) for batch in args.network_batches]
        networks.append(("csr everywhere", sparse_network(inference, images[:SAMPLE]), IMAGES))
        works = {name: partial(run_batches, network, images.split(batch)) for name, network, batch in networks}
        take_turns(works, 1, images.device)  # warm-up
        times = take_turns(works, args.repeats, images.device)
        base = min((name for name in times if "fp32" in name), key=lambda name: statistics.median(times[name]))
        yield rows_of("network", dealt, "network", level, times, base)


def run_batches(network: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    return [network(batch) for batch in batches]


def measurements(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows of one layer after another, then of one level of the network after another."""
    for stage in range(4):
        for kind in ("1x1 reduce", "3x3", "1x1 expand"):
            yield list(layer_rows(64 * 2**stage, 256 * 2**stage, 32 // 2**stage, kind, args))
    model = load_network(args.checkpoint)[1] if args.checkpoint else Build_Resnet.resnet50()
    for dealt in ("uniform", "global") if args.checkpoint else ("uniform",):
        yield from network_rows(model.eval(), dealt, args)


def print_table(rows: list[dict]) -> None:
    """Ratios by level, and the lowest level from which on all measured ones win."""
    lines: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row in rows:
        lines.setdefault((row["subject"], row["kernel"]), []).append((row["level"], float(row["ratio"])))
    for (subject, kernel), points in lines.items():
        lost = max((index for index, (_, ratio) in enumerate(points) if ratio <= 1), default=-1)
        wins = f"faster from {points[lost + 1][0]} %" if lost + 1 < len(points) else "never faster"
        print(f"{subject:22} {kernel:20}", *(f"{level}: {ratio:.2f}" for level, ratio in points), wins, flush=True)


def draw(table: Path, figure_path: Path, where: str) -> None:
    """The plot, from the CSV alone: one line per kind of layer, geometric mean over the stages with their range."""
    rows = files.read_csv(table)
    panels = list(dict.fromkeys(PANELS[row["kernel"]] for row in rows if row["kernel"] in PANELS))
    figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        groups: dict[str, dict[float, list[float]]] = {}
        for row in (row for row in rows if PANELS.get(row["kernel"]) == title):
            name = row["kind"] if row["part"] == "layer" else f"{row['subject']}, {row['kernel']}"
            groups.setdefault(name, {}).setdefault(float(row["level"]), []).append(float(row["ratio"]))
        for colour, (name, points) in zip(COLOURS, groups.items(), strict=False):
            levels, ratios = list(points), list(points.values())
            axes.fill_between(levels, list(map(min, ratios)), list(map(max, ratios)), color=colour, alpha=0.12)
            axes.plot(levels, list(map(statistics.geometric_mean, ratios)), "o-", color=colour, label=name)
        axes.axhline(1, color="black", linewidth=1)
        axes.set(title=title, xlabel="weights that are zero, %", yscale="log")
        axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1x", "0.2x", "0.5x", "1x", "2x", "5x", "10x"])
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("times as fast as dense fp32")
    title = f"Sparse against dense in a ResNet-50 on {where}", "mean over stages; band: range"
    save_figure(figure, figure_path, *title)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=levels_type, default="50,60,70,80,90,95,98,99", help="of part 1 (%(default)s)")
    parser.add_argument("--network_levels", type=levels_type, default="90,95,98,99", help="of part 2 (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="of part 1 (%(default)s)")
    parser.add_argument("--network_batches", type=int, nargs="+", default=[16, 32], help="of dense; the best counts")
    parser.add_argument("--checkpoint", type=Path, help="a ResNet-50 for 32x32 images; also pruned by one threshold")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--images_dir", type=Path, default=Path("images"), help="where plot and tables go")
    parser.add_argument("--name", type=stem_type, default="resnet50", help="stem of the outputs (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    machine.apply_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", "Sparse .* support is in beta")
    files.prepare_folder(args.images_dir, "--images_dir")
    stem = args.images_dir / f"{args.name}_sparse_kernels"
    here = machine.describe_machine(torch.device("cpu"))
    settings = {key: str(value) for key, value in vars(args).items()}
    header = {"machine": here, "versions": machine.versions(), "settings": settings}
    files.write_json(stem.with_suffix(".json"), header)
    where = f"{here['device']}, {here['threads']} threads, torch {torch.__version__}"
    print(f"{where}, batches of {args.batch_size}")
    rows: list[dict] = []
    for found in measurements(args):
        print_table(found)
        rows += found
        files.write_csv(stem.with_suffix(".csv"), COLUMNS, rows)
    draw(stem.with_suffix(".csv"), stem.with_suffix(".png"), where)


if __name__ == "__main__":
    main()
