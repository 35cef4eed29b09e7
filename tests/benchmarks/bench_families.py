"""Every family of torchvision's classification networks through pruning.py: what can be done with it, as a table.

    python tests/benchmarks/bench_families.py [--families vit regnet ...] [--out images/families/families.csv]

The smallest network of a family, at about the smallest image that it takes, is trained for a few steps on images made
on the fly, so that its outputs differ and a refit has something to hold. Then `pruning.py --describe`, and a sweep of
0, 50 and 90 % with no recovery, with `batchnorm` and with `reconstruction`, in float32. Prints a Markdown table and
writes a CSV; lines of other families that are in the CSV stay. Exit status 1 where a family fails.
"""

import argparse
import csv
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models

sys.path.insert(0, str(Path(__file__).parents[2]))

from sparsity.data.images import Split, normalise
from sparsity.data.sources import Source, load_split
from sparsity.data.synthetic import SYNTHETIC_CLASSES, synthetic_images
from sparsity.networks.outputs import give_logits
from sparsity.system.files import write_csv
from sparsity.system.machine import apply_threads

ROOT = Path(__file__).parents[2]
HALF = (0.5, 0.5, 0.5)
IMAGES = {"train": 80, "test": 40}
STEPS, BATCH = 20, 16
COLUMNS = ("family", "network", "image_size", "traced", "folded", "refitted", "prunable", "matrices", "filters")
COLUMNS += ("accuracy", "accuracy_0", "same_at_0", "finite_at_90", "seconds", "remark")


class Family(NamedTuple):
    """The smallest network of a family, an image size that it takes, its arguments, and layers left out for time."""

    network: str
    size: int = 32
    arguments: dict[str, Any] | None = None
    exclude: str = ""


