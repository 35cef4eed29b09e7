"""Families of torchvision through `--describe` and a sweep; `benchmarks/bench_families.py` does so for all of them."""

import math

import pytest
import torch
from helpers import files_of, rows_of, sweep
from torchvision import models

from sparsity.data.sources import Source, load_split
from sparsity.networks.evaluation import evaluate

FAMILIES = {"mobilenet_v2": (52, 52), "squeezenet1_1": (25, 25), "shufflenet_v2_x0_5": (56, 56)}
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_described_and_swept_with_every_layer_refitted(name, image_folder, tmp_path, capsys):
    torch.manual_seed(0)
    network = models.get_model(name, weights=None, num_classes=3).eval()
    for module in network.modules():  # untrained, some of them give one number for all images
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    path = tmp_path / "network.pth"
    torch.save(network.state_dict(), path)
    flags = ["--checkpoint", path, "--arch", f"torchvision:{name}", "--dataset", "folder", "--data_dir", image_folder]
    flags += ["--image_size", "32", "--mean", "half", "--std", "half"]
    assert sweep(tmp_path, *flags, "--describe") == 0
    said = capsys.readouterr().out
    refitted, prunable = FAMILIES[name]
    assert "traced by torch.fx: yes" in said and f"by reconstruction: {refitted} of {prunable} prunable layers" in said
    levels = ["--levels", "0,50,90", "--recover", "none", "batchnorm", "reconstruction", "--calibration_images", "8"]
    assert sweep(tmp_path, *flags, *levels, "--name", "family") == 0
    rows = rows_of(files_of(tmp_path, "family_pruning").csv)
    test, _ = load_split(Source("folder", image_folder, 32), False, HALF)
    plain = evaluate(network, test, 32)
    assert float(rows[0]["accuracy"]) == pytest.approx(plain.accuracy)
    assert float(rows[0]["loss"]) == pytest.approx(plain.loss, rel=1e-4)
    assert len(rows) == 9 and all(math.isfinite(float(row["loss"])) for row in rows)
    assert not any("not refitted" in row["notes"] for row in rows)
