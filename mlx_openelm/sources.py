"""A model from anywhere: hub names, folders, CoreNet's checkpoints and its MLX port, GGUF files."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from .config import SIZES, ModelConfig
from .errors import OpenELMError, RequestError, name_options, quote
from .formats import mlx as mlx_format
from .formats.mlx import Checkpoint
from .hub import catalog
from .inputs import check_file, read_json, to_path
from .text.tokenizer import ENGINES, Tokenizer

_CORENET_SUFFIXES = (".pt", ".pth")
_FILE_SUFFIXES = (*_CORENET_SUFFIXES, ".gguf")
_OUT_OF_MEMORY = re.compile("alloc|out of memory", re.IGNORECASE)  # MLX raises a RuntimeError then, too
# The files of a folder that a model is read from.
_READ_SUFFIXES = (".safetensors", ".json", ".model", ".jinja")

# Size, modification time in nanoseconds, and inode: one of them differs once a file was written to or replaced.
Stamp = tuple[int, int, int]


@dataclass
class Source:
    """A model from anywhere: unread weights, tokenizer, and where both came from."""

    name: str  # what the user typed
    path: Path  # the folder or file it was read from, absolute: the working directory may change
    checkpoint: Checkpoint  # config, unread weights by Hugging Face name, quantization
    tokenizer: Tokenizer
    repo: str | None  # the hub repository it came from; None for a local model
    config: ModelConfig  # as it was opened; `checkpoint` may be replaced by a changed one
    stamps: dict[Path, Stamp | None] = field(default_factory=dict, repr=False)  # the state of its files when opened

    @functools.cached_property
    def release(self) -> catalog.Release | None:
        """The published model that this is, if any."""
        return find_release(self.name, self.path, self.config)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A block in which the weights are evaluated; leave it before anything made from them is put in place.

        Raises:
            OpenELMError: a file cannot be read, or was written to, replaced or removed since the model was opened.
        """
        failure = None
        try:
            yield
        except RuntimeError as error:  # MLX's, for a file that it cannot read
            # Neither a mistake in the program nor a lack of memory says anything about the files.
            if isinstance(error, NotImplementedError | RecursionError) or _OUT_OF_MEMORY.search(str(error)):
                raise
            failure = " ".join(str(error).split())
        now = _stamps(*self.stamps)
        changed = next((path for path, stamp in self.stamps.items() if now[path] != stamp), None)
        if changed is not None:
            raise OpenELMError(
                f"{changed} was changed while it was being read; run again when no other program writes to it."
            )
        if failure is not None:
            raise OpenELMError(
                f"Reading the weights of {self.name} failed ({failure}); the disk may be failing, or a file is damaged."
            )


def open_source(
    model: str | Path,
    *,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
) -> Source:
    """Open the model that `model` names. Headers are checked; no weight is read yet.

    Args:
        model: `tiny`, an alias, a hub name, a folder (in the layout of Hugging Face, MLX or CoreNet's MLX port), a
            CoreNet checkpoint (`.pt`), a `.gguf` file, or `corenet:SIZE/NAME`, which is downloaded.
        tokenizer: a tokenizer file or folder, or `tiny`, in place of the model's own.
        config_yaml: the training configuration of a CoreNet checkpoint; not needed for published sizes.
        revision: a branch, tag or commit on the hub.

    Raises:
        RequestError: an unknown name, damaged files, or files or a tokenizer that are missing or do not match.
        OpenELMError: a download that failed.
    """
    # A model inside the package needs no look-up, unless a local folder of the same name overrides it.
    packaged = catalog.PACKAGED.get(model) if isinstance(model, str) and revision is None else None
    if packaged is not None and (packaged / "config.json").is_file() and not os.path.isfile(f"{model}/config.json"):
        path, repo = packaged, None
    else:
        path, repo = _find(model, revision)
    is_folder = path.is_dir()
    if config_yaml is not None and (is_folder or path.suffix.lower() == ".gguf"):
        refuse_yaml(model, config_yaml)
    if is_port(path) or (not is_folder and path.suffix.lower() != ".gguf"):
        return _open_corenet(model, path, tokenizer, config_yaml, repo)
    stamps = _stamps(path.absolute())
    if is_folder:
        checkpoint, own_tokenizer = mlx_format.read(path), None
    else:
        from .formats import gguf

        checkpoint, own_tokenizer = gguf.read(path)
    if own_tokenizer is None or tokenizer is not None:
        own_tokenizer = find_tokenizer(model, path, checkpoint.config, tokenizer)
    return Source(str(model), path.absolute(), checkpoint, own_tokenizer, repo, checkpoint.config, stamps)


