"""Everything that needs a GPU, unattended, in stages: correctness, speed, the reference recipe, sweeps, recovery.

    python tests/benchmarks/gpu_hour.py --archive cifar10-jpeg.tar.xz --out checkpoints/gpu_hour --stages 1 2
    python tests/benchmarks/gpu_hour.py --small --out checkpoints/small       # all of it in a few minutes on a CPU

1  the tests; a short training, and sweeps of it on the GPU and on the CPU that must agree within 0.1 point
2  images a second: bench_train.py at two batch sizes with the study's loop, bench_sweep.py with 21 whole levels
3  the reference recipe with three seeds; one checkpoint is packed to be carried away (see `pack`)
4  l1 uniform at 21 levels against the clock, then `--compare` for the checkpoints of stage 3
5  `run.py --recipe strong`
6  iterative pruning with fine-tuning, and with reconstruction, of the best checkpoint there is

A stage that meets `--limit_minutes` stops its command as Ctrl-C does; the same stage given again goes on: finished
commands are skipped, trainings resume, sweeps evaluate the missing levels. A command that fails is shown with its last
lines and stops no other. Everything goes to `--out`: logs, CSV, JSON, plots and `figures.json`, with the time, machine
and figures of each command, and the gaps of each stage. The exit status is 0 only if every stage is complete.
"""

import argparse
import json
import lzma
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from sparsity.networks import checkpoint
from sparsity.system import errors, files, machine
from sparsity.system.errors import UserError

ROOT = Path(__file__).parents[2]
AGREEMENT = 0.1  # points of accuracy between a GPU and a CPU
PART = 15 << 20  # bytes of a part of the packed checkpoint
SEEDS = 3
EPOCH_LINE = re.compile(r"^Epoch: (\d+) .*Test accuracy: ([\d.]+)% \| Epoch Time: ([\d.]+) secs", re.MULTILINE)
TINY = ["--arch", "resnet18", "--width", 4, "--image_size", 8, "--device", "cpu"]  # the network of --small


@dataclass
class Hour:
    """One run: its flags, the figures so far (also in figures.json), and when the present stage has to end."""

    args: argparse.Namespace
    figures: dict[str, Any] = field(default_factory=dict)  # name of a command or a result -> its figures
    commands: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> command, status, seconds, date, machine
    missing: dict[str, list[str]] = field(default_factory=dict)  # number of a stage -> what is not done
    stage: str = ""
    deadline: float = 0.0

    def miss(self, part: str) -> None:
        """Note that a part of the present stage is not done."""
        self.missing[self.stage].append(part)

    def path(self, *parts: str) -> Path:
        return self.args.out.joinpath(*parts)

    def data_flags(self) -> list[object]:
        return (
            ["--dataset", "synthetic"] if self.args.small else ["--dataset", "folder", "--data_dir", self.args.data_dir]
        )

    def write(self) -> None:
        """Bring figures.json up to date."""
        content = {name: getattr(self, name) for name in ("figures", "commands", "missing")}
        files.write_json(self.path("figures.json"), content)


def call(hour: Hour, name: str, words: list[object]) -> str | None:
    """Run a Python command until the stage's limit, its output in a log; that output, or None unless it succeeded.

    A command that has succeeded is not run again. The seconds of one in several pieces are those of all.
    """
    log, command = hour.path("logs", f"{name}.log"), [str(word) for word in words]
    before = hour.commands.get(name, {"status": "", "seconds": 0.0})
    if before["status"] == "done":
        return log.read_text(errors="replace")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{datetime.now():%H:%M:%S} {name}: python {' '.join(command)}", flush=True)
    started, status = time.monotonic(), "interrupted"
    try:
        with log.open("ab") as file:
            status = run_until(hour.deadline, [sys.executable, *command], file)
    finally:  # an interruption is on record as well
        hour.commands[name] = {
            "command": command,
            "status": status,
            "seconds": round(time.monotonic() - started + before["seconds"], 2),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": machine.versions(),
            "machine": machine.describe_machine(machine.resolve_device("cpu" if "cpu" in command else "auto")),
        }
        hour.write()
    text = log.read_text(errors="replace")
    if status == "done":
        return text
    hour.miss(f"{name} ({status})")
    print(f"{name}: {status}; its last lines:", *text.splitlines()[-12:], sep="\n    ", flush=True)
    return None


