"""How often a sweep's verdict "shown within 1 point" is wrong, and how often right, on simulated predictions.

    python tests/benchmarks/bench_verdicts.py [--sweeps 2000] [--out FILE]

Each image is right with probability 0.86 in the dense network. At a level it is lost or gained with probabilities whose
difference is the level's true loss and whose sum, the share of images that differ, is 2 % and 2.5 times that loss. An
image that a curve loses at a level stays lost at higher ones; curves are independent. Levels are chosen and judged by
`judge`, as in a sweep. Columns, in percent:

    wrongly_chosen   of the sweeps: a curve's chosen level truly loses 1 point or more
    wrongly_shown    of the sweeps: so does a level that is called shown, the chosen one or a lower one
    rightly_chosen   of the curves: a level above 0 % is chosen, and truly loses less than 1 point
    rightly_shown    of the curves: that level is called shown as well
    some_shown       of the curves: that level or a lower one is rightly called shown
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from sparsity.results.statistics import Pairs, judge
from sparsity.system.files import write_csv

DENSE, TOLERANCE = 0.86, 0.01
# Scenario -> true loss of each level in points.
LOSSES = {
    "at 1 point": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "beyond": (1.2, 1.4, 1.6, 1.8, 2.0, 5.0),
    "through 1 point": (0.2, 0.6, 0.9, 1.0, 1.1, 2.0),
    "0 points": (0.0, 20.0),
    "0.25 points": (0.25, 20.0),
    "0.5 points": (0.5, 20.0),
}
RATES = ("wrongly_chosen", "wrongly_shown", "rightly_chosen", "rightly_shown", "some_shown")
COLUMNS = ("scenario", "images", "curves", "sweeps", *RATES)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=2000, help="simulated sweeps of each line (2000)")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 2000, 10_000], help="test images")
    parser.add_argument("--curves", type=int, nargs="+", default=[1, 9], help="curves of a sweep (1 9)")
    parser.add_argument("--out", type=Path, help="write the table as CSV")
    return parser.parse_args()


def simulated_curve(draw: np.random.Generator, dense: np.ndarray, losses: tuple[float, ...]) -> dict[float, Pairs]:
    """Level -> the images [N] that the pruned and the dense network get right; losses in points."""
    chance = draw.random(len(dense), dtype=np.float32)
    levels: dict[float, Pairs] = {}
    for level, loss in enumerate(np.divide(losses, 100), 1):
        differing = 0.02 + 2.5 * loss
        lost, gained = (differing + loss) / 2 / DENSE, (differing - loss) / 2 / (1 - DENSE)
        levels[float(level)] = [(np.where(dense, chance >= lost, chance < gained), dense)]
    return levels


def simulated_sweeps(losses: tuple[float, ...], images: int, curves: int, sweeps: int) -> Iterator[tuple[float, ...]]:
    """RATES of each sweep, as shares."""
    labels, draw = np.arange(images) % 10, np.random.default_rng(0)
    good = {float(level) for level, loss in enumerate(losses, 1) if loss < 100 * TOLERANCE}
    for _ in range(sweeps):
        dense = draw.random(images, dtype=np.float32) < DENSE
        found = judge([simulated_curve(draw, dense, losses) for _ in range(curves)], labels, TOLERANCE)
        yield (
            any(verdict.level not in {None, *good} for verdict in found),
            any(verdict.shown_level not in {None, *good} for verdict in found),
            float(np.mean([verdict.level in good for verdict in found])),
            float(np.mean([verdict.shown and verdict.level in good for verdict in found])),
            float(np.mean([verdict.shown_level in good for verdict in found])),
        )


def main() -> None:
    args, rows = parse_args(), []
    print(f"| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS))
    for scenario, losses in LOSSES.items():
        for images in args.images:
            for curves in args.curves:
                shares = np.mean(list(simulated_sweeps(losses, images, curves, args.sweeps)), axis=0)
                line = (scenario, images, curves, args.sweeps, *(f"{100 * share:.2f}" for share in shares))
                print(f"| {' | '.join(map(str, line))} |", flush=True)
                rows.append(dict(zip(COLUMNS, line, strict=True)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
