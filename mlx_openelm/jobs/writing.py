"""What the jobs share: writing a model folder, and its card's origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import console
from ..formats import atomic
from ..formats import mlx as mlx_format
from ..hub import catalog
from ..publishing.card import write_card
from ..publishing.origin import Origin, find_origin
from ..sources import Source
from ..text.chat_template import CORENET_TEMPLATE


def write_folder(
    source: Source,
    mlx_path: Path,
    *,
    command: str | None = None,
    origin: Origin | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | bool | None = None,
    card: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a source as an MLX folder, unless its files change meanwhile. Its weights are used up.

    Args:
        command: the command line that wrote the folder, for the model card.
        origin: where the model comes from; by default what the source's own files state.
        progress: called with the bytes written so far and in all; True shows them.
        card: further facts for the card (see `card.compose_card`).
        extra: a function that writes more files into the folder.

    Raises:
        RequestError: `mlx_path` exists and `overwrite` is not set, or it cannot be created.
        OpenELMError: reading or writing failed, or a file of the source changed; nothing was left behind.
    """
    origin = origin or origin_of(source)
    with (
        atomic.new_folder(mlx_path, overwrite=overwrite) as partial,
        source.reading(),
        console.writing(progress) as show,
    ):
        source.tokenizer.save(partial, chat_template=chat_template(source))
        mlx_format.write(partial, source.checkpoint, progress=show)
        facts = {"command": command, "rounded_to": source.checkpoint.rounded_to, **(card or {})}
        write_card(partial, name=mlx_path.resolve().name, origin=origin, **facts)
        if extra is not None:
            extra(partial)


def chat_template(source: Source) -> str | None:
    """The chat template to write: the model's own, or CoreNet's for the instruct models, which come without one."""
    is_instruct = source.release is not None and source.release.instruct
    return source.tokenizer.chat_template or (CORENET_TEMPLATE if is_instruct else None)


def origin_of(source: Source) -> Origin:
    """Where a source comes from, and its license, for a model card."""
    is_corenet_release = catalog.corenet_name(source.name) is not None and source.release is not None
    base_model = source.release.hub_repo if is_corenet_release and source.release is not None else None
    return find_origin(source.path, repo=source.repo, base_model=base_model)
