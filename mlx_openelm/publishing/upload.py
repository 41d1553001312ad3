"""Uploading a model folder to the Hugging Face Hub; huggingface_hub does the transfers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..errors import OpenELMError, RequestError, quote
from ..inputs import to_path
from ..messages import say
from ..options import Option, Options
from ..wording import flag
from .card import Card, card_for_upload
from .files import leads_out, model_files
from .plan import Upload, make_plan
from .transfer import MAIN, check_visibility, full_name, send


@dataclass(frozen=True, repr=False)
class UploadOptions(Options):
    """Where and how to publish: the flags of `upload`, and of every command that can upload what it writes."""

    upload_repo: Annotated[
        str | None,
        Option(
            "Upload to this hub repository, owner/name; created if it does not exist.",
            group="Upload",
            metavar="REPO",
        ),
    ] = None
    private: Annotated[
        bool, Option("Create the repository as private; an existing one must be private already.", group="Upload")
    ] = False
    upload_revision: Annotated[
        str | None,
        Option("Branch to upload to; created if it does not exist.", group="Upload", metavar="BRANCH", default=MAIN),
    ] = None
    commit_message: Annotated[str | None, Option("Message of the upload's commit.", group="Upload")] = None
    dry_run: Annotated[
        bool,
        Option("Show what would be uploaded; keep and send nothing, and do not contact the hub.", group="Upload"),
    ] = False


def check(options: UploadOptions) -> None:
    """Refuse what cannot be published before any long work; asks the hub unless it is a dry run.

    Raises:
        RequestError: an invalid name, revision or combination.
        OpenELMError: no token, a read-only token, no network, or HF_HUB_OFFLINE.
    """
    if options.upload_repo is None:
        given = [name for name, value in vars(options).items() if value]
        if given:
            raise RequestError(f"{', '.join(map(flag, given))} needs --upload-repo: name the repository to upload to.")
        return
    repo = _checked_name(options.upload_repo)
    _checked_revision(options.upload_revision)
    if not options.dry_run:
        check_visibility(full_name(repo), options.private)


def publish(
    path: str | Path,
    options: UploadOptions,
    *,
    card: Callable[[str], str] | None = None,
    licenses: Sequence[Path] = (),
) -> Upload:
    """`upload` with options, which must name a repository.

    Raises:
        RequestError: no repository, or as `upload`.
        OpenELMError: as `upload`.
    """
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
        repo: `owner/name`; a bare name belongs to the token's owner. It is created if it does not exist.
        private: create it as private. An existing repository keeps its visibility, and must be private already.
        revision: the branch, created from `main` if it does not exist.
        dry_run: only return what would be sent, without a network request or a token.
        card, licenses: for a GGUF file, which has no folder to hold them: a function from the repository's name to
            the card's text, and license files.

    Raises:
        RequestError: a bad name, or a folder that is not a model, is damaged, or links to files elsewhere.
        OpenELMError: no token, no network, a refusal, a broken transfer, or somebody else changed the repository
            meanwhile. The folder is kept.
    """
    path = to_path(path)
    repo, revision = _checked_name(repo), _checked_revision(revision)
    for file in licenses:
        if leads_out(file):
            raise RequestError(f"{file} is a link to a file outside its folder, which is not uploaded: copy it there.")

    def plan_for(repo: str) -> Upload:
        files = [*model_files(path), *licenses]
        written = card_for_upload(path, repo) if card is None else Card(card(repo), is_own=False)
        return make_plan(path, repo, private, revision, commit_message, files, written)

    plan = plan_for(repo)
    if dry_run:
        return plan
    try:
        full_repo = full_name(repo)
        if full_repo != repo:  # the card names the repository
            plan = plan_for(full_repo)
        check_visibility(full_repo, private)
        return send(plan)
    except KeyboardInterrupt:
        say(f"\nInterrupted. {_retry_advice(plan)}")
        raise
    except OpenELMError as error:
        raise type(error)(f"{str(error).rstrip('.')}. {_retry_advice(plan)}") from error.__cause__


def _retry_advice(plan: Upload) -> str:
    return (
        f"{plan.path} is kept; `mlx-openelm upload --path {plan.path} --upload-repo {plan.repo}` tries again "
        "and sends no large file twice."
    )


def _checked_name(name: str) -> str:
    """A repository's name without blanks around it; RequestError if it is not valid."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = name.strip()
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise RequestError(
            f"{quote(name)} is not a valid name for a repository: give owner/name, in letters, digits, '-', '_' "
            "and '.'."
        ) from None
    return name


def _checked_revision(revision: str | None) -> str:
    """A branch's name; RequestError for a commit, which cannot be added to, and for names the hub cannot handle."""
    revision = MAIN if revision is None else revision.strip()
    is_name = re.fullmatch(r"\w[\w./-]*", revision) is not None and ".." not in revision
    if not is_name or revision.endswith(("/", ".lock")) or re.fullmatch(r"[0-9a-f]{40}", revision):
        raise RequestError(f"--upload-revision must be the name of a branch, got {quote(revision)}.")
    return revision
