"""Uploading a model folder to the Hugging Face Hub; huggingface_hub does the transfers."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote as quote_url
from urllib.parse import urlsplit

from ..errors import OpenELMError, RequestError, quote
from ..formats import safetensors
from ..hub.errors import explain_upload, host
from ..inputs import to_path
from ..wording import flag
from . import card as model_card
from .files import CARD, leads_out, model_files

MAIN = "main"
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# Weights that a loader would take for a part of the model, were they left beside new ones.
_WEIGHTS = ("model*.safetensors", "weights*.safetensors", safetensors.INDEX)


@dataclass(frozen=True)
class UploadOptions:
    """Where and how to publish. Also the flags of every command that can."""

    upload_repo: str | None = None
    private: bool = False
    upload_revision: str | None = None
    commit_message: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class File:
    """A file to send: its name in the repository, its bytes, and where it lies (None: written for the upload)."""

    name: str
    size: int
    path: Path | None = None


@dataclass(frozen=True)
class Upload:
    """What is sent, or was. `url` is None for a dry run; `left_out` names what lies in the folder and is not sent.

    `removes` are patterns: what fits one in the repository, outside its folders, and is not sent is removed from it.
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


def check(options: UploadOptions) -> None:
    """Refuse what cannot be published, before work that would be in vain; asks the hub unless it is a dry run.

    Raises:
        RequestError: a name, revision or combination that cannot be right.
        OpenELMError: no token, one that may not write, no network, HF_HUB_OFFLINE.
    """
    if options.upload_repo is None:
        given = [name for name, value in vars(options).items() if value]
        if given:
            raise RequestError(f"{', '.join(map(flag, given))} needs --upload-repo: name the repository to upload to.")
        return
    repo = _checked_name(options.upload_repo)
    _checked_revision(options.upload_revision)
    if not options.dry_run:
        _ask(_whole_name(repo), options.private)


def publish(
    path: str | Path,
    options: UploadOptions,
    *,
    card: Callable[[str], str] | None = None,
    licenses: Sequence[Path] = (),
) -> Upload:
    """`upload` as the options say, which must name a repository."""
    if options.upload_repo is None:
        raise RequestError("--upload-repo is missing: name the repository to upload to, as owner/name.")
    return upload(
        path,
        options.upload_repo,
        private=options.private,
        revision=options.upload_revision,
        commit_message=options.commit_message,
        dry_run=options.dry_run,
        card=card,
        licenses=licenses,
    )


def upload(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    card: Callable[[str], str] | None = None,
    licenses: Sequence[Path] = (),
) -> Upload:
    """Publish a model folder, or a GGUF file, in one commit; nothing in the folder is changed.

    Args:
        repo: `owner/name`; a bare name belongs to the token's owner. It is made if it does not exist.
        private: make it private. One that exists keeps its visibility, and must be private already.
        revision: the branch, made from `main` if it does not exist.
        dry_run: only tell what would be sent. Makes no network request, needs no token.
        card, licenses: the card's text by the repository's name, and licence files, for a GGUF file, which has
            no folder to hold them.

    Raises:
        RequestError: a bad name, or a folder that is no model, is damaged, or links to files elsewhere.
        OpenELMError: no token, no network, a refusal, a broken transfer, or somebody else changed the repository
            meanwhile. The folder is kept.
    """
    path = to_path(path)
    repo, revision = _checked_name(repo), _checked_revision(revision)
    for file in licenses:
        if leads_out(file):
            raise RequestError(f"{file} is a link to a file outside its folder, which is not uploaded: copy it there.")

    def planned(repo: str) -> Upload:
        files = [*model_files(path), *licenses]
        written = model_card.for_upload(path, repo) if card is None else model_card.Card(card(repo), is_own=False)
        return _plan(path, repo, private, revision, commit_message, files, written)

    plan = planned(repo)
    if dry_run:
        return plan
    try:
        whole = _whole_name(repo)
        if whole != repo:  # the card names the repository
            plan = planned(whole)
        _ask(whole, private)
        return _send(plan)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {_kept(plan)}", file=sys.stderr, flush=True)
        raise
    except OpenELMError as error:
        raise type(error)(f"{str(error).rstrip('.')}. {_kept(plan)}") from error.__cause__


def _kept(plan: Upload) -> str:
    return (
        f"{plan.path} is kept; `mlx-openelm upload --path {plan.path} --upload-repo {plan.repo}` tries again "
        "and sends no large file twice."
    )


# The request


