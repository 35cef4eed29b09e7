"""Sparse arithmetic: the same outputs as dense kernels give, chosen by zeros alone, refused where it cannot be."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import awaken
from test_pruning import rows_of, sweep
from torch import nn

import Build_Resnet
from sparsity.networks import sparse as engine
from sparsity.networks.inference import inference_copy
from sparsity.networks.layers import prunable_layers
from sparsity.networks.planes import Plane, PlaneConv, to_csr
from sparsity.networks.sparse import SparseNetwork, choose_kernels, run_by, sparse_network
from sparsity.prune.masks import prune_l1_uniform
from sparsity.system.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")
EXAMPLE = torch.zeros(1, 3, 16, 16)


def pruned_copy(arch, level, width=8):
    torch.manual_seed(0)
    model = awaken(Build_Resnet.build({"arch": arch, "num_classes": 5, "width": width}))
    prune_l1_uniform(prunable_layers(model, EXAMPLE), level / 100)
    return inference_copy(model)


def images(count, size=16):
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return noise.contiguous(memory_format=torch.channels_last)


def apart(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def a_conv(in_channels, out_channels, kernel, stride, density, bias=True):
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape) < density)
    return conv.requires_grad_(False)


@pytest.mark.parametrize("pack", [None, to_csr], ids=["dense", "csr"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_convolution_of_planes_is_a_convolution(pack, bias, density, kernel, stride):
    torch.manual_seed(0)
    conv, x = a_conv(5, 7, kernel, stride, density, bias), torch.randn(3, 5, 8, 8)
    layer = PlaneConv(conv, 8, 3, {}, pack)
    plane = Plane(5, 8, 3)
    for _ in range(2):  # the second time buffers hold what the first left
        found = layer(plane.load(x)).images()
        assert torch.allclose(found, conv(x), atol=1e-5)
        x = x.flip(0)


@pytest.mark.parametrize("pack", [None, to_csr], ids=["dense", "csr"])
def test_a_convolution_adds_to_another_plane_and_leaves_its_margins_zero(pack):
    torch.manual_seed(0)
    conv, x, base = a_conv(4, 6, 3, 1, 0.5), torch.randn(2, 4, 6, 6), torch.randn(2, 6, 6, 6)
    into = Plane(6, 6, 2).load(base)
    layer = PlaneConv(conv, 6, 2, {}, pack)
    assert layer(Plane(4, 6, 2).load(x), into) is into
    assert torch.allclose(into.images(), conv(x) + base, atol=1e-5)
    assert not into.pads.any()
    assert not into.whole[:, : into.margin].any() and not into.whole[:, -into.margin :].any()


def test_planes_keep_images():
    x = torch.randn(3, 4, 6, 6)
    plane = Plane(4, 6, 5)
    plane.load(torch.ones(5, 4, 6, 6)).load(x)
    assert torch.equal(plane.images()[:3], x)
    assert (plane.images()[3:] == 1).all()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("level", [0, 50, 95, 99.9, 100])
def test_the_sparse_network_gives_the_outputs_of_the_dense_one(arch, level):
    inference = pruned_copy(arch, level)
    network = run_by("sparse", inference, images(4))
    assert isinstance(network, SparseNetwork)
    with torch.no_grad():
        for count in (1, 2, 31, 32, 33, 70):  # alone, part of a chunk, several chunks
            assert apart(network(images(count)), inference(images(count))) <= 1e-5


def test_thin_networks_and_blocks_without_a_branch_run_sparse():
    spec = {"arch": "resnet50", "num_classes": 5, "width": 8}
    widths = Build_Resnet.inner_widths("resnet50", 8)
    widths |= {name: 3 for name in widths if name.startswith("layer2")} | {f"layer3.1.conv{i}": 0 for i in (1, 2)}
    torch.manual_seed(0)
    inference = inference_copy(awaken(Build_Resnet.build(spec | {"widths": widths})))
    network = run_by("sparse", inference, images(4))
    with torch.no_grad():
        assert apart(network(images(9)), inference(images(9))) <= 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_may_be_mixed(threads):
    torch.set_num_threads(threads)
    inference = pruned_copy("resnet50", 90)
    names = list(choose_kernels(inference, EXAMPLE, "sparse")[0])
    kernels = {name: ("csr", "conv")[index % 2] for index, name in enumerate(names)}
    network = sparse_network(inference, images(3), kernels)
    with torch.no_grad():
        assert apart(network(images(5)), inference(images(5))) <= 1e-5
    assert network.words() == f"sparse arithmetic in {(len(names) + 1) // 2} of {len(names)} convolutions"


@pytest.fixture(scope="module")
def wide_copy():
    """An inference copy of full width for each level, made once: that takes longer than the tests."""
    return functools.cache(functools.partial(pruned_copy, "resnet18", width=64))


@pytest.mark.parametrize(("level", "sparse"), [(0, False), (50, False), (80, False), (95, True), (99, True)])
def test_auto_goes_by_the_zeros(wide_copy, level, sparse):
    inference = wide_copy(level)
    assert isinstance(run_by("auto", inference, images(2)), SparseNetwork) == sparse
    assert run_by("dense", inference, images(2)) is inference


def test_the_estimate_falls_with_density(wide_copy):
    gains = [choose_kernels(wide_copy(level), EXAMPLE, "sparse")[1] for level in (50, 80, 90, 95, 99)]
    assert gains == sorted(gains)
    assert gains[0] < 1 < gains[-1]


def test_layers_that_are_too_dense_stay_dense():
    torch.manual_seed(0)
    model = awaken(Build_Resnet.resnet18(width=64))
    layers = prunable_layers(model, EXAMPLE)
    prune_l1_uniform({name: layer for name, layer in layers.items() if name.startswith("layer4")}, 0.98)
    kernels, _ = choose_kernels(inference_copy(model), EXAMPLE, "auto")
    assert all(kernels[name] == "csr" for name in layers if name.startswith("layer4"))
    wide = [name for name, layer in layers.items() if layer.kernel_size == (3, 3) and name[:6] in ("layer1", "layer3")]
    assert all(kernels[name] == "conv" for name in wide)


class Odd(nn.Module):
    def __init__(self, conv, after=F.relu):
        super().__init__()
        self.conv, self.linear, self.after = conv, nn.Linear(4, 2), after

    def forward(self, x):
        x = self.after(self.conv(x))
        return self.linear(torch.flatten(F.avg_pool2d(x, x.shape[-2:]), 1))


@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        (Odd(nn.Conv2d(3, 4, 5, padding=2)), 8, "neither a 1x1 nor a 3x3"),
        (Odd(nn.Conv2d(3, 4, 3)), 8, "neither a 1x1 nor a 3x3"),
        (Odd(nn.Conv2d(3, 4, 3, padding=1, dilation=2)), 8, "neither a 1x1 nor a 3x3"),
        (Odd(nn.Conv2d(3, 4, 3, padding=1, stride=2)), 7, "which 2 does not divide"),
        (Odd(nn.Conv2d(3, 4, 3, padding=1), torch.sigmoid), 8, "is no part of a ResNet"),
    ],
)
def test_other_networks_run_dense_and_say_why_not_sparse(model, size, said):
    inference = inference_copy(model.eval())
    assert run_by("auto", inference, images(2, size)) is inference
    with pytest.raises(UserError, match=said):
        run_by("sparse", inference, images(2, size))


def test_other_types_and_shapes_run_dense():
    inference = inference_copy(awaken(Build_Resnet.resnet18(width=8)), torch.bfloat16)
    with pytest.raises(UserError, match="float32 on a CPU"):
        run_by("sparse", inference, images(2).bfloat16())
    with pytest.raises(UserError, match="not square"):
        run_by("sparse", pruned_copy("resnet18", 95), images(2)[:, :, :8])


def test_a_network_that_planes_get_wrong_is_refused(monkeypatch):
    """Whatever the reason: outputs are compared before anything is evaluated."""
    monkeypatch.setattr(engine, "_relu", lambda plane: plane)
    with pytest.raises(UserError, match="disagree"):
        run_by("sparse", pruned_copy("resnet18", 95), images(2))


def test_narrow_networks_run_dense():
    inference = pruned_copy("resnet50", 99)
    assert run_by("auto", inference, images(2)) is inference


def test_a_sweep_gives_the_same_with_either_engine(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "TAP_COST", 1)  # or so narrow a network would never run sparse
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,95,100"]
    for name in ("dense", "sparse", "auto"):
        assert sweep(tmp_path / name, *flags, "--engine", name) == 0
    tables = {name: rows_of(tmp_path / name / "colours_resnet18_pruning.csv") for name in ("dense", "sparse", "auto")}
    for row, other in zip(tables["dense"], tables["sparse"], strict=True):
        assert row["accuracy"] == other["accuracy"] and row["agreement"] == other["agreement"]
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=2e-6)
        assert "sparse arithmetic" not in row["notes"]
        assert "sparse arithmetic in 20 of 20 convolutions" in other["notes"]
    assert ["sparse arithmetic" in row["notes"] for row in tables["auto"]] == [False, True, True]
    capsys.readouterr()
    assert sweep(tmp_path / "bf16", *flags, "--engine", "sparse", "--precision", "bf16") == 1
    assert (
        "--engine sparse cannot run this network (sparse products are for float32 on a CPU)" in capsys.readouterr().err
    )


def test_a_sweep_of_before_there_were_engines_goes_on(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,95"]
    assert sweep(tmp_path, *flags, "--engine", "dense") == 0
    assert sweep(tmp_path, *flags, "--engine", "auto") == 0


def test_dense_and_sparse_copies_do_not_share_what_they_change():
    inference = pruned_copy("resnet18", 95)
    before = copy.deepcopy(inference.state_dict())
    run_by("sparse", inference, images(2))(images(3))
    assert all(torch.equal(value, before[name]) for name, value in inference.state_dict().items())
