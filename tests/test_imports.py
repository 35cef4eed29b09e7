"""Imports go down only, and nothing runs on import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each module imports only from the layers below its own.
LAYERS = [
    {"run", "pruning"},
    {"settings", "record"},
    {"inputs", "forecast", "plots"},
    {"savings", "extras"},
    {"controls"},
    {"stopwatch", "subject", "deal"},
    {"panel", "pruner", "export", "chain", "summary", "heatmaps"},
    {"bench", "measure"},
    {"recovery", "parallel"},
    {"criteria", "reconstruction", "batchnorm", "finetune", "thinning", "engine", "resume"},
    {"training", "evaluation", "checkpoint", "calibration", "allocation", "collector", "recipe"},
    {"sources"},
    {"report", "data", "masks", "flags", "storage", "planes"},
    {"rows", "figures", "layout"},
    {"statistics", "synthetic", "header", "archive"},
    {"runtime"},
    {"ranks", "files"},
]
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
RUN_TIME = {"torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"}  # PIL comes with torchvision


def imported(path: Path) -> set[str]:
    """Full names of what a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(names: set[str]) -> set[str]:
    """The modules of the package among full names; a name below `recovery` counts as `recovery` from outside."""
    found = {name.split(".")[1] for name in names if name.startswith("sparsity.")}
    inside = {name.split(".")[2] for name in names if name.startswith("sparsity.recovery.") and name.count(".") >= 2}
    return {name for name in found | inside if name in DEPTH}


FILES = [*(ROOT / "sparsity").rglob("*.py"), ROOT / "run.py", ROOT / "pruning.py"]


def module(path: Path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


@pytest.mark.parametrize("path", [path for path in FILES if module(path) != "sparsity"], ids=module)
def test_imports_go_down(path):
    names = imported(path)
    assert module(path) in DEPTH, "a new module needs its place in LAYERS"
    below = own_modules(names)
    if path.parent.name == "recovery":  # `from sparsity.recovery.x import y` inside of the package names its parent too
        below -= {"recovery"}
    upward = {name for name in below if DEPTH[name] <= DEPTH[module(path)]}
    assert not upward
    if path.parent.name != ROOT.name:
        assert not {"Build_Resnet", "run", "pruning"} & names


def test_the_network_needs_torch_only():
    assert {name.split(".")[0] for name in imported(ROOT / "Build_Resnet.py")} == {"re", "torch"}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_only_the_allowed_packages_are_imported(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots - RUN_TIME - {"sparsity", "Build_Resnet"} <= sys.stdlib_module_names


def test_importing_the_scripts_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run, pruning"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
