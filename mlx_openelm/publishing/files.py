"""Which files of a folder are the model, and so may be published."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from ..errors import RequestError
from ..formats import gguf, safetensors
from ..formats import mlx as mlx_format
from ..hub import resolve as hub

CARD = "README.md"
# What belongs to a model beside its weights.
_PATTERNS = ("config.json", "generation_config.json", *hub.TOKENIZER_PATTERNS, "chat_template.jinja", "LICENSE*")


def model_files(path: Path) -> list[Path]:
    """The files of a model folder that are published, but for its card; a GGUF file is its own list.

    Weights are those the model is read from, checked against `config.json`. Code, pickles, subfolders, hidden
    files and whatever else lies there is never sent.

    Raises:
        RequestError: no model, damaged files, or a link that leads out of the folder.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise RequestError(f"{path} is a file: give the folder that holds the model, or a .gguf file.")
        gguf.check(path)
        return [path]
    if not path.is_dir():
        raise RequestError(f"The folder {path} does not exist.")
    if re.fullmatch(r"\..*\.partial-\d+(-\d+)?(-previous)?", path.resolve().name):
        raise RequestError(f"{path} is what an interrupted conversion left; convert again, and upload the result.")
    entries = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    ggufs = [entry for entry in entries if entry.suffix == ".gguf"]
    weights: list[Path] = []
    if not ggufs or any(entry.suffix == ".safetensors" for entry in entries):
        mlx_format.read(path)
        weights = safetensors.weight_files(path)
        # An index that others left beside these weights would mislead whoever reads it.
        weights += [] if (index := safetensors.index_of(weights)) is None else [index]
    for file in ggufs:
        gguf.check(file)
    others = [entry for entry in entries if _belongs(entry.name)]
    files = [*others, *weights, *ggufs]
    for file in [*files, path / CARD]:
        if not file.resolve().is_relative_to(path.resolve()):
            raise RequestError(f"{file} is a link to a file outside the folder, which is not uploaded: copy it there.")
    return files


def leads_out(file: Path) -> bool:
    """Whether `file` is a link to anything but its own folder, or the contents that the hub's cache keeps for it.

    A model folder is somebody else's work: what such a link names must not be copied or published as its own.
    """
    folder, target = file.parent.resolve(), file.resolve()
    cache = folder.parent.parent
    is_cached = folder.parent.name == "snapshots" and cache.name.startswith("models--")
    return not (target.is_relative_to(folder) or (is_cached and target.is_relative_to(cache / "blobs")))


def _belongs(name: str) -> bool:
    is_code = any(fnmatch(name, pattern) for pattern in hub.NEVER_PATTERNS)
    return not is_code and any(fnmatch(name, pattern) for pattern in _PATTERNS)
