"""Dependencies point downwards, lazy imports included, with no cycle between files or folders."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import mlx_openelm

import pytest
from package_trees import tree_of

PACKAGE = Path(mlx_openelm.__file__).parent
# From top to bottom. A room is a folder, or a file beside the folders; it imports only from itself and the rooms below.
ROOMS = [
    "__main__", "cli", "serving", "__init__",
    "training", "training.run", "training.step", "training.data.corpus", "training.options", "training.data",
    "harness", "jobs.bench", "jobs", "loading", "quantization", "evaluation", "generation",
    "adapters", "sources", "publishing", "modules", "model", "formats", "ops", "cuda", "text", "cache", "hub",
    "backend", "blas", "config", "native", "json_values", "inputs",
    "options", "keywords", "suggestions", "threads", "console", "messages", "finite", "errors", "wording", "version",
]  # fmt: skip
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


@pytest.fixture(autouse=True, scope="module")
def without_collections() -> Iterator[None]:
    """Garbage collections would take as long again as parsing the package."""
    gc.disable()
    yield
    gc.enable()


def room(file: str) -> str:
    folder, _, name = file.rpartition(".")
    return folder or name


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, inner ones too; `ast.walk` would visit every expression."""
    yield tree
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(tree, field, ()):
            yield from statements(inner)


def imports(name: str) -> set[str]:
    """The files of the package that a file imports, inside functions and under TYPE_CHECKING too."""
    targets: list[list[str]] = []
    package = [PACKAGE.name, *name.split(".")[:-1]]
    for node in statements(tree_of(FILES[name])):
        if isinstance(node, ast.Import):
            targets += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            targets += [[*base, alias.name] for alias in node.names]
    return {_file(target[1:]) for target in targets if target[0] == PACKAGE.name} - {name}


def _file(target: list[str]) -> str:
    """The file of a module, or of the module that defines a name: `ops.layers` for [ops, layers, rms_norm]."""
    for parts in (target, target[:-1]):
        for file in (".".join(parts), ".".join([*parts, "__init__"])):
            if file in FILES:
                return file
    raise AssertionError(f"no file of the package defines {'.'.join(target)}")


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("from . import cache, load", {"cache.__init__", "__init__"}),
        ("def later():\n    from .ops.layers import rms_norm", {"ops.layers"}),
        ("if TYPE_CHECKING:\n    from .hub import resolve", {"hub.resolve"}),
        ("import mlx_openelm, mlx_openelm.native", {"__init__", "native.__init__"}),
        ("from mlx_openelm.generation.decoding import generate", {"generation.decoding"}),
        ("import mlx.core as mx\nfrom pathlib import Path", set()),
        ("try:\n    pass\nexcept ImportError:\n    from . import cache", {"cache.__init__"}),
        ("for _ in ():\n    pass\nelse:\n    from . import cache", {"cache.__init__"}),
        ("try:\n    pass\nfinally:\n    from . import cache", {"cache.__init__"}),
        ("match 1:\n    case 1:\n        from . import cache", {"cache.__init__"}),
    ],
)
def test_every_form_of_import_is_found(line, files, tmp_path, monkeypatch):
    (tmp_path / "errors.py").write_text(line)
    monkeypatch.setitem(FILES, "errors", tmp_path / "errors.py")
    assert imports("errors") == files


def test_every_file_is_in_a_room():
    assert {room(file) for file in FILES} == set(ROOMS)


@cache
def all_imports() -> dict[str, set[str]]:
    return {name: imports(name) for name in sorted(FILES)}


def test_a_file_imports_from_its_room_and_those_below():
    def floor(file: str) -> int:
        return ROOMS.index(room(file))

    above = {name: {file for file in found if floor(file) < floor(name)} for name, found in all_imports().items()}
    assert {name: files for name, files in above.items() if files} == {}


def test_no_files_import_each_other_in_a_cycle():
    order = TopologicalSorter(all_imports()).static_order()  # CycleError, which names one
    assert set(order) == set(FILES)
