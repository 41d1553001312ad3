"""Data sets on the Hugging Face Hub: find the files of the splits and download only those, and no code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import OpenELMError, RequestError, quote
from ...hub import offline
from ...hub.errors import explain_download
from ...hub.progress import Transfer, snapshot_bars
from .splits import SUFFIXES, find_splits, suffix_of


def download_splits(name: str, suffixes: Sequence[str] = SUFFIXES) -> dict[str, list[Path]]:
    """The files of each split of the data set `name` (`owner/name`), downloaded unless they are in the cache.

    A repository with a single data file of another name gives that as the split `all`. Without a network, the files in
    the cache are used if they are complete.

    Args:
        suffixes: the formats of data files, best first.

    Raises:
        RequestError: there is no such data set, or its files are not recognized as splits.
        OpenELMError: access was refused, or a download failed.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        names = [file.rfilename for file in HfApi().dataset_info(name).siblings or []]
    except (HFValidationError, RepositoryNotFoundError) as error:
        if not isinstance(error, GatedRepoError):
            raise _explain(error, name) from error
        names = _cached_names(name, error, suffixes)
    except Exception as error:
        names = _cached_names(name, error, suffixes)
    splits = find_splits(names, name, choose_format=True, suffixes=suffixes)
    if not splits:
        files = [file for file in names if suffix_of(file, suffixes) is not None]
        if len(files) != 1:
            raise RequestError(
                f"The data set {name} has no files for train, valid or test among its {len(files)} of "
                f"{', '.join(suffixes)}; download what you need and give a folder."
            )
        splits = {"all": files}
    wanted = [_literally(file) for files in splits.values() for file in files]
    try:
        with Transfer(f"datasets/{name}") as transfer:
            bars = snapshot_bars(transfer, name, repo_type="dataset", revision=None, allow=wanted, ignore=[])
            folder = snapshot_download(name, repo_type="dataset", allow_patterns=wanted, tqdm_class=bars)
    except Exception as error:
        raise _explain(error, name, exists=True) from error
    return {split: [Path(folder, file) for file in files] for split, files in splits.items()}


def _cached_names(name: str, reason: Exception, suffixes: Sequence[str]) -> list[str]:
    """The data files in the cache, when the hub cannot be reached; without any, raises `reason`, explained."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, repo_type="dataset", local_files_only=True)
    except IncompleteSnapshotError as error:  # other files of the repository are missing, but they are not needed
        folder = error.snapshot_path
    except LocalEntryNotFoundError as error:
        error.__cause__ = reason
        raise _explain(error, name) from reason
    files = (file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())
    return [file for file in files if suffix_of(file, suffixes) is not None]


def _literally(file: str) -> str:
    """A pattern that matches only this file name."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in file)


def _explain(error: Exception, name: str, *, exists: bool = False) -> OpenELMError:
    """The error to raise; unless the data set is known to exist, its name may be a mistyped folder."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, HFValidationError):
        return RequestError(
            f"{quote(name)} is neither a local file or folder nor a valid name of a data set (owner/name)."
        )
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return RequestError(
            f"There is no file or folder {name} here, and no data set of that name on the hub; "
            "a private one needs `hf auth login`"
        )
    found = explain_download(error, f"datasets/{name}", None, offline.data_set(name))
    if exists or isinstance(error, GatedRepoError):
        return found
    return type(found)(f"There is no file or folder {name} here, and {found}")
