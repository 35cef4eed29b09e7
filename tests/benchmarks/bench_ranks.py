"""Time one sweep by one process and by several, with one thread each, in one run, and compare their tables.

    python tests/benchmarks/bench_ranks.py [--checkpoint FILE] [--processes 1 2] [--repeats 1] [-- FLAGS OF pruning.py]

Without a checkpoint the network is an untrained ResNet-50 on synthetic images of 16 pixels, which costs the same time.
Two times are told: of the whole command, with imports and loading, and from the forecast to the end.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import Build_Resnet
from sparsity.networks import checkpoint
from sparsity.system import machine

ROOT = Path(__file__).parents[2]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="what is swept (an untrained ResNet-50)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers to compare (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="turns of each number; the median counts (%(default)s)")
    parser.add_argument("--json", type=Path, help="where figures go as well")
    parser.add_argument("flags", nargs="*", help="more flags of pruning.py, after --")
    return parser.parse_args()


def untrained(folder: Path) -> Path:
    """A checkpoint of a new ResNet-50."""
    torch.manual_seed(0)
    spec = {"arch": "resnet50", "num_classes": 10, "width": 64}
    path = folder / "untrained.pth"
    checkpoint.save(path, {"net": checkpoint.plain_state(Build_Resnet.build(spec)), "epoch": 0, "model": spec})
    return path


def timed(processes: int, threads: int, words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of the whole command, and of its work, of a sweep that writes to `folder`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, "-u", *launcher, str(ROOT / "pruning.py"), *words, "--images_dir", str(folder)]
    started, begun = time.perf_counter(), 0.0
    with subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            begun = time.perf_counter() if line.startswith("about ") else begun
    ended = time.perf_counter()
    if process.returncode:
        raise SystemExit(f"the sweep by {processes} failed, see above")
    return ended - started, ended - begun


def rows(folder: Path) -> list[dict[str, str]]:
    """The table of a sweep without the column that tells time."""
    with next(folder.glob("*_pruning.csv")).open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = [] if args.checkpoint else ["--dataset", "synthetic"]
        words = ["--checkpoint", str(args.checkpoint or untrained(folder)), *source, *args.flags]
        times: dict[int, list[tuple[float, float]]] = {number: [] for number in args.processes}
        tables = {}
        for turn in range(args.repeats):
            for number in args.processes:
                out = folder / f"{number}_{turn}"
                times[number].append(timed(number, args.threads, words, out))
                tables[number] = rows(out)
    print(
        f"{machine.machine(torch.device('cpu'))['device']}, {args.threads} threads a process, torch {torch.__version__}"
    )
    base, figures = None, {}
    for number, turns in times.items():
        whole, work = (statistics.median(column) for column in zip(*turns, strict=True))
        base = base or (whole, work)
        same = tables[number] == tables[args.processes[0]]
        figures[number] = {"command_seconds": whole, "work_seconds": work, "same_rows": same}
        print(
            f"{number} process(es): {len(tables[number])} rows, whole command {whole:7.1f} s {base[0] / whole:5.2f}x, "
            f"work {work:7.1f} s {base[1] / work:5.2f}x; rows {'are the same' if same else 'DIFFER'}"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
