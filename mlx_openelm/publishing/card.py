"""Model cards: the README.md of a model folder, written from the folder and from what is known of its making.

A card is YAML front matter, which the hub reads, and a text. What the folder itself cannot tell (where the model
came from, the command, measurements) is kept in the front matter under `mlx_openelm`, with a digest of the text.
So a card can be written again under another name, and one that a person has edited is told apart and left alone.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .. import inputs
from ..config import ModelConfig
from ..errors import OpenELMError, RequestError
from ..hub import catalog
from ..hub import resolve as hub
from ..wording import flag
from . import card_text as model_card_text
from .card_text import Contents, Facts, Quality
from .files import CARD, leads_out

_KEY = "mlx_openelm"

# What a card takes over from the card of the original, as it stands there.
_CARRIED = ("license", "license_name", "license_link", "language")
# Relations to a base model that a conversion does not change; without one of these a base model is the model itself.
_MAKES_ANOTHER = ("finetune", "adapter", "merge")
# A licence is a page or two; what is longer only has its name.
_MAX_LICENSE = 1_000_000


@dataclass(frozen=True)
class Origin:
    """What is known of the model that was converted.

    `name` is what the text calls it; `base_model` the hub repository (or several) it is or derives from, None
    where nobody knows; `relation` how it derives from that, where it is more than a conversion; `metadata` the
    licence and language its own card states; `licenses` its licence files.
    """

    name: str
    base_model: str | list[str] | None = None
    relation: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licenses: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Card:
    """The README.md to publish: its text, and whether it is a person's own, which is sent as it is."""

    text: str
    is_own: bool


def find_origin(path: Path, *, repo: str | None = None, base_model: str | None = None, offline: bool = False) -> Origin:
    """What is known of the model in `path`, from its name and from the card and the licence beside it.

    One of Apple's models that came without a licence, as CoreNet's files do, gets that of Apple's repository.

    Args:
        path: the folder (or file) it is read from.
        repo: the hub repository that was asked for, None for what is local.
        base_model: the hub repository it is the same model as, where its files came from elsewhere.
        offline: ask nobody.
    """
    origin = _local_origin(path, repo, base_model)
    return origin if offline else _with_license(origin)


def _local_origin(path: Path, repo: str | None, base_model: str | None) -> Origin:
    """What is known without asking anybody."""
    if path == catalog.TINY_FOLDER:
        return Origin(catalog.TINY, metadata={"license": "mit", "language": "en"})
    folder = path if path.is_dir() else path.parent
    card = _read_safely(folder)
    # What lies beside a single file need not belong to it, unless we wrote it.
    belongs = folder == path or card.facts is not None
    if not belongs:
        card = _Parsed({}, "", None)
    repo = base_model or repo or _repo_of(path)
    licenses = _licenses(folder) if belongs else ()
    metadata = _terms(card, repo, licenses)

    name = card.facts.source if card.facts is not None else None
    stated, relation = card.metadata.get("base_model"), card.metadata.get("base_model_relation")
    makes_another = relation in _MAKES_ANOTHER
    converted = card.facts is not None or card.metadata.get("library_name") in ("mlx", "gguf")
    if base_model is None and stated and (repo is None or (converted and not makes_another)):
        kept = str(relation) if makes_another else None
        return Origin(name or _joined(stated), stated, kept, metadata, licenses)
    if repo is not None:
        return Origin(repo, repo, None, metadata, licenses)
    return Origin(name or path.name, None, None, metadata, licenses)


def _with_license(origin: Origin) -> Origin:
    """Licence and language of Apple's repository, for a model of Apple's that came without a licence."""
    release = catalog.find_repo(origin.base_model)
    if release is None or origin.relation is not None or origin.metadata.get("license") or origin.licenses:
        return origin
    try:
        folder = hub.download(release.hub_repo, patterns=hub.DOCUMENT_PATTERNS)
    except OpenELMError:  # no network, perhaps; the card then names the repository for the licence
        return origin
    licenses = _licenses(folder)
    terms = _terms(_read_safely(folder), release.hub_repo, licenses)
    return replace(origin, metadata={**origin.metadata, **terms}, licenses=licenses)


