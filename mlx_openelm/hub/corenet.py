"""Downloading CoreNet's files from Apple's web server: `corenet:SIZE/NAME`.

They are not on the hub, so they have a cache of their own: `~/.cache/mlx-openelm`, or the folder that XDG_CACHE_HOME or
MLX_OPENELM_CACHE names. MLX_OPENELM_CORENET_URL names a mirror.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, RequestError
from ..inputs import to_path
from . import catalog, offline
from .progress import Transfer

URL_VARIABLE = "MLX_OPENELM_CORENET_URL"
CACHE_VARIABLE = "MLX_OPENELM_CACHE"

# A transfer that breaks off resumes where it stopped: the number of attempts, and the pause between them in seconds.
_ATTEMPTS = 4
_PAUSE = 1.0
_TIMEOUT = 30.0


def download(name: str) -> Path:
    """The checkpoint file, or the folder of CoreNet's MLX port, that `corenet:SIZE/NAME` means.

    Files that were downloaded before are not requested again; an interrupted download resumes.

    Raises:
        RequestError: a size or name that was never published, or that the server does not have.
        OpenELMError: the network, the server or the disk failed.
    """
    for part in catalog.corenet_files(name):
        path = cache_folder() / "corenet" / part
        if not path.is_file():
            _fetch(name, part, path)
    folder_or_file = cached(name)
    assert folder_or_file is not None
    return folder_or_file


def cached(name: str) -> Path | None:
    """What `download` returns, if it was downloaded before; else None. Makes no network request."""
    paths = [cache_folder() / "corenet" / path for path in catalog.corenet_files(name)]
    if not all(path.is_file() for path in paths):
        return None
    return paths[0] if len(paths) == 1 else paths[0].parent


def cache_folder() -> Path:
    """The folder for downloads that are not from the hub."""
    if named := os.environ.get(CACHE_VARIABLE):
        return to_path(named)
    return to_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlx-openelm"


def _fetch(name: str, part: str, path: Path) -> None:
    """Download one file to `path`, where it appears complete or not at all."""
    import httpx2 as httpx  # the HTTP client of huggingface_hub 2
    from filelock import FileLock
    from huggingface_hub import constants

    url = f"{os.environ.get(URL_VARIABLE) or catalog.CORENET_URL}".rstrip("/") + f"/{part}"
    absent = f"{name} is not in the download cache"
    if (reason := offline.denied()) is not None:
        raise OpenELMError(f"{reason} and {absent}: {offline.corenet(name)}")
    if constants.HF_HUB_OFFLINE:
        raise OpenELMError(f"HF_HUB_OFFLINE is set and {absent}: unset it and connect once, or {offline.corenet(name)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # If two processes want the same file, the second finds it complete.
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file():
                return
            with Transfer(name if path.suffix == ".pt" else f"{name}, {path.name}") as progress:
                for attempt in range(1, _ATTEMPTS + 1):
                    try:
                        _transfer(httpx, url, name, path, progress)
                        break
                    except httpx.TransportError as error:
                        if attempt == _ATTEMPTS or isinstance(error, httpx.UnsupportedProtocol | httpx.ConnectError):
                            raise
                        time.sleep(_PAUSE)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise RequestError(f"{URL_VARIABLE} must be a whole address, like {catalog.CORENET_URL}.") from None
    except httpx.ConnectError:
        raise OpenELMError(
            f"Cannot reach {_host(url)} and {absent}: connect once, set {URL_VARIABLE} to a mirror, "
            f"or {offline.corenet(name)}"
        ) from None
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OpenELMError(
            f"The transfer of {name} broke off ({reason}): run the same command again; it resumes where it stopped."
        ) from None
    except OSError as error:
        raise _disk_error(error, name) from None


def _transfer(httpx: Any, url: str, name: str, path: Path, progress: Transfer) -> None:
    """One attempt: request the missing bytes, append them, and put the file in place once it is complete."""
    partial, tag_file = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.tag")
    tag = tag_file.read_text() if tag_file.is_file() and partial.is_file() else ""
    start = partial.stat().st_size if tag else 0
    # With If-Range a server whose file has changed sends the whole of the new one.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-", "If-Range": tag} if start else {})
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT) as answer:
        if answer.status_code == 416:  # nothing is missing, or the partial file belongs to another version
            partial.unlink(missing_ok=True)
            raise httpx.ReadError("the file on the server has changed")
        _check_status(answer.status_code, url, name)
        start = start if answer.status_code == 206 else 0
        length = int(answer.headers.get("Content-Length") or 0)
        total = start + length if length else 0
        progress.start(total or None, start)
        with partial.open("r+b" if start else "wb") as file:
            file.seek(start)
            # Only after the file was truncated: a new tag beside old bytes would mix two versions.
            tag_file.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
            for chunk in answer.iter_raw():  # as they arrive, so that a broken transfer keeps them
                file.write(chunk)
                progress.advance(len(chunk))
            size = file.tell()
    if total and size != total:
        raise httpx.ReadError(f"{size} of {total} bytes arrived")
    partial.replace(path)
    tag_file.unlink(missing_ok=True)


def _check_status(status: int, url: str, name: str) -> None:
    if status == 404:
        raise RequestError(f"{_host(url)} has no {name}: names look like corenet:270M/checkpoint_average.")
    if status >= 500:
        raise OpenELMError(f"{_host(url)} has a server error (HTTP {status}): try again later.")
    if status not in (200, 206):
        raise OpenELMError(f"{_host(url)} refused to send {name} (HTTP {status}).")


def _disk_error(error: OSError, name: str) -> OpenELMError:
    place = cache_folder()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OpenELMError(
            f"The disk is full; {name} does not fit. Free some space in {place}, or set {CACHE_VARIABLE} to a folder "
            "on another disk."
        )
    return OpenELMError(
        f"Cannot write to {place} ({error.strerror or error}): set {CACHE_VARIABLE} to a folder you own."
    )


def _host(url: str) -> str:
    """The server's host name; never the whole address, which can hold a password."""
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or url
