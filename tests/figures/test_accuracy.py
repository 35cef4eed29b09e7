"""The figure of accuracy: what its lines, names, rings, ticks and labels show."""

import itertools
import math
from dataclasses import replace

import pytest
from helpers import ink, line_points, made_row, made_sweep

from sparsity.figures import accuracy, style
from sparsity.system.methods import Curve

CHOICE = {"criterion": "l1", "allocation": "uniform", "recover": "none", "level": 40.0, "tolerance": 1.0}
CHOICE |= {"images": 20, "accuracy": 83.21, "dense": 85.04, "verdict": "not shown", "shown_level": None}
RECOVERIES = ("none", "batchnorm", "reconstruction", "finetune")


def test_many_curves_fit_in_the_picture_and_those_of_the_same_masks_share_a_colour_and_differ_in_their_lines(files):
    curves = [Curve(f"criterion{index // 4}", "uniform", RECOVERIES[index % 4]) for index in range(44)]
    rows = [made_row(level, curve=curve) for curve in curves for level in (0.0, 40.0)]
    width, height, _ = ink(accuracy.plot_sweep(made_sweep(files, rows)))
    assert width >= 1200 and height >= 800
    styles = style.curve_styles(dict.fromkeys(curves, (0.0, 40.0)))
    looks = {curve: (look["color"], look["marker"]) for curve, look in styles.items()}
    assert all((looks[one] == looks[other]) == (one[:2] == other[:2]) for one in curves for other in curves)
    assert len({tuple(map(str, look.values())) for look in styles.values()}) == len(curves)


def test_curves_of_one_level_have_no_line_and_differ_in_their_markers(files):
    curves = [Curve("l1", allocation, how) for allocation in ("2:4", "1:4") for how in style.LINES]
    for levels, count in (((50.0,), len(style.LINES)), ((50.0, 75.0), 1)):
        looks = style.curve_styles(dict.fromkeys(curves, levels))
        for allocation in ("2:4", "1:4"):
            found = [(look["color"], look["marker"]) for curve, look in looks.items() if curve.allocation == allocation]
            assert len(set(found)) == count
    few = style.curve_styles(dict.fromkeys(curves[:6], (50.0,)))
    assert len({look["color"] for look in few.values()}) == 6


def test_the_names_stand_in_the_order_in_which_the_curves_fall_and_no_line_leads_to_them(files, figures):
    paths = {
        "early": [(0.0, 90.0), (40.0, 10.0)],
        "late": [(0.0, 90.0), (40.0, 80.0), (90.0, 10.0)],
        "short and good": [(80.0, 88.0), (95.0, 85.0)],
        "short": [(80.0, 88.0), (95.0, 75.0)],
        "lost": [(5.0, 20.0), (40.0, 10.0)],
        "lost at once": [(1.0, 20.0), (40.0, 10.0)],
        "lost before": [(0.5, 20.0), (40.0, 10.0)],
    }
    points = [((name, "uniform", "none"), *pair) for name, pairs in paths.items() for pair in pairs]
    rows = [replace(made_row(x, curve=curve), sparsity=x, accuracy=y) for curve, x, y in points]
    accuracy.plot_sweep(made_sweep(files, rows))
    (legend,) = figures[0].legends
    order = ("short and good", "short", "late", "early", "lost", "lost at once", "lost before")
    assert [text.get_text() for text in legend.get_texts()] == [f"{name} uniform" for name in order]


def test_the_line_is_the_mean_over_checkpoints_and_the_chosen_level_has_a_ring(files, figures):
    more = {"one.pth": 10, "two.pth": 20}
    rows = [replace(made_row(level, name), accuracy=level + more[name]) for level in (0.0, 40.0) for name in more]
    for level in (40.0, None, 60.0):  # the last one of a run with other levels
        accuracy.plot_sweep(made_sweep(files, rows, summary=[CHOICE | {"level": level}]))
    assert line_points(figures[0].axes[0].get_lines()[0]) == [[10.5, 15], [10.5, 55]]
    rings = [
        line_points(line) for figure in figures for line in figure.axes[0].get_lines() if line.get_label() == style.RING
    ]
    assert rings == [[[10.5, 55]]]


