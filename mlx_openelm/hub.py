"""From a model's name to a folder on this machine, downloading from the Hugging Face Hub where needed.

huggingface_hub does the transfers, the cache and the retries, and honours HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE. It is imported inside the functions that need it, because a local model must start without it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import catalog
from .errors import OpenELMError, RequestError

TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
# What a model cannot be read without, as far as the repository has it.
_READ_PATTERNS = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_PATTERNS,
    "chat_template.jinja",
)
_DOCUMENT_PATTERNS = ("LICENSE*", "README.md")
MODEL_PATTERNS = (*_READ_PATTERNS, *_DOCUMENT_PATTERNS)

# Code and pickles are never downloaded, whatever patterns are asked for; nor are subfolders, which hold
# copies of the weights for other programs (`*` in a pattern matches `/` too).
_NEVER_PATTERNS = ("*.py", "*.pyc", "*.so", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*/*")

_FILE_TYPES = {".safetensors", ".gguf", ".pt", ".pth", ".bin", ".json", ".yaml", ".yml", ".model", ".npz"}


def resolve(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of the model that `name` means, downloaded if it has to be.

    `name` is `tiny` (the model inside the package), a local folder, an alias or name of a release (`270m`,
    `OpenELM-1.1B-Instruct`), or a hub repository (`owner/name`). A Path is always a local folder. A local
    folder that shares its name with a release or `tiny` wins only if it has a `config.json`.

    Raises RequestError for a name or revision that does not exist, for a file where a folder is wanted, and
    for a repository without a model; OpenELMError when the download fails.
    """
    place = _locate(name)
    if isinstance(place, Path):
        if revision is not None:
            raise RequestError(f"{name} is a local folder, which has no revision {revision!r}: leave the revision out")
        return place
    folder = download(place, revision=revision)
    _check_is_model(place, folder)
    return folder


def source_repo(name: str | Path) -> str | None:
    """The hub repository that `name` stands for, or None when it is local.

    Asks nobody. Raises RequestError for a name that is neither.
    """
    place = _locate(name)
    return place if isinstance(place, str) else None


def download(repo: str, *, revision: str | None = None, patterns: Iterable[str] = MODEL_PATTERNS) -> Path:
    """Download the files of a hub repository that match `patterns`, and give the folder in the cache.

    Files already in the cache are not downloaded again; without a network a complete cached copy is used.
    Raises RequestError for a repository or revision that does not exist, and OpenELMError when access is
    refused, the network or the disk fails, or the server does.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = list(patterns)
    # huggingface_hub's bars are for a terminal, and they show even when there is nothing to transfer.
    has_bars = sys.stderr.isatty() and _cached(repo, revision, patterns) is None
    progress = None if has_bars else _progress_class(repo)
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_NEVER_PATTERNS),
            tqdm_class=progress,
        )
    # Everything, because the transfer library in Rust raises kinds of its own.
    except Exception as error:
        is_absent = isinstance(error, LocalEntryNotFoundError)
        cached = _cached_without_documents(repo, revision, patterns) if is_absent else None
        if cached is None:
            raise _explain(error, repo, revision) from error
        folder = cached
    if not os.path.isdir(folder):
        raise RequestError(f"the repository {repo} has none of these files: {', '.join(patterns)}")
    if progress is not None and progress.announced:
        print(f"Downloaded {repo}", file=sys.stderr, flush=True)
    return Path(folder)


def download_tokenizer(release: catalog.Release) -> Path:
    """A folder with the tokenizer of a release, from the community repository that carries it ungated.

    Apple's repositories have no tokenizer, and the one they point to is gated. Nothing else is downloaded.
    Raises as `download` does.
    """
    return download(release.tokenizer_repo, patterns=TOKENIZER_PATTERNS)


def _locate(name: str | Path) -> Path | str:
    """Where the model is: a local folder as a Path, a hub repository as a str."""
    text = os.path.expanduser(str(name).strip())
    is_tiny = text.lower() == catalog.TINY
    release = None if isinstance(name, Path) else catalog.find(text)
    shadows = not isinstance(name, Path) and (is_tiny or release is not None)
    if text and os.path.isdir(text) and (not shadows or os.path.isfile(os.path.join(text, "config.json"))):
        return Path(text)
    if not shadows and os.path.isfile(text):
        raise RequestError(f"{name} is a file: give the folder that holds the model")
    if isinstance(name, Path) or _looks_like_path(str(name).strip()):
        raise RequestError(f"the folder {name} does not exist")
    if is_tiny:
        return _packaged_tiny()
    if release is not None:
        return release.hub_repo
    owner, _, repo = text.partition("/")
    if owner and repo:
        return text
    raise RequestError(
        f"there is no model named {text!r}{_did_you_mean(text)}; give {_known_names()}, a local folder, "
        "or a hub repository as owner/name"
    )


def _looks_like_path(text: str) -> bool:
    is_marked = text.startswith((".", "~", "/")) or text.endswith("/") or text.count("/") > 1
    return is_marked or Path(text).suffix.lower() in _FILE_TYPES


def _packaged_tiny() -> Path:
    if not (catalog.TINY_FOLDER / "config.json").is_file():
        raise OpenELMError("the model inside the package is missing: install mlx-openelm again")
    return catalog.TINY_FOLDER


def _check_is_model(repo: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise RequestError(f"the repository {repo} has no config.json, so it is not a model{_did_you_mean(repo)}")
    if not any(folder.glob("*.safetensors")):
        raise RequestError(
            f"the repository {repo} has no *.safetensors; pickled weights (.bin, .pt) are never downloaded"
        )


def _cached(repo: str, revision: str | None, patterns: list[str]) -> str | None:
    """The folder of a cached copy that has every file of `patterns`, or None. Asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_NEVER_PATTERNS),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _cached_without_documents(repo: str, revision: str | None, patterns: list[str]) -> str | None:
    """A cached copy that lacks nothing but the licence and the model card.

    Other programs (mlx-lm) fill the same cache and leave those out; huggingface_hub then calls it incomplete.
    """
    needed = [pattern for pattern in patterns if pattern not in _DOCUMENT_PATTERNS]
    return _cached(repo, revision, needed) if needed != patterns else None


