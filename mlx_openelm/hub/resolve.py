"""From a model's name to a folder on this machine, downloading from the Hugging Face Hub if necessary.

huggingface_hub does the transfers, the cache and the retries, and honors HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE. It is imported inside the functions that need it, so that local models start without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ..errors import OpenELMError, RequestError, quote
from ..inputs import refuse_device, to_path
from . import catalog, offline
from .errors import did_you_mean, explain_download
from .progress import Transfer, snapshot_bars

TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The files a model is read from; not every repository has all of them.
_READ_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_PATTERNS,
    "chat_template.jinja",
)
DOCUMENT_PATTERNS = ("LICENSE*", "README.md")
MODEL_PATTERNS = (*_READ_PATTERNS, *DOCUMENT_PATTERNS)

# Code and pickles are never downloaded, whatever patterns the caller gives. Neither are subfolders, which hold copies
# of the weights for other programs (`*` in a pattern also matches `/`).
NEVER_PATTERNS = ("*.py", "*.pyc", "*.so", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*/*")

_FILE_TYPES = {".safetensors", ".gguf", ".pt", ".pth", ".bin", ".json", ".yaml", ".yml", ".model", ".npz"}


def resolve(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of the model that `name` means, downloaded if necessary.

    `name` is a model inside the package (`tiny`), a local folder, an alias or name of a release (`270m`,
    `OpenELM-1.1B-Instruct`), or a hub repository (`owner/name`). A Path is always a local folder. A local
    folder that shares its name with one of these models wins only if it has a `config.json`.

    Raises RequestError for a name or revision that does not exist, for a file instead of a folder, and for a
    repository without a model; OpenELMError when the download fails.
    """
    found = locate(name)
    if isinstance(found, Path):
        if revision is not None:
            raise RequestError(
                f"{name} is a local folder, which has no revision {quote(revision)}: leave the revision out"
            )
        return found
    folder = download(found, revision=revision)
    _check_is_model(found, folder)
    return folder


def source_repo(name: str | Path) -> str | None:
    """The hub repository that `name` stands for, or None when it is local.

    Makes no network request. Raises RequestError for a name that is neither.
    """
    found = locate(name)
    return found if isinstance(found, str) else None


def download(
    repo: str,
    *,
    revision: str | None = None,
    patterns: Iterable[str] = MODEL_PATTERNS,
    advice: str | None = None,
) -> Path:
    """Download the files of a hub repository that match `patterns`, and return the folder in the cache.

    Files in the cache are not downloaded again; without a network, a complete cached copy is used.

    Args:
        advice: how to get the files without a network (see `offline`); by default how to get the model.

    Raises RequestError for a repository or revision that does not exist, and OpenELMError when access is
    refused, the network or the disk fails, or the server does.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = list(patterns)
    try:
        folder = _snapshot(repo, revision, patterns)
    # Exception, because the transfer library in Rust raises types of its own.
    except Exception as error:
        is_absent = isinstance(error, LocalEntryNotFoundError)
        cached = _cached_without_documents(repo, revision, patterns) if is_absent else None
        if cached is None:
            raise explain_download(error, repo, revision, advice or offline.model(repo, revision)) from error
        folder = cached
    if not os.path.isdir(folder):
        raise RequestError(f"The repository {repo} does not have any of these files: {', '.join(patterns)}")
    return Path(folder)


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> str:
    """The folder of a repository's newest version in the cache, downloaded unless that is denied."""
    from huggingface_hub import snapshot_download

    get = partial(
        snapshot_download, repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(NEVER_PATTERNS)
    )
    if offline.denied() is not None:
        return get(local_files_only=True)
    with Transfer(repo) as transfer:
        bars = snapshot_bars(transfer, repo, revision=revision, allow=patterns, ignore=NEVER_PATTERNS)
        return get(tqdm_class=bars)


def locate(name: str | Path) -> Path | str:
    """Where a model is: a local folder as a Path, a hub repository as a str; errors as `resolve`."""
    to_path(name)  # refuses names that no file can have
    text = os.path.expanduser(str(name).strip())
    packaged = catalog.PACKAGED.get(text.lower())
    release = None if isinstance(name, Path) else catalog.find(text)
    is_known = not isinstance(name, Path) and (packaged is not None or release is not None)
    if text and os.path.isdir(text) and (not is_known or os.path.isfile(os.path.join(text, "config.json"))):
        return Path(text)
    if not is_known and os.path.isfile(text):
        raise RequestError(f"{name} is a file: give the folder that holds the model, or a .pt or .gguf file")
    if not is_known:
        refuse_device(text)
    if isinstance(name, Path) or (not is_known and _looks_like_path(str(name).strip())):
        raise RequestError(f"The folder {name} does not exist")
    if packaged is not None:
        if not (packaged / "config.json").is_file():
            raise OpenELMError(f"The model {packaged.name} is missing from the package: install mlx-openelm again")
        return packaged
    if release is not None:
        return release.hub_repo
    owner, _, repo = text.partition("/")
    if owner and repo:
        return text
    raise RequestError(
        f"There is no model named {quote(text)}{did_you_mean(text)}; give {_known_names()}, a local folder, "
        "or a hub repository as owner/name"
    )


def _looks_like_path(text: str) -> bool:
    is_marked = text.startswith((".", "~", "/")) or text.endswith("/") or text.count("/") > 1
    return is_marked or Path(text).suffix.lower() in _FILE_TYPES


def _check_is_model(repo: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if any(folder.glob("adapter*.safetensors")):
            raise RequestError(f"{repo} is an adapter: give it with --adapter-path, and its base model with --model")
        raise RequestError(f"The repository {repo} has no config.json, so it is not a model{did_you_mean(repo)}")
    if not any(folder.glob("*.safetensors")):
        raise RequestError(
            f"The repository {repo} has no *.safetensors; pickled weights (.bin, .pt) are never downloaded"
        )


def _cached(repo: str, revision: str | None, patterns: list[str]) -> str | None:
    """The folder of a cached copy that has every file of `patterns`, or None. Makes no network request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(NEVER_PATTERNS),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _cached_without_documents(repo: str, revision: str | None, patterns: list[str]) -> str | None:
    """A cached copy that may lack the license and the model card, but nothing else.

    Other programs (mlx-lm) fill the same cache without them, and huggingface_hub then calls it incomplete.
    """
    needed = [pattern for pattern in patterns if pattern not in DOCUMENT_PATTERNS]
    return _cached(repo, revision, needed) if needed != patterns else None


def _known_names() -> str:
    aliases = [release.aliases[0] for release in catalog.releases() if not release.instruct]
    return f"{', '.join(catalog.PACKAGED)}, {', '.join(aliases)} (each size also with -instruct)"
