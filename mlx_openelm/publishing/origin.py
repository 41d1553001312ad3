"""Where a model comes from: the base model and the license that its card states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import OpenELMError, RequestError
from ..hub import catalog
from ..hub.resolve import DOCUMENT_PATTERNS, NEVER_PATTERNS, download
from .card_text import Contents
from .files import leads_out
from .front_matter import EMPTY, ParsedCard, read_leniently

# Fields that a card copies from the card of the original.
COPIED_FIELDS = ("license", "license_name", "license_link", "language")
# Relations that a conversion keeps; with any other, the base model is the model itself.
_DERIVED = ("finetune", "adapter", "merge")
# A license is a page or two; a larger file is something else.
_MAX_LICENSE_BYTES = 1_000_000


@dataclass(frozen=True)
class Origin:
    """What is known about the original model.

    Attributes:
        name: what the card's text calls it.
        base_model: the hub repository (or several) it is or derives from; None if unknown.
        relation: how it derives from `base_model`; None if it is only a conversion of it.
        metadata: the license and language that its card states.
        licenses: its license files.
        from_scratch: whether there is no original: training began from random weights.
    """

    name: str
    base_model: str | list[str] | None = None
    relation: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licenses: tuple[Path, ...] = ()
    from_scratch: bool = False


def find_origin(path: Path, *, repo: str | None = None, base_model: str | None = None, offline: bool = False) -> Origin:
    """What is known about the model in `path`, from its name and from the card and the license beside it.

    One of Apple's models that came without a license, as CoreNet's files do, gets that of Apple's repository.

    Args:
        path: the model's folder or file.
        repo: the hub repository that the user named; None for a local model.
        base_model: the hub repository of the same model, if its files came from elsewhere.
        offline: whether to make no network request.
    """
    origin = _local_origin(path, repo, base_model)
    return origin if offline else _with_license(origin)


def _local_origin(path: Path, repo: str | None, base_model: str | None) -> Origin:
    """What is known without a network request."""
    if path in catalog.PACKAGED.values():
        return Origin(path.name, metadata={"license": "mit", "language": "en"})
    folder = path if path.is_dir() else path.parent
    card = read_leniently(folder)
    # A card beside a single file need not describe it, unless we wrote it.
    describes_model = folder == path or card.facts is not None
    if not describes_model:
        card = EMPTY
    from_scratch = card.facts is not None and bool(card.facts.from_scratch)
    repo = base_model or repo or _repo_of(path, by_name=not from_scratch)
    licenses = _license_files(folder) if describes_model else ()
    metadata = _copied_fields(card, repo, licenses)

    name = card.facts.source if card.facts is not None else None
    stated, relation = card.metadata.get("base_model"), card.metadata.get("base_model_relation")
    is_derived = relation in _DERIVED
    is_converted = card.facts is not None or card.metadata.get("library_name") in ("mlx", "gguf")
    if base_model is None and stated and (repo is None or (is_converted and not is_derived)):
        stated_name = stated if isinstance(stated, str) else ", ".join(map(str, stated))
        return Origin(name or stated_name, stated, str(relation) if is_derived else None, metadata, licenses)
    if repo is not None:
        return Origin(repo, repo, None, metadata, licenses)
    return Origin(name or path.name, None, None, metadata, licenses, from_scratch)


def _with_license(origin: Origin) -> Origin:
    """Add license and language of Apple's repository to one of Apple's models that came without a license."""
    release = catalog.find_repo(origin.base_model)
    if release is None or origin.relation is not None or origin.metadata.get("license") or origin.licenses:
        return origin
    try:
        folder = download(release.hub_repo, patterns=DOCUMENT_PATTERNS)
    except OpenELMError:  # perhaps there is no network; the card then links to the repository for the license
        return origin
    licenses = _license_files(folder)
    fields = _copied_fields(read_leniently(folder), release.hub_repo, licenses)
    return replace(origin, metadata={**origin.metadata, **fields}, licenses=licenses)


def _repo_of(path: Path, *, by_name: bool) -> str | None:
    """The hub repository a local folder is a copy of: by its place in the hub's cache, or by its name and shapes."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    release = catalog.find(path.resolve().name)
    if release is None or path.is_file() or not by_name:
        return None
    try:
        is_same = Contents.read(path).shapes == ModelConfig.from_name(release.name).tensor_shapes()
    except RequestError:
        return None
    return release.hub_repo if is_same else None


def _license_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in folder.glob("LICENSE*") if _is_license(file)))


def _is_license(file: Path) -> bool:
    is_code = any(fnmatch(file.name, pattern) for pattern in NEVER_PATTERNS)
    return file.is_file() and not is_code and not leads_out(file) and file.stat().st_size <= _MAX_LICENSE_BYTES


def _copied_fields(card: ParsedCard, repo: str | None, licenses: Sequence[Path]) -> dict[str, Any]:
    """The fields to copy from a card; a link to a license file that is not copied points to the original repository."""
    fields = {key: card.metadata[key] for key in COPIED_FIELDS if card.metadata.get(key)}
    link = fields.get("license_link")
    if not isinstance(link, str) or "://" in link or link in [file.name for file in licenses]:
        return fields
    if repo is None:
        return {key: value for key, value in fields.items() if key != "license_link"}
    return fields | {"license_link": f"https://huggingface.co/{repo}/blob/main/{link.lstrip('./')}"}
