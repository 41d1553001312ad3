"""Every package that is imported is declared."""

from __future__ import annotations

import ast
import gc
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_trees import tree_of

ROOT = Path(__file__).parents[1]
# Modules whose names differ from those of their distributions.
DISTRIBUTIONS = {"yaml": "pyyaml"}
# What `bench --compare` measures beside us, if the user has it.
COMPARED = {"mlx-lm"}
IMPORTERS = ("import_module", "find_spec")


@pytest.fixture(autouse=True, scope="module")
def without_collections() -> Iterator[None]:
    """Garbage collections would take as long again as parsing the package."""
    gc.disable()
    yield
    gc.enable()


def imports(tree: ast.AST) -> Iterator[str]:
    """The names of imported modules, including those imported by functions that take a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in IMPORTERS:
            texts = [
                part.value for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant)
            ]
            yield from (text for text in texts if isinstance(text, str) and not text.startswith("."))


def third_party() -> set[str]:
    files = (ROOT / "mlx_openelm").rglob("*.py")
    names = {name.partition(".")[0] for file in files for name in imports(tree_of(file))}
    return names - {"", "mlx_openelm", *sys.stdlib_module_names}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name, lines in extras.items() if name != "dev" for line in lines]
    return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in lines}


def test_every_imported_package_is_declared() -> None:
    found = third_party()
    assert {"httpx2", "filelock", "huggingface_hub", "pyarrow", "yaml", "tensorboardX"} <= found
    distributions = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in found}
    assert distributions - declared() == COMPARED


def test_base_dependencies_are_not_in_extras() -> None:
    """The packages that download CoreNet's files are base dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}
    assert {"httpx2", "filelock"} <= names
