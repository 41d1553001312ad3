"""Convert a model to a folder that mlx-openelm and mlx-lm read (`mlx-openelm convert`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RequestError, command_or_call
from ..formats import atomic
from ..formats.mlx import Checkpoint
from ..formats.packing import cast_weights, dequantize_weights, quantize_weights
from ..hub import catalog
from ..inputs import to_path
from ..loading import check_dtype, dtype_for
from ..publishing.command_line import command_line, python_call, source_flags
from ..publishing.upload import Upload, UploadOptions, publish
from ..publishing.upload import check as check_upload
from ..quantization.recipes import Packing
from ..sources import Source, open_source
from .writing import write_folder


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote: the folder, its bits per parameter, the matrices packed differently from the rest, and what
    was uploaded, if anything."""

    path: Path
    bits_per_weight: float
    exceptions: dict[str, str]
    upload: Upload | None = None


def convert(
    model: str | Path | None = None,
    mlx_path: str | Path = "mlx_model",
    *,
    hf_path: str | Path | None = None,
    dtype: str | mx.Dtype | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    recipe: str | None = None,
    dequantize: bool = False,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    upload_repo: str | None = None,
    private: bool = False,
    progress: Callable[[int, int], None] | bool | None = True,
) -> Conversion:
    """Write a model as an MLX folder, which appears complete or not at all.

    Args:
        model: an alias, a hub name, a folder, a CoreNet checkpoint (`.pt`), a `.gguf` file, or `corenet:SIZE/NAME`.
        hf_path: mlx-lm's name for `model`.
        dtype: the type of tensors that are not quantized; bfloat16 by default. Scales and biases always have 16 bits.
        quantize: quantize every matrix; q_bits and q_group_size default to the mode's (affine: 4 and 64).
        recipe: more bits for some matrices than for others, in place of q_bits: mixed_2_6, mixed_3_4, mixed_3_6
            or mixed_4_6.
        dequantize: unpack a quantized model.
        tokenizer: a tokenizer file or folder, or `tiny`, in place of the model's own.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        revision: a branch, tag or commit on the hub.
        overwrite: replace `mlx_path` if it exists.
        upload_repo: a hub repository, as `owner/name`, to upload the folder to; it is created if it does not exist.
        private: create it as private.
        progress: called with the bytes written so far and in all; by default they are shown, with None or False not.

    Raises:
        RequestError: an invalid request; nothing was written.
        OpenELMError: a download or writing failed; nothing was left behind. Or the upload failed; the folder is kept.
    """
    if model is not None and hf_path is not None:
        raise RequestError("model and hf_path are two names for the same argument; give one of them.")
    if (model := hf_path if model is None else model) is None:
        raise RequestError("There is no model to convert; give its name or its folder.")
    upload = UploadOptions(upload_repo, private)
    check_upload(upload)
    dtype = check_dtype(model, dtype)
    packing = Packing(quantize, q_bits, q_group_size, q_mode, recipe, dequantize, dtype)
    target = atomic.check_target(Path(mlx_path), overwrite=overwrite)

    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    atomic.keep_apart(target, source.path, "the model to convert")

    checkpoint = source.checkpoint
    flags = {"model": str(model), "mlx_path": Path(mlx_path), **packing.flags()}
    opened_with = source_flags(tokenizer, config_yaml, revision)
    if quantize:
        check_unquantized(source, "convert", flags, opened_with)
    exceptions = requantize(checkpoint, packing)
    bits = checkpoint.bits_per_weight

    command = command_line("convert", flags | opened_with)
    write_folder(source, target, command=command, overwrite=overwrite, progress=progress, card={"recipe": recipe})
    sent = None if upload_repo is None else publish(target, upload)
    return Conversion(to_path(mlx_path), bits, exceptions, sent)


def check_unquantized(source: Source, command: str, flags: Mapping[str, Any], opened_with: Mapping[str, Any]) -> None:
    """Refuse to quantize a model again; the message gives the two commands, or calls, that do it from an unpacked copy.

    Args:
        command, flags: the command and its flags.
        opened_with: the flags that only opening the model needs.

    Raises:
        RequestError: the model is already quantized.
    """
    checkpoint = source.checkpoint
    if checkpoint.rounding is None:
        return
    path = to_path(source.name)
    copy = Path(f"{path.stem if path.is_file() else path.name}-unpacked")
    unpack = {"model": source.name, "dequantize": bool(checkpoint.quantization), "mlx_path": copy, **opened_with}
    again = {**flags, "model": copy}
    first, second = command_line("convert", unpack, whole_paths=True), command_line(command, again, whole_paths=True)
    steps = command_or_call(
        f"with two commands: `{first} && {second}`",
        f"with two calls: `{python_call('convert', unpack)}`, then `{python_call(command, again)}`",
    )
    # The models inside the package have no original to quantize instead.
    better = "" if source.path in catalog.PACKAGED.values() else "quantize the original, which loses less, or "
    raise RequestError(f"{source.name} is already quantized to {checkpoint.rounding}: {better}unpack it first, {steps}")


def requantize(checkpoint: Checkpoint, packing: Packing) -> dict[str, str]:
    """Cast, pack or unpack the checkpoint's unread weights in place.

    Args:
        packing: how to store matrices. Without `quantize` and `dequantize` they stay as they are, packed or full.
            Tensors that are not packed are cast to its `dtype`, bfloat16 by default.

    Returns:
        Descriptions of matrices packed differently from the rest, by module path.

    Raises:
        RequestError: there is nothing to dequantize.
    """
    dtype = dtype_for(packing.dtype, checkpoint.config) or mx.bfloat16
    packing.check(checkpoint)
    if packing.dequantize:
        unpack(checkpoint, dtype)
    checkpoint.weights = cast_weights(checkpoint.weights, checkpoint.quantization, dtype)
    if not packing.quantize:
        return {}
    checkpoint.quantization, exceptions = packing.plan(checkpoint.config)
    checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
    return exceptions


def unpack(checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
    """Dequantize the checkpoint's unread weights in place; its `rounded_to` keeps what they were quantized to."""
    checkpoint.weights = dequantize_weights(checkpoint.weights, checkpoint.quantization, dtype)
    checkpoint.rounded_to, checkpoint.quantization = checkpoint.rounding, {}