def _progress_class(repo: str) -> Any:
    """A stand-in for the progress bars: one plain line when the first file really is transferred."""
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class Announcement(tqdm):
        announced = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def refresh(self, *args: Any, **kwargs: Any) -> None:
            # huggingface_hub refreshes the bar of bytes when a file that is not cached adds to its total.
            with lock:
                if self._counts_bytes and self.total and not Announcement.announced:
                    Announcement.announced = True
                    print(f"Downloading {repo} ...", file=sys.stderr, flush=True)

    return Announcement


def _explain(error: Exception, repo: str, revision: str | None) -> OpenELMError:
    """What went wrong and what to do, in one line without addresses or tokens."""
    from huggingface_hub import errors

    if not _host():
        return RequestError("HF_ENDPOINT must be a whole address, like https://huggingface.co: correct or unset it")
    # "Not in the cache" is raised from the reason why the hub could not be asked.
    is_absent = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if is_absent and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, errors.HFValidationError):
        return RequestError(
            f"{repo!r} is no folder here and no valid name of a hub repository (owner/name){_did_you_mean(repo)}"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return _explain_answer(cause, repo, revision)
    if isinstance(cause, errors.FileMetadataError):
        return OpenELMError(f"{_host()} does not answer like a model hub: check HF_ENDPOINT and your proxy settings")
    if isinstance(cause, UnicodeEncodeError):  # a token goes into a header, which is ASCII
        return OpenELMError("your token holds characters that no token has: correct HF_TOKEN, or run `hf auth login`")
    if is_absent:
        return _explain_absent(error, cause, repo)
    if _is_disk_full(cause):
        return OpenELMError(
            f"the disk is full, {repo} did not fit: free some space in {_cache_folder()}, "
            "or set HF_HOME to a folder on another disk"
        )
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OpenELMError(
            f"cannot write to the download cache {_cache_folder()} ({cause.strerror}): set HF_HOME to a folder you own"
        )
    return OpenELMError(
        f"the transfer of {repo} from {_host()} broke off ({_first_line(cause)}): "
        "run the same command again, files that arrived whole are kept"
    )


def _explain_answer(error: Any, repo: str, revision: str | None) -> OpenELMError:
    """The server answered, and the answer was no."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return OpenELMError(
            f"{repo} is gated: accept its conditions at https://huggingface.co/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(
            f"there is no folder and no hub repository named {repo}{_did_you_mean(repo)}; "
            "a private one needs `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{repo} has no revision {revision!r}: give a branch, a tag or a full commit hash")
    status = error.response.status_code
    if status == 401:
        return OpenELMError(f"{_host()} refuses your token: log in again with `hf auth login`, or correct HF_TOKEN")
    if status == 403:
        return OpenELMError(f"{_host()} refuses access to {repo}: your token may lack the permission to read it")
    if status == 429:
        return OpenELMError(f"{_host()} limits your requests: wait a few minutes, or log in with `hf auth login`")
    if status >= 500:
        return OpenELMError(f"{_host()} has a problem of its own (HTTP {status}): try again later")
    return OpenELMError(f"{_host()} refused to send {repo} (HTTP {status})")


def _explain_absent(error: Exception, cause: Exception, repo: str) -> OpenELMError:
    """The hub could not be asked, and the cache does not help."""
    from huggingface_hub import errors

    is_partial = hasattr(error, "snapshot_path")  # IncompleteSnapshotError, which older releases lack
    what = f"only a part of {repo} is in the download cache" if is_partial else f"{repo} is not in the download cache"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return OpenELMError(
            f"HF_HUB_OFFLINE is set and {what}: unset it and connect once, "
            "or download the model on another machine and give the folder"
        )
    reason = f" ({_first_line(cause)})" if cause is not error else ""
    return OpenELMError(
        f"cannot reach {_host()}{reason} and {what}: connect once, "
        "or download the model on another machine and give the folder"
    )


def _is_disk_full(error: Exception) -> bool:
    # The transfer library in Rust raises no OSError; it passes on the text of the system.
    is_out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_out_of_space or "No space left on device" in str(error)


def _first_line(error: Exception) -> str:
    """The first line of another program's message, without addresses (they can be signed) and tokens."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return re.sub(r"\bhf_\w+", "hf_...", re.sub(r"\w+://\S+", "the hub", text))


def _host() -> str:
    """The name of the hub's machine; never the whole endpoint, which can hold a password."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or ""


def _cache_folder() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _did_you_mean(name: str) -> str:
    close = [text for text in catalog.suggest(name) if text != name]
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _known_names() -> str:
    aliases = [release.aliases[0] for release in catalog.releases() if not release.instruct]
    return f"{catalog.TINY}, {', '.join(aliases)} (each size also with -instruct)"
