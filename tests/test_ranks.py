"""What the processes of a run tell each other; threads stand in for processes, around one store."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from sparsity.networks.evaluation import evaluate_shared
from sparsity.sweep.work import dealt, work_items
from sparsity.system import processes
from sparsity.system import processes as ranks
from sparsity.system.processes import Ranks, share

UNIFORM, TUNED = ("l1", "uniform", "none"), ("l1", "uniform", "finetune")


def teams(size, per_node=8):
    """The ranks of a run that share a store, as processes would."""
    store = HashStore()
    return [Ranks(rank, size, rank % per_node, rank // per_node, store) for rank in range(size)]


def together(members, work):
    """What `work` gives for each rank, all of them at once."""
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(work, members))


@pytest.mark.parametrize(
    ("total", "size", "unit"), [(10, 1, 1), (10, 3, 1), (2, 4, 1), (0, 2, 1), (1000, 3, 32), (5, 2, 32)]
)
def test_shares_are_consecutive_and_complete(total, size, unit):
    parts = [share(total, rank, size, unit) for rank in range(size)]
    assert [number for begin, end in parts for number in range(begin, end)] == list(range(total))
    units = [-(-(end - begin) // unit) for begin, end in parts]
    assert max(units) - min(units) <= 1
    assert all(begin % unit == 0 for begin, _ in parts if begin < total)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_everybody_hears_what_everybody_says(size):
    def talk(team):
        return team.gather(team.rank), team.broadcast(lambda: f"from {team.rank}"), team.gather(10 * team.rank)

    everything = (list(range(size)), "from 0", [10 * rank for rank in range(size)])
    assert together(teams(size), talk) == [everything] * size


def test_what_everybody_has_heard_does_not_stay_in_the_store():
    members = teams(3)
    heard = together(members, lambda team: [team.gather(number) for number in range(50)])
    assert heard == [[[number] * 3 for number in range(50)]] * 3
    assert members[0].store.num_keys() <= 2 * 3


def test_one_alone_is_the_first_to_claim():
    claims = together(teams(4), lambda team: team.claim("a thing"))
    assert sorted(claims) == [False, False, False, True]
    assert together(teams(4), lambda team: team.speaks_last()).count(True) == 1
    assert Ranks().claim("a thing") and Ranks().claim("a thing")


def test_one_goes_first_and_then_one_of_each_machine():
    begun, ended = [], []

    def work(team):
        with team.in_turn("download"):
            begun.append(team.rank)
            time.sleep(0.1)
            ended.append(list(begun))

    together(teams(6, per_node=3), work)
    assert ended[0] == [0]
    alone = [seen for seen in ended if 3 in seen]
    assert begun.index(3) == next(place for place, rank in enumerate(begun) if rank >= 3) and len(alone) >= 3
    assert sorted(begun) == list(range(6))


def test_they_end_together_when_the_first_has_done_its_work():
    left = []

    def work(team):
        team.join()
        if team.first:
            time.sleep(0.3)
            assert not left
        team.leave()
        left.append(team.rank)

    together(teams(3), work)
    assert sorted(left) == [0, 1, 2]


def test_a_process_that_does_not_come_is_lost(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 0.3)
    members = teams(3)
    with pytest.raises(processes.LostProcess, match="rank 2 of 3 did not start"):
        together(members[:2], lambda team: team.join())
    assert members[0].death() is None


def test_a_process_that_is_gone_is_dead_unless_its_work_was_done():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    members = teams(3)
    together(members, lambda team: team.join())
    assert members[0].death() is None
    machine, _ = members[0]._processes[0]
    for team in members:
        team._processes = {0: (machine, os.getpid()), 1: (machine, ended.pid), 2: (machine, ended.pid)}
    assert members[0].dead() == [1, 2]
    members[2].store.set("left/2", "done")
    assert members[0].dead() == [1]
    assert members[0].death() == f"rank 1 (process {ended.pid}) of 3 died; what was finished before is kept"


def test_a_process_of_another_machine_is_dead_when_it_is_silent(monkeypatch):
    monkeypatch.setattr(ranks, "SILENCE", 0.2)
    here, there, left = members = teams(3)
    together(members, lambda team: team.join())
    machine, process = here._processes[0]
    here._processes = {0: (machine, process), 1: ("elsewhere", 1), 2: ("elsewhere", 2)}
    there._processes = {0: ("elsewhere", 1), 1: (machine, process), 2: (machine, process)}
    left.store.set("left/2", "done")
    for _ in range(3):
        assert there.silent() == here.silent() == []
        time.sleep(0.15)
    time.sleep(0.2)
    assert here.silent() == [1]
    assert here.dead() == []


def test_a_single_process_needs_no_store():
    team = Ranks()
    assert team.first and team.gather(3) == [3] and team.broadcast(lambda: 4) == 4
    team.join()
    with team.in_turn("anything"):
        pass
    team.leave()
    assert team.death() is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shared_evaluation_gives_the_bits_of_one_process(small_net, small_split, size):
    def work(team):
        seen = []
        return evaluate_shared(team, small_net, small_split, 8, seen.append), sum(seen)

    alone, _ = work(Ranks())
    results = together(teams(size), work)
    assert sum(images for _, images in results) == len(small_split)
    for result, _ in results:
        assert torch.equal(result.predictions, alone.predictions)
        assert (result.correct, result.total, result.loss) == (alone.correct, len(small_split), alone.loss)


def test_the_environment_tells_how_a_run_was_launched(monkeypatch):
    assert processes.launched() == 1 and processes.is_first() and processes.launch_words() == ["python"]
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.launched() == 4 and not processes.is_first()
    assert processes.launch_words() == ["torchrun", "--nnodes=2", "...", "--nproc_per_node=2"]


MISSING = {"a.pth": {UNIFORM: [10.0, 20.0], TUNED: [10.0]}, "b.pth": {UNIFORM: [10.0]}}
COSTS = {"none": 1.0, "finetune": 9.0}


def test_every_level_is_an_item_and_with_a_schedule_every_curve():
    levels = [(item.checkpoint, item.curve, item.levels) for item in work_items(MISSING, COSTS, whole=False)]
    assert levels == [
        ("a.pth", UNIFORM, (10.0,)),
        ("a.pth", UNIFORM, (20.0,)),
        ("a.pth", TUNED, (10.0,)),
        ("b.pth", UNIFORM, (10.0,)),
    ]
    curves = work_items(MISSING, COSTS, whole=True)
    assert [(item.levels, item.cost) for item in curves] == [((10.0, 20.0), 2.0), ((10.0,), 9.0), ((10.0,), 1.0)]
    assert work_items({}, {}, whole=False) == []


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_item_falls_to_one_process(size):
    items = work_items(MISSING, COSTS, whole=False)
    taken = together(teams(size), lambda team: list(dealt(items, team)))
    assert sorted(str(item) for part in taken for item in part) == sorted(map(str, items))


def test_the_longest_item_comes_first_and_then_what_scores_are_at_hand_for():
    items = work_items(MISSING, COSTS, whole=False)
    first, second = teams(2)
    mine, other = dealt(items, first), dealt(items, second)
    assert next(mine).curve == TUNED
    assert next(other).levels == (10.0,)  # of a.pth, where the order is that of the list
    assert next(other).checkpoint == "a.pth"
    assert next(mine).checkpoint == "b.pth"
    assert next(mine, None) is None and next(other, None) is None
    assert list(dealt(items, Ranks())) == items
