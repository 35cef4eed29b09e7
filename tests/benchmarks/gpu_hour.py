"""Everything that needs a GPU, unattended, in stages: correctness, speed, the reference recipe, sweeps, recovery.

    python tests/benchmarks/gpu_hour.py --archive cifar10-jpeg.tar.xz --out checkpoints/gpu_hour --stages 1 2
    python tests/benchmarks/gpu_hour.py --small --out checkpoints/small       # all of it in a few minutes on a CPU

1  a short training, sweeps of it on the GPU and on the CPU that must agree within 0.1 point; where there are several
   GPUs, a short training by all of them, and a sweep that must have the rows of a single process; and the tests
2  images a second: bench_train.py at two batch sizes with the study's loop, bench_sweep.py with 21 whole levels
3  the reference recipe with three seeds; one checkpoint is packed to be carried away (see `pack`)
4  l1 uniform at 21 levels against the clock, then `--compare` for the checkpoints of stage 3
5  `run.py --recipe strong`
6  iterative pruning with fine-tuning, and with reconstruction, of the best checkpoint there is

A stage that meets `--limit_minutes` stops what it runs as Ctrl-C does; the same stage given again goes on: what is done
is skipped, trainings resume, sweeps measure what is missing. A command that fails is shown with its last lines and
stops no other. Everything goes to `--out`: logs, CSV, JSON, plots and `figures.json`, which tells of each command when
and where it was run, and of each stage what is missing. The exit status is 0 only if every stage asked for is complete.
"""

import argparse
import json
import lzma
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from commands import ROOT, Hour, benchmark, call, sweep, train

from sparsity.networks import checkpoint
from sparsity.system import errors, files
from sparsity.system.errors import UserError

AGREEMENT = 0.1  # points of accuracy between a GPU and a CPU
PART = 15 << 20  # bytes of a part of the packed checkpoint
SEEDS = 3
TEST_GROUPS = 4  # the tests are run in as many commands, so that a stage that met its limit goes on where it was


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=sorted(STAGES), default=sorted(STAGES), help="(all)")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/gpu_hour"), help="where all goes (%(default)s)")
    parser.add_argument(
        "--archive", type=Path, help="tar archive of train/<class>/* and test/<class>/*, unpacked first"
    )
    parser.add_argument("--data_dir", type=Path, help="where these images are, or are unpacked to (OUT/data)")
    parser.add_argument("--epochs", type=int, help="of the trainings (60; --small: 2)")
    parser.add_argument("--limit_minutes", type=float, default=9, help="for each stage (%(default)s)")
    parser.add_argument("--again", action="store_true", help="run benchmarks and tests again that were done before")
    parser.add_argument("--small", action="store_true", help="a tiny network on synthetic images on the CPU")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.data_dir = (args.data_dir or args.out / "data").absolute()
    args.epochs = args.epochs or (2 if args.small else 60)
    return args


def unpack_images(args: argparse.Namespace) -> None:
    """Make sure that the images are there; UserError otherwise."""
    if args.small or (args.data_dir / "test").is_dir():
        return
    if not args.archive:
        raise UserError(f"{args.data_dir} holds no images; name them with --data_dir, or an --archive of them")
    try:
        half = args.data_dir.with_suffix(".part")  # so that what is there is complete
        shutil.rmtree(half, ignore_errors=True)  # of an attempt that was cut short
        with tarfile.open(args.archive) as archive:
            archive.extractall(half, filter="data")
        if not (half / "test").is_dir():
            raise OSError("there is no folder test in it")
        half.rename(args.data_dir)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"--archive {args.archive} cannot be unpacked ({errors.one_line(error)})") from error


def reference(hour: Hour) -> list[Path]:
    """The finished checkpoints of stage 3."""
    return sorted(hour.args.out.glob(f"seed?/*_ckpt_epoch{hour.args.epochs}.pth"))


def correctness(hour: Hour) -> None:
    """Stage 1."""
    trained = train(hour, "short", "--T_max", 1, epochs=1)
    if trained:
        same = ["--precision", "fp32", "--engine", "dense", "--levels", "0,40,60,80"]
        by_gpu = sweep(hour, "agree_gpu", [trained], *same)
        by_cpu = sweep(hour, "agree_cpu", [trained], *same, "--device", "cpu")
        pairs = list(zip(by_gpu, by_cpu, strict=False))  # one may have been stopped
        apart = max((abs(float(one["accuracy"]) - float(other["accuracy"])) for one, other in pairs), default=None)
        hour.figures["agreement"] = {"levels": len(pairs), "largest_difference_points": apart}
        if apart is not None and apart > AGREEMENT:
            hour.miss(f"agreement (GPU and CPU differ by {apart} points)")
    together(hour)
    files = sorted(path.relative_to(ROOT) for path in ROOT.glob("tests/test_*.py"))
    if hour.args.small:
        files = [path for path in files if path.stem in ("test_masks", "test_evaluation")]
    for group in range(TEST_GROUPS):
        if chosen := files[group::TEST_GROUPS]:
            text = call(hour, f"tests_{group}", ["-m", "pytest", "-p", "no:cacheprovider", *chosen])
            if text:
                hour.figures[f"tests_{group}"] = text.strip().splitlines()[-1]


