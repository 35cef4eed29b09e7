"""Colours, titles, legends and axes that the figures share, and the way of a figure to the disk."""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sparsity.results.store import Sweep
from sparsity.results.summary import dense_accuracy
from sparsity.system.files import write_atomic
from sparsity.system.methods import Curve

# Okabe and Ito's palette: distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
QUIET = "#777777"
RING = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": "none", "zorder": 5}
LINES = {"none": "-", "batchnorm": (0, (5, 2)), "reconstruction": (0, (1, 1.3)), "finetune": (0, (5, 1.5, 1, 1.5))}


def save_figure(figure: Figure, path: Path, *title: str) -> Path:
    """Write a figure under a title of these lines atomically as PNG, and return its path.

    The title is wrapped to the width of the figure; a long one makes the figure higher.
    """
    font = min(max(11.0, 0.9 * figure.get_figwidth()), 18.0)
    text = wrapped("\n".join(title), figure.get_figwidth() / (0.85 * font / 72))  # inches of a wide letter
    figure.suptitle(text, fontsize=font)
    further = max(0, text.count("\n") - 2)  # lines that would take their height from the axes
    figure.set_figheight(figure.get_figheight() + 1.4 * further * font / 72)
    dpi = 150 if max(figure.get_size_inches()) < 15 else 110  # a large one is legible, and large, enough
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks is drawn as boxes
        figure.savefig(buffer, format="png", dpi=dpi)
    write_atomic(path, buffer.getbuffer())
    return path


def literal(text: str) -> str:
    """Text as it is, where matplotlib would take what stands between dollar signs for a formula."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: float) -> str:
    """Literal text in lines of at most `width` characters, long words broken."""
    lines = (line for part in text.splitlines() for line in textwrap.wrap(part, max(8, int(width))))
    return literal("\n".join(lines))


def curve_styles(curves: Iterable[Curve]) -> dict[Curve, dict]:
    """Curve -> keywords of a line: colour and marker tell criterion and allocation, the line style the recovery."""
    curves, styles = list(curves), {}
    groups = list(dict.fromkeys(curve[:2] for curve in curves))
    for curve in curves:
        again, index = divmod(groups.index(curve[:2]), len(COLOURS))
        line = LINES.get(curve.recover, (0, (3, 1, 1, 1, 1, 1)))
        styles[curve] = {"color": COLOURS[index], "marker": MARKERS[again % len(MARKERS)], "linestyle": line}
    return styles


def name_lines(figure: Figure, note: str = "") -> None:
    """A legend of all lines that have a label below the axes, each label once, under a note."""
    named = {}
    for axes in figure.axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        look = {"frameon": False, "fontsize": 9, "handlelength": 4}  # long enough to tell dashes from dots
        look |= {"ncols": min(3, len(named)), "title": note, "title_fontsize": 9}
        figure.legend(named.values(), named.keys(), loc="outside lower center", **look)


def scale_accuracy(axes: Axes, xlabel: str, **more: Any) -> None:
    """Scale the y axis to percent, the same in all figures, and draw a grid; `more` is for `Axes.set`."""
    axes.set(xlabel=xlabel, ylim=(0, 106), **more)
    axes.grid(alpha=0.25)


def draw_references(axes: Axes, sweep: Sweep, side: str = "right") -> float:
    """Quiet lines at dense, named at a `side` where no curve is, and at chance, named at the other one.

    Returns the accuracy in the middle between them.
    """
    dense, chance = dense_accuracy(sweep), 100 / len(sweep.header["data"]["classes"])
    other = "left" if side == "right" else "right"
    look = {"color": QUIET, "fontsize": 9, "transform": axes.get_yaxis_transform()}
    for height, text, ha in ((dense, f"dense {dense:.1f} %", side), (chance, f"chance {chance:.3g} %", other)):
        below = 6 < height == chance  # or there is no room
        axes.axhline(height, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        x, y = 0.01 if ha == "left" else 0.99, height - 1 if below else height + 1
        axes.text(x, y, text, ha=ha, va="top" if below else "bottom", **look)
    return (dense + chance) / 2


def use_log_scale(axes: Axes, unit: str = "") -> None:
    """Make the x axis logarithmic, with ticks at 1, 2 and 5 of each power of ten; at powers alone of many of them."""
    if axes.dataLim.minposx == math.inf:
        axes.set_xlim(1, 10)  # nothing is drawn that would set the ends
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 2000 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axes.xaxis.set_minor_locator(NullLocator())
