"""The requests of an upload: who the token belongs to, what the repository holds, and the commit itself."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote as quote_url
from urllib.parse import urlsplit

from ..errors import OpenELMError
from ..hub.errors import explain_upload, host
from ..messages import say
from .card import may_replace
from .files import CARD
from .plan import File, Upload

MAIN = "main"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def full_name(repo: str) -> str:
    """`owner/name`, where a bare name belongs to the token's owner.

    Raises:
        OpenELMError: offline, no token, a read-only token, or a hub that does not answer.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OpenELMError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.")
    if get_token() is None:
        raise OpenELMError(f"Uploading needs a token that may write: {_LOG_IN}.")
    with _explained(repo):
        user = HfApi().whoami()
        role = (user.get("auth", {}).get("accessToken") or {}).get("role")
        owner = user["name"]
    if role == "read":
        raise OpenELMError(f"Your token may only read: make one that may write, then {_LOG_IN}.")
    return repo if "/" in repo else f"{owner}/{repo}"


def check_visibility(repo: str, private: bool) -> None:
    """Refuse to upload as private to a repository that is public, since existing ones keep their visibility.

    Raises:
        OpenELMError: the repository is public, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not private:
        return
    with _explained(repo):
        try:
            is_public = not HfApi().model_info(repo).private
        except RepositoryNotFoundError:
            return
    if is_public:
        raise _public_error(repo)


def send(plan: Upload) -> Upload:
    """Create the repository and the branch if needed, then send every file in one commit.

    Raises:
        OpenELMError: a refusal, a broken transfer, or somebody else changed the repository meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _explained(plan.repo):
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        if plan.revision != MAIN and not plan.revision.startswith("refs/"):
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
        info = api.model_info(plan.repo, revision=plan.revision)
        if plan.private and not info.private:  # somebody else made it since `check_visibility`
            raise _public_error(plan.repo)
        present = [sibling.rfilename for sibling in info.siblings or ()]
        files = [file for file in plan.files if file.name != CARD or _sends_card(plan, present, info.sha)]
    operations: list[Any] = [CommitOperationAdd(file.name, _content(file, plan)) for file in files]
    names = {file.name for file in files}
    stale = [name for name in present if name not in names and any(fnmatch(name, weights) for weights in plan.removes)]
    # In fnmatch `*` matches folders too, but files in folders do not belong to the model.
    operations += [CommitOperationDelete(name) for name in stale if "/" not in name]
    with _explained(plan.repo, sending=True), _progress(plan):
        # The list of files was read at this parent, so the commit must follow it directly.
        api.create_commit(
            plan.repo,
            operations,
            commit_message=plan.commit_message,
            revision=plan.revision,
            parent_commit=info.sha,
        )
    return replace(plan, files=tuple(files), url=_url(plan.repo, plan.revision))


def _content(file: File, plan: Upload) -> str | bytes:
    return plan.card.encode() if file.path is None else str(file.path)


def _sends_card(plan: Upload, present: list[str], commit: str | None) -> bool:
    """Whether the card is sent: a generated one never replaces one that a person wrote in the repository."""
    from huggingface_hub import hf_hub_download

    if plan.own_card or CARD not in present:
        return True
    found = hf_hub_download(plan.repo, CARD, revision=commit)
    return may_replace(Path(found).read_text(encoding="utf-8-sig", errors="replace"))


def _public_error(repo: str) -> OpenELMError:
    return OpenELMError(
        f"{repo} exists and is public: make it private in its settings, or choose another --upload-repo."
    )


@contextlib.contextmanager
def _explained(repo: str, *, sending: bool = False) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    try:
        yield
    except OpenELMError:
        raise
    # Every exception, because the transfer library, which is written in Rust, raises its own kinds.
    except Exception as error:
        raise explain_upload(error, repo, sending=sending) from error


@contextlib.contextmanager
def _progress(plan: Upload) -> Iterator[None]:
    """huggingface_hub's progress bars on a terminal, two plain lines elsewhere."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    say(f"Uploading {plan.path} to {plan.repo} ...")
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
    say(f"Uploaded {plan.repo}")


def _url(repo: str, revision: str) -> str:
    """The address of the upload, without the password that an endpoint may contain."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    port = f":{endpoint.port}" if endpoint.port else ""
    tree = "" if revision == MAIN else f"/tree/{quote_url(revision, safe='')}"
    return f"{endpoint.scheme}://{host()}{port}{endpoint.path.rstrip('/')}/{repo}{tree}"
