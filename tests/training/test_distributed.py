"""Training by several processes: the gradients of one, and batches that are too small for them."""

import json

import pytest
import torch
from helpers import run_to_the_end

from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.training.distributed import average_statistics, replicate, require_enough, share_batchnorm


def test_gradients_of_one_step_are_those_of_one_process(tmp_path):
    out = tmp_path / "found.json"
    run_to_the_end("tests/training/gradients.py", out, processes=2)
    found = json.loads(out.read_text())
    assert len(found) == 4
    for name, distance in found.items():
        assert distance < (1e-12 if "float64" in name else 1e-5), name


def test_one_process_is_left_as_it_is(small_net):
    before = {name: tensor.clone() for name, tensor in small_net.state_dict().items()}
    assert replicate(small_net) is small_net
    share_batchnorm(small_net)
    average_statistics(small_net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_net.state_dict().items())


def test_a_network_without_statistics_has_none_to_average(monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 2)
    network = torch.nn.Linear(2, 2)
    before = network.weight.detach().clone()
    average_statistics(network)  # without a process group: nothing is sent
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize(
    ("size", "device", "batch_size", "images", "said"),
    [
        (1, "cpu", 2, 1, "images in the training split: 1 is too small"),
        (4, "cpu", 7, 100, "--batch_size 7 is too small for 4 process"),
        (4, "cpu", 100, 7, "images in the training split: 7 is too small"),
        (4, "mps", 100, 100, "--device mps trains in one process"),
    ],
)
def test_too_many_processes_are_refused(monkeypatch, size, device, batch_size, images, said):
    monkeypatch.setattr(processes, "size", lambda: size)
    require_enough(torch.device("cpu"), 2 * size, 2 * size)
    with pytest.raises(UserError, match=said):
        require_enough(torch.device(device), batch_size, images)
