"""Extras are named as for a clone, since the package is on no index: `pip install '.[gguf]'`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = sorted(
    path
    for pattern in ("*.md", "*.py", "docs/*.md", "lora/**/*.md", "lora/*.py", "mlx_openelm/**/*.py", "benchmarks/*.py")
    for path in ROOT.glob(pattern)
)
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def wrong_extras(text: str) -> list[str]:
    """The extras in a text that do not exist, or belong to a package that pip would look for on PyPI."""
    elsewhere = re.findall(r"mlx-openelm\[[\w,]+\]", text)
    named = [name for names in re.findall(r"'\.\[([\w,]+)\]'", text) for name in names.split(",")]
    return [*elsewhere, *(name for name in named if name not in EXTRAS)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_extras_exist_and_are_named_as_for_a_clone(path: Path) -> None:
    assert wrong_extras(path.read_text()) == []


def test_the_texts_name_every_extra() -> None:
    """In the README; and wrong names are noticed."""
    readme = (ROOT / "README.md").read_text()
    assert all(re.search(rf"`{extra}`|'\.\[[\w,]*\b{extra}\b[\w,]*\]'", readme) for extra in EXTRAS)
    assert wrong_extras("pip install 'mlx-openelm[gguf]' or '.[cpu,plot]'") == ["mlx-openelm[gguf]", "plot"]
