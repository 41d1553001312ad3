"""A model from anywhere: hub names, folders, CoreNet's checkpoints and its MLX port, GGUF files."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .config import ModelConfig
from .errors import OpenELMError, RequestError, quote
from .formats import mlx as mlx_format
from .formats.mlx import Checkpoint
from .hub import catalog
from .hub import resolve as hub
from .inputs import check_file, read_json, to_path
from .text import shared_tokenizer
from .text.tokenizer import ENGINES, Tokenizer

_CORENET_SUFFIXES = (".pt", ".pth")
_FILE_SUFFIXES = (*_CORENET_SUFFIXES, ".gguf")
# What a model is read from, among the files of its folder.
_READ_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")

# Size, time of the last change in nanoseconds, and inode: one of them differs once a file was written to or replaced.
Stamp = tuple[int, int, int]


@dataclass
class Source:
    """A model from anywhere: unread weights, tokenizer, and where both came from."""

    name: str  # what the user typed
    path: Path  # the folder or file it was read from
    checkpoint: Checkpoint  # config, unread weights by Hugging Face name, quantization
    tokenizer: Tokenizer
    repo: str | None  # the hub repository it stands for, None when local
    release: catalog.Release | None
    stamps: dict[Path, Stamp | None] = field(default_factory=dict, repr=False)  # its files as they were when opened

    def check_unchanged(self) -> None:
        """Ask after the last weight was read, and before anything made of them is put in place.

        Raises:
            OpenELMError: a file of the model was written to, replaced or removed since it was opened.
        """
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise OpenELMError(
                    f"{path} was changed while it was being read; run again when no other program writes to it."
                )

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A block in which the weights are evaluated: what MLX says of a file it cannot read becomes one line,
        and a file that changed meanwhile fails the block (see `check_unchanged`)."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, NotImplementedError | RecursionError):
                raise
            self.check_unchanged()
            reason = " ".join(str(error).split())
            raise OpenELMError(
                f"Reading the weights of {self.name} failed ({reason}); the disk may be failing, or a file is damaged."
            ) from None
        self.check_unchanged()


def open_source(
    model: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
) -> Source:
    """The model that `model` means. Headers are checked; no weight is read yet.

    Args:
        model: `tiny`, an alias, a hub name, a folder (Hugging Face's layout, MLX's, or that of CoreNet's MLX port),
            a CoreNet checkpoint (`.pt`), a `.gguf` file, or `corenet:SIZE/NAME`, which is downloaded.
        tokenizer: a tokenizer file or folder, in place of the model's own.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        revision: a branch, tag or commit on the hub.

    Raises:
        RequestError: unknown names, damaged or unfitting files, a tokenizer that is missing or does not fit.
        OpenELMError: a download that failed.
    """
    is_download = catalog.corenet_name(model) is not None
    file = None if is_download else _as_file(model)
    if revision is not None and (is_download or file is not None):
        raise RequestError(
            f"{model} is not a hub repository, so it has no revision {quote(revision)}: leave the revision out."
        )
    if file is not None and file.suffix.lower() == ".gguf":
        _refuse_yaml(model, config_yaml)
        return _open_gguf(model, file, tokenizer)
    repo = None
    if is_download:
        if catalog.corenet_files(str(model).strip())[0].startswith("peft/"):
            raise RequestError(f"{model} is an adapter: give it with --adapter-path, and its base model with --model.")
        from .hub import corenet as corenet_files

        path = corenet_files.download(str(model).strip())
    elif file is not None:
        path = file
    else:
        path, repo = hub.resolve(model, revision=revision), hub.source_repo(model)
    if path.is_file() or _is_port(path):
        source = _open_corenet(model, path, tokenizer, config_yaml, repo)
        # The average of the last checkpoints is what the hub has, and what the port was made from.
        if is_download and source.release is not None and (path.is_dir() or path.stem == "checkpoint_average"):
            source.repo = source.release.hub_repo
        return source
    _refuse_yaml(model, config_yaml)
    stamps = _stamps(path)
    checkpoint = mlx_format.read(path)
    text = find_tokenizer(model, path, checkpoint.config, tokenizer)
    return Source(str(model), path, checkpoint, text, repo, find_release(model, path, checkpoint.config), stamps)


def _open_gguf(model: str | Path, path: Path, tokenizer: str | Path | None) -> Source:
    from .formats import gguf

    stamps = _stamps(path)
    checkpoint, text = gguf.read(path)
    if tokenizer is not None:
        text = find_tokenizer(model, path, checkpoint.config, tokenizer)
    return Source(str(model), path, checkpoint, text, None, find_release(model, path, checkpoint.config), stamps)


def _open_corenet(
    model: str | Path, path: Path, tokenizer: str | Path | None, config_yaml: str | Path | None, repo: str | None
) -> Source:
    """A checkpoint or a folder of the port: their vocabulary is padded, and the tokenizer tells how far it goes."""
    from .formats import corenet

    if path.is_dir():
        _refuse_yaml(model, config_yaml)
    named = None if config_yaml is None else to_path(config_yaml)
    stamps = _stamps(path) | ({} if named is None else {named: _stamp(named)})
    checkpoint, pieces = corenet.read_port(path) if path.is_dir() else corenet.read(path, named)
    unpadded = replace(checkpoint.config, vocab_size=pieces)
    release = find_release(model, path, unpadded)
    text = find_tokenizer(model, path, unpadded, tokenizer, rows=checkpoint.config.vocab_size)
    if text.vocab_size < pieces < checkpoint.config.vocab_size:
        warnings.warn(
            f"The configuration has {pieces} tokens (padding_index) and the tokenizer has {text.vocab_size}; "
            "the rows beyond the tokenizer's are dropped. If it is not the model's own, name that with --tokenizer.",
            stacklevel=3,
        )
    corenet.cut_vocabulary(checkpoint, text.vocab_size)
    return Source(str(model), path, checkpoint, text, repo, release, stamps)


def _refuse_yaml(model: str | Path, config_yaml: str | Path | None) -> None:
    if config_yaml is not None:
        raise RequestError(f"--config-yaml belongs to CoreNet's .pt files; {model} brings its own configuration.")


def _as_file(model: str | Path) -> Path | None:
    """The file `model` names, where it has the ending of one that holds a model; it must exist."""
    path = to_path(model)
    if path.suffix.lower() not in _FILE_SUFFIXES or os.path.isdir(path):
        return None
    if not os.path.exists(path):  # which, unlike Path.exists, raises nothing where a folder may not be entered
        raise RequestError(f"the file {model} does not exist")
    check_file(path)
    return path


def _is_port(folder: Path) -> bool:
    """Whether a folder is one of CoreNet's MLX port, which names its model instead of spelling it out."""
    return (folder / "weights.safetensors").is_file() and "model_name" in read_json(folder / "config.json")


def find_tokenizer(
    model: str | Path,
    path: Path,
    config: ModelConfig,
    named: str | Path | None = None,
    *,
    rows: int | None = None,
) -> Tokenizer:
    """The tokenizer named by the user, else the one in or beside `path`, else for published models the one they share.

    Args:
        rows: how many tokens the model can take at most; by default the configuration's `vocab_size`.

    Raises:
        RequestError: none of them, or one that does not fit the model.
        OpenELMError: a download that failed.
    """
    rows = config.vocab_size if rows is None else rows
    folder = path if path.is_dir() else path.parent
    beside = next((folder / name for name in ENGINES if (folder / name).exists()), None)
    if named is not None:
        tokenizer = Tokenizer.from_file(to_path(named), eos_token_ids=config.eos_token_ids, rows=rows)
    elif beside is not None:
        if path.is_dir():
            tokenizer = Tokenizer.from_folder(folder, rows=rows)
        else:  # what else lies beside a file need not belong to it
            tokenizer = Tokenizer.from_file(beside, eos_token_ids=config.eos_token_ids, rows=rows)
    elif (release := find_release(model, path, config)) is not None:
        tokenizer = shared_tokenizer.find(release, eos_token_ids=config.eos_token_ids)
    else:
        raise RequestError(
            f"{folder} holds no tokenizer.json or tokenizer.model; give one with --tokenizer "
            f"(OpenELM uses Llama 2's; {shared_tokenizer.FALLBACK} has it)."
        )
    if tokenizer.vocab_size > rows:
        raise RequestError(
            f"The tokenizer has {tokenizer.vocab_size} pieces, the model only {rows}; "
            "give the one that belongs to it with --tokenizer."
        )
    return tokenizer


def find_release(model: str | Path, path: Path, config: ModelConfig) -> catalog.Release | None:
    """The published model this is, by its name, its folder's or file's name, or its sizes."""
    names = [str(model), path.resolve().name, Path(model).name]
    if path.is_file():
        names.append(path.stem)
    found = next((release for name in names if (release := catalog.find(name)) is not None), None)
    if found is not None:
        return found
    same_size = (
        r for r in catalog.releases() if ModelConfig.from_name(r.name).tensor_shapes() == config.tensor_shapes()
    )
    return next(same_size, None)


def _stamps(path: Path) -> dict[Path, Stamp | None]:
    """The files a model is read from, as they are now."""
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = (entry for entry in path.iterdir() if entry.suffix in _READ_SUFFIXES and entry.is_file())
    return {file: _stamp(file) for file in files}


def _stamp(path: Path) -> Stamp | None:
    """How a file is now; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
