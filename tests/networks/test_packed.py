"""A packed network comes back bit for bit, is as small as promised, and takes no more memory than networks do."""

import io
import json
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import same_bits

from sparsity.networks import checkpoint, packed
from sparsity.system.errors import UserError

METADATA = {"epoch": 7, "settings": {"note": "größer"}, "metrics": [0.1, 1e-300, None]}


def weights(*shape, seed=0, level=0.0):
    """Random weights, the share of smallest magnitude at zero."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    order = tensor.abs().flatten().argsort()[: round(level * tensor.numel())]
    return tensor.flatten().index_fill(0, order, 0.0).reshape(shape)


def network(level=0.0):
    """Tensors of every form that a state dict can have, the convolution cut at a level."""
    return {
        "conv.weight": weights(16, 8, 3, 3, level=level),
        "bn.num_batches_tracked": torch.tensor(12_345_678_901),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(-2.5),
        "extremes": torch.tensor([1e-45, -1e-45, 1.17e-38, -3.0e-39, 1e38, -1e38]),
        "far apart": torch.zeros(2000).index_fill(0, torch.tensor([0, 255, 511, 767, 1999]), -1.0),
        "negative count": torch.tensor(-(2**63)),
        "index": torch.arange(12).view(3, 4),
        "short": torch.tensor([[-7, 9]], dtype=torch.int16),
        "switch": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", [0, 0.5, 0.86, 0.99, 1])
def test_everything_comes_back(level, precision):
    state = network(level)
    found, metadata = packed.unpack(packed.pack(state, METADATA, precision))
    assert metadata == METADATA
    assert same_bits(found, packed.stored(state, precision))
    assert precision == "bf16" or same_bits(found, state)
    assert packed.unpack(packed.pack({}, {"mean": (0.5, 1)}, precision)) == ({}, {"mean": [0.5, 1]})


def test_bf16_is_the_nearest_with_ties_to_even():
    patterns = torch.randint(0, 0x7F7F0000, (20000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    ties = patterns[:5000] & ~0xFFFF | 0x8000
    values = torch.cat([patterns, ties, ties + 1, ties - 1]).view(torch.float32)
    state = {"plus": values, "minus": -values}
    expected = {name: tensor.bfloat16().float() + 0.0 for name, tensor in state.items()}  # -0.0 + 0.0 is 0.0
    assert same_bits(packed.stored(state, "bf16"), expected)


def test_minus_zero_becomes_zero_and_the_network_itself_is_left_alone():
    weight = weights(4, 6, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    state = {"minus": torch.tensor([-0.0, 0.0, -1e-45, -1.0]), "strided": weight, "transposed": weights(3, 5).T}
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    found, _ = packed.unpack(packed.pack(state, {}))
    assert same_bits(found, before | {"minus": torch.tensor([0.0, 0.0, -1e-45, -1.0])})
    copy = packed.stored(state)
    assert same_bits(found, copy)
    for tensor in copy.values():
        tensor.fill_(1)
    assert same_bits(state, before)


@pytest.mark.parametrize("level", [0.4, 0.8, 0.95])
@pytest.mark.parametrize(("precision", "value_bits", "bound"), [("fp32", 32, 0.87), ("bf16", 16, 0.72)])
def test_size_stays_below_the_yardstick(level, precision, value_bits, bound):
    """Also where layers of unequal density share a file."""
    state = {name: weights(128, 128, 3, 3, level=share) for name, share in (("some", level), ("few", 0.98))}
    zeros = [int((weight == 0).sum()) for weight in state.values()]
    yardstick = sum(128 * 128 * 9 * packed.entropy_bits(count, 128 * 128 * 9, value_bits) for count in zeros)
    assert 8 * len(packed.pack(state, {}, precision)) <= bound * yardstick
    assert [packed.entropy_bits(0, 9), packed.entropy_bits(9, 9), packed.entropy_bits(5, 10, 16)] == [32, 0, 9]


def test_what_cannot_be_packed_is_said(tmp_path, monkeypatch):
    for state, metadata, error, said in (
        ({"w": torch.tensor([1.0, torch.nan])}, {}, ValueError, "w holds NaN"),
        ({"w": torch.tensor([3.4e38])}, {}, ValueError, "w holds values beyond bfloat16"),
        ({"w": torch.zeros(2).double()}, {}, ValueError, "float64"),
        ({"n": torch.zeros(0, dtype=torch.int64)}, {}, ValueError, "n holds neither"),
        ({"n": torch.zeros(2, dtype=torch.complex64)}, {}, ValueError, "n holds neither"),
        ({}, {"loss": float("nan")}, ValueError, "not JSON compliant"),
        ({}, {"net": torch.zeros(1)}, TypeError, "not JSON serializable"),
        ({}, {"x": "a" * packed.HEADER_LIMIT}, ValueError, "are more than"),
    ):
        with pytest.raises(error, match=said):
            packed.pack(state, metadata, "bf16")
    with pytest.raises(UserError, match="cannot be written"):
        checkpoint.save_packed(tmp_path / "odd.npz", {"net": {}, "settings": {"odd": torch.zeros(2)}})
    monkeypatch.setattr(packed, "VALUES_LIMIT", 2**18)
    assert packed.pack({"w": torch.zeros(2**18)}, {})
    with pytest.raises(ValueError, match="too many values"):
        packed.pack({"w": torch.zeros(2**18), "v": torch.zeros(1)}, {})


@contextmanager
def memory_below(limit):
    """Assert that not more bytes are allocated within the block at one time; numpy's are counted too."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("level", [0, 0.5, 0.95, 1])
def test_packing_and_unpacking_take_a_few_times_the_network(level):
    state = {str(seed): weights(128, 128, 3, 3, seed=seed, level=level) for seed in range(6)}
    size = sum(4 * tensor.numel() for tensor in state.values())
    with memory_below(3 * size + 2**25):  # numpy writes blocks of 2**24
        data = packed.pack(state, {})
    with memory_below(3 * size):
        packed.unpack(data)
    assert level < 1 or size > 2000 * len(data)  # however little is left, it is read


def forge(path, entries, size=12, **arrays):
    """A sound archive of random weights, with entries that claim more in its layout, and arrays exchanged."""
    with np.load(io.BytesIO(packed.pack({"w": weights(size)}, METADATA)), allow_pickle=False) as found:
        all_arrays = dict(found)
    header = json.loads(all_arrays["header"].tobytes())
    header["layout"] += [{"name": "huge", "nonzero": 0, "least": 0} | entry for entry in entries]
    all_arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(path, **all_arrays | arrays)


@pytest.mark.parametrize(
    ("entries", "change", "said"),
    [
        ([{"shape": [2**30]}], {"size": 2**21}, "too many values"),  # 51 GB in 50 MB, on a smaller scale
        ([{"shape": [9], "nonzero": 2**40}], {}, "too many values"),
        ([{"shape": [-(2**40)]}, {"shape": [2**40]}], {}, "whole numbers"),
        ([], {"header": np.zeros(50_000_000, np.uint8)}, "header is no array"),
        ([], {"values": np.zeros(50_000_000, np.uint8)}, "values is no array"),
        ([], {"values": np.array([{}], object)}, "values is no array"),
        ([], {"header": np.full(100_000, ord("["), np.uint8)}, "recursion"),
    ],
)
def test_a_file_that_claims_to_be_large_is_refused_before_it_takes_memory(tmp_path, entries, change, said):
    path = tmp_path / "bad.npz"
    forge(path, entries, **change)
    with memory_below(2 * path.stat().st_size + 2e6), pytest.raises(UserError, match=said):
        checkpoint.load(path)
