"""Adapters in mlx-lm's format: `adapter_config.json` and `adapters.safetensors`.

One rank and one scale for all modules, which are named relative to a layer and taken from the last `num_layers`, or by
whole paths. An embedding's adapter acts on the output side too. Full fine-tuning stores whole tensors by name.
Source: mlx_lm/tuner/utils.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import EMBEDDING, LAYERS, ModelConfig
from ..errors import RequestError, name_options, quote
from ..inputs import read_json
from ..wording import one_of
from . import adapter_tensors
from .adapter import CONFIG, MLX_WEIGHTS, Adapter, LowRank
from .adapter_tensors import MAX_FLOAT32, Tensors

WEIGHTS = MLX_WEIGHTS
FINE_TUNE_TYPES = ("lora", "dora", "full")
# Our own key in adapter_config.json; mlx-lm ignores it.
_OUTPUT_SIDE = "embedding_output_side"


def read(file: Path, config: ModelConfig) -> Adapter:
    """The adapter in a safetensors file, described by the `adapter_config.json` beside it.

    Raises:
        RequestError: damaged files, another kind of fine-tuning, or tensors that the model does not have.
    """
    settings_file = file.parent / CONFIG
    settings = read_json(settings_file)
    # Old versions wrote `use_dora` instead.
    kind = settings.get("fine_tune_type", "dora" if settings.get("use_dora") is True else "lora")
    if kind not in FINE_TUNE_TYPES:
        raise RequestError(
            f"{settings_file}: unknown fine_tune_type {quote(kind)}; expected {one_of(FINE_TUNE_TYPES)}."
        )
    tensors = Tensors.read(file)
    base_model = settings.get("model")
    adapter = Adapter(base_model=base_model if isinstance(base_model, str) else None)
    if kind == "full":
        adapter.weights = tensors.take_whole(config.tensor_shapes())
        tensors.check_empty("the model")
        return adapter
    scale, adapter.dropout = _scale_and_dropout(settings, settings_file)
    output_side = settings.get(_OUTPUT_SIDE, True) is not False
    for path in tensors.paths((".lora_a", ".lora_b")):
        adapter.modules[path] = _take(tensors, path, config, scale, kind == "dora", output_side and path == EMBEDDING)
    tensors.check_empty("a LoRA adapter" if kind == "lora" else "a DoRA adapter")
    return adapter


def _scale_and_dropout(settings: Mapping[str, Any], settings_file: Path) -> tuple[float, float]:
    parameters = settings.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = _number(parameters, "scale", settings_file)
    if "alpha" in parameters:
        warnings.warn(
            f"{settings_file} has both alpha and scale; only scale {scale:g} is used, as in current mlx-lm. Old "
            "versions multiplied by scale * alpha / rank: if one trained this adapter, set scale to that product "
            "and remove alpha.",
            stacklevel=2,
        )
    dropout = _number({"dropout": 0.0} | parameters, "dropout", settings_file)
    if not 0 <= dropout <= 1:
        raise RequestError(f"{settings_file}: dropout must be from 0 to 1, got {dropout:g}.")
    return scale, dropout


def _take(tensors: Tensors, path: str, config: ModelConfig, scale: float, dora: bool, output_side: bool) -> LowRank:
    inputs, outputs = adapter_tensors.sides(tensors.file, path, config)
    a = tensors.take(f"{path}.lora_a", (inputs, None))
    b = tensors.take(f"{path}.lora_b", (a.shape[1], outputs))
    m = tensors.take(f"{path}.m", (inputs if output_side else outputs,)) if dora else None
    return LowRank(a, b, scale, m, output_side)


def _number(values: Mapping[str, Any], name: str, file: Path) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_FLOAT32:
        raise RequestError(f"{file}: lora_parameters must have a {name} that is a finite float32 number.")
    return float(value)


def write(adapter: Adapter, folder: Path, config: ModelConfig, base_model: str | None = None) -> None:
    """Write both files into a folder.

    The format has one rank and one scale: smaller ranks are padded with zeros, and if scales differ they are multiplied
    into `lora_b`. Warns about what mlx-lm will apply differently.

    Raises:
        RequestError: a mixture of LoRA and DoRA.
    """
    settings: dict[str, Any] = {"fine_tune_type": "full", "num_layers": config.num_transformer_layers}
    tensors = dict(adapter.weights)
    if adapter.modules:
        rank = max(change.rank for change in adapter.modules.values())
        scales = {change.scale for change in adapter.modules.values()}
        scale = scales.pop() if len(scales) == 1 else 1.0
        keys, num_layers = _keys(adapter.modules, config.num_transformer_layers)
        parameters = {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": keys}
        kind = "dora" if uses_dora(adapter) else "lora"
        settings = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
        for path, change in adapter.modules.items():
            tensors |= _padded(path, change, rank, scale)
        settings |= _embedding_settings(adapter.modules.get(EMBEDDING), config)
    model = base_model or adapter.base_model
    settings |= {} if model is None else {"model": model}
    adapter_tensors.write(folder / WEIGHTS, tensors, "mlx")
    (folder / CONFIG).write_text(json.dumps(settings, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def uses_dora(adapter: Adapter) -> bool:
    """Whether an adapter is DoRA; files have one method for all modules.

    Raises:
        RequestError: some modules are DoRA, and others LoRA.
    """
    dora = {path: change.magnitude is not None for path, change in adapter.modules.items()}
    if any(dora.values()) and not all(dora.values()):
        plain = next(path for path, is_dora in dora.items() if not is_dora)
        raise RequestError(
            f"The adapter is DoRA on some modules and LoRA on others ({plain}), which adapter files cannot express; "
            "fuse it into the model instead."
        )
    return any(dora.values())


def _embedding_settings(change: LowRank | None, config: ModelConfig) -> dict[str, Any]:
    """Our own key for an embedding that is changed on the input side only; warns, since mlx-lm ignores it."""
    if change is None or change.output_side:
        return {}
    if change.magnitude is not None:
        warnings.warn(
            name_options(
                "mlx-lm cannot load DoRA on the embedding as it was trained; mlx-openelm can. PEFT's format carries it "
                "(--adapter-format peft)."
            ),
            stacklevel=2,
        )
    elif config.share_input_output_layers:
        warnings.warn(
            name_options(
                "The adapter changes the embedding on the input side only; mlx-lm will apply it to the output too, and "
                "give other answers. mlx-openelm reads it right, and PEFT's format carries it (--adapter-format peft)."
            ),
            stacklevel=2,
        )
    return {_OUTPUT_SIDE: False}


def _padded(path: str, change: LowRank, rank: int, scale: float) -> dict[str, mx.array]:
    """A module's tensors for the file's rank and scale: a [in, rank], b [rank, out] and DoRA's magnitude."""
    missing = rank - change.rank
    a, b = change.a, change.b if change.scale == scale else change.b * (change.scale / scale)
    parts = {f"{path}.lora_a": mx.pad(a, [(0, 0), (0, missing)]), f"{path}.lora_b": mx.pad(b, [(0, missing), (0, 0)])}
    return parts if change.magnitude is None else parts | {f"{path}.m": change.magnitude}


def _keys(paths: Collection[str], total: int) -> tuple[list[str], int]:
    """`keys` and `num_layers`: names relative to a layer if all of the last layers have them, else whole paths."""
    by_name: dict[str, set[int]] = {}
    whole = []
    for path in paths:
        if path.startswith(LAYERS):
            layer, _, name = path.removeprefix(LAYERS).partition(".")
            by_name.setdefault(name, set()).add(int(layer))
        else:
            whole.append(path)
    first = min((layer for layers in by_name.values() for layer in layers), default=0)
    relative = [name for name, layers in by_name.items() if len(layers) == total - first]
    whole += [f"{LAYERS}{n}.{name}" for name, layers in by_name.items() if name not in relative for n in sorted(layers)]
    return relative + whole, total - first
