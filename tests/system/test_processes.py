"""Shares of several processes, and their exchanges over gloo."""

import pytest
from helpers import ROOT, run_to_the_end

from sparsity.system.processes import share


@pytest.mark.parametrize(
    ("total", "size", "unit"), [(10, 1, 1), (10, 3, 1), (2, 4, 1), (0, 2, 1), (1000, 3, 32), (5, 2, 32)]
)
def test_shares_are_consecutive_and_complete(total, size, unit):
    parts = [share(total, (rank, size), unit) for rank in range(size)]
    assert [number for begin, end in parts for number in range(begin, end)] == list(range(total))
    units = [-(-(end - begin) // unit) for begin, end in parts]
    assert max(units) - min(units) <= 1
    assert all(begin % unit == 0 for begin, _ in parts if begin < total)


def test_everybody_hears_what_everybody_says(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from sparsity.system import processes\n"
        "assert (processes.rank(), processes.size(), processes.gather(1)) == (0, 1, [1])\n"
        "processes.join()\n"
        "with processes.first_alone():\n"
        "    if processes.first():\n"
        "        Path(sys.argv[1]).touch()\n"
        "    there = Path(sys.argv[1]).exists()\n"
        "sys.stdout.write(f'{processes.gather(10 * processes.rank())}, {there};')\n"
        "processes.leave()\n"
    )
    said = run_to_the_end(worker, tmp_path / "mark", processes=2)
    assert said.count("[0, 10], True;") == 2
