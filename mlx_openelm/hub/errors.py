"""What went wrong with the Hugging Face Hub and what to do, in one line without addresses or tokens."""

from __future__ import annotations

import errno
import re
from typing import Any
from urllib.parse import urlsplit

from .. import wording
from ..errors import OpenELMError, RequestError, quote
from . import catalog, offline

# What must not be printed, and its replacement. Tokens of the hub are `hf_` and 34 letters and digits, older
# ones `api_` or `api_org_`; names like `hf_transfer` and `hf_hub_download`, in lower case, are not tokens.
_SHORTEST_SECRET = 8
_MAX_TEXT = 2000
_SECRETS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\w+://\S+", "the hub"),
        (r"\?[^\s'\"()]*=[^\s'\"()]*", "?..."),  # the end of an address, which can be signed
        (r"[^\s:/@'\"]+:[^\s/@'\"]+@(?=\w)", "...@"),  # name and password of a proxy
        (r"\bhf_(?:oauth_[\w.-]+|[A-Za-z0-9]{30,}|\w*[A-Z]\w*)", "hf_..."),
        (r"\bapi_(?:org_)?[A-Za-z0-9]{30,}", "api_..."),
        (r"\beyJ[\w-]+\.[\w.-]+", "..."),  # a JSON web token
        (r"(?i)\b(authorization\b\W{1,4}(?:basic|bearer|token)?|bearer)(\s+)[\w.~+/=-]{16,}", r"\1\2..."),
        (r"(?i)\b(\w*(?:token|password|secret|signature)(?:['\"]\s*:\s*|=)['\"]?)[^\s&,;'\")]+", r"\1..."),
    )
]

_NO_ADDRESS = "HF_ENDPOINT must be a whole address, like https://huggingface.co: correct or unset it"
_NO_HUB = "{} does not answer like a model hub: check HF_ENDPOINT and your proxy settings"
_NO_TOKEN_TEXT = "Your token has invalid characters: correct HF_TOKEN, or run `hf auth login`"
_BAD_TOKEN = "{} refuses your token: log in again with `hf auth login`, or correct HF_TOKEN"
_TOO_MANY = "{} limits your requests: wait a few minutes"
_BROKEN = "{} has a server error (HTTP {}): try again later"


