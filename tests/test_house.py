"""The rooms of the package, and which of them may import which; CONTRIBUTING.md has the map."""

import ast
from pathlib import Path

import pytest

import ddpm_hf

SELF_CONTAINED = {"models", "schedulers", "pipelines"}  # what a repository that carries its own code has of them
MAY_IMPORT = {
    "models": set(),
    "schedulers": set(),
    "utils": set(),
    "pipelines": {"models", "schedulers"},
    "data": SELF_CONTAINED | {"utils"},
    "training": SELF_CONTAINED | {"data", "utils"},
    "evaluation": SELF_CONTAINED | {"data", "utils"},
    "hub": SELF_CONTAINED | {"utils"},
    "convert": SELF_CONTAINED | {"utils"},
    "commands": SELF_CONTAINED | {"data", "training", "evaluation", "hub", "convert", "utils"},
}
FOR_ALL = "ddpm_hf.utils.arguments"  # the module of utils that a self-contained repository carries too
PACKAGE = Path(ddpm_hf.__file__).parent


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a module imports, wherever in it."""
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("ddpm_hf.") and name != FOR_ALL}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), file
        assert imported(tree) <= MAY_IMPORT[room] | {room}, file


def test_every_module_has_a_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == MAY_IMPORT.keys() | {"recipes"}
