"""Where sparse arithmetic beats dense in a ResNet-50 on 32x32 images: layer by layer, then in the whole network.

    python tests/benchmarks/bench_sparse_kernels.py [--levels 50,70,90,95] [--batch_size 32] [--checkpoint FILE]

Part 1 takes one convolution of every shape in a bottleneck at its real size, zeroes the weights of smallest magnitude,
and lets what torch has for sparse matrices take turns with the dense convolution of `sparsity.evaluation`. Every
contestant must first give what the dense convolution gives. `bsr` zeroes whole blocks, the same share, because
scattered zeros hardly ever fill one.

How activations travel: a sparse product wants [C, H * W * N], not images. `sparsity.planes` keeps them so through the
whole network, with a column of zeros beside each row of pixels, so that each tap of a 3x3 is a product with a shifted
view. Only the images are converted then, and the strided convolutions split their input. `csr, converted` is what a
layer costs that stands alone between dense ones: from channels_last and back.

Part 2 runs the network by the sparse engine of `sparsity.engine`, with CSR in every convolution and where it pays,
against the dense inference copy at its best batch size; logits must agree. Without a checkpoint the network is
untrained.
"""

import argparse
import copy
import csv
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from timing import take_turns

import Build_Resnet
from sparsity.figures.style import COLOURS, save_figure, set_title
from sparsity.networks import checkpoint, families
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.networks.planes import Plane, PlaneConv, to_csr
from sparsity.networks.sparse import choose_kernels, run_by, sparse_network
from sparsity.prune import allocation
from sparsity.prune.masks import apply_masks
from sparsity.results.rows import level_text
from sparsity.system import errors, files, machine
from sparsity.system.files import write_csv
from sparsity.system.flags import levels_type, stem_type
from sparsity.system.machine import apply_threads

COLUMNS = ("part", "subject", "kind", "kernel", "level", "milliseconds", "dense_milliseconds", "ratio", "notes")
IMAGES = 64  # per timing of the whole network, whatever the batch size
SAMPLE = 8  # images on which sparse and dense networks must agree
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output
PANELS = {  # kernel -> title of its panel
    "csr, planes": "one layer, CSR in planes",
    "csr, converted": "one layer, CSR, images converted",
    "bsr 16x16, planes": "one layer, 16x16 blocks in planes",
    "csr where it pays": "whole network",
    "csr everywhere": "whole network",
}
PACK: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": to_csr,
    "mm": lambda matrix: matrix,
    "bsr 4x4": lambda matrix: matrix.to_sparse_bsr((4, 4)),
    "bsr 16x16": lambda matrix: matrix.to_sparse_bsr((16, 16)),
}


