"""`--describe`: a network layer by layer, and what can be done with it; nothing is pruned and no file written."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsity.data.images import Split, normalise
from sparsity.networks.evaluation import default_batch_size
from sparsity.networks.fused import fused
from sparsity.networks.inference import choose_way, inference_copy
from sparsity.networks.layers import BatchNorm, Layer, exclude, positions_per_image, prunable_layers, unprunable
from sparsity.prune.coupling import couple
from sparsity.recover.reconstruction import not_refitted
from sparsity.sweep import work
from sparsity.sweep.flags import CALIBRATION_IMAGES
from sparsity.sweep.inputs import Inputs, load_inputs
from sparsity.sweep.prepare import coupled_text, filter_layers, prepare_inference
from sparsity.system import processes
from sparsity.system.errors import by_reason, few
from sparsity.system.machine import set_up_machine

COMPARED = 32  # images that the folded network is compared on


@dataclass(frozen=True)
class Entry:
    """A weight of two or more dimensions: `macs` are its multiply-adds for an image.

    `dense` says why it is not pruned, and is '' where it is prunable.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    macs: int
    dense: str


def describe(args: argparse.Namespace) -> None:
    """Print the table of the layers of the first checkpoint, and what can be done with them."""
    processes.join()
    device = set_up_machine(args)
    args.batch_size = args.batch_size or default_batch_size(device)
    given = load_inputs(args)
    table = layer_table(given.dense, given.example, args.exclude)
    print(f"\n{table_text(table)}\n")
    for line in ability_lines(given.dense.to(device), table, given.test.to(device)):
        print(line)
    print(time_line(args, given, prepare_inference(args, given), [entry.name for entry in table if not entry.dense]))
    processes.leave()


def layer_table(model: nn.Module, example: Tensor, patterns: list[str]) -> list[Entry]:
    """The weights of two or more dimensions, in the order of `named_modules`; `patterns` are those of --exclude."""
    positions, reasons = positions_per_image(model, example), unprunable(model, example)
    kept, table = exclude(prunable_layers(model, example), patterns), []
    for module_name, module in model.named_modules():
        for name, weight in _matrices(module):
            layer = module_name if name == "weight" else f"{module_name}.{name}".lstrip(".")
            dense = "" if layer in kept else reasons.get(module_name, "excluded")
            if not isinstance(module, Layer):
                attention = isinstance(module, nn.MultiheadAttention)
                dense = "inside MultiheadAttention" if attention else "neither convolution nor linear layer"
            macs = positions.get(module_name, 0) * weight.numel() if name.endswith("weight") else 0
            kind = _kind(module) if name == "weight" else f"parameter of {_kind(module)}"
            table.append(Entry(layer, kind, tuple(weight.shape), weight.numel(), macs, dense))
    return table


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of two or more dimensions of a module itself; of a parametrized one as computed."""
    if isinstance(module, parametrize.ParametrizationList):
        return
    own = dict(module.named_parameters(recurse=False))
    if parametrize.is_parametrized(module):
        own |= {name: getattr(module, name) for name in module.parametrizations}
    yield from ((name, value) for name, value in own.items() if value.dim() > 1)


def _kind(module: nn.Module) -> str:
    """The class of a module; of convolutions the groups as well."""
    groups, kind = getattr(module, "groups", 1), type(module).__name__
    if parametrize.is_parametrized(module):
        kind = kind.removeprefix("Parametrized")
    if not isinstance(groups, int) or groups == 1:
        return kind
    return f"{kind}, depthwise" if groups == getattr(module, "in_channels", 0) else f"{kind}, {groups} groups"


def table_text(table: list[Entry]) -> str:
    """The table as text, its numbers flush right."""
    lines = [("layer", "kind", "shape", "weights", "multiply-adds", "prunable")]
    for entry in table:
        figures = f"{entry.weights:,}", f"{entry.macs:,}" if entry.macs else "-"
        shape, prunable = "x".join(map(str, entry.shape)), f"no: {entry.dense}" if entry.dense else "yes"
        lines.append((entry.name, entry.kind, shape, *figures, prunable))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'>' if 2 < index < 5 else '<'}{width}}" for index, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (zip(line, widths, strict=True) for line in lines)
    )


def ability_lines(model: nn.Module, table: list[Entry], test: Split) -> Iterator[str]:
    """Sentences: prunable weights, tracing, folding, refits, filters."""
    prunable = [entry for entry in table if not entry.dense]
    parameters, weights = sum(each.numel() for each in model.parameters()), sum(entry.weights for entry in prunable)
    yield f"prunable: {weights:,} of {parameters:,} parameters, in {len(prunable)} of {len(table)} layers"
    if rest := _dense_rest(model):
        yield f"dense besides: {rest}"
    images = normalise(test.images[:COMPARED], test.mean, test.std, torch.float32)
    way = choose_way(model, images)
    yield f"traced by torch.fx: {'yes' if way.traced else f'no ({way.reason})'}"
    yield _folding_line(model, images)
    names = [entry.name for entry in prunable]
    left = not_refitted(model, names, images[:1])
    refitted = f"refitted by reconstruction: {len(names) - len(left)} of {len(names)} prunable layers"
    yield "; ".join([refitted, *(f"not {few(found)}: {reason}" for reason, found in by_reason(left).items())])
    filters = [model.get_submodule(name).out_channels for name in filter_layers(model, names, False)]
    yield f"filters that can be removed: {sum(filters):,}, in {len(filters)} convolutions"
    yield f"with --couple: {coupled_text(couple(model, names))}"


def _dense_rest(model: nn.Module) -> str:
    """The parameters of one dimension, by kinds of their modules, with their counts."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        bias = ".bias" if isinstance(module, Layer) else ""
        for value in module.parameters(recurse=False):
            if value.dim() < 2 and not isinstance(module, parametrize.ParametrizationList):
                counts[_kind(module) + bias] += value.numel()
    return ", ".join(f"{count:,} of {kind}" for kind, count in counts.items())