def write(folder: Path, *, name: str, origin: Origin, **making: Any) -> None:
    """Write README.md into a folder whose other files are complete, and copy the licence of the original.

    `name` is what the lines that show how to use the model call it, until it is uploaded; for `making`, and what
    is raised, see `compose`.
    """
    text = compose(folder, name=name, origin=origin, **making)
    for file in origin.licenses:
        shutil.copyfile(file, folder / file.name)
    (folder / CARD).write_text(text, encoding="utf-8")


def compose(
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
) -> str:
    """The card of a model: of a folder, or of a GGUF file.

    Args:
        name: the repository, or what else the model is to be called.
        command: the command line that made it, as `command_line` gives it.
        method, recipe: how it was quantized, where more than plain rounding; for GGUF its type (`q8_0`).
        quality: what was measured.
        config: the model's, for GGUF, which has no config.json.
        rounded_to: what the weights had been quantized to before they were unpacked.
        adapters: what was fused into them, in words.

    Raises:
        RequestError: there is no model, or files are damaged.
    """
    contents = Contents.read(path)
    sizes = (None, None) if config is None else (config.num_parameters, config.num_transformer_layers)
    facts = Facts(origin.name, command, method, recipe, tuple(quality), sizes[0], sizes[1], rounded_to, tuple(adapters))
    return _compose(contents, name, _metadata(contents, origin, method), facts)


def for_upload(path: Path, repo: str) -> Card:
    """The card to publish `path` (a folder, or a GGUF file) with as `repo`; nothing is written.

    A card we wrote is written anew with the repository's name and the front matter it has now; one a person
    wrote or edited is given back as it is; where there is none, one is written from what the files tell.

    Raises:
        RequestError: front matter that is not YAML, or a folder without a model.
    """
    folder = path if path.is_dir() else path.parent
    card = _read(folder / CARD, strict=True) if path.is_dir() else None
    if card is not None and not card.is_untouched:
        return Card(inputs.read_text(folder / CARD), is_own=True)
    contents = Contents.read(path)
    if card is None:
        # A dry run asks nobody, and shows what is sent without it too.
        origin = find_origin(path, offline=True) if path.is_dir() else Origin(path.name)
        facts, metadata = Facts(None), _metadata(contents, origin)
    else:
        assert card.facts is not None
        facts, metadata = card.facts, card.metadata
    return Card(_compose(contents, repo, metadata, facts), is_own=False)


def may_replace(text: str) -> bool:
    """Whether a card found in a repository may be replaced: one we wrote, or front matter without any text."""
    card = _parse(text)
    return card is not None and (card.is_untouched or not card.body.strip())


def command_line(command: str, flags: Mapping[str, Any]) -> str:
    """`mlx-openelm COMMAND` with its flags as a person types them, safe to publish.

    None, False and empty lists are left out; of a Path, or a text that means one, only the last part is told.
    """
    words = ["mlx-openelm", command]
    for key, value in flags.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is True:
                words.append(flag(key))
            elif item is not None and item is not False:
                words += [flag(key), shlex.quote(without_folders(item))]
    return " ".join(words)


def source_flags(
    tokenizer: str | Path | None, config_yaml: str | Path | None, revision: str | None = None
) -> dict[str, Any]:
    """For `command_line`: what `open_source` is told beside the model's name; the first two are files."""
    return {
        "tokenizer": None if tokenizer is None else Path(tokenizer),
        "config_yaml": None if config_yaml is None else Path(config_yaml),
        "revision": revision,
    }


def without_folders(value: object) -> str:
    """The last part of a path, and other text as it is: where a person keeps their files is nobody's business."""
    text = str(value)
    path = text.strip()  # as the loaders read it
    is_path = isinstance(value, Path) or path.startswith((".", "~", "/")) or Path(path).is_absolute()
    is_path = is_path or os.path.exists(path)  # `clients/acme`, which looks like a hub repository
    return Path(path).name or "." if is_path else text


@dataclass(frozen=True)
class _Parsed:
    """A README.md taken apart; `facts` where we wrote it."""

    metadata: dict[str, Any]
    body: str
    facts: Facts | None

    @property
    def is_untouched(self) -> bool:
        """Whether the text is still the one we wrote."""
        return self.facts is not None and self.metadata[_KEY].get("text") == _digest(self.body)


