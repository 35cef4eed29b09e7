"""Pilots of the strong recipe: short trainings that differ from it in one thing, as one table.

    python tests/benchmarks/bench_recipes.py --data_dir datasets/cifar10-jpeg --out images/pilots/pilots.csv

Each row is a run of `run.py --recipe strong` on the first training images of each class, 20,000 in all, by default of a
ResNet-18 of a quarter of the usual width for five epochs; test accuracy is that on all test images. A pilot whose row
is in the file is not run again, so that an interrupted table goes on. Columns: variant, seed, the flags that make it,
arch, width, images, epochs, test and training accuracy in percent after the last epoch, the seconds of all epochs.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from sparsity.system.files import write_csv

ROOT = Path(__file__).parents[2]
# Variant -> the flags that are added.
VARIANTS = {
    "strong": "",
    "start at 16 pixels": "--start_size 16",
    "always 32 pixels": "--start_size 0",
    "Nesterov, rate 0.12": "--optimizer sgd",
    "Nesterov, rate 0.25": "--optimizer sgd --learning_rate 0.25",
    "Muon, half the rate": "--learning_rate 0.06",
    "Muon, twice the rate": "--learning_rate 0.24",
    "batch 256, same rate": "--batch_size 256 --learning_rate 0.12",
    "batch 256, twice the rate": "--batch_size 256",
    "warm-up of 5 %": "--warmup_share 0.05",
    "warm-up of 30 %": "--warmup_share 0.3",
    "no label smoothing": "--label_smoothing 0",
    "black borders": "--border zeros",
    "shifts of 4 pixels": "--shift 4",
    "residual branches not from zero": "--no-zero_init",
    "reference recipe": "--recipe reference --T_max {epochs}",
}
COLUMNS = (
    *("variant", "seed", "flags", "arch", "width", "images", "epochs"),
    *("test_accuracy", "training_accuracy", "seconds"),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder dataset")
    parser.add_argument("--out", type=Path, required=True, help="the table, a CSV that is added to")
    parser.add_argument("--arch", default="resnet18", help="(%(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of each pilot (%(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="training images (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(0 1)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants (all)")
    return parser.parse_args()


def link_images(source: Path, folder: Path, images: int) -> None:
    """Make `folder` a folder dataset: links to `images` training images, evenly of each class, and all tests."""
    folder.mkdir()
    (folder / "test").symlink_to((source / "test").resolve())
    classes = sorted(path for path in (source / "train").iterdir() if path.is_dir())
    for each in classes:
        (folder / "train" / each.name).mkdir(parents=True)
        for path in sorted(each.iterdir())[: images // len(classes)]:
            (folder / "train" / each.name / path.name).symlink_to(path.resolve())


def run_pilot(args: argparse.Namespace, data: Path, variant: str, seed: int) -> dict[str, object]:
    """The row of one training, which `run.py` does in a process and a folder of its own."""
    flags = VARIANTS[variant].format(epochs=args.epochs)
    recipe = "" if "--recipe" in flags else "--recipe strong"
    with tempfile.TemporaryDirectory() as folder:
        words = f"{recipe} --dataset folder --arch {args.arch} --width {args.width} --epochs {args.epochs} {flags}"
        places = ["--data_dir", data, "--checkpoint_dir", folder, "--images_dir", folder]
        places += ["--threads", args.threads] if args.threads else []
        command = [sys.executable, ROOT / "run.py", *words.split(), "--seed", seed, *places]
        subprocess.run([str(word) for word in command], check=True)
        with next(Path(folder).glob("*_training.csv")).open(newline="") as file:
            epochs = list(csv.DictReader(file))
        about = json.loads(next(Path(folder).glob("*_training.json")).read_text())
    return {
        "variant": variant,
        "flags": flags,
        "arch": args.arch,
        "width": args.width,
        "images": args.images,
        "seed": seed,
        "epochs": len(epochs),
        "test_accuracy": about["test_accuracy"],
        "training_accuracy": epochs[-1]["training_accuracy"],
        "seconds": f"{sum(float(epoch['seconds']) for epoch in epochs):.1f}",
    }


def read_rows(path: Path) -> list[dict[str, object]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(args.out)
    keys = ("variant", "arch", "width", "images", "seed", "epochs")
    done = {tuple(str(row[key]) for key in keys) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images"
        link_images(args.data_dir, data, args.images)
        for seed in args.seeds:
            for variant in args.only:
                pilot = (variant, args.arch, args.width, args.images, seed, args.epochs)
                if tuple(map(str, pilot)) not in done:
                    rows.append(run_pilot(args, data, variant, seed))
                    write_csv(args.out, COLUMNS, rows)
                    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
