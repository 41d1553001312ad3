"""Fuse: a model with adapters becomes a model without, as a folder that every reader of MLX folders knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapters.files import read_adapter
from ..adapters.merging import Deviation, merge
from ..adapters.switching import AdapterPaths, mix, parse_paths
from ..errors import RequestError
from ..formats import atomic
from ..formats import mlx as mlx_format
from ..formats.adapter import Adapter
from ..formats.mlx import Checkpoint
from ..inputs import to_path
from ..loading import build_model, check_dtype, dtype_for
from ..publishing import card as model_card
from ..publishing.card import Origin
from ..quantization.learned import Progress
from ..quantization.options import QuantizeOptions
from ..quantization.recipes import Packing
from ..quantization.report import Yardstick
from ..quantization.text import read_text
from ..sources import Source, open_source
from .convert import find_origin, write_source

# Windows of text that a report reads.
_WINDOWS = 8
# A path or name, and how often it counts.
Adapters = list[tuple[str, float]]


@dataclass(frozen=True)
class Fusion:
    """What `fuse` wrote: where, how many bits a parameter takes, and matrices packed unlike the others.

    `matrices` tells by module path what the adapters changed and what storing the result lost, `overall` the same
    of all of them together; `untied` whether the output layer became one of its own; `requantized` whether they were
    packed before and again. Where a report was asked for, `kl_divergence` is how far the written model is from the
    base with the adapters in float32, in nats a token, and `base_kl_divergence` how far the base without them is.
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
    dtype: str | None = None,
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
    progress: Progress | None = None,
) -> Fusion:
    """Write a model with adapters added as an MLX folder, which appears complete or not at all.

    Matrices are read, changed in float32 and written one at a time, so a model need not fit into memory. Those of a
    quantized model are packed again as they were, unless `dequantize` leaves them full; what no adapter changes stays
    as it is, to the bit. An adapter that changes an embedding as the input alone makes the output layer a tensor of
    its own (`share_input_output_layers: false`), so that it stays as it is.

    Args:
        model: as in `convert`.
        adapter_path: an adapter (mlx-lm's, PEFT's or CoreNet's format, or a hub name), several of them, or several
            with weights, where they are LoRA: `{"a": 0.7, "b": 0.3}`, or `["a=0.7", "b=0.3"]`.
        dtype: the type of what is not quantized; as it is stored unless told.
        quantize, q_bits, q_group_size, q_mode, recipe: as in `convert`, for a model that is not quantized.
        dequantize: unpack a quantized model.
        report: measure what storing the result costs (`kl_divergence`), on `report_data` or the bundled text. Holds
            the model in float32.
        overwrite: replace `save_path` if it exists.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        RequestError: a request that cannot be right, or adapters of another model; nothing was written.
        OpenELMError: a download or writing failed; nothing was left behind.
    """
    packing = Packing(quantize, q_bits, q_group_size, q_mode, recipe, dequantize, dtype)
    if report_data is not None and not report:
        raise RequestError("--report-data needs --report.")
    reading = QuantizeOptions(report=True, report_data=report_data)
    adapters = parse_paths(adapter_path)
    check_dtype(model, dtype)
    target = atomic.check_target(Path(save_path), overwrite=overwrite, flag="--save-path")
    places: dict[str, Any] = {"tokenizer": tokenizer, "config_yaml": config_yaml, "revision": revision}
    source = open_source(model, **places)
    _check_places(target, source, adapters)
    source.tokenizer.check_writable()
    base = source.checkpoint
    _check_packing(base, packing)
    windows = read_text(source.tokenizer, base.config, reading).held_out[:_WINDOWS] if report else []

    read = _read_all(adapters, source)
    made_of = [_describe(*entry) for entry in read]
    packed = bool(base.quantization)
    merged = merge(
        base,
        mix(read),
        dtype=dtype_for(dtype, base.config),
        plan=packing.plan if quantize else None,
        dequantize=dequantize,
    )
    source.checkpoint, bits = merged.checkpoint, merged.checkpoint.bits_per_weight
    command = model_card.command_line(
        "fuse",
        {
            "model": str(model),
            "adapter_path": [_typed(model_card.without_folders(path), weight) for path, weight in adapters],
            "save_path": Path(save_path),
            **packing.flags(),
            **model_card.source_flags(tokenizer, config_yaml, revision),
        },
    )
    stage = progress or (lambda *_: None)
    write_source(
        source,
        target,
        command=command,
        origin=_origin(source),
        overwrite=overwrite,
        progress=lambda done, total: stage("Writing", done, total),
        card={"recipe": recipe, "adapters": made_of},
    )
    overall = Deviation()
    for deviation in merged.deviations.values():
        overall.add(deviation)
    divergences: list[float] = []
    if report:
        divergences = _divergences(lambda: open_source(model, **places), adapters, target, windows, stage)
    return Fusion(
        target,
        bits,
        merged.deviations,
        overall,
        merged.exceptions,
        merged.untied,
        packed and not dequantize,
        *divergences,
    )