def together(hour: Hour) -> None:
    """A short training by one process a GPU, or by two on a CPU, and a sweep by as many against one by a single one."""
    processes = 2 if hour.args.small else torch.cuda.device_count()
    if processes < 2:
        hour.figures["together"] = f"not run: it needs two GPUs, and this machine has {processes}"
        return
    trained = train(hour, "short_together", "--T_max", 1, epochs=1, processes=processes)
    if trained:
        # Threads and kernels decide about the last bits, and torchrun gives each process one thread.
        same = ["--precision", "fp32", "--engine", "dense", "--threads", 1, "--deterministic", "--levels", "0:90:10"]
        alone = sweep(hour, "rows_alone", [trained], *same)
        shared = sweep(hour, "rows_together", [trained], *same, processes=processes)
        found = [[row | {"seconds": None} for row in rows] for rows in (alone, shared)]
        whole = all(hour.figures.get(name, {}).get("finished") for name in ("rows_alone", "rows_together"))
        alike = found[0] == found[1] if whole else None
        hour.figures["together"] = {"processes": processes, "rows": [len(alone), len(shared)], "same_rows": alike}
        if alike is False:
            hour.miss(f"agreement of processes (the rows of {processes} differ from those of one)")


def speed(hour: Hour) -> None:
    """Stage 2."""
    training, sweeping = "tests/benchmarks/bench_train.py", "tests/benchmarks/bench_sweep.py"
    if hour.args.small:
        benchmark(hour, "train", training, "--images", 128, "--batch_size", 64, "--reference")
        benchmark(hour, "evaluation", sweeping, "--images", 128, "--precision", "fp32")
        return
    images = ["--images", 12_800, "--compile"]
    benchmark(hour, "train_128", training, *images, "--batch_size", 128, "--reference")
    benchmark(hour, "train_512", training, *images, "--batch_size", 512)
    benchmark(hour, "evaluation", sweeping, "--images", 10_000, "--compile", "--levels", 21)


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
    saved, home = checkpoint.load(path), hour.path("home")
    if hour.figures.get("packed", {}).get("of_sha256") == saved.sha256:
        return
    home.mkdir(exist_ok=True)
    packed = home / f"{path.stem}.npz"
    checkpoint.save_packed(packed, saved.content | {"net": saved.net}, "bf16")
    data = lzma.compress(packed.read_bytes())
    packed.unlink()
    for number, start in enumerate(range(0, len(data), PART)):
        files.write_atomic(home / f"{packed.name}.xz.{number:02}", data[start : start + PART])
    hour.figures["packed"] = {"bytes": len(data), "parts": number + 1, "of": str(path), "of_sha256": saved.sha256}


def sweeps(hour: Hour) -> None:
    """Stage 4."""
    if len(found := reference(hour)) < SEEDS:
        hour.miss(f"some sweeps ({len(found)} of {SEEDS} seeds of stage 3 are trained)")
    if found:
        levels = ["--levels", "0,50,90"] if hour.args.small else []
        sweep(hour, "l1_uniform", found[:1], *levels)
        sweep(hour, f"compare_{len(found)}_seeds", found, "--compare", *levels)


def strong(hour: Hour) -> None:
    """Stage 5."""
    short = ["--warmup_epochs", 1] * (hour.args.epochs <= 5)
    train(hour, "strong", "--recipe", "strong", *short, epochs=hour.args.epochs)


def recovery(hour: Hour) -> None:
    """Stage 6."""
    better = sorted(hour.path("strong").glob("*_ckpt_epoch*.pth"), key=lambda path: path.stat().st_mtime)
    done = hour.commands.get("strong", {}).get("status") == "done"
    if not (found := better[-1:] if done and better else reference(hour)[:1]):
        hour.miss("all (a finished checkpoint of stage 3 or 5 is needed)")
        return
    small, stem = hour.args.small, found[0].parent.name
    levels = "80,95" if small else "80,90,95,97,98,99"
    iterative = ["--allocation", "lamp", "--schedule", "iterative", "--levels", levels]
    tuning = ["--finetune_epochs", 1 if small else 8, "--finetune_learning_rate", 0.01]
    images = ["--calibration_images", 64] * small
    sweep(hour, f"{stem}_iterative_finetune", found, *iterative, "--recover", "finetune", *tuning)
    sweep(hour, f"{stem}_iterative_reconstruction", found, *iterative, "--recover", "reconstruction", *images)


STAGES: dict[int, Callable[[Hour], None]] = {1: correctness, 2: speed, 3: recipe, 4: sweeps, 5: strong, 6: recovery}


def work(args: argparse.Namespace) -> None:
    """The stages in their order, then the figures; UserError at the end unless all is complete."""
    files.prepare_folder(args.out, "--out", 1 << 30)
    hour = Hour(args)
    hour.read()
    unpack_images(args)
    for number in args.stages:
        print(f"\nstage {number}: {STAGES[number].__name__}", flush=True)
        hour.stage, hour.missing[str(number)] = number, []
        hour.deadline = time.monotonic() + 60 * args.limit_minutes
        try:
            STAGES[number](hour)
        except (UserError, OSError, LookupError, ValueError) as error:  # also a file that is not as it should be
            hour.miss(errors.one_line(error))
        finally:  # Ctrl-C as well
            hour.write()
    print("\nfigures")
    for name, figures in hour.figures.items():
        print(f"{name}: {json.dumps(figures, indent=2)}")
    missing = [f"{what} of stage {number}" for number in args.stages for what in hour.missing[str(number)]]
    if missing:
        raise UserError(f"incomplete: {'; '.join(missing)}; the same stages given again go on")


if __name__ == "__main__":
    flags = parse_args()
    sys.exit(errors.run_main(lambda team: work(flags), lambda: errors.command_line(sys.argv[0], sys.argv[1:])))
