"""The house plan: a room imports only from rooms below it, lazily too, and no files import each other in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mlx_openelm

import pytest

PACKAGE = Path(mlx_openelm.__file__).parent
# From the top floor down; what is below the line is free to import.
ROOMS = (
    *("__main__", "cli", "__init__", "training", "jobs", "loading", "quantization", "evaluation", "generation"),
    *(
        "adapters",
        "sources",
        "publishing",
        "finite",
        "modules",
        "model",
        "formats",
        "ops",
        "cuda",
        "text",
        "cache",
        "hub",
    ),
    *("backend", "interposing", "config", "native"),
    *("inputs", "environment", "errors", "wording", "version"),
)
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """The files of the package that a file imports, wherever in it."""
    found = set()
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
        for alias in node.names:
            for parts in ([*base, alias.name], base):
                target = ".".join(filter(None, parts))
                file = target if target in FILES else f"{target}.__init__".lstrip(".")
                if file in FILES:
                    found.add(file)
                    break
    return found - {name}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_imports_from_its_room_and_those_below(name):
    def floor(file: str) -> int:
        return ROOMS.index(file.split(".")[0])

    above = {file for file in imports(name) if floor(file) < floor(name)}
    assert not above


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter({name: imports(name) for name in FILES}).prepare()
