"""Logits, whatever a network returns; networks that cannot give them, or cannot be trained, are refused."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import Tensor, fx, nn

from sparsity.networks.outputs import give_logits, require_logits, training_problem
from sparsity.system.errors import UserError

Pair = namedtuple("Pair", "aux logits")


class Net(nn.Module):
    """A network that returns what `wrap` makes of its logits [B, 4]."""

    def __init__(self, wrap=lambda logits: logits):
        super().__init__()
        self.conv, self.linear, self.wrap = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 4), wrap

    def forward(self, x: Tensor, targets: Tensor | None = None):
        return self.wrap(self.linear(self.conv(x).relu().mean((2, 3))))


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OUTPUTS = {
    "tensor": (lambda logits: logits, None),
    "tuple": (lambda logits: (logits, logits + 1), "a tuple; its logits are number 0"),
    "list": (lambda logits: [logits], "a list; its logits are number 0"),
    "dict": (lambda logits: {"aux": logits + 1, "logits": logits}, "a dict; its logits are logits"),
    "ordered": (lambda logits: OrderedDict(aux=logits + 1, out=logits), "a OrderedDict; its logits are out"),
    "named": (lambda logits: Pair(logits + 1, logits), "a Pair; its logits are logits"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_logits_are_taken_by_the_network_its_copies_and_its_trace_and_this_is_said(kind, capsys):
    wrap, said = OUTPUTS[kind]
    plain = Net().eval()
    network = give_logits(Net(wrap).eval(), "net")
    network.load_state_dict(plain.state_dict())
    expected = plain(IMAGES)
    for each in (network, copy.deepcopy(network), fx.symbolic_trace(network)):
        assert torch.equal(each(IMAGES), expected)
    assert isinstance(network, Net) and type(network).__name__ == "Net"
    require_logits(network, "net", 8, 4)
    assert capsys.readouterr().out == (f"net returns {said}\n" if said else "")


def poisoned() -> nn.Module:
    network = Net()
    network.register_buffer("scale", torch.tensor([1.0, torch.nan]))
    return network


def at_one_size(logits: Tensor) -> Tensor:
    return logits.reshape(1, 4)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Net(lambda logits: {"a": logits}), "returns a dict; it has to return logits, a tensor"),
        (Net(lambda logits: None), "returns a NoneType"),
        (Net(lambda logits: logits[0]), r"returns a tensor \[4\] for a batch of 1"),
        (Net(lambda logits: logits.squeeze(0)), r"returns a tensor \[4\] for a batch of 1"),
        (Net(at_one_size), "cannot take images of 8 pixels .*RuntimeError: shape '.1, 4.' is invalid"),
        (Net(lambda logits: logits[..., None]), r"returns a tensor \[1, 4, 1\]"),
        (Net(lambda logits: logits[:, :3]), "has 3 output classes, not the 4 that are asked of it"),
        (Net(lambda logits: logits / 0), "gives NaN or Inf for an image of 8 pixels"),
        (poisoned(), "cannot be used: its scale holds NaN or Inf"),
        (nn.Sequential(nn.AdaptiveAvgPool2d((2, 2)), nn.Conv2d(3, 4, 3), nn.Flatten()), "cannot take images of 8"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "holds no parameters"),
    ],
)
def test_a_network_that_gives_no_logits_is_refused(network, said):
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=said):
        require_logits(give_logits(network, "net").train(), "net", 8, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit
def test_a_network_that_is_given_twice_or_has_no_class_of_its_own_is_refused():
    network = give_logits(Net(), "net")
    with pytest.raises(UserError, match="gives the same network at every call"):
        give_logits(network, "net")
    network = Net()
    network.forward = lambda x: x
    for wrong in (network, torch.jit.trace(Net(), IMAGES)):
        with pytest.raises(UserError, match="scripted or set on the instance"):
            give_logits(wrong, "net")


class InPlace(Net):
    """A network whose gradient is lost, as the sigmoid's output is changed."""

    def forward(self, x: Tensor):
        y = self.linear(self.conv(x).mean((2, 3))).sigmoid()
        return y.add_(1)


class Detached(Net):
    def forward(self, x: Tensor):
        return super().forward(x).detach()


def test_whether_a_network_can_be_trained_is_tried_on_a_copy():
    network = give_logits(Net(), "net")
    before = copy.deepcopy(network.state_dict())
    assert training_problem(network, "net", 8) is None
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert next(network.parameters()).grad is None
    assert "modified by an inplace operation" in training_problem(give_logits(InPlace(), "net"), "net", 8)
    assert "returns no tensor with gradients" in training_problem(give_logits(Detached(), "net"), "net", 8)
    normed = give_logits(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.BatchNorm1d(4)), "net")
    assert training_problem(normed, "net", 8) is None
    assert "cannot take images of 9 pixels (RuntimeError" in training_problem(normed, "net", 9)