def explain_download(error: Exception, repo: str, revision: str | None, advice: str) -> OpenELMError:
    """Why files of `repo` could not be downloaded; `advice` says how to get them without a network (see `offline`)."""
    from huggingface_hub import errors

    if not host():
        return RequestError(_NO_ADDRESS)
    # "Not in the cache" is raised from the reason why the hub could not be asked.
    is_absent = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if is_absent and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, errors.HFValidationError):
        return RequestError(
            f"{quote(repo)} is neither a local folder nor a valid hub repository name (owner/name){did_you_mean(repo)}"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return _explain_answer(cause, repo, revision)
    if isinstance(cause, errors.FileMetadataError):
        return OpenELMError(_NO_HUB.format(host()))
    if isinstance(cause, UnicodeEncodeError):  # a token goes into a header, which is ASCII
        return OpenELMError(_NO_TOKEN_TEXT)
    if is_absent:
        return _explain_absent(error, cause, repo, advice)
    if _is_disk_full(cause):
        return OpenELMError(
            f"The disk is full; {repo} does not fit. Free some space in {_cache_folder()}, "
            "or set HF_HOME to a folder on another disk"
        )
    if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OpenELMError(
            f"Cannot write to the download cache {_cache_folder()} ({cause.strerror}): set HF_HOME to a folder you own"
        )
    return OpenELMError(
        f"The transfer of {repo} from {host()} broke off ({_first_line(cause)}): "
        "run the same command again, completed files are kept"
    )


def is_absent(error: OpenELMError) -> bool:
    """Whether a download failed because the repository, or every file asked for, does not exist."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(cause, errors.GatedRepoError):  # which is a RepositoryNotFoundError, too
        return False
    return cause is None or isinstance(cause, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)


def is_refused(error: OpenELMError) -> bool:
    """Whether a download failed because access to this repository is restricted."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(cause, errors.LocalEntryNotFoundError):
        cause = cause.__cause__
    if isinstance(cause, errors.GatedRepoError):
        return True
    return isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code == 403


def _explain_answer(error: Any, repo: str, revision: str | None) -> OpenELMError:
    """The server refused a download."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return OpenELMError(
            f"{repo} is gated: accept its conditions at https://huggingface.co/{repo}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(
            f"There is no folder and no hub repository named {repo}{did_you_mean(repo)}; "
            "a private one needs `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{repo} has no revision {quote(revision)}: give a branch, a tag or a full commit hash")
    status = error.response.status_code
    if status == 401:
        return OpenELMError(_BAD_TOKEN.format(host()))
    if status == 403:
        return OpenELMError(f"{host()} refuses access to {repo}: your token may lack the permission to read it")
    if status == 429:
        return OpenELMError(f"{_TOO_MANY.format(host())}, or log in with `hf auth login`")
    if status >= 500:
        return OpenELMError(_BROKEN.format(host(), status))
    return OpenELMError(f"{host()} refused to send {repo} (HTTP {status})")


def _explain_absent(error: Exception, cause: Exception, repo: str, advice: str) -> OpenELMError:
    """The hub could not be asked, and the cache does not help."""
    from huggingface_hub import errors

    is_partial = hasattr(error, "snapshot_path")  # IncompleteSnapshotError, which older releases lack
    if is_partial:
        what = f"only a part of {repo} is in the download cache"
    elif catalog.find_repo(repo) is None and repo.count("/") == 1:  # the name may be a mistyped folder
        what = f"{repo} is neither a folder nor in the download cache"
    else:  # a release, or datasets/owner/name
        what = f"{repo} is not in the download cache"
    if (reason := offline.denied()) is not None:
        return OpenELMError(f"{reason} and {what}: {advice}")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return OpenELMError(f"HF_HUB_OFFLINE is set and {what}: unset it and connect once, or {advice}")
    why = f" ({_first_line(cause)})" if cause is not error else ""
    return OpenELMError(f"Cannot reach {host()}{why} and {what}: connect once, or {advice}")


def explain_upload(error: Exception, repo: str, *, sending: bool) -> OpenELMError:
    """Why nothing could be uploaded to `repo`; `sending` is whether files were already on their way."""
    from huggingface_hub import errors

    if not host():
        return RequestError(_NO_ADDRESS)
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        reason = " ".join(line.strip("- ") for line in str(error).splitlines()[1:])
        return RequestError(f"{host()} refuses the front matter of README.md ({_clean(reason)}): correct it")
    # What goes wrong in a thread that sends a file comes wrapped.
    causes = [error]
    while isinstance(causes[-1].__cause__, Exception):
        causes.append(causes[-1].__cause__)
    answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    if answer is not None:
        return _explain_refusal(answer, repo)
    if isinstance(error, UnicodeEncodeError):  # a token goes into a header, which is ASCII
        return OpenELMError(_NO_TOKEN_TEXT)
    if isinstance(error, ValueError | KeyError):  # an answer that is not JSON, or not the JSON of a hub
        return OpenELMError(_NO_HUB.format(host()))
    if sending:
        return OpenELMError(f"The transfer of {repo} to {host()} broke off ({_first_line(causes[-1])})")
    return OpenELMError(f"Cannot reach {host()} ({_first_line(causes[-1])}): check your network")


def _explain_refusal(error: Any, repo: str) -> OpenELMError:
    """The server refused an upload."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.RepositoryNotFoundError):
        return OpenELMError(
            f"{host()} has no repository {repo} that your token may write to: check the name, and the token's rights"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{repo} has no such revision: give the name of a branch")
    if status == 401:
        return OpenELMError(_BAD_TOKEN.format(host()))
    if status == 403:
        return OpenELMError(
            f"{host()} refuses your token to write to {repo}: use a name of yours or of an organization "
            "you may write to, and a token with write permission"
        )
    if status in (409, 412):
        return OpenELMError(f"{repo} was changed by someone else meanwhile: try again")
    if status == 429:
        return OpenELMError(_TOO_MANY.format(host()))
    if status >= 500:
        return OpenELMError(_BROKEN.format(host(), status))
    reason = f": {_clean(error.server_message)}" if error.server_message else ""
    return OpenELMError(f"{host()} refused the upload to {repo} (HTTP {status}){reason}")


def _is_disk_full(error: Exception) -> bool:
    # The transfer library in Rust raises no OSError; it passes on the text of the system.
    is_out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_out_of_space or "No space left on device" in str(error)


def _first_line(error: Exception) -> str:
    """The first line of another program's message, without addresses (they can be signed) and tokens."""
    lines = str(error).strip().splitlines()
    return _clean(lines[0].rstrip(".") if lines else type(error).__name__)


def _clean(text: str) -> str:
    """Another program's text without addresses and secrets, among them the token in use."""
    from huggingface_hub import get_token

    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT].rpartition(' ')[0]} …"  # a secret that was cut would not be known as one
    token = get_token()
    if token and len(token) >= _SHORTEST_SECRET:
        text = text.replace(token, "...")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def host() -> str:
    """The hub's host name; never the whole endpoint, which can hold a password."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or ""


def _cache_folder() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def did_you_mean(name: str) -> str:
    """` (did you mean ...?)`, or nothing if no published name is similar."""
    hint = wording.did_you_mean(name, [known for known in catalog.names() if known != name])
    return f" ({hint})" if hint else ""
