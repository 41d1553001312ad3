"""Convert: from a name to a folder that mlx-openelm and mlx-lm read (`mlx-openelm convert`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RequestError
from ..formats import atomic
from ..formats import mlx as mlx_format
from ..formats.mlx import Checkpoint
from ..formats.packing import cast_weights, dequantize_weights, quantize_weights
from ..hub import catalog
from ..loading import check_dtype, dtype_for
from ..publishing import card as model_card
from ..publishing.card import Origin
from ..quantization.recipes import Packing
from ..sources import Source, open_source
from ..text.chat_template import CORENET_TEMPLATE


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote: where, how many bits a parameter takes, and matrices packed unlike the others."""

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
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a model as an MLX folder, which appears complete or not at all.

    Args:
        model: an alias, a hub name, a folder, a CoreNet checkpoint (`.pt`), a `.gguf` file, or `corenet:SIZE/NAME`.
        dtype: the type of what is not quantized; bfloat16 unless told. Scales and biases have 16 bits in any case.
        quantize: pack every matrix; q_bits and q_group_size default to the mode's (affine: 4 and 64).
        recipe: more bits for some matrices than for others, in place of q_bits: mixed_2_6, mixed_3_4, mixed_3_6
            or mixed_4_6.
        dequantize: unpack a quantized model.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        overwrite: replace `mlx_path` if it exists.
        progress: called with the bytes written so far and in all.

    Raises:
        RequestError: a request that cannot be right; nothing was written.
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
    command = model_card.command_line(
        "convert",
        {
            "model": str(model),
            "mlx_path": Path(mlx_path),
            **packing.flags(),
            **model_card.source_flags(tokenizer, config_yaml, revision),
        },
    )
    write_source(source, target, command=command, overwrite=overwrite, progress=progress, card={"recipe": recipe})
    return Conversion(target, bits, exceptions)


def write_source(
    source: Source,
    mlx_path: Path,
    *,
    command: str | None = None,
    origin: Origin | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    card: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a source as an MLX folder, which appears once its files turn out unchanged; empties its weights.

    Args:
        command: how the folder was made, for the model card.
        origin: what is known of the model, where that is not what the source's own files tell.
        progress: called with the bytes written so far and in all.
        card: what else the card tells (see `model_card.write`).
        extra: writes further files into the folder it is given.

    Raises:
        RequestError: `mlx_path` exists and `overwrite` is not asked for, or it cannot be made.
        OpenELMError: reading or writing failed, or a file of the source changed; nothing was left behind.
    """
    text = source.tokenizer
    instruct = source.release is not None and source.release.instruct
    origin = origin or find_origin(source)
    with atomic.new_folder(mlx_path, overwrite=overwrite) as partial, source.reading():
        text.save(partial, chat_template=text.chat_template or (CORENET_TEMPLATE if instruct else None))
        mlx_format.write(partial, source.checkpoint, progress=progress)
        making = {"command": command, "rounded_to": source.checkpoint.rounded_to, **(card or {})}
        model_card.write(partial, name=mlx_path.resolve().name, origin=origin, **making)
        if extra is not None:
            extra(partial)


def find_origin(source: Source) -> Origin:
    """What a model card tells of a source: where it comes from, and its licence."""
    is_published = catalog.corenet_name(source.name) is not None and source.release is not None
    base_model = source.release.hub_repo if is_published and source.release is not None else None
    return model_card.find_origin(source.path, repo=source.repo, base_model=base_model)


def requantize(checkpoint: Checkpoint, packing: Packing) -> dict[str, str]:
    """Cast, pack or unpack the checkpoint's unread weights in place; returns what was packed unlike the rest."""
    dtype = dtype_for(packing.dtype, checkpoint.config) or mx.bfloat16
    if packing.quantize and checkpoint.rounding is not None:
        raise RequestError(
            f"The model is already quantized to {checkpoint.rounding}; convert the original, or unpack it into a "
            f"folder first{', with --dequantize' if checkpoint.quantization else ', without -q'}."
        )
    packing.check(checkpoint)
    if packing.dequantize:
        checkpoint.weights = dequantize_weights(checkpoint.weights, checkpoint.quantization, dtype)
        checkpoint.rounded_to, checkpoint.quantization = checkpoint.rounding, {}
    checkpoint.weights = cast_weights(checkpoint.weights, checkpoint.quantization, dtype)
    if not packing.quantize:
        return {}
    checkpoint.quantization, exceptions = packing.plan(checkpoint.config)
    checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
    return exceptions
