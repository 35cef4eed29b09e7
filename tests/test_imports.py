"""Imports go down only, and nothing runs on import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room -> the rooms that it may import, beside itself.
MAY_IMPORT = {
    "system": set(),
    "data": {"system"},
    "networks": {"system", "data"},
    "training": {"system", "data", "networks"},
    "prune": {"system", "data", "networks"},
    "recover": {"system", "data", "networks", "training", "prune"},
    "results": {"system"},
    "figures": {"system", "results"},
    "sweep": {"system", "data", "networks", "training", "prune", "recover", "results", "figures"},
}
SCRIPTS = ("run", "pruning")
RUN_TIME = {"torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL"}  # PIL comes with torchvision
FILES = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / "sparsity").rglob("*.py")}
MODULES = {".".join(name.parts).removesuffix(".__init__"): path for name, path in FILES.items()}
MODULES |= {name: ROOT / f"{name}.py" for name in (*SCRIPTS, "Build_Resnet")}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, and of what it imports from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def below(module: str) -> set[str]:
    """The modules of this project that a module imports."""
    return {name for name in imported(MODULES[module]) if name in MODULES and name not in ("sparsity", module)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    roots = {name.split(".")[0] for name in imported(MODULES[module])}
    assert roots - RUN_TIME - {"sparsity", "Build_Resnet"} <= sys.stdlib_module_names
    if module in SCRIPTS or module == "sparsity":
        return
    if module == "Build_Resnet":
        assert roots == {"torch"}
        return
    room = module.split(".")[1]
    others = {name.split(".")[1] for name in below(module) if name.startswith("sparsity.")} - {room}
    assert others <= MAY_IMPORT[room]
    assert ("Build_Resnet" in below(module)) <= (module == "sparsity.networks.families")
    assert not below(module) & set(SCRIPTS)
    if room in ("results", "figures"):
        assert not {"torch", "torchvision", "tqdm", "PIL"} & roots


def test_every_room_is_known_no_file_too_long_and_there_is_no_circle_and_at_most_nine_floors():
    rooms = {path.name for path in (ROOT / "sparsity").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == MAY_IMPORT.keys() and len(MODULES) > 40
    assert not {name: lines for name, path in MODULES.items() if (lines := path.read_text().count("\n")) > 300}
    floors: dict[str, int] = {}

    def floor(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, " -> ".join((*above, module))
        if module not in floors:
            floors[module] = 1 + max((floor(name, (*above, module)) for name in below(module)), default=0)
        return floors[module]

    assert max(map(floor, MODULES)) <= 9


NO_TORCH = "flags.parse_args([]); assert not {'torch', 'numpy'} & sys.modules.keys()"


@pytest.mark.parametrize(
    "code",
    [
        "import run, pruning",
        f"import sparsity.sweep.flags as flags; {NO_TORCH}",
        f"import sparsity.training.recipe as flags; {NO_TORCH}",
    ],
)
def test_importing_the_scripts_does_nothing_and_flags_are_parsed_without_torch(tmp_path, code):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
