"""Times and memory of inference: fresh processes, the columns of --measure, and the kernels that are timed."""

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, files_of, rows_of, stub_times, sweep
from torch import nn

import Build_Resnet
from sparsity.data.images import Split
from sparsity.networks.fused import fused
from sparsity.networks.inference import inference_copy
from sparsity.sweep import timing
from sparsity.sweep.timing import Timer, time_inference
from sparsity.system.errors import UserError

NOISE = Split(torch.zeros(128, 3, 16, 16, dtype=torch.uint8), torch.zeros(128), (0, 0, 0), (1, 1, 1))


def copy_of(width):
    torch.manual_seed(0)
    return inference_copy(Build_Resnet.resnet18(width=width).eval())


def test_a_network_is_timed_in_turns_with_another_and_its_memory_is_that_of_inference_alone():
    """A network of 98 MB with small activations: loading needs it twice, inference once; the reference comes later."""
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, width), nn.ReLU()).eval() for width in (2000, 1000)]
    speed = time_inference(*map(inference_copy, networks), 64, "dense", False)
    assert 98 < speed["peak_memory_mb"] - speed["base_memory_mb"] < 98 + 70
    assert 0 < speed["latency_ms"] < 1000 and speed["speedup"] < 0.9


def test_a_network_of_a_class_that_a_fresh_process_lacks_is_told():
    class Own(nn.Linear):
        pass

    with pytest.raises(UserError, match=r"cannot be timed in a fresh process \(.*Own.*\); leave --measure out"):
        time_inference(Own(3, 4), None, 8, "dense", False)


def test_a_timed_network_is_the_one_that_is_evaluated(tmp_path):
    """A graph adds out of place after it was saved; the sparse engine would not know it."""
    network, images = copy_of(4), torch.randn(2, 3, 16, 16)
    torch.save(network, tmp_path / "network.pt")
    found, _ = timing._load(tmp_path / "network.pt", NOISE, "dense", False)
    evaluated = fused(network, NOISE)
    assert [node.target for node in found.graph.nodes] == [node.target for node in evaluated.graph.nodes]
    assert torch.equal(found(images), evaluated(images))
    sparse, _ = timing._load(tmp_path / "network.pt", NOISE, "sparse", False)
    assert torch.allclose(sparse(images), network(images), atol=1e-5)


def test_a_compiled_sweep_is_timed_through_the_compiler(tmp_path, monkeypatch):
    """For both batch sizes; the timer tells whether the sweep compiles."""
    compiled, told = [], []
    monkeypatch.setattr(timing, "compiled", lambda network, noise, count: compiled.append(count) or network)
    torch.save(copy_of(2), tmp_path / "network.pt")
    timing._load(tmp_path / "network.pt", NOISE, "dense", True)
    assert compiled == [1, 128]
    monkeypatch.setattr(timing, "time_inference", lambda *args: told.append(args) or dict.fromkeys(timing.TIMED, 1.0))
    Timer(None, copy_of(2), 8, "dense", True).columns("network")
    assert told == [("network", None, 8, "dense", True)]


def test_a_process_that_fails_or_dies_is_told_in_one_line():
    too_small = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"timing inference failed: RuntimeError: [^\n]*[Kk]ernel size[^\n]*$"):
        time_inference(inference_copy(too_small), None, 4, "dense", False)

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    threading.Thread(target=kill).start()
    with pytest.raises(UserError, match=r"timing inference failed: [^\n]*SIGKILL$"):
        time_inference(copy_of(4), None, 8, "dense", False)


