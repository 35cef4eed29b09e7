"""The study's loop at its plainest, to hold the sweep against: reload, prune, unfolded model, one image set, count.

    python tests/plain_loop.py CHECKPOINT SWEEP.csv TEST_FOLDER [--levels 0,20,40,50,60] [--images 2000]

compares accuracy and loss of these levels, in float32, with the rows of a sweep over the same images, and exits 1 when
an accuracy differs by more than 0.1 point or a loss by more than 0.1 %. Of the project's code it uses the network, and
the fixed order of the images, nothing else.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parents[1]))


import Build_Resnet
from sparsity.data.images import class_balanced_order

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def load_images(folder: Path, count: int | None, mean=MEAN, std=STD) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` test images in the fixed order, normalised by torchvision, and their labels."""
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    dataset = datasets.ImageFolder(str(folder), convert)
    order = class_balanced_order(torch.tensor(dataset.targets))[:count].tolist()
    images, labels = zip(*(dataset[index] for index in order), strict=True)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def plain_result(
    path: Path, images: torch.Tensor, labels: torch.Tensor, level: float, output: str = "linear"
) -> tuple[float, float]:
    """Accuracy in percent and mean loss of the network in `path`, pruned to `level` percent in each layer."""
    net = torch.load(path, weights_only=True)["net"]
    model = Build_Resnet.build(Build_Resnet.spec_of(net))
    model.load_state_dict(net)
    model.eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and name != output:
            prune.l1_unstructured(module, "weight", amount=level / 100)
    correct, loss = 0, 0.0
    for some, right in zip(images.split(100), labels.split(100), strict=True):
        logits = model(some)
        correct += int((logits.argmax(1) == right).sum())
        loss += float(F.cross_entropy(logits, right, reduction="sum"))
    return 100 * correct / len(labels), loss / len(labels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "csv", "folder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--levels", default="0,20,40,50,60")
    parser.add_argument("--images", type=int)
    args = parser.parse_args()
    with args.csv.open(newline="") as file:
        rows, worst = {float(row["level"]): row for row in csv.DictReader(file)}, 0
    images, labels = load_images(args.folder, args.images)
    for level in map(float, args.levels.split(",")):
        accuracy, loss = plain_result(args.checkpoint, images, labels, level)
        swept = float(rows[level]["accuracy"]), float(rows[level]["loss"])
        points, share = abs(accuracy - swept[0]), 100 * abs(loss - swept[1]) / loss
        worst |= points > 0.1 or share > 0.1
        there = f"plain {accuracy:.3f} %, loss {loss:.6f}; swept {swept[0]:.3f} %, loss {swept[1]:.6f}"
        print(f"{level:5g} %: {there}; apart {points:.3f} points, {share:.5f} %", flush=True)
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
