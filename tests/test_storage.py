"""A packed network comes back bit for bit, is as small as promised, and a damaged file is refused or means the same."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import Build_Resnet
from sparsity.networks import checkpoint, families, layout, packed
from sparsity.system.errors import UserError

SPEC = {"arch": "resnet18", "num_classes": 3, "width": 4}
METADATA = {"epoch": 7, "model": SPEC, "settings": {"seed": 3, "note": "größer"}, "metrics": [0.1, 1e-300, None]}


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8).tolist()


def same(state, other):
    return list(state) == list(other) and all(
        state[name].dtype == other[name].dtype
        and state[name].shape == other[name].shape
        and bits(state[name]) == bits(other[name])
        for name in state
    )


def cut(tensor, level):
    """A copy with the share of smallest magnitude at zero."""
    order = tensor.abs().flatten().argsort()[: round(level * tensor.numel())]
    return tensor.flatten().index_fill(0, order, 0.0).reshape(tensor.shape)


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def network(level=0.0):
    """Tensors of every form that a state dict can have, cut at a level."""
    state = {
        "conv.weight": cut(weights(16, 8, 3, 3), level),
        "bn.num_batches_tracked": torch.tensor(12_345_678_901),
        "bn.weight": weights(16, seed=1) + 1,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(-2.5),
        "one": torch.tensor([3.0]),
        "extremes": torch.tensor([1e-45, -1e-45, 1.17e-38, -3.0e-39, 3.4e38, -3.4e38]),
        "zeros": torch.zeros(70, 9),
        "far apart": torch.zeros(2000).index_fill(0, torch.tensor([0, 255, 511, 767, 1999]), -1.0),
        "negative count": torch.tensor(-(2**63)),
    }
    return {name: tensor.clamp(-1e38, 1e38) if name == "extremes" else tensor for name, tensor in state.items()}


def written(path, state, metadata=METADATA, precision="fp32"):
    path.write_bytes(packed.pack(state, metadata, precision))
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", [0, 0.5, 0.86, 0.99, 1])
def test_everything_comes_back(tmp_path, level, precision):
    state = network(level)
    found, metadata = packed.unpack(written(tmp_path / "net.npz", state, precision=precision))
    assert metadata == METADATA
    assert same(found, packed.stored(state, precision))
    if precision == "fp32":
        assert same(found, state)


def test_bf16_is_the_nearest_with_ties_to_even():
    patterns = torch.randint(0, 0x7F7F0000, (20000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    ties = patterns[:5000] & ~0xFFFF | 0x8000
    values = torch.cat([patterns, ties, ties + 1, ties - 1]).view(torch.float32)
    values = torch.cat([values, -values])
    expected = values.bfloat16().float() + 0.0  # -0.0 + 0.0 is 0.0
    assert bits(packed.stored({"w": values}, "bf16")["w"]) == bits(expected)


def test_minus_zero_becomes_zero_and_nothing_else_changes(tmp_path):
    state = {"w": torch.tensor([-0.0, 0.0, -1e-45, -1.0])}
    found, _ = packed.unpack(written(tmp_path / "net.npz", state))
    assert same(found, {"w": torch.tensor([0.0, 0.0, -1e-45, -1.0])})
    assert same(found, packed.stored(state))
    assert bits(state["w"][:1]) == bits(torch.tensor([-0.0]))  # the network itself is left alone


def test_what_is_stored_shares_no_memory():
    state = network()
    before = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in packed.stored(state).values():
        tensor.fill_(1)
    assert same(state, before)


def test_strided_tensors_and_those_with_gradients_are_packed_in_their_order(tmp_path):
    weight = weights(4, 6, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    found, _ = packed.unpack(written(tmp_path / "net.npz", {"w": weight, "t": weights(3, 5).T}))
    assert same(found, {"w": weight.detach().contiguous(), "t": weights(3, 5).T.contiguous()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_packed_checkpoint_is_the_same_network(tmp_path, precision):
    torch.manual_seed(0)
    model = Build_Resnet.build(SPEC).eval()
    content = {"net": checkpoint.plain_state(model), **METADATA}
    checkpoint.save(tmp_path / "net.pth", {**content, "net": packed.stored(content["net"], precision)})
    checkpoint.save_packed(tmp_path / "net.npz", content, precision)
    loaded = [checkpoint.load(tmp_path / name) for name in ("net.pth", "net.npz")]
    plain, back = (families.restore(one, Build_Resnet.build, Build_Resnet.spec_of) for one in loaded)
    assert same(plain.state_dict(), back.state_dict())
    assert (loaded[1].epoch, loaded[1].model, loaded[1].settings) == (7, SPEC, METADATA["settings"])
    assert loaded[1].content["metrics"] == METADATA["metrics"]
    back(torch.zeros(1, 3, 8, 8))


def test_a_packed_file_is_checked_like_any_other(tmp_path):
    checkpoint.save_packed(tmp_path / "net.npz", {"net": {"bn.running_var": torch.tensor([-1.0])}})
    with pytest.raises(UserError, match="negative variance"):
        checkpoint.load(tmp_path / "net.npz")
    checkpoint.save_packed(tmp_path / "net.npz", {"net": {"w": torch.ones(1)}, "data": {"dataset": 5}})
    with pytest.raises(UserError, match="entry 'data'"):
        checkpoint.load(tmp_path / "net.npz")


@pytest.mark.parametrize("level", [0.4, 0.6, 0.8, 0.9, 0.95])
@pytest.mark.parametrize(("precision", "value_bits", "bound"), [("fp32", 32, 0.87), ("bf16", 16, 0.72)])
def test_size_stays_below_the_yardstick(level, precision, value_bits, bound):
    weight = cut(weights(512, 128, 3, 3), level)
    size = 8 * len(packed.pack({"w": weight}, {}, precision)) / weight.numel()
    assert size <= bound * packed.entropy_bits(int((weight == 0).sum()), weight.numel(), value_bits)


def test_layers_of_unequal_density_share_a_file():
    """Each is coded as suits it: together no larger than apart."""
    layers = [cut(weights(256, 64, 3, 3, seed=seed), level) for seed, level in enumerate((0.2, 0.99, 0.6, 0.95))]
    apart = sum(len(packed.pack({"w": layer}, {})) for layer in layers)
    together = len(packed.pack({str(seed): layer for seed, layer in enumerate(layers)}, {}))
    assert together <= apart


def test_the_yardstick():
    assert packed.entropy_bits(0, 10) == 32
    assert packed.entropy_bits(10, 10) == 0
    assert packed.entropy_bits(5, 10, 16) == 9
    assert packed.entropy_bits(95, 100) == pytest.approx(1.8864, abs=1e-4)


def test_only_bytes_are_in_the_file_for_any_reader(tmp_path):
    with np.load(written(tmp_path / "net.npz", network()), allow_pickle=False) as arrays:
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.uint8)}
        assert json.loads(arrays["header"].tobytes())["metadata"] == METADATA


@pytest.mark.parametrize(
    ("state", "metadata", "error", "said"),
    [
        ({"w": torch.tensor([1.0, torch.nan])}, {}, ValueError, "w holds NaN"),
        ({"w": torch.tensor([-torch.inf])}, {}, ValueError, "w holds NaN"),
        ({"w": torch.zeros(2).double()}, {}, ValueError, "float64"),
        ({"n": torch.zeros(2, dtype=torch.int64)}, {}, ValueError, "single int64"),
        ({"n": torch.tensor(True)}, {}, ValueError, "single int64"),
        ({"w": torch.zeros([1] * 9)}, {}, ValueError, "wrong entry"),
        ({}, {"loss": float("nan")}, ValueError, "not JSON compliant"),
        ({}, {"net": torch.zeros(1)}, TypeError, "not JSON serializable"),
        ({}, {"x": {1: 0, "1": 0}}, ValueError, "not as it is written"),
        ({}, {"x": "a" * layout.HEADER_LIMIT}, ValueError, "are more than"),
    ],
)
def test_what_cannot_be_packed_is_said(state, metadata, error, said):
    with pytest.raises(error, match=said):
        packed.pack(state, metadata)


def test_values_that_rounding_makes_infinite_are_not_packed():
    state = {"w": torch.tensor([3.4e38])}
    assert packed.pack(state, {})
    with pytest.raises(ValueError, match="w holds values beyond bfloat16"):
        packed.pack(state, {}, "bf16")


def test_a_network_of_nothing_that_could_not_be_read_back_is_not_packed(monkeypatch):
    monkeypatch.setattr(layout, "DENSE_LIMIT", 2**20)
    assert packed.pack({"w": torch.zeros(2**18)}, {})
    with pytest.raises(ValueError, match="too many"):
        packed.pack({"w": torch.zeros(2**20)}, {})


def test_tuples_become_lists(tmp_path):
    assert packed.unpack(written(tmp_path / "net.npz", {}, {"mean": (0.5, 1)})) == ({}, {"mean": [0.5, 1]})


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path / "net.npz", network())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_packed(path, {"net": network(0.9)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.npz"]


def small():
    """A network whose arrays can be written by hand: 3 of 12 weights in bits, 2 of 300 in gaps."""
    dense = torch.zeros(3, 4).index_fill(1, torch.tensor([1]), -0.5)
    return {"dense": dense, "sparse": torch.zeros(300).index_fill(0, torch.tensor([2, 290]), 0.75)}


def arrays():
    with np.load(io.BytesIO(packed.pack(small(), {"epoch": 1}))) as found:
        return {name: found[name] for name in found.files}


def rewritten(path, *drop, **change):
    """A file with arrays taken away and put in, sound as an archive."""
    np.savez_compressed(path, **{name: value for name, value in (arrays() | change).items() if name not in drop})


def with_header(path, change):
    document = json.loads(arrays()["header"].tobytes())
    change(document)
    text = json.dumps(document, separators=(",", ":")).encode()
    rewritten(path, header=np.frombuffer(text, np.uint8))


def with_text(path, old, new):
    text = arrays()["header"].tobytes()
    assert text.count(old) == 1
    rewritten(path, header=np.frombuffer(text.replace(old, new), np.uint8))


def with_entry(path, **change):
    with_header(path, lambda document: document["layout"][0].update(change))


def with_array(path, name, index, value):
    changed = arrays()[name].copy()
    changed[index] = value
    rewritten(path, **{name: changed})


def with_plane(path, *planes):
    """The high bytes of the first value, others left as they are."""
    values = arrays()["values"].reshape(4, -1).copy()
    values[: len(planes), 0] = planes
    rewritten(path, values=values.reshape(-1))


def patched(path, signature, offset, value):
    """A good file with bytes of a record of its zip directory written over."""
    content = bytearray(packed.pack(small(), {}))
    start = content.rindex(signature) + offset
    content[start : start + len(value)] = value
    path.write_bytes(content)


def stored_plainly(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, value in arrays().items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            archive.writestr(f"{name}.npy", buffer.getvalue())


def bomb(path):
    """A header of 50 megabytes that takes 50 kilobytes."""
    rewritten(path, header=np.zeros(50_000_000, np.uint8))


def twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("header", "bits", "gaps", "values", "values"):
            archive.writestr(f"{name}.npy", b"")


def with_member(path, start, data, **declared):
    """The array of values with other bytes before them, and what the directory says of them changed."""
    rewritten(path, "values")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("values.npy", start + data)
        for key, value in declared.items():
            setattr(archive.getinfo("values.npy"), key, value)


def described(text, version=b"\x01\x00"):
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


class Evil:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return open, ("pwned", "w")


DESCRIPTION = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }"
HUGE = [2**31 - 1] * 8
BAD = {
    "text": (lambda path: path.write_text("hello " * 20), "does not end as"),
    "nothing": (lambda path: path.write_bytes(b""), "empty"),
    "few bytes": (lambda path: path.write_bytes(b"PK\x05\x06"), "empty"),
    "a pth": (lambda path: torch.save({"net": small()}, path), "damaged"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), "damaged"),
    "other zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "b"), "does not hold the arrays"),
    "other npz": (lambda path: np.savez_compressed(path, labels=np.zeros(5)), "does not hold the arrays"),
    "cut short": (lambda path: path.write_bytes(packed.pack(small(), {})[:-100]), "does not end as"),
    "head gone": (lambda path: path.write_bytes(packed.pack(small(), {})[100:]), "does not end as"),
    "array missing": (lambda path: rewritten(path, "gaps"), "does not hold the arrays"),
    "array too many": (lambda path: rewritten(path, more=np.zeros(1, np.uint8)), "does not hold the arrays"),
    "array twice": (twice, "does not hold the arrays"),
    "object array": (lambda path: rewritten(path, values=np.array([Evil()], object)), "values"),
    "other dtype": (lambda path: rewritten(path, values=arrays()["values"].view(np.int8)), "not a plain array"),
    "wider dtype": (lambda path: rewritten(path, bits=np.zeros(1, np.uint16)), "bits takes 2 bytes instead of 2|plain"),
    "other shape": (lambda path: rewritten(path, values=arrays()["values"].reshape(4, -1)), "not a plain array"),
    "too few values": (lambda path: rewritten(path, values=arrays()["values"][:-1]), "values takes 19 bytes"),
    "too many values": (lambda path: rewritten(path, values=np.zeros(21, np.uint8)), "values takes 21 bytes"),
    "no bytes behind": (
        lambda path: with_member(path, described(DESCRIPTION % 2**40), bytes(20)),
        "not a plain array",
    ),
    "fewer bytes than declared": (
        lambda path: with_member(path, described(DESCRIPTION % 20), bytes(15), file_size=10 + len(DESCRIPTION) + 20),
        "ends too early",
    ),
    "code as header": (
        lambda path: with_member(path, described(b"__import__('os').system('touch pwned')"), bytes(20)),
        "not a plain array",
    ),
    "other form of header": (
        lambda path: with_member(path, described(DESCRIPTION % 20, b"\x02\x00"), bytes(20)),
        "values is not an array",
    ),
    "place beyond all files": (
        lambda path: with_member(path, described(DESCRIPTION % 20), bytes(20), header_offset=2**64 - 1),
        "damaged",
    ),
    "stored": (stored_plainly, "not deflated"),
    "bomb": (bomb, "header takes 50000000 bytes"),
    "encrypted": (lambda path: patched(path, b"PK\x01\x02", 8, b"\x01"), "encrypted"),
    "bzip2": (lambda path: patched(path, b"PK\x01\x02", 10, b"\x0c"), "not deflated"),
    "other checksum": (lambda path: patched(path, b"PK\x01\x02", 16, b"\0\0\0\0"), "Bad CRC-32"),
    "other place": (lambda path: patched(path, b"PK\x01\x02", 42, b"\xff\xff\xff\x7f"), "damaged"),
    "place beyond numbers": (lambda path: patched(path, b"PK\x01\x02", 42, b"\xff\xff\xff\xff"), "damaged"),
    "declared smaller": (lambda path: patched(path, b"PK\x01\x02", 24, b"\x10\0\0\0"), "values takes|Bad CRC"),
    "huge directory": (lambda path: patched(path, b"PK\x05\x06", 12, b"\xff\xff\xff\0"), "does not end as"),
    "more behind": (lambda path: path.write_bytes(bytes(packed.pack(small(), {})) + b"x"), "does not end as"),
    "comment": (lambda path: patched(path, b"PK\x05\x06", 20, b"\x05\0"), "does not end as"),
    "version 2": (lambda path: with_text(path, b'"version":1', b'"version":2'), "not of version 1"),
    "version true": (lambda path: with_text(path, b'"version":1', b'"version":true'), "not of version 1"),
    "no JSON": (lambda path: with_text(path, b'"layout":[', b'"layout":[['), "damaged"),
    "JSON list": (lambda path: rewritten(path, header=np.frombuffer(b"[]", np.uint8)), "not of version"),
    "deep JSON": (lambda path: with_text(path, b'"epoch":1', b'"epoch":' + b"[" * 100_000), "recursion"),
    "NaN": (lambda path: with_text(path, b'"epoch":1', b'"epoch":NaN'), "not JSON compliant"),
    "infinity": (lambda path: with_text(path, b'"epoch":1', b'"epoch":1e999'), "not JSON compliant"),
    "key twice": (lambda path: with_text(path, b'"epoch":1', b'"epoch":2,"epoch":1'), "not as it is written"),
    "half a character": (lambda path: with_text(path, b'"epoch":1', b'"epoch":"\\ud800"'), "surrogates"),
    "no UTF-8": (lambda path: with_text(path, b'"epoch"', b'"ep\xffch"'), "utf-8"),
    "key too many": (lambda path: with_header(path, lambda document: document.update(more=1)), "not as it is"),
    "precision": (lambda path: with_header(path, lambda document: document.update(precision="fp8")), "precision"),
    "layout is text": (lambda path: with_header(path, lambda document: document.update(layout="x")), "layout"),
    "metadata is a list": (lambda path: with_header(path, lambda document: document.update(metadata=[])), "metadata"),
    "entry is a number": (lambda path: with_header(path, lambda document: document.update(layout=[5])), "damaged"),
    "entry incomplete": (lambda path: with_header(path, lambda document: document["layout"][0].pop("least")), "least"),
    "entry too much": (lambda path: with_entry(path, more=1), "more"),
    "name is a number": (lambda path: with_entry(path, name=5), "wrong entry"),
    "name twice": (lambda path: with_entry(path, name="sparse"), "names a tensor twice"),
    "negative shape": (lambda path: with_entry(path, shape=[-3, -4]), "wrong entry"),
    "shape of true": (lambda path: with_entry(path, shape=[True, 12]), "wrong entry"),
    "shape of floats": (lambda path: with_entry(path, shape=[3.0, 4]), "wrong entry"),
    "shape is a number": (lambda path: with_entry(path, shape=12), "wrong entry"),
    "shape too deep": (lambda path: with_entry(path, shape=[12] + [1] * 8), "wrong entry"),
    "huge shape": (lambda path: with_entry(path, shape=HUGE, nonzero=3), "too many"),
    "huge empty shape": (lambda path: with_entry(path, shape=[0, *HUGE[1:]], nonzero=0, least=0), "damaged"),
    "beyond memory": (lambda path: with_entry(path, shape=[2**28]), "too many"),
    "other shape of the weights": (lambda path: with_entry(path, shape=[3, 7]), "bits takes 2 bytes instead of 3"),
    "count too high": (lambda path: with_entry(path, nonzero=4), "damaged"),
    "count above size": (lambda path: with_entry(path, nonzero=13), "wrong entry"),
    "count of true": (lambda path: with_entry(path, nonzero=True), "wrong entry"),
    "least zero": (lambda path: with_entry(path, least=0), "wrong entry"),
    "least beyond": (lambda path: with_entry(path, least=0x7F800000), "wrong entry"),
    "whole number too large": (
        lambda path: with_header(path, lambda d: d["layout"].append({"name": "n", "integer": 2**63})),
        "wrong entry",
    ),
    "whole number of true": (
        lambda path: with_header(path, lambda d: d["layout"].append({"name": "n", "integer": True})),
        "wrong entry",
    ),
    "padding": (lambda path: with_array(path, "bits", -1, arrays()["bits"][-1] | 1), "behind the last weight"),
    "another mask": (lambda path: with_array(path, "bits", 0, 0xFF), "dense has not as many values"),
    "gap without end": (lambda path: with_array(path, "gaps", -1, 255), "no end"),
    "gaps beyond": (lambda path: rewritten(path, gaps=np.array([2, 255, 100], np.uint8)), "gaps do not fit"),
    "gap too few": (lambda path: rewritten(path, gaps=np.array([255, 7, 255][:2], np.uint8)), "gaps do not fit"),
    "not a number": (lambda path: with_plane(path, 0xFF), "dense holds NaN"),
    "just infinite": (lambda path: with_plane(path, 0x7F - 0x3F << 1 | 1), "dense holds NaN"),
    "nothing so small": (lambda path: with_array(path, "values", slice(-5, None), 3), "nothing as small as it says"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_packed_network_is_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, said = BAD[kind]
    path = tmp_path / "bad.npz"
    make(path)
    with pytest.raises(UserError, match=said) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def peak_memory(work):
    """The most bytes that were allocated by `work` at one time; numpy's are counted too."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path):
    with pytest.raises(UserError):
        packed.unpack(path)


