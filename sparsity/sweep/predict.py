"""`--predict`: the classes that the network in any checkpoint or exported file finds in images, one line each."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsity.data.images import CIFAR10_CLASSES
from sparsity.data.sources import read_image
from sparsity.networks.families import load_network, named
from sparsity.networks.onnx_file import run_onnx
from sparsity.networks.outputs import require_logits
from sparsity.networks.program import FromPixels, answers
from sparsity.networks.program_reader import read_program
from sparsity.sweep.flags import EXPORT_FORMATS, PROGRAMS
from sparsity.sweep.inputs import find_normalisation, find_source
from sparsity.system.errors import UserError, described, one_line
from sparsity.system.machine import apply_threads

SHOWN = 3  # classes
BATCH = 8  # images at a time
SIZES = range(4, 4097)  # pixels a side that are believed


class Opened(NamedTuple):
    """A network: `run` maps images [B, 3, S, S] in 0..1 to logits, S is `size`; the names of its classes, or None."""

    run: Callable[[Tensor], Tensor]
    size: int
    classes: list[str] | None


def predict(args: argparse.Namespace) -> None:
    """Print a line for each image; all else that is said goes to stderr. Runs on the CPU, in the file's precision."""
    path, *images = args.predict
    apply_threads(args.threads)
    for image in images:
        if image.suffix in EXPORT_FORMATS.values():
            raise UserError(f"{image} is no image; the file of the network comes first, before the images")
        if not image.is_file():
            missing = "is no file" if image.exists() else "is not there"
            raise UserError(f"image {image} {missing}; name files of images after {path}")
    with redirect_stdout(sys.stderr):
        opened = _open_program(args, path) if path.suffix in PROGRAMS.values() else _open_checkpoint(args, path)
    for start in range(0, len(images), BATCH):
        few = images[start : start + BATCH]
        pixels = [torch.tensor(read_image(str(image), opened.size)[0]).permute(2, 0, 1) for image in few]
        for image, shares in zip(few, _shares(path, opened, torch.stack(pixels)), strict=True):
            print(f"{image}: {_best(shares, opened.classes)}", flush=True)


def _open_checkpoint(args: argparse.Namespace, path: Path) -> Opened:
    """The network of a checkpoint, which normalises as the flags or the file tell."""
    saved, model = load_network(path, named(args.arch, args.arch_args))
    source = find_source(saved, args.dataset, None, args.image_size)
    mean, std = find_normalisation(saved, source, args.mean, args.std)
    require_logits(model, saved.model["arch"], source.image_size, saved.model["num_classes"])
    whole = FromPixels(model, mean, std, torch.float32).eval()
    classes = (saved.data or {}).get("classes") or (list(CIFAR10_CLASSES) if args.dataset == "cifar10" else None)
    return Opened(whole, source.image_size, classes)


def _open_program(args: argparse.Namespace, path: Path) -> Opened:
    """The network of a program or ONNX file, which knows all about its images."""
    if given := [name for name in ("arch", "arch_args", "dataset", "mean", "std", "image_size") if getattr(args, name)]:
        raise UserError(f"{path} tells its network and its images itself; leave out --{', --'.join(given)}")
    if not path.is_file():
        raise UserError(f"{path} is not there; write one with --export LEVEL --export_format program")
    data = path.read_bytes()
    try:
        if path.suffix == PROGRAMS["program"]:
            run, metadata = read_program(data)
        else:
            run, properties = run_onnx(data)
            metadata = json.loads(properties["metadata"])
        about = metadata["data"]
        size, classes = about["image_size"], about["classes"]
        if size not in SIZES or not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
            raise ValueError("its image size or class names are not valid")
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged bytes surface as almost any exception from the readers of zip, JSON and ONNX
        raise UserError(f"{path} is refused, damaged or not written by this project ({described(error)})") from error
    return Opened(run, size, classes)


def _shares(path: Path, opened: Opened, images: Tensor) -> Tensor:
    """The probability of each class [N, classes], in percent; UserError where the file gives none."""
    try:
        logits = answers(opened.run, images, BATCH)
        if not logits.isfinite().all() or logits.shape != (len(images), len(opened.classes or logits[0])):
            raise ValueError("it gives no finite logits of its classes")
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the network is anybody's
        raise UserError(f"{path} cannot be run on images of {opened.size} pixels ({described(error)})") from error
    return 100 * logits.double().softmax(1)


def _best(shares: Tensor, classes: list[str] | None) -> str:
    """The most likely classes and their probabilities, in words."""
    top = shares.topk(min(SHOWN, len(shares)))
    names: list[Any] = [f"class {index}" if classes is None else classes[index] for index in top.indices.tolist()]
    pairs = zip(names, top.values.tolist(), strict=True)
    return ", ".join(f"{one_line(name)[:80]} {share:.2f} %" for name, share in pairs)
