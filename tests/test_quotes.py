"""The figures that README.md and images/README.md quote are those of the committed files, all of them.

`tests/quotes.txt` holds, below a line `# DOCUMENT`, the sentences and table rows that quote figures, each with
references in the places of its figures:

    {FILE WORDS... COLUMN FORMAT}    the cell of a CSV under images/, of the only row whose first five cells have
                                     all WORDS in this order; one with spaces stands in quotation marks
    {FILE KEY.KEY FORMAT}            an entry of a JSON under images/

FILE may be short for one, as the first lines, `SHORT: FILE`, say. FORMAT is Python's, such as `.2f`, or ends in `MB`,
of bytes. A line `= TEXT` is a text with numbers that no run measured.
"""

import csv
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?!\.\d|\w)")  # measured ones have a decimal point


def sections():
    """Document -> the lines of its section in quotes.txt; '' -> those above the first."""
    parts = re.split(r"^# (.*)$", "# \n" + (ROOT / "tests" / "quotes.txt").read_text(), flags=re.MULTILINE)[1:]
    return {name: list(filter(None, text.splitlines())) for name, text in zip(parts[::2], parts[1::2], strict=True)}


@cache
def aliases():
    """The short names of files."""
    return dict(line.split(": ") for line in sections()[""])


@cache
def table(name):
    with (ROOT / "images" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def in_order(words, cells):
    """Whether the words are among the cells, in this order."""
    rest = iter(cells)
    return all(word in rest for word in words)


def look_up(reference):
    """The figure of a reference, as text."""
    name, *words, form = shlex.split(reference)
    name = aliases().get(name, name)
    if name.endswith(".json"):
        value = json.loads((ROOT / "images" / name).read_text())
        for key in words[0].split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
    else:
        *words, column = words
        (row,) = (row for row in table(name) if in_order(words, list(row.values())[:5]))
        value = row[column]
    if form.endswith("MB"):
        value, form = float(value) / 1e6, form.removesuffix("MB")
    return format(float(value), form)


def quoted(line):
    """A line of quotes.txt as the document has it."""
    return line.removeprefix("= ") if line.startswith("= ") else re.sub(r"{([^}]+)}", lambda m: look_up(m[1]), line)


def prose(document):
    """The text of a document with single spaces, without commands, code and addresses."""
    lines = (ROOT / document).read_text().splitlines()
    text = " ".join(line for line in lines if not line.startswith("    "))
    return " ".join(re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv \S+", " ", text).split())


@pytest.mark.parametrize("document", list(filter(None, sections())))
def test_quoted_figures_are_those_of_the_files(document):
    text = " ".join((ROOT / document).read_text().split())
    for line in sections()[document]:
        assert " ".join(quoted(line).split()) in text, line


@pytest.mark.parametrize("document", ["README.md", "images/README.md"])
def test_every_figure_with_decimals_is_traced_to_a_file(document):
    text = prose(document)
    for line in sorted(sections()[document], key=len, reverse=True):
        fragment = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|arXiv \S+", " ", quoted(line))
        text = text.replace(" ".join(fragment.split()), "|")
    assert not NUMBER.findall(text), text
