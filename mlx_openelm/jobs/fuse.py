"""Add adapters to a model's weights and write the sum as an ordinary MLX folder (`mlx-openelm fuse`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import console
from ..adapters.files import read_adapter
from ..adapters.merging import Deviation, Merged, merge
from ..adapters.switching import AdapterPaths, mix, parse_paths
from ..errors import RequestError, name_options
from ..formats import atomic
from ..formats import mlx as mlx_format
from ..formats.adapter import Adapter
from ..formats.mlx import Checkpoint
from ..inputs import to_path
from ..loading import build_model, check_dtype, dtype_for
from ..publishing.command_line import command_line, source_flags, without_folders
from ..publishing.origin import Origin
from ..quantization.learned import Progress
from ..quantization.options import QuantizeOptions
from ..quantization.recipes import Packing
from ..quantization.report import Evaluator
from ..quantization.text import read_text
from ..sources import Source, open_source
from .writing import origin_of, write_folder

# Windows of text that a report measures on.
_WINDOWS = 8
# Adapters by path or hub name, each with its weight.
WeightedPaths = list[tuple[str, float]]


@dataclass(frozen=True)
class Fusion:
    """What `fuse` wrote.

    Attributes:
        path: the folder.
        bits_per_weight: bits per parameter as stored.
        matrices: what the adapters changed and what storing the sum lost, by module path.
        overall: the same over all matrices.
        exceptions: descriptions of matrices packed differently from the rest, by module path.
        untied: whether the output layer, which shared the embedding, became a tensor of its own.
        requantized: whether the matrices were packed before, and were packed again.
        kl_divergence: if a report was asked for, KL(base with the adapters in float32 || what was written), in nats
            per token.
        base_kl_divergence: the same for the base without the adapters.
    """

    path: Path
    bits_per_weight: float
    matrices: dict[str, Deviation]
    overall: Deviation
    exceptions: dict[str, str] = field(default_factory=dict)
    untied: bool = False
    requantized: bool = False
    kl_divergence: float | None = None
    base_kl_divergence: float | None = None


def fuse(
    model: str | Path = "tiny",
    adapter_path: AdapterPaths = "adapters",
    save_path: str | Path = "fused_model",
    *,
    dtype: str | mx.Dtype | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    recipe: str | None = None,
    dequantize: bool = False,
    report: bool = False,
    report_data: str | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = True,
) -> Fusion:
    """Write a model with adapters added as an MLX folder, which appears complete or not at all.

    Matrices are read, changed in float32 and written one at a time, so the model need not fit into memory. The
    matrices of a quantized model are packed again in the same way, unless `dequantize` leaves them full. Tensors that
    no adapter changes keep every bit. An adapter that changes a shared embedding on the input side only makes the
    output layer a tensor of its own (`share_input_output_layers: false`), so that the output layer stays unchanged.

    Args:
        model: as in `convert`.
        adapter_path: an adapter (mlx-lm's, PEFT's or CoreNet's format, or a hub name), or several LoRA adapters, with
            weights if wanted: `{"a": 0.7, "b": 0.3}`, or `["a=0.7", "b=0.3"]`.
        dtype: the type of tensors that are not quantized; the stored type by default.
        quantize, q_bits, q_group_size, q_mode, recipe: as in `convert`, for a model that is not quantized.
        dequantize: unpack a quantized model.
        report: measure what storing the sum costs (`kl_divergence`), on `report_data` or the bundled text. Holds the
            model in float32.
        tokenizer, config_yaml, revision: as in `convert`.
        overwrite: replace `save_path` if it exists.
        progress: called with the name of a stage, the amount done, and the total; by default a bar shows each stage,
            None or False shows none.

    Raises:
        RequestError: an invalid request, or adapters of another model; nothing was written.
        OpenELMError: a download or writing failed; nothing was left behind.
    """
    dtype = check_dtype(model, dtype)
    packing = Packing(quantize, q_bits, q_group_size, q_mode, recipe, dequantize, dtype)
    if report_data is not None and not report:
        raise RequestError("--report-data needs --report.")
    paths = parse_paths(adapter_path)
    target = atomic.check_target(Path(save_path), overwrite=overwrite, flag="--save-path")
    open_base = partial(open_source, model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)

    source = open_base()
    _check_inputs(target, source, paths)
    _check_packing(source.checkpoint, packing)
    windows = _held_out(source, report_data) if report else []
    was_packed = bool(source.checkpoint.quantization)
    adapters = _read_adapters(paths, source)
    merged = _merge(source, adapters, packing)
    bits = merged.checkpoint.bits_per_weight  # before the weights are taken
    flags = _adapter_flags(model, paths, save_path) | packing.flags() | source_flags(tokenizer, config_yaml, revision)
    with console.stages(progress) as show:
        write_folder(
            source,
            target,
            command=command_line("fuse", flags),
            origin=_origin(source),
            overwrite=overwrite,
            progress=partial(show, "Writing"),
            card={"recipe": recipe, "adapters": [_describe(*entry) for entry in adapters]},
        )
        fusion = _fusion(to_path(save_path), bits, merged, requantized=was_packed and not dequantize)
        if report:
            written, base_alone = _divergences(open_base, paths, target, windows, show)
            fusion = replace(fusion, kl_divergence=written, base_kl_divergence=base_alone)
    return fusion


def _check_inputs(target: Path, source: Source, paths: WeightedPaths) -> None:
    """Refuse to write over the model or an adapter, and a tokenizer that cannot be written."""
    inputs = {"the model": source.path} | {f"the adapter {path}": to_path(path) for path, _ in paths}
    for what, path in inputs.items():
        atomic.keep_apart(target, path, f"{what} to fuse", "--save-path")
    source.tokenizer.check_writable()


def _check_packing(base: Checkpoint, packing: Packing) -> None:
    """Refuse to unpack a full model; warn of rounding twice, and of matrices that `dtype` leaves packed."""
    packing.check(base)
    if packing.quantize and base.rounding is not None:
        warnings.warn(
            name_options(
                f"The model is already quantized to {base.rounding}, so with -q it is rounded twice; fusing into the "
                "original loses less."
            ),
            stacklevel=3,
        )
    dtype = packing.dtype
    if dtype is not None and base.quantization and not (packing.quantize or packing.dequantize):
        warnings.warn(
            name_options(
                f"The matrices stay packed in {base.rounding}, and only what is not packed becomes {dtype}; "
                f"--dequantize gives {dtype} throughout."
            ),
            stacklevel=3,
        )


def _held_out(source: Source, report_data: str | None) -> list[list[int]]:
    """The windows of text that a report reads, as token ids."""
    options = QuantizeOptions(report=True, report_data=report_data)
    return read_text(source.tokenizer, source.checkpoint.config, options).held_out[:_WINDOWS]


def _merge(source: Source, adapters: list[tuple[str, Adapter, float]], packing: Packing) -> Merged:
    """Add the adapters to the source's checkpoint, which the sum replaces; no weight is read yet."""
    base = source.checkpoint
    merged = merge(
        base,
        mix(adapters),
        dtype=dtype_for(packing.dtype, base.config),
        plan=packing.plan if packing.quantize else None,
        dequantize=packing.dequantize,
    )
    source.checkpoint = merged.checkpoint
    return merged


def _read_adapters(paths: WeightedPaths, source: Source) -> list[tuple[str, Adapter, float]]:
    return [(path, read_adapter(path, source.checkpoint.config), weight) for path, weight in paths]


def _fusion(target: Path, bits_per_weight: float, merged: Merged, *, requantized: bool) -> Fusion:
    """The result without a report, once the weights are written and the deviations are complete."""
    return Fusion(
        path=target,
        bits_per_weight=bits_per_weight,
        matrices=merged.deviations,
        overall=Deviation.total(merged.deviations.values()),
        exceptions=merged.exceptions,
        untied=merged.untied,
        requantized=requantized,
    )


def _with_weight(path: str, weight: float) -> str:
    """An adapter and its weight, as `--adapter-path` takes them."""
    return path if weight == 1 else f"{path}={weight:g}"


def _adapter_flags(model: str | Path, paths: WeightedPaths, save_path: str | Path) -> dict[str, Any]:
    """The flags of the command line that name the model, the adapters and the output, for the model card."""
    adapters = [_with_weight(without_folders(path), weight) for path, weight in paths]
    return {"model": str(model), "adapter_path": adapters, "save_path": Path(save_path)}


def _describe(path: str, adapter: Adapter, weight: float) -> str:
    """A description of an adapter for the model card."""
    times = "" if weight == 1 else f", {weight:g} times"
    name = f"`{without_folders(path)}`{times}"
    if not adapter.modules:
        return f"the weights of full fine-tuning in {name}"
    ranks = sorted({change.rank for change in adapter.modules.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    is_dora = any(change.magnitude is not None for change in adapter.modules.values())
    return f"the {'DoRA' if is_dora else 'LoRA'} adapter {name} ({rank}, on {len(adapter.modules)} matrices)"


def _origin(source: Source) -> Origin:
    """The origin of the sum: a model derived from the base."""
    origin = origin_of(source)
    relation = "merge" if origin.relation == "merge" else "finetune"
    return replace(origin, name=f"{origin.name}, fine-tuned", relation=relation if origin.base_model else None)


def _divergences(
    open_base: Callable[[], Source],
    paths: WeightedPaths,
    target: Path,
    windows: list[list[int]],
    show: Progress,
) -> tuple[float, float]:
    """KL(base with the adapters || model) in nats per token, in float32, of the written model and of the base."""
    source = open_base()
    packed = bool(source.checkpoint.quantization)
    exact = merge(source.checkpoint, mix(_read_adapters(paths, source)), dtype=mx.float32, dequantize=packed)
    with source.reading():
        full = build_model(exact.checkpoint, dtype=mx.float32, expand=True)
    evaluator = Evaluator(full, windows, progress=partial(show, "Reading the text"))
    del full

    def divergence(checkpoint: Checkpoint) -> float:
        return evaluator.measure(build_model(checkpoint, dtype=mx.float32, expand=True))[1]

    show("Measuring", 0, 2)
    written = divergence(mlx_format.read(target))
    show("Measuring", 1, 2)
    base = divergence(open_base().checkpoint)
    show("Measuring", 2, 2)
    return written, base
