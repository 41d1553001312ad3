"""The recipes inside the package: configuration files of pretraining runs, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import RequestError, quote
from ..hub.catalog import ASSETS
from ..inputs import to_path
from ..wording import did_you_mean, one_of

_FOLDER = ASSETS / "recipes"
RECIPES = ("tiny", "tiny-draft", "openelm-270m", "openelm-450m", "openelm-1.1b", "openelm-3b")


def find_recipe(name: str) -> Path:
    """The file of a configuration: a path, or the name of a recipe.

    Raises:
        RequestError: it is neither.
    """
    path = to_path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    if name.lower() not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise RequestError(
            f"--config {quote(name)} is no file, and no recipe; {hint or f'these are {one_of(RECIPES)}.'}"
        )
    return _FOLDER / f"{name.lower()}.yaml"
