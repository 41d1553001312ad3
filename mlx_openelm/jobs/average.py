"""The mean of several checkpoints: CoreNet's published models are the mean of the last five of their training."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from ..errors import RequestError, quote
from ..finite import check_finite
from ..formats import atomic
from ..formats.safetensors import Tensor, Weights
from ..hub import catalog
from ..inputs import to_path
from ..loading import dtype_for, dtype_name
from ..publishing.command_line import command_line, source_flags, without_folders
from ..publishing.origin import Origin
from ..sources import Source, open_source
from .writing import origin_of, write_folder

# Fields that change what a model computes from the same weights.
_BEHAVIOR = (
    "activation_fn_name",
    "rms_norm_eps",
    "rope_freq_constant",
    "num_query_heads",
    "num_kv_heads",
    "ffn_with_glu",
)


def average(
    models: Sequence[str | Path],
    mlx_path: str | Path = "mlx_model",
    *,
    dtype: str | mx.Dtype | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | bool | None = True,
) -> Path:
    """Write the mean of checkpoints, tensor by tensor, as an MLX folder, which appears complete or not at all.

    Args:
        models: two or more, each an alias, a hub name, a folder, a CoreNet checkpoint (`.pt`), a `.gguf` file, or
            `corenet:SIZE/NAME`. Means are computed in float32.
        dtype: the type to write; by default the stored type of the checkpoints, float32 if they differ.
        tokenizer: a tokenizer file or folder, or `tiny`, in place of the models' own; by default the first model's is
            written.
        config_yaml: the training configuration of CoreNet checkpoints.
        overwrite: replace `mlx_path` if it exists.
        progress: called with the bytes written so far and in all; by default they are shown, with None or False not.

    Raises:
        RequestError: fewer than two models, a quantized one, or models of different shapes; nothing was written.
        OpenELMError: a download, reading or writing failed, a weight is not finite, or a file changed meanwhile;
            nothing was left behind.
    """
    if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence):
        raise RequestError(f"models must be a list of checkpoints, got {quote(models)}.")
    if len(models) < 2:
        raise RequestError("An average needs at least two checkpoints.")
    dtype = dtype_name(dtype)
    target = atomic.check_target(Path(mlx_path), overwrite=overwrite)

    sources = [_open(model, tokenizer, config_yaml) for model in models]
    first = sources[0]
    for source in sources:
        atomic.keep_apart(target, source.path, "one of the models to average")
        _check_same_architecture(first, source)

    dtypes = [source.checkpoint.dtype for source in sources]
    common = dtypes[0] if len(set(dtypes)) == 1 else mx.float32
    target_dtype = dtype_for(dtype, first.checkpoint.config) or common
    mean = replace(
        first,
        name=", ".join(source.name for source in sources),
        checkpoint=replace(first.checkpoint, weights=_means(sources, target_dtype)),
        stamps={path: stamp for source in sources for path, stamp in source.stamps.items()},
    )

    command = command_line(
        " ".join(["average", *(shlex.quote(without_folders(model)) for model in models)]),
        {"mlx_path": Path(mlx_path), "dtype": dtype, **source_flags(tokenizer, config_yaml)},
    )
    write_folder(mean, target, command=command, origin=_origin(sources), overwrite=overwrite, progress=progress)
    return to_path(mlx_path)


def _open(model: str | Path, tokenizer: str | Path | None, config_yaml: str | Path | None) -> Source:
    """One of the checkpoints; RequestError if it is quantized."""
    # `config_yaml` is for CoreNet checkpoints; folders have their own configuration.
    is_corenet = str(model).lower().endswith((".pt", ".pth")) or catalog.corenet_name(model) is not None
    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml if is_corenet else None)
    if (rounding := source.checkpoint.rounding) is not None:
        raise RequestError(
            f"{model} is quantized to {rounding}, so the mean would be rough; `convert --dequantize` unpacks it."
        )
    return source


def _check_same_architecture(first: Source, other: Source) -> None:
    """Refuse two models whose tensors, or the settings they are computed with, differ."""
    expected, shapes = first.checkpoint.config.tensor_shapes(), other.checkpoint.config.tensor_shapes()
    differing = [name for name in expected | shapes if expected.get(name) != shapes.get(name)]
    if differing:
        name = differing[0]
        raise RequestError(
            f"{first.name} and {other.name} have different shapes: {len(differing)} tensors differ, such as {name} "
            f"({_shape_text(expected.get(name))} and {_shape_text(shapes.get(name))})."
        )
    for field in _BEHAVIOR:
        ours, theirs = getattr(first.checkpoint.config, field), getattr(other.checkpoint.config, field)
        if ours != theirs:
            raise RequestError(f"{first.name} and {other.name} differ in {field}: {ours} and {theirs}.")


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _means(sources: Sequence[Source], dtype: mx.Dtype) -> Weights:
    """The mean of each tensor; reading one takes it out of the sources, so it can be read only once."""
    shapes = sources[0].checkpoint.config.tensor_shapes()

    def read(name: str) -> mx.array:
        total = mx.zeros(shapes[name])
        for source in sources:
            weight = source.checkpoint.weights.take(name).astype(mx.float32)
            check_finite(weight, f"{name} of {source.name}", "averaged")
            total = total + weight
            mx.eval(total)
            del weight  # before the next is read
        mean = (total / len(sources)).astype(dtype)
        check_finite(mean, f"The mean of {name}", "written")
        return mean

    names = list(sources[0].checkpoint.weights)
    return Weights({name: Tensor(dtype, shapes[name], partial(read, name)) for name in names})


def _origin(sources: Sequence[Source]) -> Origin:
    """The origin of the mean: every base model, and the metadata and license that all of them share."""
    origins = [origin_of(source) for source in sources]
    first = origins[0]
    stated = [o.base_model for o in origins if o.base_model is not None]
    bases = list(dict.fromkeys(name for base in stated for name in ([base] if isinstance(base, str) else base)))
    shared = {k: v for k, v in first.metadata.items() if all(o.metadata.get(k) == v for o in origins)}
    license_fields = [{k: v for k, v in o.metadata.items() if k.startswith("license")} for o in origins]
    is_same_license = all(fields == license_fields[0] for fields in license_fields)
    return Origin(
        name="the mean of " + ", ".join(origin.name for origin in origins),
        base_model=bases[0] if len(bases) == 1 else bases or None,
        relation="merge" if bases else None,
        metadata=shared if is_same_license else {k: v for k, v in shared.items() if k not in license_fields[0]},
        licenses=first.licenses if is_same_license else (),
        from_scratch=all(origin.from_scratch for origin in origins),
    )