def run_until(deadline: float, command: list[str], output: IO[bytes]) -> str:
    """Run a command until the deadline at most, then end it as Ctrl-C does; returns how it ended."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    try:
        return f"status {process.returncode}" if process.wait(max(0, deadline - time.monotonic())) else "done"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        return "stopped at the limit"
    finally:
        process.kill()
        process.wait()


def train(hour: Hour, name: str, *words: object, epochs: int) -> Path | None:
    """Train, or go on training, into a folder of its own; the last numbered checkpoint if it is finished."""
    folder, log = hour.path(name), hour.path("logs", f"{name}.log")
    small = [*TINY, "--batch_size", 500] if hour.args.small else []
    resume = ["--resume"] if list(folder.glob("*_last.pth")) else []
    flags = ["--epochs", epochs, "--save_every", epochs, "--checkpoint_dir", folder, "--images_dir", folder, *resume]
    done = call(hour, name, ["run.py", *hour.data_flags(), *small, *words, *flags]) is not None
    if lines := EPOCH_LINE.findall(log.read_text()):
        seconds = statistics.median(float(seconds) for *_, seconds in lines)
        figures = {"epochs": int(lines[-1][0]), "test_accuracy": float(lines[-1][1]), "median_epoch_seconds": seconds}
        hour.figures[name] = {"finished": done} | figures
    return next(folder.glob(f"*_ckpt_epoch{epochs}.pth"), None) if done else None


def sweep(hour: Hour, name: str, paths: list[Path], *words: object) -> list[dict[str, str]]:
    """Sweep, or evaluate the missing levels of a sweep; its rows as they stand, whether or not it is complete."""
    small = ["--max_test_images", 200, *["--device", "cpu"] * ("--device" not in words)] if hour.args.small else []
    small += ["--calibration_images", 64] * (hour.args.small and "--compare" in words)
    flags = [*hour.data_flags(), *small, *words, "--images_dir", hour.args.out, "--name", name]
    done = call(hour, name, ["pruning.py", "--checkpoint", *paths, *flags]) is not None
    table = hour.path("synthetic_" * hour.args.small + f"{name}_pruning.csv")  # pruning.py puts that word there
    if not table.exists():
        return []
    rows, header = files.read_csv(table), json.loads(table.with_suffix(".json").read_text())
    hour.figures[name] = {
        "finished": done,
        "rows": len(rows),
        "seconds_of_levels": round(sum(float(row["seconds"]) for row in rows), 2),
        "dense_accuracy": {key: figures["accuracy"] for key, figures in header["dense"].items()},
        "sentences": [entry["sentence"] for entry in header.get("summary") or []],
    }
    return rows


def benchmark(hour: Hour, name: str, script: str, *words: object) -> None:
    """Run one of the benchmarks and keep its figures."""
    file = hour.path(f"{name}.json")
    if call(hour, name, [f"tests/benchmarks/{script}", *words, "--json", file]) is not None:
        hour.figures[name] = json.loads(file.read_text())


def correctness(hour: Hour) -> None:
    """Stage 1."""
    for name, words in {"tests_on_gpu": ["-m", "cuda", "-n", 0], "tests": ["tests/networks"] * hour.args.small}.items():
        text = call(hour, name, ["-m", "pytest", "-p", "no:cacheprovider", *words])
        hour.figures[name] = text and text.strip().splitlines()[-1]
    if trained := train(hour, "short", "--T_max", 1, epochs=1):
        same = ["--precision", "fp32", "--levels", "0,40,60,80"]
        gpu, cpu = (
            sweep(hour, "agree_gpu", [trained], *same),
            sweep(hour, "agree_cpu", [trained], *same, "--device", "cpu"),
        )
        pairs = zip(gpu, cpu, strict=False)  # one may have been stopped
        apart = max((abs(float(one["accuracy"]) - float(other["accuracy"])) for one, other in pairs), default=None)
        hour.figures["agreement"] = {"largest_difference_points": apart}
        if apart is not None and apart > AGREEMENT:
            hour.miss(f"agreement (GPU and CPU differ by {apart} points)")


def speed(hour: Hour) -> None:
    """Stage 2."""
    if hour.args.small:
        benchmark(hour, "train", "bench_train.py", *TINY, "--images", 128, "--batch_size", 64, "--reference")
        benchmark(hour, "evaluation", "bench_sweep.py", *TINY, "--images", 128, "--precision", "fp32")
        return
    images = ["--images", 12_800, "--compile"]
    benchmark(hour, "train_128", "bench_train.py", *images, "--batch_size", 128, "--reference")
    benchmark(hour, "train_512", "bench_train.py", *images, "--batch_size", 512)
    benchmark(hour, "evaluation", "bench_sweep.py", "--images", 10_000, "--compile", "--levels", 21)


def recipe(hour: Hour) -> None:
    """Stage 3."""
    for seed in range(SEEDS):
        trained = train(hour, f"seed{seed}", "--seed", seed, epochs=hour.args.epochs)
        if trained and seed == 0:
            pack(hour, trained)


def pack(hour: Hour, path: Path) -> None:
    """Pack a checkpoint to be carried away: bfloat16, xz, in parts below 16 MiB, in OUT/home.

    `cat OUT/home/*.xz.* | xz -d > file.npz` makes of them a file that `--checkpoint` takes.
    """
    saved, packed = checkpoint.load(path), hour.path("home", f"{path.stem}.npz")
    packed.parent.mkdir(exist_ok=True)
    checkpoint.save_packed(packed, saved.content | {"net": saved.net}, "bf16")
    data = lzma.compress(packed.read_bytes())
    packed.unlink()
    for number, start in enumerate(range(0, len(data), PART)):
        files.write_atomic(packed.with_name(f"{packed.name}.xz.{number:02}"), data[start : start + PART])
    hour.figures["packed"] = {"bytes": len(data), "of": str(path), "of_sha256": saved.sha256}


def sweeps(hour: Hour) -> None:
    """Stage 4."""
    found = sorted(hour.args.out.glob(f"seed?/*_ckpt_epoch{hour.args.epochs}.pth"))
    if len(found) < SEEDS:
        hour.miss(f"some sweeps ({len(found)} of {SEEDS} seeds of stage 3 are trained)")
    if found:
        levels = ["--levels", "0,50,90"] * hour.args.small
        sweep(hour, "l1_uniform", found[:1], *levels)
        sweep(hour, f"compare_{len(found)}_seeds", found, "--compare", *levels)


def strong(hour: Hour) -> None:
    """Stage 5."""
    train(hour, "strong", "--recipe", "strong", epochs=hour.args.epochs)


def recovery(hour: Hour) -> None:
    """Stage 6."""
    found = [
        path for name in ("strong", "seed0") for path in hour.path(name).glob(f"*_ckpt_epoch{hour.args.epochs}.pth")
    ]
    if not found:
        hour.miss("all (a finished checkpoint of stage 3 or 5 is needed)")
        return
    small, stem = hour.args.small, found[0].parent.name
    steps = ["--allocation", "lamp", "--schedule", "iterative", "--levels", "80,95" if small else "80,90,95,97,98,99"]
    tuning = ["--finetune_epochs", 1 if small else 8, "--finetune_learning_rate", 0.01]
    images = ["--calibration_images", 64] * small
    sweep(hour, f"{stem}_iterative_finetune", found[:1], *steps, "--recover", "finetune", *tuning)
    sweep(hour, f"{stem}_iterative_reconstruction", found[:1], *steps, "--recover", "reconstruction", *images)


STAGES = (correctness, speed, recipe, sweeps, strong, recovery)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(1, len(STAGES) + 1)
    parser.add_argument("--stages", type=int, nargs="+", choices=numbers, default=list(numbers), help="(all)")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/gpu_hour"), help="where all goes (%(default)s)")
    parser.add_argument("--archive", type=Path, help="tar of train/<class>/* and test/<class>/*, unpacked first")
    parser.add_argument("--data_dir", type=Path, help="where these images are, or are unpacked to (OUT/data)")
    parser.add_argument("--epochs", type=int, help="of the trainings (60; --small: 2)")
    parser.add_argument("--limit_minutes", type=float, default=9, help="for each stage (%(default)s)")
    parser.add_argument("--small", action="store_true", help="a tiny network on synthetic images on the CPU")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.data_dir = (args.data_dir or args.out / "data").absolute()
    args.epochs = args.epochs or (2 if args.small else 60)
    return args


def work(args: argparse.Namespace) -> None:
    """The stages in their order, then the figures; UserError at the end unless all is complete."""
    files.prepare_folder(args.out, "--out", 1 << 30)
    known = args.out / "figures.json"
    hour = Hour(args, **(json.loads(known.read_text()) if known.exists() else {}))
    if not args.small and not (args.data_dir / "test").is_dir():
        if not args.archive:
            raise UserError(f"{args.data_dir} holds no images; name them with --data_dir, or an --archive of them")
        with tarfile.open(args.archive) as archive:
            archive.extractall(args.data_dir, filter="data")
    for number in args.stages:
        print(f"\nstage {number}: {STAGES[number - 1].__name__}", flush=True)
        hour.stage, hour.missing[str(number)] = str(number), []
        hour.deadline = time.monotonic() + 60 * args.limit_minutes
        STAGES[number - 1](hour)
        hour.write()
    for name, figures in hour.figures.items():
        print(f"{name}: {json.dumps(figures, indent=2)}")
    missing = [f"{part} of stage {number}" for number in args.stages for part in hour.missing[str(number)]]
    if missing:
        raise UserError(f"incomplete: {'; '.join(missing)}; the same stages given again go on")


if __name__ == "__main__":
    flags = parse_args()
    sys.exit(errors.run_main(lambda: work(flags), lambda: errors.command_line(sys.argv[0], sys.argv[1:])))
