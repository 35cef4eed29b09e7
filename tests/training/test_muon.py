"""Muon: singular values near 1, torch's own Muon on flattened convolutions, SGD for all other parameters."""

import copy

import pytest
import torch
from torch import nn, optim

from sparsity.training.muon import MATRIX_DECAY, MATRIX_RATE, orthogonalise
from sparsity.training.optimizer import make_optimizer

MATRICES = ("stem.weight", "down.weight", "result.weight")  # `hidden` is defined last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 50), (50, 8), (16, 16), (1, 9), (9, 1)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, min(shape)))[0] for size in shape)
    matrix = left * torch.linspace(1, 30, min(shape)) @ right.T
    found = orthogonalise(matrix, dtype)
    assert found.shape == matrix.shape and found.dtype == torch.float32
    inner = left.T @ found @ right  # diagonal, if the singular vectors are the same
    assert (inner - inner.diag().diag()).abs().max() < 0.02
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3
    torch.testing.assert_close(orthogonalise(1000 * matrix, dtype), found, rtol=0, atol=0.02)
    assert not orthogonalise(torch.zeros(shape), dtype).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_step_as_by_torch_and_all_else_as_by_sgd(small_net, nesterov, layout):
    small_net = small_net.to(memory_format=layout)
    optimizer = make_optimizer("muon", small_net, 0.3, 0.9, 5e-4, nesterov, False, torch.bfloat16)
    flat = {name: nn.Parameter(small_net.get_parameter(name).detach().flatten(1).clone()) for name in MATRICES}
    rule = {"momentum": 0.9, "nesterov": nesterov}
    theirs = optim.Muon(flat.values(), lr=0.3 * MATRIX_RATE, weight_decay=5e-4 * MATRIX_DECAY, **rule)
    others = dict(copy.deepcopy(small_net).named_parameters())
    others = {name: others[name] for name in others.keys() - flat.keys()}
    vectors = [parameter for parameter in others.values() if parameter.dim() == 1]
    groups = [{"params": others["hidden.weight"]}, {"params": vectors, "weight_decay": 0.0}]
    plain = optim.SGD(groups, lr=0.3, weight_decay=5e-4, **rule)
    for step in range(4):
        torch.manual_seed(step)
        for name, parameter in small_net.named_parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = gradient.to(memory_format=layout) if parameter.dim() == 4 else gradient
            reference = flat[name] if name in flat else others[name]
            reference.grad = gradient.reshape(reference.shape)
        for one in (optimizer, theirs, plain):
            one.step()
    for name, parameter in small_net.named_parameters():
        expected, tolerance = (flat[name], 5e-3) if name in flat else (others[name], 1e-6)
        torch.testing.assert_close(parameter, expected.view(parameter.shape), rtol=tolerance, atol=tolerance)


def test_each_parameter_is_in_one_group_and_norms_decay_only_if_asked(small_net):
    for decay in (True, False):
        output, vectors, matrices = make_optimizer("muon", small_net, 0.3, 0.9, 5e-4, False, decay).param_groups
        covered = [id(parameter) for group in (output, vectors, matrices) for parameter in group["params"]]
        assert sorted(covered) == sorted(map(id, small_net.parameters()))
        assert list(map(id, matrices["params"])) == [id(small_net.get_parameter(name)) for name in MATRICES]
        assert output["params"][0] is small_net.hidden.weight
        assert (output["weight_decay"], vectors["weight_decay"]) == (5e-4, 5e-4 if decay else 0)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))  # without an output layer
    optimizer = make_optimizer("muon", convolutions, 0.3, 0.9, 0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 3, 1]
    optimizer.step()  # without gradients nothing changes
    assert not optimizer.state
