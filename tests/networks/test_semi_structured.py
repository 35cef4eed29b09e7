"""Semi-structured kernels: which layers they take, and the outputs of dense ones."""

import pytest
import torch
from helpers import files_of, rows_of, stub_times, sweep
from torch import nn

from sparsity.networks.inference import inference_copy
from sparsity.networks.semi_structured import semi_structured_layers, use_semi_structured
from sparsity.prune.pruner import Pruner
from sparsity.sweep.timing import SEMI_STRUCTURED, time_inference
from sparsity.system.methods import Curve


def pruned(pattern: str) -> nn.Module:
    """Linear layers of 192, 128 and 40 inputs, the last one dense, as N of every M inputs stay."""
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 32)
    return Pruner(nn.Sequential(*layers).eval(), ["1", "3"]).prune(Curve("l1", pattern, "none"), 50)[0]


def test_dense_kernels_are_timed_on_a_cpu_which_is_said(tiny_checkpoint, tmp_path, monkeypatch):
    assert semi_structured_layers(inference_copy(pruned("2:4"), torch.bfloat16)) == []
    stub_times(monkeypatch)
    flags = ["--checkpoint", tiny_checkpoint, "--allocation", "uniform", "2:4", "--levels", "50", "--measure"]
    assert sweep(tmp_path, *flags) == 0
    uniform, groups = rows_of(files_of(tmp_path).csv)
    assert "kernels" not in uniform["notes"] and "timed by dense kernels" in groups["notes"].split("; ")
    assert float(groups["speedup"]) == 1


@pytest.mark.cuda
def test_two_of_four_inputs_are_skipped_on_a_gpu_with_the_same_outputs():
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    for pattern, names in (("2:4", ["1"]), ("1:2", ["1"]), ("3:4", []), ("4:8", [])):  # 40 outputs are no multiple
        network = inference_copy(pruned(pattern).cuda(), torch.bfloat16)
        assert semi_structured_layers(network) == names
        expected = network(images)
        use_semi_structured(network)
        torch.testing.assert_close(network(images), expected, rtol=2e-2, atol=2e-2)
    assert semi_structured_layers(inference_copy(pruned("2:4").cuda())) == []  # in float32 they would round
    network = inference_copy(pruned("2:4").cuda(), torch.bfloat16)
    assert time_inference(network, network, 8, SEMI_STRUCTURED, compiling=False)["speedup"] > 0
