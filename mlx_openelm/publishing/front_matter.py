"""Reading a README.md: its YAML front matter, its text, and whether we wrote it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import inputs
from ..errors import RequestError
from .card_text import Facts
from .files import CARD, leads_out

# Our own field of the front matter: the facts that the files do not state, and a digest of the text.
KEY = "mlx_openelm"


@dataclass(frozen=True)
class ParsedCard:
    """A README.md in parts; `facts` is None unless we wrote it."""

    metadata: dict[str, Any]
    body: str
    facts: Facts | None

    @property
    def is_untouched(self) -> bool:
        """Whether the text is still the one we wrote."""
        return self.facts is not None and self.metadata[KEY].get("text") == digest(self.body)


EMPTY = ParsedCard({}, "", None)


def read_strictly(file: Path) -> ParsedCard | None:
    """A README.md in parts, or None if there is none.

    Raises:
        RequestError: the file cannot be read, or its front matter is not valid YAML.
    """
    if not file.exists():
        return None
    try:
        text = _read_text(file)
    except RequestError as error:
        raise RequestError(f"{str(error).rstrip('.')}; correct or remove it.") from None
    card = parse(text)
    if card is None:
        raise RequestError(f"The front matter of {file} is not valid YAML; correct it, or remove the file.")
    return card


def read_leniently(folder: Path) -> ParsedCard:
    """The card in a folder; `EMPTY` if it is missing, damaged, or a link to a file outside."""
    file = folder / CARD
    if leads_out(file) or not file.exists():
        return EMPTY
    try:
        return parse(_read_text(file)) or EMPTY
    except RequestError:
        return EMPTY


def parse(text: str) -> ParsedCard | None:
    """A card's text in parts, or None if its front matter is damaged."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return ParsedCard({}, text, None)
    try:
        metadata = inputs.parse_yaml(block.group(2), "The front matter") or {}
    except RequestError:
        return None
    if not isinstance(metadata, dict):
        return None
    return ParsedCard(metadata, text[block.end() :], Facts.from_dict(metadata.get(KEY)))


def digest(body: str) -> str:
    """A short digest of a card's text, to tell later whether somebody edited it."""
    return hashlib.sha256(body.strip().replace("\r\n", "\n").encode()).hexdigest()[:16]


def _read_text(file: Path) -> str:
    # Like huggingface_hub, drop a byte-order mark: it would hide the front matter.
    return inputs.read_text(file).removeprefix("\ufeff")
