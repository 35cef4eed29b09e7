"""Types of command-line flags that refuse what makes no sense, and the flags that both scripts share; torch-free."""

import argparse
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

# Name -> side in pixels where no other is asked for; loaded by data/sources.py.
DATASETS = {"cifar10": 32, "cifar100": 32, "folder": 32, "synthetic": 16}

BUILT_IN = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # networks of Build_Resnet.py


class Parser(argparse.ArgumentParser):
    """A parser that takes flags by their whole names only, and tells a usage error in one line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End the program with status 2; --help has what argparse would print first."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


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
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rising start:stop:step nor a list as 0,40") from error
    return sorted({float(level_text(float(level))) for level in levels})  # levels of equal text are one level


def level_text(level: float) -> str:
    """A level in percent as a person writes it: 40, 99.5. Levels are compared by this text."""
    return f"{level:.10g}"


def counted(number: int, noun: str) -> str:
    """A number of things in words: '1 network', '2,048 networks'."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def time_span(text: str) -> float:
    """An argparse type: seconds, from text such as '2h30m', '90m', '1.5h' and '45s', or a bare number of seconds."""
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text)
    try:
        seconds = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    except (AttributeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 2h30m, 90m or 45s")
    return seconds


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


def images_type(text: str) -> int | None:
    """An argparse type: a number of images, at least 2, or None for the word 'all'."""
    if text == "all":
        return None
    try:
        return integer(2)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number from 2 nor all") from error


def device_name(text: str) -> str:
    """An argparse type: 'auto' or a torch device; whether it is at hand is found out later."""
    if not re.fullmatch(r"auto|[a-z]+(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a torch device such as cpu, cuda:0")
    return text


def arch_type(text: str) -> str:
    """An argparse type: a network's name, as in ARCH_HELP; whether there is such a network is found out later."""
    library = re.fullmatch(r"(torchvision|timm):[\w.\-]+", text)
    file = re.fullmatch(r".+\.py:[^\W\d]\w*", text)
    if text not in BUILT_IN and not (text.isprintable() and (library or file)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {ARCH_HELP}")
    return text


ARCH_HELP = f"{', '.join(BUILT_IN)}, torchvision:NAME, timm:NAME, path/to/file.py:function"


def argument_type(text: str) -> tuple[str, Any]:
    """An argparse type: 'key=value' as a pair; the value is a JSON literal, or else text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value, such as depth=20 or norm=batch")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


class _Pairs(argparse.Action):
    """Keeps pairs as a dictionary."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if repeated := [key for key, _ in values if sum(key == other for other, _ in values) > 1]:
            parser.error(f"argument {option}: {repeated[0]} is given twice")
        setattr(namespace, self.dest, dict(values))


def add_arch_flags(add: Callable[..., Any], default: str | None, text: str) -> None:
    """Add --arch and --arch_args, which name the network."""
    add("--arch", type=arch_type, default=default, metavar="NAME", help=text)
    text = "arguments of a network that is not built in: JSON literals, else text (none)"
    add("--arch_args", type=argument_type, nargs="+", action=_Pairs, default={}, metavar="KEY=VALUE", help=text)


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where and how to compute, as a group of the help."""
    add = parser.add_argument_group("machine").add_argument
    text = "auto (cuda, then mps, then cpu) or a torch device (%(default)s)"
    add("--device", type=device_name, default="auto", metavar="NAME", help=text)
    text = "auto is bf16 where the hardware is made for it (%(default)s)"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=text)
    add("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="of all draws (%(default)s)")
    text = "CPU threads; results repeat to the bit only with the same number (torch's choice)"
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
