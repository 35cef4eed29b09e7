"""The chosen networks as files: which ones, their accuracy on the other half, and rows that stay the same."""

import json
from pathlib import Path

import pytest
from helpers import export, files_of, rows_of, sweep

from sparsity.networks import checkpoint
from sparsity.results.statistics import halves
from sparsity.results.store import read_sweep
from sparsity.sweep.evaluator import Evaluator

STEM = "colours_small_net"
FLAGS = ["--tolerance", "4", "--levels", "0:100:10", "--allocation", "uniform", "global"]


@pytest.fixture
def added(monkeypatch):
    """The networks that are evaluated, by curve and level."""
    found, add = [], Evaluator.add
    monkeypatch.setattr(Evaluator, "add", lambda self, net: found.append((net.curve, net.level)) or add(self, net))
    return found


def rows(out, *without):
    """The lines of the CSV without some columns and the seconds."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", *without)}
        for row in rows_of(files_of(out, f"{STEM}_pruning").csv)
    ]


def entries(out):
    return json.loads(files_of(out, f"{STEM}_pruning").json.read_text())["summary"]


def names(out):
    return sorted(path.name for path in (out / "files").iterdir())


def test_the_chosen_level_of_each_curve_is_written_once_and_its_row_stays(accurate, tmp_path, added, capsys):
    flags = [*accurate, *FLAGS]
    assert export(tmp_path, *flags) == 0
    before, count = rows(tmp_path), len(added)
    assert export(tmp_path, *flags, "--export", "chosen") == 0
    chosen = {
        tuple(entry[name] for name in ("criterion", "allocation", "recover")): entry for entry in entries(tmp_path)
    }
    assert added[count:] == [(curve, entry["level"]) for curve, entry in chosen.items()] and len(chosen) == 2
    assert [row | {"file_bytes": "", "notes": ""} for row in rows(tmp_path)] == [row | {"notes": ""} for row in before]
    out, found = capsys.readouterr().out, read_sweep(files_of(tmp_path, f"{STEM}_pruning"))
    for curve, entry in chosen.items():
        path = tmp_path / "files" / f"{STEM}_{'_'.join(curve)}_{entry['level']:g}.npz"
        content, row = (
            checkpoint.load(path).content,
            found.rows["|".join((Path(accurate[1]).name, *curve, f"{entry['level']:g}"))],
        )
        right = found.correct(row)[halves(found.labels)[1]]
        assert content["metrics"] == {
            "test_accuracy": row.accuracy,
            "test_images": 180,
            "reporting_accuracy": pytest.approx(100 * right.mean(), abs=1e-6),
            "reporting_images": 90,
        }
        assert content["metrics"]["reporting_accuracy"] == entry["accuracy"]
        assert content["pruning"]["level"] == entry["level"] and content["pruning"]["budget"] == "weights"
        line = f"{path}: {path.stat().st_size:,} bytes (fp32), {entry['accuracy']:.2f} % on the 90 images for reporting"
        assert line in out
    count, stamps = len(added), [path.stat().st_mtime_ns for path in (tmp_path / "files").iterdir()]
    assert export(tmp_path, *flags, "--export", "chosen") == 0
    assert len(added) == count and stamps == [path.stat().st_mtime_ns for path in (tmp_path / "files").iterdir()]
    assert len(names(tmp_path)) == 2


def test_the_best_curve_is_the_one_that_removes_most(accurate, tmp_path, capsys):
    flags = [*accurate, *FLAGS, "--criterion", "l1", "random", "--recover", "batchnorm"]
    for budget in ("weights", "macs"):
        out = tmp_path / budget
        assert export(out, *flags, "--export", "best", "--budget", budget, "--export_format", "dense") == 0
        (name,) = names(out)
        found = {(row["criterion"], row["allocation"], row["level"]): row for row in rows(out)}
        saved = {}
        for entry in entries(out):
            row = found[entry["criterion"], entry["allocation"], f"{entry['level'] or 0:g}"]
            share = float(row["sparsity"]) if budget == "weights" else 100 - 100 / float(row["macs_ratio"])
            saved[f"{STEM}_{entry['criterion']}_{entry['allocation']}_batchnorm_{entry['level'] or 0:g}.pth"] = share
        assert saved[name] >= max(saved.values()) - 0.5 > min(saved.values())
        assert f"%, {out / 'files' / name}: " in capsys.readouterr().out
    assert export(out, *flags, "--budget", "macs", "--export", "20") == 0  # all but 20 % are of the command before
    assert name not in capsys.readouterr().out


def test_a_curve_that_affords_no_level_is_said_and_has_no_file(accurate, tmp_path, capsys):
    for levels, what in (("100", "chosen"), ("0,100", "chosen"), ("0,100", "best")):
        flags = [*accurate, "--levels", levels, "--tolerance", "0"]
        assert export(tmp_path / levels / what, *flags, "--export", what) == 0
        said = "l1 uniform: no file is written, because no level above 0 % was chosen\n"
        assert capsys.readouterr().out.count(said) == 1 and not names(tmp_path / levels / what)


@pytest.mark.parametrize(
    "more",
    [
        "--schedule iterative --recover finetune",
        "--search --criterion filter_l1 --recover batchnorm --calibration_images 16",
    ],
)
def test_steps_and_searches_end_in_a_file_of_their_row(accurate, tmp_path, more):
    flags = [*accurate, "--tolerance", "4", *more.split()]
    flags += [] if "--search" in more else ["--levels", "20:100:20"]
    assert export(tmp_path / "plain", *flags) == 0
    assert export(tmp_path, *flags, "--export", "chosen") == 0
    assert rows(tmp_path, "file_bytes", "notes") == rows(tmp_path / "plain", "file_bytes", "notes")
    (entry,), (name,) = entries(tmp_path), names(tmp_path)
    assert name.endswith(f"_{entry['level']:g}.npz") and entry["level"] > 0
    assert sweep(tmp_path / "again", *accurate[2:], "--checkpoint", tmp_path / "files" / name, "--levels", "0") == 0
    (row,) = [row for row in rows(tmp_path) if row["level"] == f"{entry['level']:g}"]
    assert rows(tmp_path / "again")[0]["accuracy"] == row["accuracy"]
    assert not list(tmp_path.glob("*_state.pth"))


def test_groups_of_inputs_are_exported_under_a_name_without_a_colon(tiny_checkpoint, tmp_path):
    flags = ["--checkpoint", tiny_checkpoint, "--allocation", "2:4", "1:2", "--recover", "reconstruction"]
    assert export(tmp_path, *flags, "--export", "50") == 0
    assert names(tmp_path) == [f"colours_resnet18_l1_{pattern}_reconstruction_50.npz" for pattern in ("1-2", "2-4")]
    for row in read_sweep(files_of(tmp_path)).table():
        size = row.allocation[-1]
        assert row.level == 50 and row.notes.startswith(f"dense, because their inputs are no multiple of {size}: conv1")
    for name, value in checkpoint.load(tmp_path / "files" / names(tmp_path)[1]).net.items():
        if value.dim() == 4 and name != "conv1.weight":
            assert ((value != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()


def test_bad_paths_and_patterns_are_told_before_anything_is_measured(tiny_checkpoint, tmp_path, capsys):
    itself = tmp_path / "files" / "colours_resnet18_l1_uniform_none_99.5.pth"
    itself.parent.mkdir()
    itself.write_bytes(tiny_checkpoint.read_bytes())
    (tmp_path / "file").write_text("no folder")
    search, tiny = ["--search", "--export", "chosen", "--export_format", "dense"], ["--checkpoint", tiny_checkpoint]
    cases = {
        "would be replaced by the network made of it": ["--checkpoint", itself, *search],
        "file cannot be written to": [*tiny, *search, "--checkpoint_dir", tmp_path / "file"],
        "no layer has inputs in multiples of 7": [*tiny, "--allocation", "uniform", "3:7"],
    }
    for said, flags in cases.items():
        assert export(tmp_path, *flags) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and said in line
    assert not list(tmp_path.glob("*.csv")) and itself.read_bytes() == tiny_checkpoint.read_bytes()


def test_rows_of_another_budget_are_not_mixed(swept_at_two, tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50"]
    assert sweep(tmp_path, *flags, "--budget", "macs") == 1
    assert "budget (not set there, macs now)" in capsys.readouterr().err
    assert sweep(tmp_path / "macs", *flags, "--budget", "macs", "--allocation", "lamp", "--tolerance", "100") == 0
    assert "chosen level 50 % of the multiply-adds removed" in capsys.readouterr().out
