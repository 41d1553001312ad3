"""Model cards: the README.md of a model folder, from the folder's files and from how it was made.

A card has YAML front matter, which the hub reads, and a text. Facts that the files do not state (where the model came
from, the command, measurements) are kept in the front matter under `mlx_openelm`, with a digest of the text. So a card
can be written again under another name, and a card that a person has edited is recognized and left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import inputs
from ..config import ModelConfig
from .card_text import Contents, Facts, Quality, render
from .files import CARD
from .front_matter import KEY, digest, parse, read_strictly
from .origin import COPIED_FIELDS, Origin, find_origin


@dataclass(frozen=True)
class Card:
    """The README.md to publish. `is_own` is true for one that a person wrote, which is sent unchanged."""

    text: str
    is_own: bool


def write_card(folder: Path, *, name: str, origin: Origin, **facts: Any) -> None:
    """Write README.md into a folder whose other files are complete, and copy the license of the original.

    `name` is what the usage examples call the model until it is uploaded. For `facts` and errors see `compose_card`.
    """
    text = compose_card(folder, name=name, origin=origin, **facts)
    for file in origin.licenses:
        shutil.copyfile(file, folder / file.name)
    (folder / CARD).write_text(text, encoding="utf-8")


def compose_card(
    path: Path,
    *,
    name: str,
    origin: Origin,
    command: str | None = None,
    method: str | None = None,
    recipe: str | None = None,
    quality: Sequence[Quality] = (),
    config: ModelConfig | None = None,
    rounded_to: str | None = None,
    adapters: Sequence[str] = (),
    trained_tokens: int | None = None,
) -> str:
    """The card of a model folder or a GGUF file.

    Args:
        name: the repository, or another name for the model.
        command: the command line that made it, from `command_line`.
        method, recipe: how it was quantized, if not by plain rounding; for GGUF its type (`q8_0`).
        quality: measurements.
        config: the model's configuration, for GGUF, which has no config.json.
        rounded_to: the quantization that the weights had before they were unpacked.
        adapters: descriptions of the adapters that were fused into the weights.
        trained_tokens: the tokens that the weights were trained on here.

    Raises:
        RequestError: the path holds no model, or files are damaged.
    """
    contents = Contents.read(path)
    facts = Facts(
        source=origin.name,
        command=command,
        method=method,
        recipe=recipe,
        quality=tuple(quality),
        parameters=None if config is None else config.num_parameters,
        layers=None if config is None else config.num_transformer_layers,
        rounded_to=rounded_to,
        adapters=tuple(adapters),
        trained_tokens=trained_tokens,
        from_scratch=origin.from_scratch or None,
    )
    return _compose(contents, name, _metadata(contents, origin, method), facts)


def card_for_upload(path: Path, repo: str) -> Card:
    """The card to publish `path` (a folder or a GGUF file) with as `repo`; nothing is written.

    A card we wrote is written again with the repository's name and its present front matter. One that a person wrote
    or edited is returned unchanged. If there is none, one is written from the files.

    Raises:
        RequestError: front matter that is not YAML, or a folder without a model.
    """
    card = read_strictly(path / CARD) if path.is_dir() else None
    if card is not None and not card.is_untouched:
        return Card(inputs.read_text(path / CARD), is_own=True)
    contents = Contents.read(path)
    if card is None:
        # Offline, so that a dry run makes no request and shows the card that is sent.
        origin = find_origin(path, offline=True) if path.is_dir() else Origin(path.name)
        facts, metadata = Facts(None), _metadata(contents, origin)
    else:
        assert card.facts is not None
        facts, metadata = card.facts, card.metadata
    return Card(_compose(contents, repo, metadata, facts), is_own=False)


def may_replace(text: str) -> bool:
    """Whether a card found in a repository may be replaced: one we wrote, or front matter without any text."""
    card = parse(text)
    return card is not None and (card.is_untouched or not card.body.strip())


def _compose(contents: Contents, name: str, metadata: Mapping[str, Any], facts: Facts) -> str:
    """Front matter and text."""
    from huggingface_hub import CardData

    body = "\n" + render(contents, name, metadata, facts)
    values = dict(metadata) | {KEY: facts.to_dict() | {"text": digest(body)}}
    front = CardData(**values).to_yaml(original_order=list(values))
    return f"---\n{front}\n---\n{body}"


def _metadata(contents: Contents, origin: Origin, method: str | None = None) -> dict[str, Any]:
    """The fields that the hub reads: the original's license and language, the library, the base model, tags."""
    library = {"mlx": "mlx", "huggingface": "transformers", "gguf": "gguf"}[contents.layout]
    bits = f"{contents.common.bits}-bit" if contents.common is not None else None
    tags = [tag for tag in (library if library != "transformers" else None, "openelm", bits) if tag]
    values: dict[str, Any] = {key: origin.metadata[key] for key in COPIED_FIELDS if key in origin.metadata}
    values |= {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if origin.base_model:
        values["base_model"] = origin.base_model
        relation = origin.relation or ("quantized" if contents.common or method else None)
        values |= {"base_model_relation": relation} if relation else {}
    return values
