"""Types of command-line flags that refuse what makes no sense, and the flags that both scripts share; torch-free."""

import argparse
import math
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

# Name -> side in pixels where no other is asked for; loaded by data/sources.py.
DATASETS = {"cifar10": 32, "cifar100": 32, "folder": 32, "synthetic": 16}


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value

    return parse


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` (itself not allowed if `above`) to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            bound = "above" if above else "from"
            upper = "" if high == math.inf else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound} {low:g}{upper}")
        return value

    return parse


def levels_type(text: str) -> list[float]:
    """An argparse type: levels in percent, ascending; 'start:stop:step' with stop included, or a list 'a,b,c'."""
    try:
        if ":" in text:
            start, stop, step = (Decimal(part) for part in text.split(":"))
            if not (start.is_finite() and stop.is_finite() and step.is_finite()) or step <= 0 or start > stop:
                raise ValueError
            if (stop - start) / step > 10_000:
                raise argparse.ArgumentTypeError(f"{text!r} is more than 10,000 levels")
            # Decimals, so that 0:1:0.1 ends at 1 and holds 0.3 instead of 0.30000000000000004.
            levels = [start + step * index for index in range(int((stop - start) / step) + 1)]
        else:
            levels = [Decimal(part) for part in text.split(",")]
        if not all(0 <= level <= 100 for level in levels):  # also refuses nan
            raise argparse.ArgumentTypeError(f"{text!r} has a level outside 0 to 100 percent")
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither start:stop:step nor a list such as 0,40,90") from error
    return sorted({float(level_text(float(level))) for level in levels})  # levels of equal text are one level


def level_text(level: float) -> str:
    """A level in percent as a person writes it: 40, 99.5. Levels are compared by this text."""
    return f"{level:.10g}"


def stem_type(text: str) -> str:
    """An argparse type: a file name's stem, without folders."""
    if not text.isprintable() or Path(text).name != text or text.startswith(".") or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name for files in --images_dir")
    return text


def rate_type(text: str) -> float | str:
    """An argparse type: a learning rate above 0, or the word 'rewind'."""
    if text == "rewind":
        return text
    try:
        return number(0, 1e30, above=True)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor rewind") from error


def device_name(text: str) -> str:
    """An argparse type: 'auto' or a torch device; whether it is at hand is found out later."""
    if not re.fullmatch(r"auto|[a-z]+(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a torch device such as cpu, cuda:0")
    return text


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where and how to compute, as a group of the help."""
    add = parser.add_argument_group("machine").add_argument
    text = "auto (cuda, then mps, then cpu) or a torch device (%(default)s)"
    add("--device", type=device_name, default="auto", metavar="NAME", help=text)
    text = "auto is bf16 where the hardware is made for it (%(default)s)"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=text)
    add("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="of all draws (%(default)s)")
    text = "CPU threads; part of repeatability (torch's choice)"
    add("--threads", type=integer(1, 4096), metavar="N", help=text)
    text = "compile the network first; auto is on for CUDA, off elsewhere (%(default)s)"
    add("--compile", choices=("auto", "on", "off"), default="auto", help=text)
    text = "the same bits again on the same hardware, versions and threads, on a GPU too, where it costs time (off)"
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False, help=text)


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None) -> set[str]:
    """The names of the flags that are on the command line, as opposed to left at their defaults."""
    unset = object()
    # argparse leaves an attribute alone that the namespace has already, unless the flag is given.
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), unset))
    return {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not unset}
