"""Prompt caches as files, by mlx-lm's names: `make_prompt_cache`, `save_prompt_cache`, `load_prompt_cache`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from ..cache import make_cache
from ..errors import RequestError, quote
from ..formats import prompt_cache as file_format
from ..inputs import to_path
from ..model import OpenELM
from .cache_origin import Origin
from .options import token_ids
from .prompt_cache import cache_offset

TOKENS = "prompt_cache_tokens"
_MAX_ID = 1 << 31


def make_prompt_cache(model: OpenELM, max_kv_size: int | None = None) -> list[Any]:
    """Empty key-value caches for one sequence, one per layer: growing, or sliding if `max_kv_size` is given.

    Raises:
        RequestError: `max_kv_size` is too small.
    """
    return make_cache(len(model.layers), max_kv_size)


def save_prompt_cache(
    file_name: str | Path, cache: Sequence[Any], metadata: Mapping[str, Any] | None = None, *, overwrite: bool = False
) -> Path:
    """Write caches, ours or mlx-lm's, to a file that both read; it appears complete or not at all.

    Args:
        file_name: `.safetensors` is put at the end if it is not there.
        metadata: strings by name, to be kept with the cache, and under `prompt_cache_tokens` the ids that it has seen.
        overwrite: replace an existing file.

    Returns:
        The file written.

    Raises:
        RequestError: the file exists, or metadata or caches cannot be written.
        OpenELMError: writing failed, or a key or value is not finite.
    """
    path = check_new(file_name, overwrite)
    if not isinstance(metadata, Mapping | None):
        raise RequestError(f"metadata must be strings by name, got {quote(metadata)}.")
    notes = dict(metadata or {})
    if not cache:
        raise RequestError("The prompt cache is empty: it has no layers.")
    offset = cache_offset(cache, len(cache) if isinstance(cache, Sequence) else 0)
    if TOKENS in notes:
        tokens = token_ids(notes[TOKENS], _MAX_ID, TOKENS)
        if len(tokens) != offset:
            raise RequestError(f"{TOKENS} has {len(tokens)} ids, and the prompt cache has seen {offset} tokens.")
        notes[TOKENS] = json.dumps(tokens)
    for name, value in notes.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise RequestError(f"metadata must be strings by name; {quote(name)} is {quote(value)}.")
    file_format.write(path, cache, notes)
    return path


def check_new(file_name: str | Path, overwrite: bool) -> Path:
    """The path of a file to write, with its ending; RequestError if it exists and is not to be replaced."""
    if not str(file_name).strip():
        raise RequestError("--prompt-cache-file is empty; name a file.")
    path = file_format.with_ending(to_path(file_name))
    if path.is_dir():
        raise RequestError(f"{path} is a folder, not a file.")
    if path.exists() and not overwrite:
        raise RequestError(f"{path} exists; choose another name, or replace it with --overwrite.")
    return path


@overload
def load_prompt_cache(file_name: str | Path, return_metadata: Literal[False] = False) -> list[Any]: ...
@overload
def load_prompt_cache(file_name: str | Path, return_metadata: Literal[True]) -> tuple[list[Any], dict[str, Any]]: ...


def load_prompt_cache(file_name: str | Path, return_metadata: bool = False) -> Any:
    """The caches in a file of `save_prompt_cache`, ours or mlx-lm's, for one sequence, one per layer.

    Args:
        file_name: `.safetensors` may be left out.
        return_metadata: also return the metadata: strings by name, and under `prompt_cache_tokens`, if the file has
            them, the ids that the cache has seen, as the argument of that name in `generate` takes them.

    Raises:
        RequestError: there is no such file, it is damaged, or holds caches of another kind.
    """
    path = to_path(file_name)
    path = path if path.exists() else file_format.with_ending(path)
    cache, notes = file_format.read(path)
    metadata: dict[str, Any] = dict(notes)
    try:
        offset = cache_offset(cache, len(cache))
        if TOKENS in notes:
            metadata[TOKENS] = token_ids(json.loads(notes[TOKENS]), _MAX_ID, TOKENS)
            if len(metadata[TOKENS]) != offset:
                raise RequestError(f"It lists {len(metadata[TOKENS])} ids and has seen {offset} tokens.")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: {str(error).rstrip('.')}; write it again.") from None
    return (cache, metadata) if return_metadata else cache


def origin_metadata(origin: Origin, tokens: Sequence[int]) -> dict[str, Any]:
    """The metadata of a cache that has seen `tokens`, with what mlx-lm's `generate` looks for."""
    return origin.notes() | {"tokenizer_config": "{}", TOKENS: list(tokens)}