def _typed(path: str, weight: float) -> str:
    """An adapter as it is typed."""
    return path if weight == 1 else f"{path}={weight:g}"


def _check_packing(base: Checkpoint, packing: Packing) -> None:
    """Refuse to unpack what is not packed, and warn of packing what was rounded before, and of what stays packed."""
    packing.check(base)
    if packing.quantize and base.rounding is not None:
        warnings.warn(
            f"The model is already quantized to {base.rounding}, so with -q it is rounded twice; fusing into the "
            "original loses less.",
            stacklevel=3,
        )
    dtype = packing.dtype
    if dtype is not None and base.quantization and not (packing.quantize or packing.dequantize):
        warnings.warn(
            f"The matrices stay packed in {base.rounding}, and only what is not packed becomes {dtype}; --dequantize "
            f"gives {dtype} throughout.",
            stacklevel=3,
        )


def _check_places(target: Path, source: Source, adapters: Adapters) -> None:
    """Refuse to write over what is read."""
    places = {"the model": source.path} | {f"the adapter {path}": to_path(path) for path, _ in adapters}
    for what, place in places.items():
        atomic.keep_apart(target, place, f"{what} to fuse", "--save-path")


def _read_all(adapters: Adapters, source: Source) -> list[tuple[str, Adapter, float]]:
    return [(path, read_adapter(path, source.checkpoint.config), weight) for path, weight in adapters]


def _describe(path: str, adapter: Adapter, weight: float) -> str:
    """What a model card says of an adapter."""
    times = "" if weight == 1 else f", {weight:g} times"
    name = f"`{model_card.without_folders(path)}`{times}"
    if not adapter.modules:
        return f"the weights of full fine-tuning in {name}"
    ranks = sorted({change.rank for change in adapter.modules.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    is_dora = any(change.magnitude is not None for change in adapter.modules.values())
    return f"the {'DoRA' if is_dora else 'LoRA'} adapter {name} ({rank}, on {len(adapter.modules)} matrices)"


def _origin(source: Source) -> Origin:
    """What a model card tells of the base: the result is another model than it."""
    origin = find_origin(source)
    relation = "merge" if origin.relation == "merge" else "finetune"
    return replace(origin, name=f"{origin.name}, fine-tuned", relation=relation if origin.base_model else None)


def _divergences(
    reopen: Callable[[], Source], adapters: Adapters, target: Path, windows: list[list[int]], stage: Progress
) -> list[float]:
    """KL(base with the adapters || model), in nats a token and in float32, of what was written and of the base."""
    source = reopen()
    packed = bool(source.checkpoint.quantization)
    exact = merge(source.checkpoint, mix(_read_all(adapters, source)), dtype=mx.float32, dequantize=packed)
    with source.reading():
        full = build_model(exact.checkpoint, dtype=mx.float32, expand=True)
    yardstick = Yardstick(full, windows, progress=lambda done, total: stage("Reading the text", done, total))
    del full
    found = []
    for done, checkpoint in enumerate((mlx_format.read(target), reopen().checkpoint)):
        stage("Measuring", done, 2)
        found.append(yardstick.measure(build_model(checkpoint, dtype=mx.float32, expand=True))[1])
    stage("Measuring", 2, 2)
    return found
