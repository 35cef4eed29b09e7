"""Twelve kinds of awkward networks: what is said and done with each."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from conftest import awaken
from helpers import rows_of, same_bits, sweep, without_seconds
from torch import nn

from sparsity.data.calibration import Calibration
from sparsity.data.images import Split, normalise
from sparsity.networks.census import census
from sparsity.networks.checkpoint import fit, load, save, save_packed
from sparsity.networks.families import build, describe
from sparsity.networks.inference import choose_way, inference_copy
from sparsity.networks.layers import (
    dense_parameters,
    effective_weight,
    positions_per_image,
    prunable_layers,
    unmasked_state,
    unprunable,
)
from sparsity.prune.criteria import CRITERIA
from sparsity.prune.filters import inner_convs
from sparsity.prune.pruner import Pruner
from sparsity.recover import RECOVERIES, Means
from sparsity.recover.finetune import Finetuning
from sparsity.recover.reconstruction import not_refitted
from sparsity.system.methods import Curve

FILE = Path(__file__).with_name("awkward.py")
EXAMPLE = torch.zeros(1, 3, 16, 16)


class Case(NamedTuple):
    """Which layers are not pruned or not refitted, and why; whether a network is traced, and in channels_last."""

    dense: dict[str, str]
    left: Mapping[str, str] = MappingProxyType({})
    traced: bool = True
    channels_last: bool = True
    loose: tuple[str, ...] = ()  # parameters of no layer
    filters: tuple[str, ...] = ()  # convolutions that can lose some
    no_batchnorm: bool = False


HEAD = {"fc2": "output layer"}
TWIN = Case(channels_last=False, dense=HEAD, filters=("conv1",))  # `view`
LOOSE = ("place", "attention.in_proj_weight", "attention.in_proj_bias")
CASES = {
    "ControlFlow": Case(traced=False, channels_last=False, dense=HEAD),
    "SharedWeights": Case(
        dense={
            "second": "pruned with first, whose weight it has",
            "hidden": "its weight is that of output too",
            "output": "output layer",
        },
        left={"first": "has its weight with another layer"},
    ),
    "CalledTwice": Case(dense={"fc": "output layer"}, left={"block.0": "runs 2 times"}),
    "Attention": Case(
        dense={"head": "output layer"},
        left=dict.fromkeys(("attention.out_proj", "layer.self_attn.out_proj"), "inside MultiheadAttention"),
        loose=(*LOOSE, "layer.self_attn.in_proj_weight", "layer.self_attn.in_proj_bias"),
        no_batchnorm=True,
    ),
    "NoBatchNorm": Case(dense={"classifier": "output layer"}, no_batchnorm=True),
    "TupleOutput": TWIN,
    "DictOutput": TWIN,
    "NamedOutput": TWIN,
    "ConvHead": Case(dense={"head": "output layer"}, filters=("expand.0",)),
    "Transposed": Case(dense={"fc": "output layer"}, left={"up": "transposed convolution", "deep": "3-d convolution"}),
    "OneDimensional": Case(dense={"fc": "output layer"}),
    "Stochastic": Case(dense={"fc": "output layer"}),
    "OwnBuffers": Case(
        dense={"fc": "output layer", "auxiliary": "not called as a layer"},
        left={"conv1": "a forward pass of its own"},
        no_batchnorm=True,
    ),
}


def make(name: str, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return awaken(build(describe(f"{FILE}:{name}", classes, 0, {})))


@pytest.fixture
def images() -> Split:
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=draw)
    return Split(pixels, torch.arange(24) % 4, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(params=CASES)
def case(request, images):
    """The dense network, its case, and normalised images."""
    dense, normalised = make(request.param), normalise(images.images, images.mean, images.std)
    choose_way(dense, normalised)
    return dense, CASES[request.param], normalised


def pruned(dense: nn.Module, level: float, criterion: str = "l1", calibration=None, recover: str = "finetune"):
    pruner = Pruner(dense, list(prunable_layers(dense, EXAMPLE)), calibration)
    return pruner.prune(Curve(criterion, "global", recover), level)


@torch.no_grad()
def test_what_is_known_of_each_before_it_is_pruned(case):
    dense, expected, _ = case
    assert (dense.way.traced, dense.way.channels_last) == (expected.traced, expected.channels_last)
    assert "control flow" in dense.way.reason or dense.way.traced
    assert unprunable(dense, EXAMPLE) == expected.dense
    layers = prunable_layers(dense, EXAMPLE)
    assert not_refitted(dense, list(layers), EXAMPLE) == dict(expected.left)
    assert set(dense_parameters(dense)) == set(expected.loose)
    assert set(inner_convs(dense)) == set(expected.filters)
    counted = census(dense, layers, positions_per_image(dense, EXAMPLE))
    assert counted.parameters == sum(parameter.numel() for parameter in dense.parameters())
    assert counted.macs == counted.macs_remaining > counted.prunable


@pytest.mark.parametrize("level", [0, 60])
def test_masks_recoveries_and_the_evaluated_copy_agree(case, images, level):
    dense, expected, pixels = case
    before, calibration = copy.deepcopy(dense.state_dict()), Calibration(images)
    layers = prunable_layers(dense, EXAMPLE)
    tuning = Finetuning(images, 1, lambda place: 0.01, 12, 0.9, 5e-4, torch.float32)
    means = Means(dense, tuple(layers), calibration, tuning)
    outputs = {}
    for recovery in ("none", "batchnorm", "reconstruction", "finetune"):
        model, _ = pruned(dense, level, recover=recovery)
        masked = {name: effective_weight(model.get_submodule(name)).clone() for name in layers}
        notes = RECOVERIES[recovery](model, means, 0)
        with torch.no_grad():
            outputs[recovery] = model(pixels)
            torch.testing.assert_close(inference_copy(model)(pixels), outputs[recovery], rtol=1e-3, atol=1e-4)
        zeros = sum(int((weight == 0).sum()) for weight in masked.values())
        assert zeros == round(level / 100 * sum(weight.numel() for weight in masked.values()))
        for name, weight in masked.items():
            now = effective_weight(model.get_submodule(name))
            assert not now[weight == 0].any()
            still = recovery in ("none", "batchnorm") or (recovery == "reconstruction" and name in expected.left)
            assert recovery == "finetune" or torch.equal(now, weight) == (still or level == 0), name
        told = [f"not refitted: {', '.join(names)}" for names in grouped(expected.left) if level]
        wanted = ["no BatchNorm to re-estimate"] if expected.no_batchnorm and recovery == "batchnorm" else []
        wanted += told if recovery == "reconstruction" else []
        assert [note.partition(" (")[0] for note in notes] == wanted
    if level == 0:
        torch.testing.assert_close(outputs["none"], dense(pixels).detach())  # attention has a fast path without masks
    assert torch.equal(outputs["none"], outputs["batchnorm"]) == expected.no_batchnorm
    assert same_bits(before, dense.state_dict())


def grouped(reasons: dict[str, str]) -> list[list[str]]:
    return [[name for name in reasons if reasons[name] == reason] for reason in dict.fromkeys(reasons.values())]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("l1", "random")])
def test_every_criterion_scores_every_layer_and_says_which_only_by_magnitude(case, images, criterion):
    dense, expected, _ = case
    _, notes = pruned(dense, 50, criterion, Calibration(images, position_limit=24 * 20))
    unread = [name for name, why in expected.left.items() if why[:4] not in ("runs", "has ")]
    told = [f"scored by magnitude, not by inputs: {', '.join(unread)}"] if unread and criterion != "gradient" else []
    assert [note for note in notes if "swapped" not in note] == told


def test_a_network_that_cannot_be_traced_is_pruned_and_recovered_as_its_traced_twin(images):
    flow, twin = make("ControlFlow"), make("Twin")
    normalised = normalise(images.images, images.mean, images.std)
    results = {}
    for dense in (flow, twin):
        dense.load_state_dict(flow.state_dict())
        choose_way(dense, normalised)
        calibration = Calibration(images)
        for criterion in ("activation", "obs"):
            model, _ = pruned(dense, 70, criterion, calibration)
            means = Means(dense, tuple(prunable_layers(dense, EXAMPLE)), calibration)
            RECOVERIES["reconstruction"](model, means, 0)
            results.setdefault(criterion, []).append(unmasked_state(model))
    assert (flow.way.traced, twin.way.traced) == (False, True)
    for one, other in results.values():
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


def test_a_shared_weight_counts_once_has_one_mask_and_is_shared_in_files(tmp_path):
    dense = make("SharedWeights")
    model, _ = pruned(dense, 50)
    assert torch.equal(model.first.weight_mask, model.second.weight_mask)
    assert model.first.weight_orig is model.second.weight_orig
    counts = census(model, prunable_layers(model, EXAMPLE), positions_per_image(model, EXAMPLE))
    assert counts.parameters == sum(parameter.numel() for parameter in dense.parameters())
    assert counts.prunable == 3 * 8 * 9 + 8 * 8 * 9 + 4 * 8
    state = unmasked_state(model)
    assert state["first.weight"] is state["second.weight"]
    for path, write in ((tmp_path / "net.pth", save), (tmp_path / "net.npz", save_packed)):
        write(path, {"net": state})
        alone = {name: value for name, value in state.items() if name != "second.weight"}
        write(tmp_path / f"alone{path.suffix}", {"net": alone})
        assert path.stat().st_size - (tmp_path / f"alone{path.suffix}").stat().st_size < 8 * 8 * 9 * 4 / 2
        found = make("SharedWeights")
        fit(found, load(path))
        assert found.first.weight is found.second.weight
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


FLAGS = ["--dataset", "folder", "--image_size", "16", "--levels", "0,70"]


@pytest.fixture
def swept(tmp_path, image_folder):
    """A function that sweeps an awkward network of seed 0; returns the folder and the status."""

    def run(name: str, *flags: str) -> tuple[Path, int]:
        out = tmp_path / name
        out.mkdir()
        torch.save(make(name, 3).state_dict(), out / "net.pth")
        places = ["--checkpoint", out / "net.pth", "--checkpoint_dir", out, "--data_dir", image_folder]
        places += ["--arch", f"{FILE}:{name}"]
        return out, sweep(out, *places, *FLAGS, "--name", "net", *flags)

    return run


def test_a_sweep_without_tracing_has_the_rows_of_the_traced_twin_and_says_so(swept, capsys):
    rows = {}
    recoveries = ("--allocation", "global", "--recover", "none", "batchnorm", "reconstruction")
    for name in ("ControlFlow", "Twin"):
        out, status = swept(name, *recoveries, "--export", "70")
        assert status == 0
        rows[name] = without_seconds(out / "net_pruning.csv")
        said = capsys.readouterr()
        assert ("it is tested as it is, unfolded" in said.out) == (name == "ControlFlow")
        assert "Traced" not in said.err
    for one, other in zip(*rows.values(), strict=True):
        assert "not traced by torch.fx" in one.pop("notes") and other.pop("notes") == ""
        assert abs(float(one.pop("loss")) - float(other.pop("loss"))) < 1e-4
        assert {key: value for key, value in one.items() if key != "file_bytes"} == {
            key: value for key, value in other.items() if key != "file_bytes"
        }


def test_what_a_sweep_prints_of_weights_that_stay_dense(swept, capsys):
    out, status = swept("Attention", "--export", "70", "--recover", "batchnorm")
    said = capsys.readouterr().out
    assert status == 0 and "place, attention.in_proj_weight, layer.self_attn.in_proj_weight (in no convol" in said
    row = rows_of(out / "net_pruning.csv")[-1]
    assert row["notes"].startswith("no BatchNorm to re-estimate")


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("WeightNorm", (), "conv2 cannot be pruned: it is parametrized by WeightNorm; .*remove_parametrizations"),
        ("OldWeightNorm", (), "conv2 cannot be pruned: .*remove_weight_norm"),
        ("Attention", ("--criterion", "filter_l1"), "has no filters that can be removed"),
        ("ControlFlow", ("--engine", "sparse"), "--engine sparse needs a network that torch.fx can trace"),
        ("ControlFlow", ("--measure",), "--measure needs a network that torch.fx can trace"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_cannot_be_done_is_one_line(swept, capsys, name, flags, said):
    _, status = swept(name, *flags)
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 1 and len(error) == 1
    assert re.search(said, error[0])
