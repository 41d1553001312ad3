"""What an upload sends: the files, the card, and what it removes from the repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..formats import safetensors
from .card import Card
from .files import CARD

# Old weights, which a loader would take for part of the model if they stayed beside the new ones.
_WEIGHTS = ("model*.safetensors", "weights*.safetensors", safetensors.INDEX)


@dataclass(frozen=True)
class File:
    """A file to send: its name in the repository, its bytes, and its path (None: written for the upload)."""

    name: str
    size: int
    path: Path | None = None


@dataclass(frozen=True)
class Upload:
    """An upload, planned or done.

    Attributes:
        left_out: names of files and folders in `path` that are not sent.
        own_card: whether a person wrote the card.
        removes: patterns; files at the top of the repository that match one and are not sent are removed.
        url: where it was sent; None for a dry run.
    """

    path: Path
    repo: str
    private: bool
    revision: str
    commit_message: str
    files: tuple[File, ...]
    left_out: tuple[str, ...]
    card: str
    own_card: bool
    removes: tuple[str, ...] = ()
    url: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def make_plan(
    path: Path,
    repo: str,
    private: bool,
    revision: str,
    message: str | None,
    files: Sequence[Path],
    card: Card,
) -> Upload:
    """The upload of `files` and a card; nothing is sent yet."""
    card_file = File(CARD, len(card.text.encode()), path / CARD if card.is_own else None)
    model_files = [File(file.name, file.stat().st_size, file) for file in files]
    sent = sorted([*model_files, card_file], key=lambda file: file.name)
    names = {file.name for file in sent}
    entries = sorted(path.iterdir()) if path.is_dir() else []
    return Upload(
        path=path,
        repo=repo,
        private=private,
        revision=revision,
        commit_message=(message or "").strip() or "Upload with mlx-openelm",
        files=tuple(sent),
        left_out=tuple(entry.name + "/" * entry.is_dir() for entry in entries if entry.name not in names),
        card=card.text,
        own_card=card.is_own,
        removes=_WEIGHTS if any(name.endswith(".safetensors") for name in names) else (),
    )