@pytest.mark.parametrize("kind", ["bomb", "huge shape", "beyond memory", "no bytes behind", "huge directory"])
def test_what_claims_to_be_large_is_refused_before_it_takes_memory(tmp_path, kind):
    path = tmp_path / "bad.npz"
    BAD[kind][0](path)
    assert peak_memory(lambda: refused(path)) < 2e6


def test_a_directory_of_thousands_is_refused_before_it_takes_memory(tmp_path):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20_000):
            archive.writestr(str(number), b"")
    assert peak_memory(lambda: refused(path)) < 2e6


@pytest.mark.parametrize("level", [0, 0.5, 0.95])
def test_packing_and_unpacking_take_a_few_times_the_network(tmp_path, level):
    state = {str(seed): cut(weights(256, 128, 3, 3, seed=seed), level) for seed in range(6)}
    size = sum(4 * tensor.numel() for tensor in state.values())
    path = tmp_path / "net.npz"
    block = 2**24  # which numpy writes at a time
    assert peak_memory(lambda: written(path, state)) < 3 * size + 2 * block
    assert peak_memory(lambda: packed.unpack(path)) < 3 * size


def test_places_that_are_no_file(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "none")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    for name, said in (
        ("none", "is not there"),
        ("folder", "is a folder"),
        ("link", "is not there"),
        ("loop", "is not there"),
        ("pipe", "not a file"),
    ):
        with pytest.raises(UserError, match=f"{name}.npz .*{said}"):
            checkpoint.load(tmp_path / f"{name}.npz")
        with pytest.raises(UserError, match=f"{name}.npz .*not a file"):
            packed.unpack(tmp_path / f"{name}.npz")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = written(tmp_path / "net.npz", small())

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", denied)  # root may read everything, so that modes would not do
    with pytest.raises(UserError, match=r"net.npz cannot be read \(Permission denied\)"):
        packed.unpack(path)


