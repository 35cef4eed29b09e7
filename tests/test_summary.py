"""The table and the sentence."""

import json

import pytest
from test_report import CURVE, LABELS, fill, predictions, row

from sparsity import summary


def test_the_table_shows_every_level(files):
    text = summary.summary_table(fill(files))
    assert "95 % interval" in text
    assert len(text.splitlines()) == 4
    assert text.splitlines()[-1].split()[:3] == ["40", "10.50", "0.00"]


def test_the_summary_follows_from_the_predictions(files):
    sweep = fill(files, (0.0, 3.0, 40.0))  # the predictions of 0 and 3 are all right, those of 40 all wrong
    entry = summary.summarise(sweep, CURVE, tolerance=1.0)
    assert (entry["level"], entry["accuracy"], entry["dense"], entry["difference"]) == (3.0, 100.0, 100.0, 0.0)
    assert entry["difference_low"] < 0 < entry["difference_high"]
    assert entry["sentence"].startswith("l1 uniform: 3 % of the weights can go within 1 point of dense (chosen on half")
    sweep.finish([entry])
    assert json.loads(files.json.read_text())["summary"] == [entry]


def test_nothing_within_tolerance_is_said(files):
    entry = summary.summarise(fill(files, (40.0,)), CURVE, tolerance=0.5)
    assert entry["level"] is None
    assert entry["accuracy"] is None
    assert entry["sentence"] == "l1 uniform: no measured level stays within 0.5 points of the dense network."


@pytest.mark.parametrize("share", [0.5, 0.123456])
def test_shares_become_percent(share):
    assert summary.percent(share) == pytest.approx(100 * share)
    assert summary.percent(float("nan")) is None


def test_only_levels_that_all_checkpoints_have_can_be_chosen(files):
    sweep = fill(files, (0.0, 3.0))
    sweep.header["checkpoints"]["two.pth"] = {"sha256": "2"}
    sweep.add_dense("two.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    sweep.add(row(0.0, "two.pth"), predictions(0))
    entry = summary.summarise(sweep, CURVE, tolerance=1.0)
    assert (entry["level"], entry["accuracy"]) == (0.0, 100.0)
    sweep.add(row(3.0, "two.pth"), predictions(3))
    assert summary.summarise(sweep, CURVE, tolerance=1.0)["level"] == 3.0


def test_no_level_in_common_is_no_choice(files):
    sweep = fill(files, (0.0,))
    sweep.header["checkpoints"]["two.pth"] = {"sha256": "2"}
    sweep.add_dense("two.pth", LABELS, {"accuracy": 100.0, "loss": 0.1})
    sweep.add(row(3.0, "two.pth"), predictions(3))
    assert summary.summarise(sweep, CURVE, tolerance=1.0)["level"] is None
