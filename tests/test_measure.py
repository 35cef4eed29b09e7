"""Times and memory of inference: fresh processes, columns, words; and controls beside them."""

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import train_arguments
from PIL import Image
from test_export import STEM, table
from test_pruning import rows_of, sweep

import Build_Resnet
import run
from sparsity.figures.savings import pareto, savings_lines
from sparsity.networks.inference import inference_copy
from sparsity.results.files import SweepFiles
from sparsity.results.store import read_sweep
from sparsity.sweep import measure
from sparsity.sweep.controls import read_controls
from sparsity.sweep.measure import time_inference
from sparsity.system.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")
CPU = torch.device("cpu")


def copy_of(width):
    return inference_copy(Build_Resnet.resnet18(width=width).eval())


def test_a_network_is_timed_in_turns_with_another():
    speed = time_inference(copy_of(2), copy_of(16), 16, 1, CPU)
    assert 0 < speed.latency_ms < 1000
    assert speed.speedup > 1.2
    assert speed.peak_memory_mb > speed.base_memory_mb > 50


def test_what_is_timed_is_what_is_evaluated():
    """A graph that was saved and loaded adds out of place; the sparse engine would not know it."""
    speed = time_inference(copy_of(4), copy_of(4), 16, 1, CPU, "sparse")
    assert speed.speedup > 0
    network = copy_of(4)
    stream = io.BytesIO(measure._serialised(network))
    received = measure._received(stream, CPU)
    assert [node.target for node in received.graph.nodes] == [node.target for node in network.graph.nodes]
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(received(images), network(images))


def test_memory_is_that_of_inference_and_not_of_loading_and_alone_there_is_no_speedup():
    """A network of 90 MB with small activations: loading needs it twice, inference once."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 120_000), torch.nn.ReLU())
    speed = time_inference(network.eval(), None, 8, 1, CPU)
    weights = 120_000 * 193 * 4 / 1e6
    activations = 2 * 128 * 120_000 * 4 / 1e6
    grown = speed.peak_memory_mb - speed.base_memory_mb
    assert weights < grown < weights + activations + 100
    assert speed.speedup is None


def test_a_process_that_fails_is_told():
    class Broken(torch.nn.Linear):  # cannot be found by the fresh process
        pass

    Broken.__qualname__ = "Broken"
    sys.modules["broken_for_a_test"] = sys.modules[__name__]
    Broken.__module__ = "broken_for_a_test"
    sys.modules["broken_for_a_test"].Broken = Broken
    try:
        with pytest.raises(UserError, match=r"timing inference failed with status 1: .*broken_for_a_test"):
            time_inference(torch.nn.Sequential(Broken(1, 1)), None, 8, 1, CPU)
    finally:
        del sys.modules["broken_for_a_test"]


def test_a_process_whose_parent_is_gone_ends(tmp_path):
    code = (
        f"import sys; sys.path[:0] = {[str(Path(measure.__file__).parents[2])]!r}\n"
        "import torch, Build_Resnet\n"
        "from sparsity.sweep import measure\n"
        "from sparsity.networks.inference import inference_copy\n"
        "measure.RUNS = 20\n"
        "network = inference_copy(Build_Resnet.resnet50(width=16).eval())\n"
        "print('ready', flush=True)\n"
        "measure.time_inference(network, None, 96, 1, torch.device('cpu'))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    parent.stdout.readline()
    deadline = time.monotonic() + 60
    while not (children := _children(parent.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 25  # all of its runs would take longer
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _children(process):
    tasks = Path(f"/proc/{process}/task/{process}/children")
    return tasks.read_text().split() if tasks.exists() else []


def without_processes(monkeypatch):
    """Timing without fresh processes, for tests of what is made of the figures; the networks that are timed."""
    calls = []

    def answer(network, reference, image_size, threads, device, engine):
        calls.append((network, reference))
        weights = sum(parameter.numel() for parameter in network.parameters())
        base = weights if reference is None else sum(parameter.numel() for parameter in reference.parameters())
        return measure.Speed(weights / 1e4, 1e6 / weights, 300.0, 200.0, base / weights if reference else None)

    monkeypatch.setattr("sparsity.sweep.timing.time_inference", answer)
    return calls


@pytest.fixture
def quick(monkeypatch):
    return without_processes(monkeypatch)


@pytest.fixture(scope="module")
def sweep_with_times(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("timed")
    with pytest.MonkeyPatch.context() as patch:
        without_processes(patch)
        assert sweep(out, "--checkpoint", tiny_checkpoint, "--levels", "0,50", "--measure") == 0
    return out


@pytest.fixture
def timed(sweep_with_times, tmp_path, quick):
    """The table of a sweep with times, in the test's own folder."""
    shutil.copytree(sweep_with_times, tmp_path, dirs_exist_ok=True)
    return table(tmp_path)