def corrupted(content, draw):
    """A copy with one random damage, half of them where the records of the zip format are."""
    data = bytearray(content)
    length = int(draw.integers(1, 40))

    def place():
        last = len(content) - length
        near_the_end = max(0, len(content) - 350)
        return int(draw.choice([draw.integers(0, last), draw.integers(near_the_end, last), draw.integers(0, 130)]))

    start, other = place(), place()
    kind = draw.integers(6)
    if kind == 0:
        for _ in range(draw.integers(1, 5)):
            data[place()] ^= 1 << int(draw.integers(8))
    elif kind == 1:
        data[start : start + length] = draw.bytes(length)
    elif kind == 2:
        del data[start:]
    elif kind == 3:
        first, second = data[start : start + length], data[other : other + length]
        data[start : start + length], data[other : other + length] = second, first
    elif kind == 4:
        data[start:start] = draw.bytes(length)
    else:
        del data[start : start + length]
    return bytes(data)


def test_a_damaged_file_is_refused_or_means_the_same(tmp_path):
    """2,000 random damages: nothing but UserError, nothing but the very network, and no memory to speak of."""
    draw = np.random.default_rng(0)
    state = network(0.9)
    path = written(tmp_path / "net.npz", state)
    content = path.read_bytes()
    outcomes = {"refused": 0, "the same": 0}

    def try_all():
        for _ in range(2000):
            path.write_bytes(corrupted(content, draw))
            try:
                found, metadata = packed.unpack(path)
            except UserError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            else:
                assert same(found, state)
                assert metadata == METADATA
                outcomes["the same"] += 1

    assert peak_memory(try_all) < 4e6
    assert outcomes["refused"] > 1500
    assert outcomes["the same"] > 20  # in what no reader of a zip file looks at