def _read(file: Path, *, strict: bool = False) -> _Parsed | None:
    """A README.md taken apart, or None where there is none; damaged front matter is none, or refused."""
    if not file.exists():
        return None
    try:
        # huggingface_hub leaves the mark at the beginning out, too, so it hides no front matter.
        text = inputs.read_text(file).removeprefix("\ufeff")
    except RequestError as error:
        if strict:
            raise RequestError(f"{str(error).rstrip('.')}; correct or remove it.") from None
        return None
    card = _parse(text)
    if card is None and strict:
        raise RequestError(f"The front matter of {file} is not valid YAML; correct it, or remove the file.")
    return card


def _read_safely(folder: Path) -> _Parsed:
    """The card in a folder; an empty one where there is none to be trusted."""
    return (None if leads_out(folder / CARD) else _read(folder / CARD)) or _Parsed({}, "", None)


def _parse(text: str) -> _Parsed | None:
    """A card's text taken apart, or None where its front matter is damaged."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return _Parsed({}, text, None)
    try:
        metadata = inputs.parse_yaml(block.group(2), "The front matter") or {}
    except RequestError:
        return None
    if not isinstance(metadata, dict):
        return None
    return _Parsed(metadata, text[block.end() :], Facts.from_dict(metadata.get(_KEY)))


def _compose(contents: Contents, name: str, metadata: Mapping[str, Any], facts: Facts) -> str:
    """Front matter and text."""
    from huggingface_hub import CardData

    body = "\n" + model_card_text.render(contents, name, metadata, facts)
    values = dict(metadata) | {_KEY: facts.to_dict() | {"text": _digest(body)}}
    front = CardData(**values).to_yaml(original_order=list(values))
    return f"---\n{front}\n---\n{body}"


def _metadata(contents: Contents, origin: Origin, method: str | None = None) -> dict[str, Any]:
    """What the hub reads: the original's licence and language, the library, the base model, tags."""
    library = {"mlx": "mlx", "huggingface": "transformers", "gguf": "gguf"}[contents.layout]
    bits = f"{contents.common.bits}-bit" if contents.common is not None else None
    tags = [tag for tag in (library if library != "transformers" else None, "openelm", bits) if tag]
    values: dict[str, Any] = {key: origin.metadata[key] for key in _CARRIED if key in origin.metadata}
    values |= {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if origin.base_model:
        values["base_model"] = origin.base_model
        relation = origin.relation or ("quantized" if contents.common or method else None)
        values |= {"base_model_relation": relation} if relation else {}
    return values


def _repo_of(path: Path) -> str | None:
    """The hub repository a local folder is a copy of: in the hub's cache, or named like a release of its sizes."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    release = catalog.find(path.resolve().name)
    if release is None or path.is_file():
        return None
    try:
        is_same = Contents.read(path).shapes == ModelConfig.from_name(release.name).tensor_shapes()
    except RequestError:
        return None
    return release.hub_repo if is_same else None


def _licenses(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(file for file in folder.glob("LICENSE*") if _is_license(file)))


def _is_license(file: Path) -> bool:
    is_code = any(fnmatch(file.name, pattern) for pattern in hub.NEVER_PATTERNS)
    return file.is_file() and not is_code and not leads_out(file) and file.stat().st_size <= _MAX_LICENSE


def _terms(card: _Parsed, repo: str | None, licenses: Sequence[Path]) -> dict[str, Any]:
    """What a card takes over; a link to a licence file that is not copied points to the original repository."""
    metadata = {key: card.metadata[key] for key in _CARRIED if card.metadata.get(key)}
    link = metadata.get("license_link")
    if not isinstance(link, str) or "://" in link or link in [file.name for file in licenses]:
        return metadata
    if repo is None:
        return {key: value for key, value in metadata.items() if key != "license_link"}
    return metadata | {"license_link": f"https://huggingface.co/{repo}/blob/main/{link.lstrip('./')}"}


def _joined(names: str | list[str]) -> str:
    return names if isinstance(names, str) else ", ".join(map(str, names))


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().replace("\r\n", "\n").encode()).hexdigest()[:16]