def drawn_curve(files, figures, levels, more=(), **header):
    """The axes of the accuracy figure of a curve at these levels, 90 % accurate up to 50 % and then falling."""
    rows = [
        replace(made_row(x), sparsity=x, accuracy=90 - max(0, x - 50), macs_ratio=100 / (100.1 - x)) for x in levels
    ]
    accuracy.plot_sweep(made_sweep(files, [*rows, *more], **header))
    return figures[-1].axes


@pytest.mark.parametrize(
    ("levels", "breaks"),
    [
        ((0, 90, 95, 97, 98, 99), [(0, 90)]),
        ((0, 60, 80), [(0, 60)]),  # a coarse grid may have steps of 20 points
        ((0, 5, 10, 15, 35, 40), [(15, 35)]),  # four levels of this grid are missing
        (range(0, 101, 20), []),
        ((0, 100), [(0, 100)]),
        ((40,), []),
    ],
)
def test_no_line_and_no_band_crosses_levels_that_were_not_measured(files, figures, levels, breaks):
    (found,) = style.broken(levels, levels)
    there = [None if math.isnan(x) else x for x in found]
    cuts = [(there[i - 1], there[i + 1]) for i, x in enumerate(there) if x is None]
    assert cuts == breaks and [x for x in there if x is not None] == list(levels)
    if levels[1:2] == (60,):
        axes, *_ = drawn_curve(files, figures, levels)
        assert math.isnan(axes.get_lines()[0].get_xdata()[1])
        band, bars = axes.collections  # 0 % has a bar of its own
        assert [path.get_extents().intervalx.tolist() for path in band.get_paths()] == [[0, 0], [60, 80]]
        assert [segment[0][0] for segment in bars.get_segments()] == [0]


def test_multiply_adds_have_a_panel_where_allocations_differ_in_them_and_ticks_stay_inside_the_data(files, figures):
    levels = range(40, 85, 5)
    other = [replace(made_row(x, curve=("l1", "lamp", "none")), sparsity=x, accuracy=50, macs_ratio=2) for x in levels]
    for more, count in (((), 1), (other, 2)):
        places = drawn_curve(files, figures, levels, more)
        assert len(places) == count
        for axes in places:
            drawn = [x for line in axes.get_lines()[: len(more) + 1] for x, _ in line_points(line) if x > 1]
            assert len(axes.get_xticks()) > 3
            assert min(drawn) - 0.3 <= min(axes.get_xticks()) and max(axes.get_xticks()) <= max(drawn) + 0.3
            assert max(axes.get_yticks()) <= 100
    assert [axes.get_xlabel() for axes in places] == ["weights removed (%)", "multiply-adds removed (%)"]


def test_crowded_levels_have_a_logarithmic_axis_of_what_is_left_and_what_lies_near_dense_a_panel(files, figures):
    (axes,) = drawn_curve(files, figures, (0, 80, 90, 95, 98, 99, 100))
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] > 100 > 1 > axes.get_xlim()[1] > 0
    assert axes.get_xlabel() == "weights left (%)" and {100, 10, 1} <= set(axes.get_xticks())
    full, near = drawn_curve(files, figures, (0, 20, 40, 60), dense={"one.pth": {"accuracy": 90.5}})
    assert full.get_ylim()[0] == 0 and near.get_ylim()[0] == 87 and near.get_xscale() == "linear"