def refuse_yaml(model: str | Path, config_yaml: str | Path | None) -> None:
    """Refuse the training configuration of a CoreNet checkpoint for another kind of model."""
    if config_yaml is not None:
        raise RequestError(f"--config-yaml belongs to CoreNet's .pt files; {model} brings its own configuration.")


def is_port(folder: Path) -> bool:
    """Whether a folder is CoreNet's MLX port, which names its model in config.json instead of giving its sizes."""
    return (folder / "weights.safetensors").is_file() and "model_name" in read_json(folder / "config.json")


def _find(model: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The folder or file of a model, downloaded if necessary, and the hub repository it came from, if any.

    Raises:
        RequestError: an unknown name, or a revision of something that is not a hub repository.
        OpenELMError: a download that failed.
    """
    local = to_path(model)
    if catalog.corenet_name(model) is not None:
        check_revision(model, revision)
        return _download_corenet(str(model)), None
    if (file := find_file(model, revision)) is not None:
        return file, None
    if revision is None and str(model).strip() and os.path.isfile(local / "config.json"):
        return local, None
    from .hub import resolve

    return resolve.resolve(model, revision=revision), resolve.source_repo(model)


def find_file(model: str | Path, revision: str | None = None) -> Path | None:
    """The `.pt` or `.gguf` file that `model` names, or None if it names something else.

    Raises:
        RequestError: it does not exist, is no regular file, or a revision is given.
    """
    local = to_path(model)
    if local.suffix.lower() not in _FILE_SUFFIXES or os.path.isdir(local):
        return None
    check_revision(model, revision)
    if not os.path.exists(local):  # unlike Path.exists, does not raise in a folder without permission
        raise RequestError(f"The file {model} does not exist")
    check_file(local)
    return local


def check_revision(model: str | Path, revision: str | None) -> None:
    """Refuse a revision of something that is not a hub repository."""
    if revision is not None:
        raise RequestError(
            f"{model} is not a hub repository, so it has no revision {quote(revision)}: leave the revision out."
        )


def check_corenet_model(name: str) -> None:
    """Refuse a name `corenet:SIZE/NAME` that was never published, or that means an adapter."""
    if catalog.corenet_files(name.strip())[0].startswith("peft/"):
        raise RequestError(f"{name} is an adapter: give it with --adapter-path, and its base model with --model.")


def _download_corenet(name: str) -> Path:
    """The file or folder of `corenet:SIZE/NAME`, downloaded; RequestError for an adapter."""
    from .hub import corenet

    check_corenet_model(name)
    return corenet.download(name.strip())


def _open_corenet(
    model: str | Path, path: Path, tokenizer: str | Path | None, config_yaml: str | Path | None, repo: str | None
) -> Source:
    """A checkpoint or a folder of the port. Their vocabulary is padded; the tokenizer gives its real size."""
    from .formats import corenet

    yaml_file = None if config_yaml is None else to_path(config_yaml)
    stamps = _stamps(*(file.absolute() for file in (path, yaml_file) if file is not None))
    checkpoint, vocab_size = corenet.read_port(path) if path.is_dir() else corenet.read(path, yaml_file)
    unpadded, padded_size = replace(checkpoint.config, vocab_size=vocab_size), checkpoint.config.vocab_size
    found = find_tokenizer(model, path, unpadded, tokenizer, rows=padded_size)
    if found.vocab_size < vocab_size < padded_size:
        warnings.warn(
            name_options(
                f"The configuration has {vocab_size} tokens (padding_index) but the tokenizer has {found.vocab_size}; "
                "the rows beyond them are dropped. If this is not the model's own tokenizer, give that one with "
                "--tokenizer."
            ),
            stacklevel=3,
        )
    corenet.cut_vocabulary(checkpoint, found.vocab_size)
    source = Source(str(model), path.absolute(), checkpoint, found, repo, unpadded, stamps)
    # Apple published the average of the last checkpoints on the hub, and made the port from it.
    is_average = path.is_dir() or path.stem == "checkpoint_average"
    if catalog.corenet_name(model) is not None and source.release is not None and is_average:
        source.repo = source.release.hub_repo
    return source


def find_tokenizer(
    model: str | Path,
    path: Path,
    config: ModelConfig,
    named: str | Path | None = None,
    *,
    rows: int | None = None,
) -> Tokenizer:
    """The tokenizer the user named, else the one in or beside `path`, else, for published models, their shared one.

    Args:
        rows: the largest vocabulary that the model supports; by default the configuration's `vocab_size`.

    Raises:
        RequestError: there is no tokenizer, or it does not match the model.
        OpenELMError: a download that failed.
    """
    rows = config.vocab_size if rows is None else rows
    folder = path if path.is_dir() else path.parent
    beside = next((folder / name for name in ENGINES if (folder / name).exists()), None)
    if named is not None:
        tokenizer = named_tokenizer(named, eos_token_ids=config.eos_token_ids, rows=rows)
    elif beside is not None:
        if path.is_dir():
            tokenizer = Tokenizer.from_folder(folder, rows=rows)
        else:  # other files beside a checkpoint may belong to another model
            tokenizer = Tokenizer.from_file(beside, eos_token_ids=config.eos_token_ids, rows=rows)
    else:
        from .text import shared_tokenizer

        if (release := find_release(model, path, config)) is None:
            where = f"in {folder}" if path.is_dir() else f"beside {path}"
            raise RequestError(
                f"No tokenizer.json or tokenizer.model {where}; {tokenizer_advice(path, config)}, "
                "or give a copy with --tokenizer."
            )
        tokenizer = shared_tokenizer.find(release, eos_token_ids=config.eos_token_ids)
    if tokenizer.vocab_size > rows:
        raise RequestError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the model only {rows}; "
            "give the model's own with --tokenizer."
        )
    return tokenizer


def named_tokenizer(
    named: str | Path, *, eos_token_ids: Collection[int] | None = None, rows: int | None = None
) -> Tokenizer:
    """The tokenizer of a file, a folder, or a model inside the package, unless a local folder overrides its name.

    Args:
        eos_token_ids, rows: as in `Tokenizer.from_folder`.

    Raises:
        RequestError: there is no tokenizer, or it is damaged.
    """
    path = to_path(named)
    packaged = catalog.PACKAGED.get(str(named).strip())
    if packaged is not None and not any((path / name).is_file() for name in ENGINES):
        path = packaged
    return Tokenizer.from_file(path, eos_token_ids=eos_token_ids, rows=rows)


def tokenizer_advice(path: Path, config: ModelConfig) -> str:
    """How to put a tokenizer where it is looked for, for a model without one, whose folder or file is `path`."""
    from .hub import offline
    from .text import shared_tokenizer

    folder = path if path.is_dir() else path.parent
    if config.vocab_size < shared_tokenizer.LLAMA2.vocab_size:  # the model's tokenizer is another
        return "copy the one it was trained with there"
    return f"OpenELM's is Llama 2's: run {offline.tokenizer_command(str(folder))}"


def find_release(model: str | Path, path: Path, config: ModelConfig) -> catalog.Release | None:
    """The published model that this is, by its name, the name of its folder or file, or its sizes."""
    names = [str(model), path.resolve().name, Path(model).name]
    if path.is_file():
        names.append(path.stem)
    found = next((release for name in names if (release := catalog.find(name)) is not None), None)
    if found is not None or (config.num_transformer_layers, config.model_dim, config.head_dim) not in SIZES.values():
        return found
    same_size = (
        r for r in catalog.releases() if ModelConfig.from_name(r.name).tensor_shapes() == config.tensor_shapes()
    )
    return next(same_size, None)


def _stamps(*paths: Path) -> dict[Path, Stamp | None]:
    """The state of files, and of the files in a folder that a model is read from; None for one that does not exist."""
    stamps: dict[Path, Stamp | None] = {}
    for path in paths:
        entries = [e for e in path.iterdir() if e.suffix in _READ_SUFFIXES and e.is_file()] if path.is_dir() else [path]
        for entry in entries:
            try:
                status = entry.stat()
                stamps[entry] = status.st_size, status.st_mtime_ns, status.st_ino
            except OSError:
                stamps[entry] = None
    return stamps