def test_every_row_is_measured_in_a_fresh_process(tiny_checkpoint, tmp_path):
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "50", "--measure") == 0
    (row,) = rows_of(table(tmp_path))
    assert all(float(row[name]) > 0 for name in ("latency_ms", "throughput", "peak_memory_mb", "speedup"))
    header = json.loads(table(tmp_path).with_suffix(".json").read_text())
    assert header["measurement"]["runs"] >= 20
    assert (header["measurement"]["latency_batch"], header["measurement"]["throughput_batch"]) == (1, 128)
    assert header["dense"][tiny_checkpoint.name]["throughput"] > 0
    assert {"threads", "precision", "torch"} <= header["settings"].keys()


def test_filters_are_timed_as_the_smaller_network_and_masks_as_the_dense_one(tiny_checkpoint, tmp_path, quick, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50", "--criterion", "l1", "filter_l1", "--measure"]
    assert sweep(tmp_path, *flags) == 0
    rows = {(row["criterion"], row["level"]): float(row["speedup"]) for row in rows_of(table(tmp_path))}
    assert rows["l1", "0"] == rows["l1", "50"] == rows["filter_l1", "0"] == 1
    assert rows["filter_l1", "50"] > 1.5
    out = capsys.readouterr().out
    assert "l1 uniform: 1.00x the throughput of dense" in out
    assert "masks alone make nothing faster" in out
    assert "filter_l1 uniform: throughput of the smaller network against dense, 0 %: 1.00x" in out


def test_times_are_added_to_rows_that_are_there_and_kept_by_later_runs(swept_at_two, tiny_checkpoint, tmp_path, quick):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    assert [row["throughput"] for row in rows_of(table(tmp_path))] == ["", ""]
    assert sweep(tmp_path, *flags, "--measure") == 0
    timed = rows_of(table(tmp_path))
    assert all(row["throughput"] for row in timed)
    count = len(quick)
    assert sweep(tmp_path, *flags, "--measure") == 0
    assert len(quick) == count
    assert sweep(tmp_path, *flags, "--export", "50", "--checkpoint_dir", tmp_path / "files") == 0
    assert [row["throughput"] for row in rows_of(table(tmp_path))] == [row["throughput"] for row in timed]


def test_tables_from_before_there_were_sizes_and_times_are_read(swept_at_two, tiny_checkpoint, tmp_path):
    path = swept_at_two
    path.write_text("".join(",".join(line.split(",")[:20]) + "\n" for line in path.read_text().splitlines()))
    assert [row.file_bytes for row in read_sweep(SweepFiles(path.with_suffix(""))).table()] == [None, None]
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "0,50") == 0


@pytest.mark.parametrize("wrong", ["-1", "nan", "inf", "many"])
def test_sizes_and_times_that_cannot_be_are_refused(timed, tiny_checkpoint, tmp_path, capsys, wrong):
    timed.write_text(timed.read_text().replace(rows_of(timed)[0]["latency_ms"], wrong))
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--levels", "0,50", "--measure") == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.drawn
def test_controls_are_measured_beside_the_pruned_networks(image_folder, tiny_checkpoint, tmp_path, quick, capsys):
    small = train_arguments(image_folder, tmp_path, "--epochs", "1")
    small[small.index("--width") + 1] = "2"
    assert run.main(small) == 0
    control = tmp_path / "checkpoints" / f"{STEM}_ckpt_epoch1.pth"
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50", "--criterion", "l1", "filter_l1", "--measure"]
    flags += ["--export", "0,50", "--checkpoint_dir", tmp_path / "files", "--controls", control, tiny_checkpoint]
    assert sweep(tmp_path, *flags) == 0
    stem = table(tmp_path).with_suffix("")
    lines = read_controls(stem.with_name(stem.name + "_controls.csv"))
    assert [line.network for line in lines] == ["resnet18 width 2", "resnet18 width 4"]
    assert "epochs 1, optimizer sgd, batch_size 16" in lines[0].recipe
    assert lines[0].parameters < lines[1].parameters
    assert lines[0].file_bytes < lines[1].file_bytes
    assert lines[0].speedup > 1 == lines[1].speedup
    dense = read_sweep(SweepFiles(stem)).header["dense"][tiny_checkpoint.name]
    assert lines[1].accuracy == pytest.approx(dense["accuracy"])  # the very network that is swept
    assert lines[1].macs == dense["macs"]
    assert lines[1].file_bytes == pytest.approx(read_sweep(SweepFiles(stem)).table()[0].file_bytes, rel=0.05)
    picture = Image.open(stem.with_name(stem.name + "_savings.png"))
    assert picture.size[0] > 1500
    before = stem.with_name(stem.name + "_controls.csv").read_text()
    count = len(quick)
    assert sweep(tmp_path, *flags) == 0
    assert stem.with_name(stem.name + "_controls.csv").read_text() == before
    assert len(quick) == count