def test_the_label_has_the_figures_of_the_half_it_speaks_of_and_rings_the_colour_of_their_curve(files, figures):
    axes, *_ = drawn_curve(files, figures, (0, 20, 40, 60), summary=[CHOICE])
    (label,) = [text.get_text() for text in axes.texts if "pruned" in text.get_text()]
    assert "40 % pruned: 83.2 %, dense 85.0 %" in label and "20 reporting images" in label
    assert "not shown" in figures[-1].get_suptitle()
    assert "One checkpoint, one seed" in figures[-1].legends[0].get_title().get_text().replace("\n", " ")
    shown = CHOICE | {"allocation": "lamp", "level": 60.0, "verdict": "shown", "shown_level": 60.0}
    more = [made_row(x, curve=("l1", "lamp", "none")) for x in (40.0, 60.0)]
    axes, *_ = drawn_curve(files, figures, (0, 20, 40, 60), more, summary=[CHOICE, shown])
    thin, thick = (line for line in axes.get_lines() if line.get_label() == style.RING)
    lamp, uniform, *_ = axes.get_lines()
    assert [ring.get_markeredgecolor() for ring in (thin, thick)] == [uniform.get_color(), lamp.get_color()]
    assert thin.get_markeredgewidth() < thick.get_markeredgewidth()
    message = figures[-1].get_suptitle().splitlines()[0].replace("\u00a0", " ")
    assert message == "Shown to be within 1 point of dense: 60 % of the weights gone (l1 lamp), no level (l1 uniform)"


def test_without_a_chosen_level_the_title_says_that_none_was_chosen(files, figures):
    for summary, said in (
        ([CHOICE | {"level": 0.0}], "No level above 0 % was chosen (within 1 point of dense on half of the images)"),
        ([], "Accuracy of pruned networks"),
    ):
        drawn_curve(files, figures, (0, 20, 40), summary=summary)
        assert " ".join(figures[-1].get_suptitle().split()).startswith(said)


def test_names_beside_lines_cover_neither_each_other_nor_the_lines_nor_the_edge(files, figures):
    rows = []
    for index, name in enumerate(("one", "two", "three", "four")):
        for x in range(0, 101, 5):
            height = 10 + 80 / (1 + math.exp((x - 20 * (index + 1)) / 4))
            rows.append(replace(made_row(x, curve=(name, "uniform", "none")), sparsity=x, accuracy=height))
    accuracy.plot_sweep(made_sweep(files, rows, dense={"one.pth": {"accuracy": 90.0}}))
    axes = figures[0].axes[0]
    figures[0].draw_without_rendering()
    names = [text for text in axes.texts if "uniform" in text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines()]
    assert len(boxes) == 4 and not any(path.intersects_bbox(box, filled=False) for path in paths for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_levels_of_multiply_adds_have_an_axis_of_their_own_and_say_their_unit(files, figures):
    entry = CHOICE | {"unit": "multiply-adds"}
    macs = drawn_curve(files, figures, (20, 40, 60), summary=[entry], settings={"budget": "macs"})
    weights = drawn_curve(files, figures, (20, 40, 60), summary=[CHOICE], settings={"budget": None})
    names = ["weights removed (%)", "multiply-adds removed (%)"]
    assert [axes.get_xlabel() for axes in macs][:2] == names and "multiply" not in weights[-1].get_xlabel()
    for axes, unit in ((macs, " of the multiply-adds"), (weights, "")):
        assert any(text.get_text().startswith(f"40 %{unit} pruned: 83.2 %") for text in axes[0].texts)
    messages = [figure.get_suptitle() for figure in figures[-2:]]
    assert ["40 % of the multiply-adds gone" in messages[0], "40 % of the weights gone" in messages[1]] == [True, True]


def test_an_allocation_of_one_level_is_a_point_with_its_name_beside_it(files, figures):
    row = replace(made_row(50.0, curve=("l1", "2:4", "none")), sparsity=49.9, accuracy=80.0)
    axes, *_ = drawn_curve(files, figures, range(0, 101, 10), more=[row])
    line = next(line for line in axes.get_lines() if line_points(line) == [[49.9, 80.0]])
    (name,) = (text for text in axes.texts if text.get_text() == "l1 2:4")
    left, bottom, right, top = name.get_window_extent().transformed(axes.transData.inverted()).extents
    assert left - 10 < 49.9 < right + 10 and bottom - 10 < 80 < top + 10
    assert line.get_color() == name.get_color()
