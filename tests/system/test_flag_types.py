"""Types of flags take what makes sense and nothing else."""

import argparse

import pytest

from sparsity.system.flags import (
    counted,
    device_name,
    given_flags,
    integer,
    levels_type,
    number,
    rate_type,
    stem_type,
    time_span,
)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("0:100:50", [0, 50, 100]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ("90,0,40,40", [0, 40, 90]),
        ("99.5", [99.5]),
        ("50,50.00000000001", [50]),
        ("0,1e-400", [0]),
        ("0:99:50", [0, 50]),
    ],
)
def test_levels_are_read_as_written(text, levels):
    assert levels_type(text) == levels


@pytest.mark.parametrize(
    ("kind", "texts", "said"),
    [
        (
            levels_type,
            ["0:100", "0:100:0", "50:0:5", "forty", "", "0:9e999999:1e-999999"],
            "neither a rising start:stop:step",
        ),
        (levels_type, ["0,101", "-5,0"], "outside 0 to 100"),
        (levels_type, ["0,nan", "0:100:nan", "inf"], "'"),
        (levels_type, ["0:100:0.001"], "more than 10,000 levels"),
        (integer(1, 9), ["0", "10", "1e0", "many", ""], "not a whole number from 1 to 9"),
        (number(0, above=True), ["0", "-1", "nan", "inf", "x"], "not a number above 0"),
        (number(0, 1), ["-0.1", "1.1"], "not a number from 0 to 1"),
        (rate_type, ["0", "fast", "nan"], "neither a number above 0 nor rewind"),
        (time_span, ["", "0", "h", "2x", "-5", "30m2h", "1..5h", "1e3", "inf", "99999999999h"], "is not a time"),
        (device_name, ["cuda:x", "CPU!", ""], "neither auto nor a torch device"),
        (stem_type, ["a/b", "..", ".hidden", "n" * 300, "a\nb"], "not a plain name"),
    ],
)
def test_values_without_a_meaning_are_refused(kind, texts, said):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            kind(text)


def test_times_are_read_as_seconds():
    times = {"2h30m": 9000, "90m": 5400, "1.5h": 5400, "45s": 45, "1h1m1s": 3661, "45": 45, "9000.0": 9000}
    assert {text: time_span(text) for text in times} == times


def test_given_flags_are_those_on_the_command_line_even_with_their_default():
    parser = argparse.ArgumentParser()
    parser.add_argument("--a", type=int, default=1)
    parser.add_argument("--b", action="store_true")
    parser.add_argument("--c", nargs="+", default=[])
    assert given_flags(parser, ["--a", "1", "--c", "x"]) == {"a", "c"}
    assert given_flags(parser, []) == set()


def test_one_thing_is_singular():
    assert [counted(number, "row") for number in (0, 1, 2, 2048)] == ["0 rows", "1 row", "2 rows", "2,048 rows"]
