"""The commands of run.py and pruning.py in the READMEs have flags that the scripts take; none is run."""

import re
import shlex
from pathlib import Path
from string import Template

import pytest

from sparsity.sweep import flags
from sparsity.training import recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "sparsity/README.md", "images/README.md", "tests/README.md")
PARSERS = {"run.py": recipe.parse_args, "pruning.py": flags.parse_args}


def commands(document: str) -> list[tuple[str, str]]:
    """The scripts and their flags in the code of a document, its shell variables filled in."""
    found, variables = [], {}
    text = re.sub(r"\\\n\s*", "", (ROOT / document).read_text())
    for line in re.findall(r"^ {4}([^#\n]+)", text, re.MULTILINE):
        if assigned := re.fullmatch(r'(\w+)="(.*)"\s*', line):
            variables[assigned[1]] = assigned[2]
        for part in line.split("&&"):
            if command := re.fullmatch(r"(?:python|torchrun .*) (run\.py|pruning\.py)(.*)", part.strip()):
                found.append((command[1], Template(command[2]).substitute(variables)))
    return found


COMMANDS = [command for document in DOCUMENTS for command in commands(document)]


def test_the_commands_are_found():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize(("script", "words"), COMMANDS, ids=[f"{script}{words}" for script, words in COMMANDS])
def test_a_command_has_flags_that_its_script_takes(script, words):
    assert vars(PARSERS[script](shlex.split(words)))  # a usage error would end the program
