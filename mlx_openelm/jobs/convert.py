"""Convert a model to a folder that mlx-openelm and mlx-lm read (`mlx-openelm convert`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import RequestError
from ..formats import atomic
from ..formats.mlx import Checkpoint
from ..formats.packing import cast_weights, dequantize_weights, quantize_weights
from ..loading import check_dtype, dtype_for
from ..publishing.command_line import command_line, source_flags
from ..quantization.recipes import Packing
from ..sources import open_source
from .writing import write_folder


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote: the folder, its bits per parameter, and the matrices packed differently from the rest."""

    path: Path
    bits_per_weight: float
    exceptions: dict[str, str]


def convert(
    model: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    dtype: str | None = None,
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
    progress: Callable[[int, int], None] | bool | None = True,
) -> Conversion:
    """Write a model as an MLX folder, which appears complete or not at all.

    Args:
        model: an alias, a hub name, a folder, a CoreNet checkpoint (`.pt`), a `.gguf` file, or `corenet:SIZE/NAME`.
        dtype: the type of tensors that are not quantized; bfloat16 by default. Scales and biases always have 16 bits.
        quantize: quantize every matrix; q_bits and q_group_size default to the mode's (affine: 4 and 64).
        recipe: more bits for some matrices than for others, in place of q_bits: mixed_2_6, mixed_3_4, mixed_3_6
            or mixed_4_6.
        dequantize: unpack a quantized model.
        tokenizer: a tokenizer file or folder, in place of the model's own.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        revision: a branch, tag or commit on the hub.
        overwrite: replace `mlx_path` if it exists.
        progress: called with the bytes written so far and in all; by default they are shown, with None or False not.

    Raises:
        RequestError: an invalid request; nothing was written.
        OpenELMError: a download or writing failed; nothing was left behind.
    """
    packing = Packing(quantize, q_bits, q_group_size, q_mode, recipe, dequantize, dtype)
    check_dtype(model, dtype)
    target = atomic.check_target(Path(mlx_path), overwrite=overwrite)

    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    atomic.keep_apart(target, source.path, "the model to convert")

    checkpoint = source.checkpoint
    exceptions = requantize(checkpoint, packing)
    bits = checkpoint.bits_per_weight

    command = command_line(
        "convert",
        {
            "model": str(model),
            "mlx_path": Path(mlx_path),
            **packing.flags(),
            **source_flags(tokenizer, config_yaml, revision),
        },
    )
    write_folder(source, target, command=command, overwrite=overwrite, progress=progress, card={"recipe": recipe})
    return Conversion(target, bits, exceptions)


def requantize(checkpoint: Checkpoint, packing: Packing) -> dict[str, str]:
    """Cast, pack or unpack the checkpoint's unread weights in place.

    Args:
        packing: how to store matrices. Without `quantize` and `dequantize` they stay as they are, packed or full.
            Tensors that are not packed are cast to its `dtype`, bfloat16 by default.

    Returns:
        Descriptions of matrices packed differently from the rest, by module path.

    Raises:
        RequestError: the model is already quantized, or there is nothing to dequantize.
    """
    dtype = dtype_for(packing.dtype, checkpoint.config) or mx.bfloat16
    if packing.quantize and checkpoint.rounding is not None:
        raise RequestError(
            f"The model is already quantized to {checkpoint.rounding}; convert the original, or unpack it into a "
            f"folder first{', with --dequantize' if checkpoint.quantization else ', without -q'}."
        )
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