def test_a_process_whose_parent_is_killed_ends():
    code = """
import Build_Resnet
from sparsity.networks.inference import inference_copy
from sparsity.sweep import timing
timing.time_inference(inference_copy(Build_Resnet.resnet50().eval()), None, 128, "dense", False)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)

    def child():
        """The timing process, as soon as SIGINT, which it ignores while it starts, ends it."""
        for number in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split():
            ignored = Path(f"/proc/{number}/status").read_text().partition("SigIgn:")[2].split()[0]
            if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes() and not int(ignored, 16) & 2:
                return Path(f"/proc/{number}")
        return None

    while not (process := child()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5  # all of its runs would take minutes
    while process.exists() and b"spawn_main" in (process / "cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_row_is_timed_in_a_fresh_process(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50", "--measure", "--engine", "sparse"]
    assert sweep(tmp_path, *flags) == 0
    (row,) = rows_of(files_of(tmp_path).csv)
    assert all(float(row[name]) > 0 for name in ("latency_ms", "throughput", "peak_memory_mb", "speedup"))
    header = json.loads(files_of(tmp_path).json.read_text())
    assert header["measurement"]["runs"] >= 20 and header["dense"][tiny_checkpoint.name]["throughput"] > 0


def test_times_are_added_to_rows_and_kept(swept_at_two, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    timed = stub_times(monkeypatch)
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    both = [*flags, "--criterion", "l1", "filter_l1", "--measure"]
    assert [row["throughput"] for row in rows_of(swept_at_two)] == ["", ""]
    assert sweep(tmp_path, *both) == 0
    rows, count = rows_of(swept_at_two), len(timed)
    # Masks are timed as the dense network, filters as the thin one.
    assert [float(row["speedup"]) for row in rows[:3]] == [1, 1, 1] and float(rows[3]["speedup"]) > 1.5
    assert sweep(tmp_path, *both) == 0 and len(timed) == count
    assert sweep(tmp_path, *flags, "--export", "50", "--checkpoint_dir", tmp_path / "files") == 0
    assert [row["throughput"] for row in rows_of(swept_at_two)] == [row["throughput"] for row in rows]
    assert sweep(tmp_path, *both, "--engine", "sparse") == 1  # times of two engines are not mixed
    assert "engine (dense there, sparse now)" in capsys.readouterr().err


def test_a_sweep_gives_the_same_with_either_engine(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,95,100"]
    tables = []
    for name in ("dense", "sparse"):
        assert sweep(tmp_path / name, *flags, "--engine", name) == 0
        tables.append(rows_of(files_of(tmp_path / name).csv))
    for row, other in zip(*tables, strict=True):
        assert row["accuracy"] == other["accuracy"] and row["agreement"] == other["agreement"]
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=2e-6)
        assert "sparse arithmetic" not in row["notes"] and "sparse arithmetic" in other["notes"]
    assert sweep(tmp_path / "bf16", *flags, "--engine", "sparse", "--precision", "bf16") == 1
    assert "--engine sparse is for float32 on a CPU" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("compiling", [False, True])
def test_a_network_is_timed_on_a_gpu(compiling):
    networks = [copy_of(width).cuda().bfloat16() for width in (16, 64)]
    speed = time_inference(*networks, 32, "dense", compiling)
    weights = sum(parameter.nbytes for parameter in networks[0].parameters()) / 1e6
    assert speed["peak_memory_mb"] > weights and speed["base_memory_mb"] is None
    assert speed["latency_ms"] > 0 and speed["speedup"] > 1


@pytest.mark.cuda
@pytest.mark.parametrize("compiling", ["off", "on"])
def test_a_sweep_on_a_gpu_has_the_rows_of_the_cpu(tiny_checkpoint, tmp_path, compiling):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50,100", "--recover", "none", "batchnorm"]
    assert sweep(tmp_path / "cpu", *flags, "--device", "cpu") == 0
    assert sweep(tmp_path / "cuda", *flags, "--device", "cuda", "--compile", compiling) == 0
    for row, other in zip(*(rows_of(files_of(tmp_path / name).csv) for name in ("cpu", "cuda")), strict=True):
        assert all(row[name] == other[name] for name in ("level", "sparsity", "nonzero", "macs_ratio"))
        assert abs(float(row["accuracy"]) - float(other["accuracy"])) <= 100 / 24 + 1e-6  # one of 24 images
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-2)
