"""Colours, titles, captions, axes and gaps that the figures share, and the way of a figure to the disk."""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsity.results.store import Sweep, dense_accuracy
from sparsity.system.files import write_atomic
from sparsity.system.methods import Curve

# Okabe and Ito's palette: distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v")
QUIET = "#777777"
RING = "_ring"  # the label of rings, which no legend shows
LINES = {
    "none": "-",
    "batchnorm": (0, (5, 2)),
    "reconstruction": (0, (1, 1.3)),
    "distill": (0, (3, 1.2, 1, 1.2, 1, 1.2)),
    "finetune": (0, (5, 1.5, 1, 1.5)),
}
MOST_NAMES = 6  # of more curves the names would cover the lines
SMALL_GAP, LARGE_GAP = 10, 20  # levels, in points, that a line joins always, and only where the grid is that coarse


def save_figure(figure: Figure, path: Path, message: str, *about: str) -> Path:
    """Write a figure under its message, with the lines `about` its data in small letters, as PNG; return the path.

    Both are wrapped to the width of the figure; long ones make the figure higher. The file is written atomically.
    """
    large = min(max(11.0, 1.25 * figure.get_figwidth()), 18.0)
    small = 0.72 * large
    title = wrapped(message, figure.get_figwidth() / (0.57 * large / 72))  # inches of a letter
    below = wrapped("\n".join(about), figure.get_figwidth() / (0.88 * small / 72))  # and of a wide one
    heights = [1.25 * font * (text.count("\n") + 1) / 72 for text, font in ((title, large), (below, small))]
    further = max(0.0, sum(heights) - 0.6)  # inches that would be taken from the axes
    figure.set_figheight(figure.get_figheight() + further)
    top = 1 - 0.042 / figure.get_figheight()  # where the layout puts the title
    # The layout leaves room for the title alone: empty lines of it make the room for the small ones.
    figure.suptitle(title + "\n" * math.ceil(heights[1] / (1.25 * large / 72)), fontsize=large)
    look = {"ha": "center", "va": "top", "fontsize": small, "color": QUIET}
    figure.text(0.5, top - (heights[0] + 0.04) / figure.get_figheight(), below, **look)
    dpi = 150 if max(figure.get_size_inches()) < 12 else 110  # a large one is legible, and large, enough
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks is drawn as boxes
        # `Figure.savefig` would draw everything twice, the first time for the layout alone.
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(path, buffer.getbuffer())
    return path


def literal(text: str) -> str:
    """Text as it is, where matplotlib would take what stands between dollar signs for a formula."""
    return text.replace("$", r"\$")


def unbroken(text: str) -> str:
    """Text whose spaces end no line."""
    return text.replace(" ", "\u00a0")


def wrapped(text: str, width: float) -> str:
    """Literal text in lines of at most `width` characters, long words broken."""
    lines = (line for part in text.splitlines() for line in textwrap.wrap(part, max(8, int(width))))
    return literal("\n".join(lines))


def curve_styles(curves: Mapping[Curve, Sized]) -> dict[Curve, dict]:
    """Curve -> keywords of a line: the line style tells the recovery, colour and marker criterion and allocation.

    Up to MOST_NAMES curves have a colour each, in which their names are written beside them. Of a curve of one level,
    which has no line, the marker tells the recovery as well.
    """
    styles = {}
    parts = 3 if len(curves) <= MOST_NAMES else 2
    groups = list(dict.fromkeys(curve[:parts] for curve in curves))
    for curve, levels in curves.items():
        again, index = divmod(groups.index(curve[:parts]), len(COLOURS))
        again += [*LINES].index(curve.recover) if len(levels) == 1 and curve.recover in LINES else 0
        line = LINES.get(curve.recover, (0, (3, 1, 1, 1, 1, 1)))
        styles[curve] = {"color": COLOURS[index], "marker": MARKERS[again % len(MARKERS)], "linestyle": line}
    return styles


def broken(levels: Sequence[float], *columns: Sequence[float]) -> list[np.ndarray]:
    """Columns [levels] as floats, with a nan where neighbouring levels are too far apart to be joined by a line.

    Levels, ascending, are joined that are at most SMALL_GAP points apart, or at most LARGE_GAP and at most twice the
    median step of their grid.
    """
    steps = np.diff(levels)
    widest = max(SMALL_GAP, min(LARGE_GAP, 2 * np.median(steps))) if len(steps) else math.inf
    gaps = np.flatnonzero(steps > widest + 1e-9) + 1
    return [np.insert(np.asarray(column, dtype=float), gaps, math.nan) for column in columns]


def alone(values: np.ndarray) -> np.ndarray:
    """Where a column of `broken` has a value that no line joins to another one: boolean, of its length."""
    there = np.concatenate([[False], np.isfinite(values), [False]])
    return there[1:-1] & ~there[:-2] & ~there[2:]