def conv_of(weight: Tensor) -> nn.Conv2d:
    """A convolution of stride 1 that keeps the size, without bias, with this weight in channels_last."""
    out_channels, in_channels, size, _ = weight.shape
    conv = nn.utils.skip_init(nn.Conv2d, in_channels, out_channels, size, padding=size // 2, bias=False)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    return conv


def pruned(weight: Tensor, level: float, block: int = 1) -> Tensor:
    """Zero `level` percent of the blocks of `block` x `block` (output x input channels), those of smallest norm."""
    out_channels, in_channels, size, _ = weight.shape
    blocks = weight.view(out_channels // block, block, in_channels // block, block, size, size)
    scores = blocks.square().sum(dim=(1, 3), keepdim=True)
    mask = torch.ones_like(scores).flatten()
    mask[scores.flatten().argsort()[: round(level / 100 * len(mask))]] = 0
    return (blocks * mask.view_as(scores)).view_as(weight)


def halved(weight: Tensor) -> Tensor:
    """2:4: of four neighbouring input channels the two larger weights stay."""
    quads = weight.unflatten(1, (-1, 4))
    return (quads * torch.zeros_like(quads).scatter_(2, quads.abs().topk(2, dim=2).indices, 1)).view_as(weight)


def contestants(name: str, weight: Tensor, x: Tensor, level: float) -> tuple[Callable[[], Plane | Tensor], Tensor]:
    """The work of a kernel, and the weight with whose dense convolution its result must agree."""
    way, _, place = name.partition(", ")
    block = {"bsr 4x4": 4, "bsr 16x16": 16}.get(way, 1)
    weight = halved(weight) if way == "2:4 bf16" else pruned(weight, level, block)
    conv, matrix = conv_of(weight), weight.flatten(1)
    if way in PACK and place in ("planes", "converted"):
        plane = Plane(x.shape[1], x.shape[-1], len(x))
        conv = PlaneConv(conv, x.shape[-1], len(x), {}, PACK[way])
        plane.load(x)
        return (lambda: conv(plane)) if place == "planes" else (lambda: conv(plane.load(x)).images()), weight
    if way == "csr":
        matrix, images = matrix.to_sparse_csr(), x.contiguous()
        columns, rows = x.transpose(0, 1).flatten(1).contiguous(), x.permute(0, 2, 3, 1).flatten(0, 2)
        return {
            "allocating": lambda: matrix @ columns,
            "channels_last": lambda: (rows @ matrix.t()).t(),
            "unfold": lambda: matrix @ F.unfold(images, 3, padding=1).transpose(0, 1).flatten(1),
        }[place], weight
    if way == "2:4 bf16":
        matrix = torch.sparse.to_sparse_semi_structured(matrix.bfloat16())
        columns = x.transpose(0, 1).flatten(1).bfloat16().contiguous()
        return lambda: matrix @ columns, weight
    conv, images = (conv.bfloat16(), x.bfloat16()) if way == "dense bf16" else (conv, x)
    return lambda: conv(images), weight


def kernels_for(size: int, level: float, device: torch.device) -> list[str]:
    """Kernels that apply to a convolution of this size; "mm" is a dense product in planes."""
    names = ["dense fp32", "dense bf16", "mm, planes", "csr, planes", "csr, converted"]
    names += ["bsr 4x4, planes", "bsr 16x16, planes"]
    names += ["csr, allocating", "csr, channels_last"] if size == 1 else ["csr, unfold"]
    return names + ["2:4 bf16"] * (size == 1 and level == 50 and device.type == "cuda")


def deviation(result: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float((result.float() - expected).abs().max() / expected.abs().max())


def verified(name: str, weight: Tensor, x: Tensor, level: float) -> Callable[[], object] | None:
    """The work of a kernel that has shown to give what the dense convolution gives; None where torch has none here."""
    try:
        work, weight = contestants(name, weight, x, level)
        result = work()
    except (RuntimeError, NotImplementedError) as error:
        print(f"{name}, {tuple(weight.shape)}: not possible here: {errors.one_line(error)[:160]}", file=sys.stderr)
        return None
    images = result.images() if isinstance(result, Plane) else result
    if images.dim() == 2:
        images = images.reshape(len(weight), len(x), *x.shape[2:]).transpose(0, 1)
    off = deviation(images, F.conv2d(x, weight, padding=weight.shape[-1] // 2))
    if not off <= TOLERANCES[images.dtype]:
        raise AssertionError(f"{name} at {level} % is off by {off:.1e} of the largest output")
    return work


def layer_rows(inner: int, outer: int, side: int, kind: str, args: argparse.Namespace) -> Iterator[dict]:
    """A row a level and kernel of one convolution, the dense one in the same turns, at stride 1."""
    size = 3 if kind == "3x3" else 1
    out_channels, in_channels = (outer, inner) if kind == "1x1 expand" else (inner, inner if size == 3 else outer)
    x = torch.randn(args.batch_size, in_channels, side, side, device=args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, in_channels, size, size, device=args.device)
    for level in args.levels:
        works = {name: verified(name, weight, x, level) for name in kernels_for(size, level, args.device)}
        times = take_turns({name: work for name, work in works.items() if work}, args.repeats, args.device)
        yield from rows_of("layer", f"{kind} {in_channels}-{out_channels} {side}px", kind, level, times, "dense fp32")


def rows_of(part: str, subject: str, kind: str, level: float, times: dict[str, list[float]], base: str) -> list[dict]:
    """Rows of the CSV from one round of turns; the ratio says how many times faster than `base` a kernel is."""
    medians = {kernel: 1000 * statistics.median(runs) for kernel, runs in times.items()}
    rows = []
    for kernel, median in medians.items():
        numbers = (f"{median:.4g}", f"{medians[base]:.4g}", f"{medians[base] / median:.3f}")
        rows.append(dict(zip(COLUMNS, (part, subject, kind, kernel, level_text(level), *numbers, ""), strict=True)))
    return rows


def contest(
    inference: fx.GraphModule, images: Tensor, batches: list[int], repeats: int
) -> tuple[dict[str, list[float]], str]:
    """Times of the network dense, at each of `batches`, and sparse; and what the engine would choose, in words."""
    kernels, estimate = choose_kernels(inference, images[:1], "auto")
    networks = {"csr everywhere": run_by("sparse", inference, images[:SAMPLE])}  # compares with dense
    if "conv" in kernels.values():
        networks["csr where it pays"] = sparse_network(inference, images[:SAMPLE], kernels)
    works = {f"dense fp32 @{batch}": runner(inference, images, batch) for batch in batches}
    works |= {name: runner(network, images, len(images)) for name, network in networks.items()}
    for work in works.values():
        work()  # warm-up
    chosen = f"{list(kernels.values()).count('csr')} of {len(kernels)} csr, estimate {estimate:.2f}x"
    return take_turns(works, repeats, images.device), chosen


def runner(network: nn.Module, images: Tensor, batch: int) -> Callable[[], list[Tensor]]:
    """The network on all images, in batches."""
    return lambda: [network(part) for part in images.split(batch)]


def network_rows(model: nn.Module, dealt: str, args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows of one level after another, weights of smallest magnitude gone by allocation `dealt`."""
    example, images = torch.zeros(1, 3, 32, 32), torch.randn(IMAGES, 3, 32, 32)
    images = images.to(args.device).contiguous(memory_format=torch.channels_last)
    scores = {name: layer.weight.abs() for name, layer in prunable_layers(model, example).items()}
    allocator = allocation.prepare(dealt, allocation.rank(scores))
    for level in args.network_levels:
        masked = copy.deepcopy(model)
        apply_masks(prunable_layers(masked, example), allocator.masks(level / 100)[0])
        inference = inference_copy(masked.to(args.device))
        times, notes = contest(inference, images, args.network_batches, args.repeats)
        base = min((name for name in times if "fp32" in name), key=lambda name: statistics.median(times[name]))
        rows = rows_of("network", dealt, "network", level, times, base)
        yield [row | {"notes": notes} for row in rows]


def measurements(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Rows of one layer after another, then of one level of the network after another."""
    for stage in range(4) if args.part != "network" else ():
        for kind in ("1x1 reduce", "3x3", "1x1 expand"):
            yield list(layer_rows(64 * 2**stage, 256 * 2**stage, 32 // 2**stage, kind, args))
    if args.part != "layers":
        model = Build_Resnet.resnet50()
        if args.checkpoint:
            model = families.restore(checkpoint.load(args.checkpoint), Build_Resnet.build, Build_Resnet.spec_of)
        for dealt in ("uniform", "global") if args.checkpoint else ("uniform",):
            yield from network_rows(model.eval(), dealt, args)


def print_table(rows: list[dict]) -> None:
    """Ratios by level, and the lowest level from which on all measured ones win."""
    lines: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for row in rows:
        lines.setdefault((row["subject"], row["kernel"], row["notes"]), []).append((row["level"], float(row["ratio"])))
    for (subject, kernel, notes), points in lines.items():
        lost = max((index for index, (_, ratio) in enumerate(points) if ratio <= 1), default=-1)
        wins = f"faster from {points[lost + 1][0]} %" if lost + 1 < len(points) else "never faster"
        ratios = " ".join(f"{level}: {ratio:.2f}" for level, ratio in points)
        print(f"{subject:22} {kernel:20} {ratios}  {wins}  {notes}", flush=True)


def draw(table: Path, figure_path: Path, machine: str) -> None:
    """The plot, from the CSV alone: a line a kind of layer, geometric mean over the stages with their range."""
    with table.open(newline="") as file:
        rows = [row | {"kernel": row["kernel"].split(" @")[0]} for row in csv.DictReader(file)]
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
    set_title(figure, f"Sparse against dense in a ResNet-50 on {machine}", "mean over stages; band: range")
    save_figure(figure, figure_path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=levels_type, default="50,60,70,80,90,95,98,99", help="of part 1 (%(default)s)")
    parser.add_argument("--network_levels", type=levels_type, default="90,95,98,99", help="of part 2 (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="of part 1 (%(default)s)")
    parser.add_argument("--network_batches", type=int, nargs="+", default=[16, 32], help="of dense; the best counts")
    parser.add_argument("--checkpoint", type=Path, help="a ResNet-50 for 32x32 images; also pruned by one threshold")
    parser.add_argument("--part", choices=("both", "layers", "network"), default="both", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--device", type=machine.resolve_device, default="auto", help="auto, cpu, cuda")
    parser.add_argument("--images_dir", type=Path, default=Path("images"), help="where plot and tables go")
    parser.add_argument("--name", type=stem_type, default="resnet50", help="stem of the outputs (%(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    apply_threads(args.threads)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", "Sparse .* support is in beta")
    files.prepare_folder(args.images_dir, "--images_dir")
    stem, here = args.images_dir / f"{args.name}_sparse_kernels", machine.machine(args.device)
    settings = {key: str(value) for key, value in vars(args).items()}
    header = {"machine": here, "versions": machine.versions(), "settings": settings}
    files.write_json(stem.with_suffix(".json"), header)
    where = f"{here['device']}, {here['threads']} threads, torch {torch.__version__}"
    print(f"{where}, batches of {args.batch_size}" + "; no 2:4, which needs CUDA" * (args.device.type != "cuda"))
    rows: list[dict] = []
    for found in measurements(args):
        print_table(found)
        rows += found
        write_csv(stem.with_suffix(".csv"), COLUMNS, rows)
    draw(stem.with_suffix(".csv"), stem.with_suffix(".png"), where)


if __name__ == "__main__":
    main()
