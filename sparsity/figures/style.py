"""What all figures share: colours, titles, and the way to the disk."""

import io
import textwrap
import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from sparsity.results.rows import Curve
from sparsity.system.files import write_atomic

# Okabe and Ito's palette: distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


MARKERS = ("o", "s", "^", "D", "v")


QUIET = "#777777"


LINES = {"none": "-", "batchnorm": (0, (5, 2)), "reconstruction": (0, (1, 1.3)), "finetune": (0, (5, 1.5, 1, 1.5))}


OTHER_LINE = (0, (3, 1, 1, 1, 1, 1))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG."""
    FigureCanvasAgg(figure)
    dpi = 150 if max(figure.get_size_inches()) < 15 else 110  # a large one is legible, and large, enough
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks is drawn as boxes
        figure.savefig(buffer, format="png", dpi=dpi)
    write_atomic(path, buffer.getbuffer())


def literal(text: str) -> str:
    """Text as it is, where matplotlib would take what stands between dollar signs for a formula."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: int) -> str:
    """Literal text in lines of at most `width` characters, long words broken."""
    lines = (line for part in text.splitlines() for line in textwrap.wrap(part, max(8, width)))
    return literal("\n".join(lines))


def set_title(figure: Figure, *parts: str) -> None:
    """The title of a whole figure, wrapped to its width; a long one makes the figure higher."""
    font = min(max(11.0, 0.9 * figure.get_figwidth()), 18.0)
    points = 72 * 0.95 * figure.get_figwidth()
    characters = int(1.8 * points / font)  # what fits of usual text; fewer where letters are wide
    while _text_width(text := wrapped("\n".join(parts), characters), font) > points and characters > 20:
        characters = int(0.9 * characters)
    figure.suptitle(text, fontsize=font)
    further = max(0, text.count("\n") - 2)  # lines that would take their height from the axes
    figure.set_figheight(figure.get_figheight() + 1.4 * further * font / 72)


def _text_width(text: str, size: float) -> float:
    """Width of the longest of several lines in points."""
    font = FontProperties(size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return max(text_to_path.get_text_width_height_descent(line, font, False)[0] for line in text.split("\n"))


def curve_styles(curves: list[Curve]) -> dict[Curve, dict]:
    """Curve -> keywords of a line: colour and marker tell criterion and allocation, the line style the recovery."""
    groups = list(dict.fromkeys(curve[:2] for curve in curves))
    styles = {}
    for curve in curves:
        again, index = divmod(groups.index(curve[:2]), len(COLOURS))
        styles[curve] = {
            "color": COLOURS[index],
            "marker": MARKERS[again % len(MARKERS)],
            "linestyle": LINES.get(curve[2], OTHER_LINE),
        }
    return styles
