"""`mlx-openelm upload`: publish a model folder on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import console
from ..hub import offline
from ..publishing.files import CARD
from ..publishing.upload import Upload, UploadOptions, publish
from ..wording import counted, size
from . import flags

MAIN_FLAGS = ("--path", "--upload-repo", "--private", "--dry-run", "--json")
EXAMPLES = """\
  mlx-openelm upload --path OpenELM-270M-4bit --upload-repo me/OpenELM-270M-4bit --dry-run"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `upload` to its parser."""
    common = parser.groups["Common flags"]
    common.add_argument("--path", required=True, metavar="PATH", help="Model folder, or .gguf file, to upload.")
    flags.add_shared(common, "--json")
    flags.add_fields(parser, UploadOptions)


def run(args: Namespace) -> int:
    """Publish a model folder on the Hugging Face Hub, with a model card.

    Only the files of the model are sent. A card of your own (README.md) is sent as it is.
    """
    show(publish(args.path, UploadOptions(**flags.given(args, UploadOptions))), as_json=args.json)
    return 0


@contextlib.contextmanager
def output_folder(path: Path, options: UploadOptions) -> Iterator[Path]:
    """The folder that a command writes its output `path` into.

    For a dry run that is a temporary one beside it, which is removed, and nothing is downloaded in the block.
    """
    if not options.dry_run:
        yield path.parent
        return
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    with (
        tempfile.TemporaryDirectory(prefix=f".{path.name}.dry-run-", dir=place) as folder,
        offline.no_network("--dry-run downloads nothing"),
    ):
        yield Path(folder)


def wrote(options: UploadOptions) -> str:
    """The verb for what a command reports to have written."""
    return "Would write" if options.dry_run else "Wrote"


def publish_written(written: Path, options: UploadOptions, path: Path, **card: Any) -> Upload | None:
    """Publish what a command wrote, if that was asked for.

    Args:
        path: the output's own path, which differs from `written` in a dry run.
        card: further arguments of `publishing.publish`.
    """
    if options.upload_repo is None:
        return None
    return replace(publish(written, options, **card), path=path)


def show(done: Upload, *, as_json: bool = False) -> None:
    """Print what was sent and where it is, or what would be sent."""
    if as_json:
        console.print_json(to_json(done))
    elif done.url is not None:
        if all(file.name != CARD for file in done.files):
            console.print_line("The README.md in the repository was written or edited by a person, so it was kept.")
        console.print_line(f"Uploaded {counted(len(done.files), 'file')}, {size(done.size)}: {done.url}")
    else:
        console.print_line("\n".join(_plan_lines(done)))


def to_json(done: Upload) -> dict[str, Any]:
    """What was sent, or would be sent, as JSON values."""
    return {
        "path": str(done.path),
        "repo": done.repo,
        "private": done.private,
        "revision": done.revision,
        "commit_message": done.commit_message,
        "files": [{"name": file.name, "size": file.size} for file in done.files],
        "size": done.size,
        "left_out": list(done.left_out),
        "card": done.card,
        "own_card": done.own_card,
        "removes": list(done.removes),
        "url": done.url,
    }


def _plan_lines(plan: Upload) -> list[str]:
    owner = "" if "/" in plan.repo else " (of the token's owner)"
    visibility = "private" if plan.private else "public if it is new; an existing repository keeps its visibility"
    width = max(len(file.name) for file in plan.files)
    card = "yours, as it is" if plan.own_card else "written for this model"
    weights = f"removed if their names match {' or '.join(plan.removes)}" if plan.removes else "kept"
    theirs = "replaced by yours" if plan.own_card else "kept, and this one not sent, if a person wrote or edited it"
    return [
        f"Would upload {plan.path}; nothing was sent.",
        f"  repository      {plan.repo}{owner}",
        f"  visibility      {visibility}",
        f"  revision        {plan.revision}",
        f"  commit message  {plan.commit_message}",
        *(f"  {file.name:{width}}  {size(file.size):>9}" for file in plan.files),
        f"  {counted(len(plan.files), 'file')}, {size(plan.size)}",
        *([f"Not sent: {', '.join(plan.left_out)}"] if plan.left_out else []),
        "The hub was not contacted. In an existing repository files with these names are replaced. Its other files:",
        f"  older weights   {weights}",
        f"  README.md       {theirs}",
        "  anything else   kept",
        f"README.md ({card}):",
        "",
        plan.card.rstrip(),
    ]