@torch.inference_mode()
def _folding_line(model: nn.Module, images: Tensor) -> str:
    """How many BatchNorm a float32 copy folds, and how far its outputs then are from those of the network."""
    copy = inference_copy(model)
    expected, found = model(images), copy(images)
    norms = sum(isinstance(module, BatchNorm) for module in model.modules())
    folded = sum(name is not None for name in copy.folded.values())
    apart, largest = float((expected - found).abs().max()), float(expected.abs().max())
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    return (
        f"folded: {folded} of {norms} BatchNorm; on {len(images)} test images logits of up to {largest:.3g} differ by "
        f"at most {apart:.2g}, {'all' if same == len(images) else same} predictions are the same"
    )


def time_line(args: argparse.Namespace, given: Inputs, inference: nn.Module, layers: list[str]) -> str:
    """About how long the sweep of these flags takes, evaluated in `inference`, and what the estimate assumes."""
    panel = work.choose_panel(args, layers, filter_layers(given.dense, layers, args.couple))
    test = given.test.to(torch.device(args.device))
    rate = work.images_per_second(fused(inference, test), test, args.batch_size)
    calibrated = args.calibration_images or CALIBRATION_IMAGES
    costs = {name: cost / rate for name, cost in work.level_costs(len(test), calibrated, 0, 0).items()}
    seconds = costs["none"] + sum(costs[curve.recover] * len(levels) for curve, levels in panel.items())
    assumed = [
        f"{rate:,.0f} images/s in a few batches of {args.batch_size}, --threads {args.threads}, nothing beside it"
    ]
    if recoveries := {curve.recover for curve in panel} - {"none"}:
        assumed.append(f"{calibrated:,} calibration images and, for refits, the ratios of a ResNet-50")
        assumed += ["no time for training" for name in recoveries & {"distill", "finetune"}][:1]
    networks = f"{1 + sum(map(len, panel.values()))} networks x {len(test):,} images"
    return (
        f"a sweep of these flags: about {timedelta(seconds=round(seconds))}, {networks}; assumed: {'; '.join(assumed)}"
    )
