"""The files of a folder that belong to the model and may be published."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from ..errors import RequestError
from ..formats import gguf, safetensors
from ..formats import mlx as mlx_format
from ..hub.resolve import NEVER_PATTERNS, TOKENIZER_PATTERNS
from ..inputs import refuse_device

CARD = "README.md"
# A model's files other than its weights.
_PATTERNS = ("config.json", "generation_config.json", *TOKENIZER_PATTERNS, "chat_template.jinja", "LICENSE*")


def model_files(path: Path) -> list[Path]:
    """The files of a model folder to publish, except its card; for a GGUF file, that file.

    The weights are the files that the model is read from, checked against `config.json`. Code, pickles, subfolders,
    hidden files and anything else in the folder are never sent.

    Raises:
        RequestError: no model, damaged files, or a link to a file outside the folder.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise RequestError(f"{path} is a file: give the folder of the model, or a .gguf file.")
        gguf.check(path)
        return [path]
    refuse_device(path)
    if not path.is_dir():
        raise RequestError(f"The folder {path} does not exist.")
    if re.fullmatch(r"\..*\.partial-\d+(-\d+)?(-previous)?", path.resolve().name):
        raise RequestError(f"{path} is left over from an interrupted conversion; convert again, and upload the result.")
    entries = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    ggufs = [entry for entry in entries if entry.suffix == ".gguf"]
    weights: list[Path] = []
    if not ggufs or any(entry.suffix == ".safetensors" for entry in entries):
        mlx_format.read(path)
        weights = safetensors.weight_files(path)
        # Only the index of these weights: a stale one would mislead its readers.
        weights += [] if (index := safetensors.index_of(weights)) is None else [index]
    for file in ggufs:
        gguf.check(file)
    others = [entry for entry in entries if _belongs_to_model(entry.name)]
    files = [*others, *weights, *ggufs]
    for file in [*files, path / CARD]:
        if not file.resolve().is_relative_to(path.resolve()):
            raise RequestError(f"{file} is a link to a file outside the folder, which is not uploaded: copy it there.")
    return files


def leads_out(file: Path) -> bool:
    """Whether `file` is a link out of its own folder, other than into the blobs of the hub's cache.

    A model folder may come from a stranger, so the target of such a link must not be copied or published.
    """
    folder, target = file.parent.resolve(), file.resolve()
    cache = folder.parent.parent
    is_cached = folder.parent.name == "snapshots" and cache.name.startswith("models--")
    return not (target.is_relative_to(folder) or (is_cached and target.is_relative_to(cache / "blobs")))


def _belongs_to_model(name: str) -> bool:
    is_code = any(fnmatch(name, pattern) for pattern in NEVER_PATTERNS)
    return not is_code and any(fnmatch(name, pattern) for pattern in _PATTERNS)
