"""Write models for other programs: Hugging Face folders for transformers, GGUF files for llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import console
from ..errors import RequestError, quote
from ..formats import atomic, gguf, huggingface
from ..formats.mlx import Checkpoint
from ..formats.packing import cast_weights
from ..hub import catalog
from ..inputs import to_path
from ..loading import check_dtype, dtype_for
from ..publishing.card import compose_card, write_card
from ..publishing.command_line import command_line, source_flags
from ..sources import Source, open_source
from .convert import unpack
from .writing import chat_template, origin_of

FORMATS = ("huggingface", "gguf")


@dataclass(frozen=True)
class Export:
    """What `export` wrote: the path, its bytes, its bits per parameter, and the matrices stored differently.

    A folder contains its model card and license. For a file, `card` gives the card's text for a repository's name, and
    `licenses` are the original's license files.
    """

    path: Path
    type: str  # of the weights: a GGUF type, or float32, float16 or bfloat16
    size: int
    bits_per_weight: float
    exceptions: dict[str, str] = field(default_factory=dict)
    card: Callable[[str], str] | None = field(default=None, repr=False)
    licenses: tuple[Path, ...] = ()


def export(
    model: str | Path,
    output: str | Path | None = None,
    *,
    format: str,
    gguf_type: str | None = None,
    dtype: str | mx.Dtype | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | bool | None = True,
    folder: Path = Path(),
) -> Export:
    """Write a model as a Hugging Face folder or a GGUF file, which appears complete or not at all.

    Args:
        model: as in `convert`; a quantized model is dequantized first.
        output: the folder or file to write; by default `NAME-hf`, or `NAME-TYPE.gguf`.
        format: huggingface or gguf.
        gguf_type: f32, f16, bf16, q8_0 or q4_0. By default f16; bf16 for the 3B model, because llama.cpp multiplies
            float16 matrices with float16 activations, and those of the 3B model exceed that type's range.
        dtype: the type of a Hugging Face folder's weights. By default the stored type; float32, which holds every
            value, for a model that is quantized or stored in several types.
        tokenizer: a tokenizer file or folder, or `tiny`, in place of the model's own.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        revision: a branch, tag or commit on the hub.
        overwrite: replace `output` if it exists.
        progress: called with the bytes written so far and in all; by default they are shown, with None or False not.
        folder: where to write if `output` is not given.

    Raises:
        RequestError: an invalid request; nothing was written.
        OpenELMError: a download, reading or writing failed; nothing was left behind.
    """
    dtype = check_dtype(model, dtype)
    _check_request(format, gguf_type, dtype)
    if output is not None:  # before a download that would be wasted
        check_output(Path(output), format, overwrite=overwrite)

    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)

    command = command_line(
        "export",
        {
            "model": str(model),
            "format": format,
            "output": None if output is None else Path(output),
            "gguf_type": gguf_type,
            "dtype": dtype,
            **source_flags(tokenizer, config_yaml, revision),
        },
    )
    if format == "gguf":
        chosen = gguf_type or ("f16" if source.checkpoint.config.fits_float16 else "bf16")
        path = folder / f"{_name(source)}-{chosen}.gguf" if output is None else to_path(output)
        return _export_gguf(source, path, chosen, command, overwrite=overwrite, progress=progress)
    path = folder / f"{_name(source)}-hf" if output is None else to_path(output)
    return _export_huggingface(source, path, dtype, command, overwrite=overwrite, progress=progress)


def _check_request(format: str, gguf_type: str | None, dtype: str | None) -> None:
    if format not in FORMATS:
        raise RequestError(f"--format must be one of {', '.join(FORMATS)}, got {quote(format)}.")
    if gguf_type is not None and format != "gguf":
        raise RequestError("--gguf-type needs --format gguf; for huggingface there is --dtype.")
    if gguf_type is not None and gguf_type not in gguf.FILE_TYPES:
        raise RequestError(f"--gguf-type must be one of {', '.join(gguf.FILE_TYPES)}, got {quote(gguf_type)}.")
    if dtype is not None and format != "huggingface":
        raise RequestError("--dtype needs --format huggingface; for gguf there is --gguf-type.")


def check_output(path: Path, format: str, *, overwrite: bool) -> Path:
    """The output with links resolved; RequestError if it cannot or must not be replaced."""
    target = Path(os.path.realpath(to_path(path)))
    if format == "huggingface":
        return atomic.check_target(path, overwrite=overwrite, flag="--output")
    if target.is_dir():
        raise RequestError(f"{target} is a folder; give a file with --output.")
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists; choose another --output, or replace it with --overwrite.")
    if target.exists() and not gguf.is_gguf(target):
        raise RequestError(f"{target} is not a GGUF file, so it will not be overwritten; choose another --output.")
    return target


def _export_gguf(
    source: Source,
    path: Path,
    chosen: str,
    command: str,
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | bool | None,
) -> Export:
    config, name = source.checkpoint.config, _name(source)
    gguf.check_representable(config, chosen)
    target = check_output(path, "gguf", overwrite=overwrite)
    atomic.keep_apart(target, source.path, "the model to export", "--output")

    origin, template = origin_of(source), chat_template(source)
    with atomic.new_file(target) as partial, source.reading(), console.writing(progress) as show:
        exceptions = gguf.write(
            partial, source.checkpoint, source.tokenizer, chosen, name=name, chat_template=template, progress=show
        )
    method = chosen if chosen.startswith("q") else None  # q8_0 and q4_0; the others are float types
    rounded_to = source.checkpoint.rounding

    def card(repo: str) -> str:
        facts: dict[str, Any] = {"command": command, "method": method, "config": config, "rounded_to": rounded_to}
        return compose_card(path, name=repo, origin=origin, **facts)

    bits = gguf.bits_per_weight(config, chosen)
    return Export(path, chosen, target.stat().st_size, bits, exceptions, card, origin.licenses)


def _export_huggingface(
    source: Source,
    path: Path,
    dtype: str | None,
    command: str,
    *,
    overwrite: bool,
    progress: Callable[[int, int], None] | bool | None,
) -> Export:
    checkpoint = source.checkpoint
    requested = dtype_for(dtype, checkpoint.config)
    target = check_output(path, "huggingface", overwrite=overwrite)
    atomic.keep_apart(target, source.path, "the model to export", "--output")

    _unify(checkpoint, requested)
    stored, bits = checkpoint.dtype, checkpoint.bits_per_weight
    origin, template = origin_of(source), chat_template(source)
    folder = atomic.new_folder(target, overwrite=overwrite, flag="--output")
    with folder as partial, source.reading(), console.writing(progress) as show:
        source.tokenizer.save(partial, chat_template=template)
        huggingface.write(partial, checkpoint, release=source.release, progress=show)
        facts: dict[str, Any] = {"command": command, "rounded_to": checkpoint.rounded_to}
        write_card(partial, name=target.name, origin=origin, **facts)
    size = sum(file.stat().st_size for file in target.iterdir())
    return Export(path, str(stored).removeprefix("mlx.core."), size, bits)


def _unify(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> None:
    """Dequantize and cast the checkpoint's unread weights in place, so that all have one type."""
    stored = {tensor.dtype for tensor in checkpoint.weights.tensors.values()}
    if dtype is None and not checkpoint.quantization and len(stored) == 1:
        return
    dtype = dtype or mx.float32
    unpack(checkpoint, dtype)
    checkpoint.weights = cast_weights(checkpoint.weights, {}, dtype)


def _name(source: Source) -> str:
    """The model's name for default file names: its release's, or the last part of its path or hub name."""
    path = to_path(source.name)
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    if (release := catalog.find(source.name)) is not None:
        return release.name
    if (published := catalog.corenet_name(source.name)) is not None:
        return "OpenELM-" + published.replace("/", "-")
    return path.name