def ring(axes: Axes, points: np.ndarray, colour: str, width: float = 1.5) -> None:
    """Draw rings of a colour around points [N, 2]."""
    look = {"markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": width, "markersize": 10}
    axes.plot(*np.reshape(points, (-1, 2)).T, marker="o", linestyle="none", zorder=5, label=RING, **look)


def caption(figure: Figure, text: str, lines: Iterable[Line2D] = (), names: Iterable[str] = ()) -> None:
    """Write a caption of small letters below the axes, over a legend of the lines, if any, in up to three columns.

    The figure is made higher by what they take.
    """
    look = {"frameon": False, "fontsize": 9, "handlelength": 4, "columnspacing": 1.2}  # long enough to tell dashes
    look |= {"title": wrapped(text, 15.5 * figure.get_figwidth()), "title_fontsize": 8.5, "alignment": "left"}
    handles, names = list(lines), list(names)
    columns = 3 if max(map(len, names), default=0) * 0.08 + 0.7 < figure.get_figwidth() / 3 else 2
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(names) / columns) + 0.15 * len(text) / 150)
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, min(columns, len(names))), **look)


def name_lines(figure: Figure, note: str = "") -> None:
    """A legend of all lines that have a label below the axes, each label once, under a note."""
    named = {}
    for axes in figure.axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    caption(figure, note, named.values(), named)


def inner_ticks(low: float, high: float, log: bool = False, most: int = 10) -> list[float]:
    """Round values from `low` to `high`; `log`: 1, 2 and 5 of each power of ten, or powers alone of many of them."""
    ticks = MaxNLocator(most, steps=(1, 2, 5, 10)).tick_values(low, high).tolist()
    if log:
        digits = (1, 2, 5) if high < 2000 * low else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        rounded = [digit * 10.0**power for power in powers for digit in digits]
        if sum(low <= tick <= high for tick in rounded) > 2:
            ticks = rounded
    margin = 0.005 * (high - low)  # 99.99 % is as good as 100 %
    ticks = [tick for tick in ticks if low - margin <= tick <= high + margin]
    return _apart(ticks, 0.11 * math.log(high / low)) if log else ticks


def _apart(ticks: list[float], distance: float) -> list[float]:
    """Those of positive ascending ticks that lie this far apart on a logarithmic axis, from the highest down."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or math.log(kept[-1] / tick) >= distance:
            kept.append(tick)
    return kept[::-1]


def scale_x(axes: Axes, log: bool = False, unit: str = "", room: float = 0.04) -> None:
    """Scale the x axis to what is drawn, with `room` at both ends and ticks inside the range of the data."""
    low, high = axes.dataLim.intervalx if np.isfinite(axes.dataLim.intervalx).all() else (1.0, 10.0)
    if log:
        axes.set_xscale("log")
        margin = max(high / low, 1.2) ** room
        axes.set_xlim(low / margin, high * margin)
    else:
        margin = room * (high - low) or 1.0
        axes.set_xlim(low - margin, high + margin)
    ticks = inner_ticks(low, high, log)
    shown = [float(f"{tick:.4g}") if log else tick for tick in ticks]  # a single point is its own tick
    axes.set_xticks(ticks, [f"{tick:g}{unit}" for tick in shown])
    axes.set_xticks([], minor=True)


def scale_accuracy(axes: Axes, low: float = 0.0, high: float = 100.0) -> None:
    """Scale the y axis to accuracies in percent from `low` to `high`, with room above, and draw a grid."""
    axes.set_ylim(low, high + 0.08 * (high - low or 1.0))
    axes.set_yticks(inner_ticks(low, high, most=6))
    axes.grid(alpha=0.25)


def draw_references(axes: Axes, sweep: Sweep, side: str = "right") -> None:
    """Quiet lines at dense, named at a `side` where no curve is, and at chance, named at the other one."""
    dense, chance = dense_accuracy(sweep), 100 / len(sweep.header["data"]["classes"])
    low, high = axes.get_ylim()
    look = {"color": QUIET, "fontsize": 9, "transform": axes.get_yaxis_transform()}
    places = (
        (dense, f"dense {dense:.1f} %", side),
        (chance, f"chance {chance:.3g} %", "left right".replace(side, "").strip()),
    )
    for height, text, ha in places:
        if not low <= height <= high:
            continue
        below = height == chance and 0.06 * (high - low) < height - low  # or there is no room
        axes.axhline(height, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        x, y = 0.01 if ha == "left" else 0.99, height + (-0.01 if below else 0.01) * (high - low)
        axes.text(x, y, text, ha=ha, va="top" if below else "bottom", **look)