def test_controls_of_other_images_are_refused(image_folder, tiny_checkpoint, tmp_path, capsys):
    content = torch.load(tiny_checkpoint, weights_only=True)
    torch.save(content | {"data": content["data"] | {"image_size": 16}}, tmp_path / "other.pth")
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--controls", tmp_path / "other.pth") == 1
    assert "was trained on other images than" in capsys.readouterr().err
    assert not table(tmp_path).exists()
    assert sweep(tmp_path, "--checkpoint", tiny_checkpoint, "--controls", tmp_path / "none.pth") == 1
    assert "none.pth is not there" in capsys.readouterr().err


def test_a_damaged_table_of_controls_is_told(tmp_path):
    path = tmp_path / "controls.csv"
    assert read_controls(path) == []
    path.write_text("checkpoint,sha256\na,b\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_controls(path)


def test_the_pareto_front_is_what_no_other_beats():
    points = [(1, 10), (2, 30), (2, 20), (3, 30), (4, 29), (5, 50), (1, 10)]
    front = pareto(points)
    assert front == [(1, 10), (2, 30), (5, 50)]
    for cost, gain in points:
        assert any(other <= cost and better >= gain for other, better in front)
    assert pareto([]) == []


def test_words_are_those_of_the_rows(tiny_checkpoint, tmp_path, quick):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50,90", "--measure", "--engine", "dense"]
    assert sweep(tmp_path, *flags) == 0
    found = read_sweep(SweepFiles(table(tmp_path).with_suffix("")))
    for row, speedup in zip(found.table(), (0.9, 1.0, 1.2), strict=True):
        found.rows[row.key] = replace(row, speedup=speedup)
    assert "1.00x the throughput of dense (0.90x to 1.20x over the levels)" in savings_lines(found)[0]
    last = found.table()[-1]
    found.rows[last.key] = replace(last, notes="sparse arithmetic in 20 of 20 convolutions")
    masks, sparse = savings_lines(found)
    assert "0.95x the throughput of dense (0.90x to 1.00x over the levels)" in masks
    assert "throughput with sparse kernels against dense, 90 %: 1.20x" in sparse
    assert savings_lines(read_sweep_without_times(found)) == []


def read_sweep_without_times(found):
    for row in found.table():
        found.rows[row.key] = replace(row, speedup=None)
    return found


def test_times_of_another_machine_or_engine_are_not_mixed_in(timed, tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50", "--measure"]
    before = table(tmp_path).read_text()
    assert sweep(tmp_path, *flags, "--engine", "dense") == 1
    assert "holds times of another machine, engine" in capsys.readouterr().err
    header = json.loads(table(tmp_path).with_suffix(".json").read_text())
    header["measurement"]["machine"]["device"] = "another"
    table(tmp_path).with_suffix(".json").write_text(json.dumps(header))
    assert sweep(tmp_path, *flags) == 1
    assert table(tmp_path).read_text() == before
    assert sweep(tmp_path, *flags, "--restart") == 0


def test_controls_that_are_pruned_or_named_twice_are_refused(tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50"]
    assert sweep(tmp_path, *flags, "--export", "50", "--checkpoint_dir", tmp_path / "files") == 0
    pruned = tmp_path / "files" / f"{STEM}_l1_uniform_none_50.npz"
    assert sweep(tmp_path, *flags, "--controls", pruned) == 1
    assert "is pruned; a control is a dense network" in capsys.readouterr().err
    assert sweep(tmp_path, *flags, "--controls", tiny_checkpoint, tiny_checkpoint) == 1
    assert "name each one once" in capsys.readouterr().err


def test_controls_of_other_test_images_are_measured_again(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0", "--controls", tiny_checkpoint]
    assert sweep(tmp_path, *flags) == 0
    first = read_controls(tmp_path / f"{STEM}_pruning_controls.csv")
    assert sweep(tmp_path, *flags, "--max_test_images", "12", "--restart") == 0
    second = read_controls(tmp_path / f"{STEM}_pruning_controls.csv")
    assert first[0].images != second[0].images
    assert not list(tmp_path.glob("*.old"))


def test_nothing_is_drawn_where_nothing_was_measured(sweep_of_two):
    assert list(sweep_of_two.glob("*_layers.png"))
    assert not list(sweep_of_two.glob("*_savings.png"))
    with table(sweep_of_two).open() as file:
        assert all(row["file_bytes"] == "" for row in csv.DictReader(file))