def _checked_name(name: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = name.strip()
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise RequestError(
            f"{quote(name)} is no valid name for a repository: give owner/name, in letters, digits, '-', '_' and '.'."
        ) from None
    return name


def _checked_revision(revision: str | None) -> str:
    """A branch's name. Commits cannot be added to, and the hub answers other names in ways nobody understands."""
    revision = MAIN if revision is None else revision.strip()
    is_name = re.fullmatch(r"\w[\w./-]*", revision) is not None and ".." not in revision
    if not is_name or revision.endswith(("/", ".lock")) or re.fullmatch(r"[0-9a-f]{40}", revision):
        raise RequestError(f"--upload-revision must be the name of a branch, got {quote(revision)}.")
    return revision


def _whole_name(repo: str) -> str:
    """`owner/name`; also the moment where a token is missed, or refused."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OpenELMError("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.")
    if get_token() is None:
        raise OpenELMError(f"Uploading needs a token that may write: {_LOG_IN}.")
    with _explaining(repo):
        user = HfApi().whoami()
        role = (user.get("auth", {}).get("accessToken") or {}).get("role")
        owner = user["name"]
    if role == "read":
        raise OpenELMError(f"Your token may only read: make one that may write, then {_LOG_IN}.")
    return repo if "/" in repo else f"{owner}/{repo}"


def _ask(repo: str, private: bool) -> None:
    """Refuse to publish what was to be private: a repository that exists keeps its visibility."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not private:
        return
    with _explaining(repo):
        try:
            is_public = not HfApi().model_info(repo).private
        except RepositoryNotFoundError:
            return
    if is_public:
        raise _public_error(repo)


def _public_error(repo: str) -> OpenELMError:
    return OpenELMError(
        f"{repo} exists and is public: make it private in its settings, or choose another --upload-repo."
    )


@contextlib.contextmanager
def _explaining(repo: str, *, sending: bool = False) -> Iterator[None]:
    try:
        yield
    except OpenELMError:
        raise
    # Everything, because the transfer library in Rust raises kinds of its own.
    except Exception as error:
        raise explain_upload(error, repo, sending=sending) from error


# The files


def _plan(
    path: Path,
    repo: str,
    private: bool,
    revision: str,
    message: str | None,
    files: Sequence[Path],
    card: model_card.Card,
) -> Upload:
    card_file = File(CARD, len(card.text.encode()), path / CARD if card.is_own else None)
    listed = [File(file.name, file.stat().st_size, file) for file in files]
    everything = sorted([*listed, card_file], key=lambda file: file.name)
    sent = {file.name for file in everything}
    entries = sorted(path.iterdir()) if path.is_dir() else []
    return Upload(
        path=path,
        repo=repo,
        private=private,
        revision=revision,
        commit_message=(message or "").strip() or "Upload with mlx-openelm",
        files=tuple(everything),
        left_out=tuple(entry.name + "/" * entry.is_dir() for entry in entries if entry.name not in sent),
        card=card.text,
        own_card=card.is_own,
        removes=_WEIGHTS if any(name.endswith(".safetensors") for name in sent) else (),
    )


# The transfer


def _send(plan: Upload) -> Upload:
    """Make the repository and the branch if need be, then commit every file at once."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _explaining(plan.repo):
        api.create_repo(plan.repo, private=plan.private or None, exist_ok=True)
        if plan.revision != MAIN and not plan.revision.startswith("refs/"):
            api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
        info = api.model_info(plan.repo, revision=plan.revision)
        if plan.private and not info.private:  # somebody else made it since we asked
            raise _public_error(plan.repo)
        there = [sibling.rfilename for sibling in info.siblings or ()]
        files = [file for file in plan.files if file.name != CARD or _takes_card(plan, there, info.sha)]
    operations: list[Any] = [CommitOperationAdd(file.name, _content(file, plan)) for file in files]
    names = {file.name for file in files}
    stale = [name for name in there if name not in names and any(fnmatch(name, weights) for weights in plan.removes)]
    # fnmatch lets `*` stand for folders too, and what lies in those is not the model's.
    operations += [CommitOperationDelete(name) for name in stale if "/" not in name]
    with _explaining(plan.repo, sending=True), _showing(plan):
        # With its parent: what was decided from the list of files holds for that commit alone.
        api.create_commit(
            plan.repo,
            operations,
            commit_message=plan.commit_message,
            revision=plan.revision,
            parent_commit=info.sha,
        )
    return Upload(**{**vars(plan), "files": tuple(files), "url": _url(plan.repo, plan.revision)})


def _content(file: File, plan: Upload) -> str | bytes:
    return plan.card.encode() if file.path is None else str(file.path)


def _takes_card(plan: Upload, there: list[str], commit: str | None) -> bool:
    """Whether our card may be sent: one that a person wrote in the repository is never replaced by it."""
    from huggingface_hub import hf_hub_download

    if plan.own_card or CARD not in there:
        return True
    found = hf_hub_download(plan.repo, CARD, revision=commit)
    return model_card.may_replace(Path(found).read_text(encoding="utf-8-sig", errors="replace"))


@contextlib.contextmanager
def _showing(plan: Upload) -> Iterator[None]:
    """huggingface_hub's bars on a terminal, two plain lines elsewhere."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    print(f"Uploading {plan.path} to {plan.repo} ...", file=sys.stderr, flush=True)
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
    print(f"Uploaded {plan.repo}", file=sys.stderr, flush=True)


def _url(repo: str, revision: str) -> str:
    """Where to look at it; without a password that the endpoint may hold."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    port = f":{endpoint.port}" if endpoint.port else ""
    tree = "" if revision == MAIN else f"/tree/{quote_url(revision, safe='')}"
    return f"{endpoint.scheme}://{host()}{port}{endpoint.path.rstrip('/')}/{repo}{tree}"