WITHOUT_HEADS = {"aux_logits": False, "init_weights": False}
FAMILIES = {
    "alexnet": Family("alexnet", 64, exclude="classifier.1"),  # of 9,216 inputs
    "convnext": Family("convnext_tiny"),
    "densenet": Family("densenet121"),
    "efficientnet": Family("efficientnet_b0"),
    "googlenet": Family("googlenet", 32, WITHOUT_HEADS),
    "inception": Family("inception_v3", 75, WITHOUT_HEADS),
    "maxvit": Family("maxvit_t", 224),
    "mnasnet": Family("mnasnet0_5"),
    "mobilenet_v2": Family("mobilenet_v2"),
    "mobilenet_v3": Family("mobilenet_v3_small"),
    "regnet": Family("regnet_y_400mf"),
    "resnet": Family("resnet18"),
    "resnext": Family("resnext50_32x4d"),
    "shufflenet": Family("shufflenet_v2_x0_5"),
    "squeezenet": Family("squeezenet1_1"),
    "swin": Family("swin_t"),
    "vgg": Family("vgg11", exclude="classifier.0"),  # of 25,088 inputs
    "vgg_bn": Family("vgg11_bn", exclude="classifier.0"),
    "vit": Family("vit_b_16", 32, {"image_size": 32}),
    "wide_resnet": Family("wide_resnet50_2"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME", help="(all)")
    parser.add_argument("--out", type=Path, default=ROOT / "images/families/families.csv", help="CSV (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    return parser.parse_args()


def draw_images(folder: Path, size: int) -> None:
    """Write the training and test images, of `size` pixels, to class folders below `folder`."""
    for split, count in IMAGES.items():
        images, labels = synthetic_images(32, split == "train")
        for number, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
            path = folder / split / SYNTHETIC_CLASSES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR).save(path)


def train(network: nn.Module, images: Split) -> None:
    """A few steps of Adam, in place; leaves the network in eval mode."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(STEPS):
        batch = (torch.arange(BATCH) + step * BATCH) % len(images)
        inputs = normalise(images.images[batch], images.mean, images.std).contiguous()
        optimizer.zero_grad()
        F.cross_entropy(network.train()(inputs), images.labels[batch]).backward()
        optimizer.step()
    network.eval()


@torch.inference_mode()
def accuracy_and_loss(network: nn.Module, images: Split) -> tuple[float, float]:
    """Accuracy in percent and mean loss of a network as it is, in eval mode, by a plain loop."""
    correct, loss = 0, 0.0
    for image, label in zip(images.images, images.labels, strict=True):
        logits = network(normalise(image[None], images.mean, images.std).contiguous())
        correct += int(logits.argmax(1) == label)
        loss += float(F.cross_entropy(logits, label[None]))
    return 100 * correct / len(images), loss / len(images)


def prune(folder: Path, *flags: str) -> str:
    """What pruning.py prints; RuntimeError with the last line of its errors where it fails."""
    command = [sys.executable, str(ROOT / "pruning.py"), "--images_dir", str(folder), "--checkpoint_dir", str(folder)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(("traceback: " * ("Traceback" in done.stderr)) + done.stderr.strip().splitlines()[-1])
    return done.stdout


def measure(family: Family, threads: int) -> dict[str, Any]:
    """The columns of a family's line."""
    line = {"network": family.network, "image_size": family.size, "remark": ""}
    arguments = family.arguments or {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder, family.size)
        torch.manual_seed(0)
        network = models.get_model(family.network, weights=None, num_classes=len(SYNTHETIC_CLASSES), **arguments)
        network = give_logits(network, family.network)
        splits = [load_split(Source("folder", folder, family.size), each, (HALF, HALF))[0] for each in (True, False)]
        train(network, splits[0])
        accuracy, loss = accuracy_and_loss(network, splits[1])
        torch.save(network.state_dict(), folder / "network.pth")
        del network
        flags = ["--checkpoint", "network.pth", "--arch", f"torchvision:{family.network}", "--dataset", "folder"]
        flags += ["--data_dir", ".", "--image_size", str(family.size), "--mean", "half", "--std", "half"]
        flags += ["--precision", "fp32", "--threads", str(threads), "--name", "family"]
        flags += ["--exclude", family.exclude] if family.exclude else []
        words = [f"{key}={json.dumps(value)}" for key, value in arguments.items()]
        flags += ["--arch_args", *words] if words else []
        line |= described(prune(folder, "--describe", *flags)) | {"accuracy": accuracy}
        prune(folder, "--levels", "0,50,90", "--recover", "none", "batchnorm", "reconstruction", *flags)
        with (folder / "family_pruning.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    (dense,) = (row for row in rows if (row["level"], row["recover"]) == ("0", "none"))
    line["accuracy_0"] = float(dense["accuracy"])
    line["same_at_0"] = line["accuracy_0"] == accuracy and math.isclose(float(dense["loss"]), loss, rel_tol=1e-3)
    pruned = [float(row["loss"]) for row in rows if row["level"] == "90"]
    line["finite_at_90"] = len(pruned) == 3 and all(map(math.isfinite, pruned))
    return line | {"remark": f"{family.exclude} stays dense, for time" if family.exclude else ""}


def described(text: str) -> dict[str, Any]:
    """The columns that are read off `pruning.py --describe`."""
    prunable, matrices = re.search(r"^prunable: .* in (\d+) of (\d+) layers", text, re.M).groups()
    folded, norms = re.search(r"^folded: (\d+) of (\d+) BatchNorm", text, re.M).groups()
    return {
        "traced": "traced by torch.fx: yes" in text,
        "folded": f"{folded} of {norms}",
        "refitted": int(re.search(r"^refitted by reconstruction: (\d+) of", text, re.M)[1]),
        "prunable": int(prunable),
        "matrices": int(matrices),
        "filters": int(re.search(r"^filters that can be removed: ([\d,]+)", text, re.M)[1].replace(",", "")),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as a Markdown table."""
    words = {"True": "yes", "False": "no"}
    cells = [[words.get(str(line[name]), str(line[name])) for name in COLUMNS] for line in lines]
    return "\n".join(f"| {' | '.join(each)} |" for each in [COLUMNS, ["---"] * len(COLUMNS), *cells])


def main() -> int:
    args = parse_args()
    threads, lines = apply_threads(args.threads), {}
    if args.out.exists():
        with args.out.open(newline="") as file:
            lines = {line["family"]: line for line in csv.DictReader(file)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.families:
        started = time.perf_counter()
        try:
            line = measure(FAMILIES[name], threads)
        except RuntimeError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        lines[name] = line | {"family": name, "seconds": round(time.perf_counter() - started)}
        print(f"{name}: {lines[name]['seconds']} s", file=sys.stderr, flush=True)
        write_csv(args.out, COLUMNS, (lines[known] for known in FAMILIES if known in lines))
    print(table([lines[known] for known in FAMILIES if known in lines]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
