"""Which networks a sweep evaluates, and how they are dealt to several processes."""

import pytest

from sparsity.sweep.flags import parse_args
from sparsity.sweep.work import choose_panel, level_costs, my_share
from sparsity.system import processes
from sparsity.system.errors import UserError
from sparsity.system.methods import Curve

UNIFORM, TUNED = Curve("l1", "uniform", "none"), Curve("l1", "uniform", "finetune")


def test_curves_are_those_of_the_flags():
    def panel(flags, inner=("b",)):
        return choose_panel(parse_args(flags.split()), ["a", "b"], list(inner))

    assert list(panel("--criterion l1 l1 --recover none batchnorm")) == [
        ("l1", "uniform", "none"),
        ("l1", "uniform", "batchnorm"),
    ]
    compared = panel("--compare --levels 0,100")
    assert len(compared) == 9
    assert compared["l1", "global", "reconstruction"] == [60, 80, 90, 95]
    assert compared["random", "uniform", "batchnorm"] == [0, 100]
    assert panel("--sensitivity --levels 90") == {("l1", f"only {name}", "none"): [90] for name in "ab"}
    assert list(panel("--sensitivity --criterion filter_l1")) == [("filter_l1", "only b", "none")]
    with pytest.raises(UserError, match="no filters that can be removed"):
        panel("--criterion filter_l1", inner=())


def shares(monkeypatch, size, missing, costs, iterative=False):
    """The share of each of `size` processes."""
    found = []
    monkeypatch.setattr(processes, "size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        found.append(my_share(missing, costs, iterative))
    return found


MISSING = {"a": {UNIFORM: [0.0, 50.0, 100.0], TUNED: [50.0, 90.0]}, "b": {TUNED: [10.0]}}
COSTS = {"none": 1.0, "finetune": 5.0}


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_shares_are_disjoint_complete_and_in_order(monkeypatch, size, iterative):
    def curves(parts):
        return [(name, curve, levels) for part in parts for name in part for curve, levels in part[name].items()]

    def networks(parts):
        return [(name, curve, level) for name, curve, levels in curves(parts) for level in levels]

    dealt = shares(monkeypatch, size, MISSING, COSTS, iterative)
    assert sorted(networks(dealt)) == sorted(networks([MISSING]))
    if size == 1:
        assert networks(dealt) == networks([MISSING])
    if iterative:  # curves stay whole
        assert sorted(curves(dealt)) == sorted(curves([MISSING]))


def test_the_longest_work_is_dealt_first_and_evenly(monkeypatch):
    first, second = shares(monkeypatch, 2, MISSING, COSTS)  # costs 5 5 5 1 1 1: 10 against 8
    assert first == {"a": {TUNED: [50.0]}, "b": {TUNED: [10.0]}}
    assert second == {"a": {TUNED: [90.0], UNIFORM: [0.0, 50.0, 100.0]}}


def test_costs_grow_with_the_work_of_a_recovery():
    costs = level_costs(1000, 100, 500, 500)
    assert costs["none"] == 1000 < costs["batchnorm"] < costs["finetune"] < costs["reconstruction"] < costs["distill"]
