"""Controls: smaller dense networks, measured as the levels of a sweep and written as rows beside them."""

import pytest
from conftest import train
from helpers import files_of, stub_times, sweep

from sparsity.results.rows import read_rows

STEM = "colours_resnet18"


@pytest.fixture(scope="module")
def small_checkpoint(image_folder, tmp_path_factory):
    """A network of half the width."""
    out = train(image_folder, tmp_path_factory.mktemp("small"), "--epochs", "1", "--width", "2")
    return out / "checkpoints" / f"{STEM}_ckpt_epoch1.pth"


def test_controls_are_rows_measured_as_levels_are(small_checkpoint, tiny_checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "0,50", "--export", "0,50"]
    flags += ["--checkpoint_dir", tmp_path / "files", "--controls", small_checkpoint, tiny_checkpoint]
    assert sweep(tmp_path, *flags) == 0
    files = files_of(tmp_path)
    small, same = read_rows(files.controls)
    level = read_rows(files.csv)[0]
    assert small.curve == ("dense", "resnet18 width 2", "none") and same.curve == ("dense", "resnet18 width 4", "none")
    assert (small.level, small.sparsity) == (0, 0) and "epochs 1, optimizer sgd, batch_size 16" in small.notes
    assert small.macs_ratio > 2 and small.compression > 2 and small.parameters < same.parameters
    # The control that is the swept network itself has the figures of its level 0.
    figures = ("sparsity", "nonzero", "parameters", "macs_ratio", "accuracy", "ci_low", "loss", "agreement", "lost")
    assert all(getattr(same, name) == pytest.approx(getattr(level, name), abs=1e-5) for name in figures)
    assert small.file_bytes < same.file_bytes == pytest.approx(level.file_bytes, rel=0.05)
    before = files.controls.read_text()
    assert capsys.readouterr().out.count("control ") >= 2
    assert sweep(tmp_path, *flags) == 0
    assert files.controls.read_text() == before and "control " not in capsys.readouterr().out  # they are kept
    assert sweep(tmp_path, *flags, "--export_precision", "bf16") == 0  # but for the bytes of other files
    assert read_rows(files.controls)[0].file_bytes < small.file_bytes
    assert sweep(tmp_path, *flags, "--export_format", "dense") == 0
    assert read_rows(files.controls)[0].file_bytes > 4 * small.parameters
    assert sweep(tmp_path, *flags[:4], "--controls", small_checkpoint, "--max_test_images", "12", "--restart") == 0
    (fewer,) = read_rows(files.controls)
    assert fewer.ci_high - fewer.ci_low > small.ci_high - small.ci_low


def test_controls_are_timed_against_the_swept_network(small_checkpoint, tiny_checkpoint, tmp_path, monkeypatch):
    stub_times(monkeypatch)
    flags = ["--checkpoint", tiny_checkpoint, "--levels", "50"]
    assert sweep(tmp_path, *flags, "--measure") == 0
    controls = ["--controls", small_checkpoint, tiny_checkpoint]
    assert sweep(tmp_path, *flags, *controls) == 0
    assert [row.speedup for row in read_rows(files_of(tmp_path).controls)] == [None, None]
    assert sweep(tmp_path, *flags, *controls, "--measure") == 0  # no level is missing
    small, same = read_rows(files_of(tmp_path).controls)
    assert small.speedup > 1 == same.speedup
