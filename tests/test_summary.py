"""The tables and the sentences."""

import dataclasses
import json

import numpy as np
import pytest
from test_report import CURVE, LABELS, ZEROS, add, begin, fill, header, predictions, row

from sparsity.results import summary
from sparsity.results.rows import accuracy_columns, comparison_columns
from sparsity.results.statistics import choosing_half, mcnemar_p

GLOBAL = ("l1", "global", "none")


def with_second_checkpoint(files, levels):
    sweep = fill(files, levels)
    sweep.header["checkpoints"]["two.pth"] = {"sha256": "2"}
    sweep.add_dense("two.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    return sweep


def wrong_on(images):
    """Predictions that are wrong on so many images of each half."""
    found, half = LABELS.copy(), choosing_half(LABELS)
    for part in (half, ~half):
        found[np.flatnonzero(part)[:images]] += 1
    found %= 4
    return found


def add_wrong(sweep, curve, level, images):
    """A row that loses so many images of each half."""
    found = wrong_on(images)
    columns = accuracy_columns(40 - 2 * images, 40) | comparison_columns(found == LABELS, LABELS == LABELS)
    sweep.add(dataclasses.replace(row(level, curve=curve), **columns), found, ZEROS)


def test_the_table_shows_every_level(files):
    text = summary.summary_table(fill(files))
    lines = text.splitlines()
    assert "95 % interval" in text
    assert len(lines) == 4
    assert lines[-1].split()[:3] == ["40", "10.50", "0.00"]
    assert lines[0].endswith("McNemar p")
    assert float(lines[-1].split()[-1]) == pytest.approx(2.0**-39, rel=1e-2)
    assert {len(line) for line in lines if not line.startswith("--")} == {len(lines[0])}


def test_the_table_of_several_checkpoints_averages_the_levels_that_all_have(files):
    sweep = with_second_checkpoint(files, (0.0, 3.0, 40.0))
    add(sweep, row(0.0, "two.pth"), row(40.0, "two.pth"))
    lines = summary.summary_table(sweep).splitlines()
    assert "+/- sd" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["0", "40"]
    assert lines[-1].endswith(" -")


def test_the_summary_follows_from_the_predictions(files):
    sweep = fill(files, (0.0, 3.0, 40.0))  # the predictions of 0 and 3 are all right, those of 40 all wrong
    (entry,) = summary.summarise_all(sweep, tolerance=1.0)
    assert (entry["level"], entry["accuracy"], entry["dense"], entry["difference"]) == (3.0, 100.0, 100.0, 0.0)
    assert entry["difference_low"] < 0 < entry["difference_high"]
    assert (entry["lost"], entry["gained"], entry["mcnemar_p"], entry["p_holm"]) == (0, 0, 1.0, 1.0)
    assert entry["sentence"].startswith("l1 uniform: 3 % of the weights can go within 1 point of dense (chosen on half")
    sweep.finish([entry])
    assert json.loads(files.json.read_text())["summary"] == [entry]


def test_nothing_within_tolerance_is_said(files):
    (entry,) = summary.summarise_all(fill(files, (40.0,)), tolerance=0.5)
    for figure in ("level", "accuracy", "lost", "gained", "mcnemar_p", "p_holm"):
        assert entry[figure] is None
    assert entry["sentence"] == "l1 uniform: no measured level stays within 0.5 points of the dense network."


def test_p_values_are_of_the_other_half_and_corrected_over_the_curves_that_have_one(files):
    sweep = begin(files)
    curves = {CURVE: 3, GLOBAL: 4, ("random", "uniform", "none"): 0}
    for curve, images in curves.items():
        add_wrong(sweep, curve, 5.0, images)
    add(sweep, row(40.0, curve=("random", "global", "none")))  # all wrong: chooses no level and is no test
    entries = {tuple(e[k] for k in ("criterion", "allocation", "recover")): e for e in summary.summarise_all(sweep, 40)}
    for curve, images in curves.items():
        assert (entries[curve]["lost"], entries[curve]["gained"]) == (images, 0)
        assert entries[curve]["mcnemar_p"] == pytest.approx(mcnemar_p(images, 0), rel=1e-5)
    assert [entries[curve]["p_holm"] for curve in curves] == [0.5, 0.375, 1.0]  # 2 x 0.25, 3 x 0.125, 1
    assert entries[("random", "global", "none")]["p_holm"] is None
    assert entries[GLOBAL]["sentence"].endswith(
        "; McNemar p = 0.125, Holm-corrected over 3 curves 0.375: these images do not show whether the two differ)."
    )


@pytest.mark.parametrize(("images", "shown"), [(0, False), (5, False), (6, True), (9, True)])
def test_a_large_p_is_never_called_no_difference(files, images, shown):
    sweep = begin(files)
    add_wrong(sweep, CURVE, 5.0, images)
    (entry,) = summary.summarise_all(sweep, tolerance=50)
    assert (entry["mcnemar_p"] <= 0.05) == shown
    assert ("do not show whether the two differ" in entry["sentence"]) == (not shown)
    for claim in ("no difference", "no loss", "not significant", "Holm"):
        assert claim not in entry["sentence"]


@pytest.mark.parametrize(("p", "text"), [(0.0123, "= 0.0123"), (1.0, "= 1"), (1e-30, "= 1e-30"), (0.0, "< 1e-300")])
def test_p_values_in_words(p, text):
    assert summary.p_text(p) == text


@pytest.mark.parametrize("share", [0.5, 0.123456])
def test_shares_become_percent(share):
    assert summary.percent(share) == pytest.approx(100 * share)
    assert summary.percent(float("nan")) is None


def test_only_levels_that_all_checkpoints_have_can_be_chosen(files):
    sweep = with_second_checkpoint(files, (0.0, 3.0))
    add(sweep, row(0.0, "two.pth"))
    (entry,) = summary.summarise_all(sweep, tolerance=1.0)
    assert (entry["level"], entry["accuracy"], entry["checkpoints"]) == (0.0, 100.0, 2)
    assert (entry["lost"], entry["gained"], entry["mcnemar_p"], entry["p_holm"]) == (None,) * 4
    assert "over 2 checkpoints)" in entry["sentence"]
    add(sweep, row(3.0, "two.pth"))
    assert summary.summarise_all(sweep, tolerance=1.0)[0]["level"] == 3.0


def test_no_level_in_common_is_no_choice(files):
    sweep = with_second_checkpoint(files, (0.0,))
    add(sweep, row(3.0, "two.pth"))
    assert summary.summarise_all(sweep, tolerance=1.0)[0]["level"] is None
    assert "| l1 uniform |" in summary.markdown_table(sweep)


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_table_for_papers(files):
    head = header() | {"title": "net on data\nfour | classes"}
    sweep = begin(files, head)
    levels = (0.0, 5.0, 15.0, 25.0, 30.0, 35.0, 40.0, 45.0, 55.0, 65.0, 90.0)  # more than ten: the round ones count
    add(sweep, *map(row, levels), row(40.0, curve=GLOBAL))
    sweep.finish(summary.summarise_all(sweep, 1.0))
    summary.write_markdown(sweep)
    text = files.with_suffix(".md").read_text()
    assert text.splitlines()[0] == r"net on data / four \| classes"
    top, rule, *rows = cells(text)
    assert top == ["curve", "0 %", "40 %", "90 %", "chosen"]
    assert len(rule) == len(top)
    low, high = accuracy_columns(40, 40)["ci_low"], 100
    assert rows == [
        ["l1 global", "", "0.00 ± 4.38", "", "none"],
        ["l1 uniform", f"100.00 ± {(high - low) / 2:.2f}", "0.00 ± 4.38", f"100.00 ± {(high - low) / 2:.2f}", "0 %"],
    ]
    assert (
        "on 40 images; ± is half the width of the 95 % interval (Wilson's for one checkpoint). Dense: 100.00." in text
    )


def test_the_table_for_papers_has_student_s_interval_over_checkpoints(files):
    sweep = with_second_checkpoint(files, (0.0, 40.0))
    add(sweep, row(0.0, "two.pth"))
    half = row(40.0, "two.pth")
    found = wrong_on(10)
    columns = accuracy_columns(20, 40) | comparison_columns(found == LABELS, LABELS == LABELS)
    sweep.add(dataclasses.replace(half, **columns), found, ZEROS)
    *_, line = cells(summary.markdown_table(sweep))
    width = 12.706204736432095 * np.std([0, 50], ddof=1) / np.sqrt(2)
    assert line[1:] == ["100.00 ± 0.00", f"25.00 ± {width:.2f}", ""]
    assert "Student's t over 2 checkpoints" in summary.markdown_table(sweep)


def test_the_table_for_papers_stays_narrow(files):
    sweep = fill(files, [float(level) for level in (0, 1, 2, 20, 33, 40, 50, 60, 70, 75, 80, 90, 95, 99, 100)])
    assert len(cells(summary.markdown_table(sweep))[0]) == 12
    sweep = begin(files, restart=True)
    add(sweep, *(row(level + 0.5) for level in range(19)))
    assert cells(summary.markdown_table(sweep))[0][1:3] == ["0.5 %", "2.5 %"]
    assert len(cells(summary.markdown_table(sweep))[0]) == 12
    assert np.array_equal(predictions(0.5), LABELS)
