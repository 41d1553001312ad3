"""Adapters as PEFT has them: `adapter_config.json` and `adapter_model.safetensors`; LoRA, rsLoRA and DoRA.

Source: peft/tuners/lora and peft/utils/save_and_load.py. Ranks and alphas may differ by module, where `rank_pattern`
and `alpha_pattern` have a regular expression that a module's path ends with.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapters.adapter import EMBEDDING, Adapter, LowRank
from ..config import ModelConfig
from ..errors import RequestError
from ..inputs import read_json
from . import adapter_tensors
from .adapter_tensors import Tensors
from .mlx_adapter import uses_dora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What a configuration may say without changing what the tensors mean.
_HARMLESS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
# Beginnings that leave the base's weights as they are. With others (`loftq`, `lora_ga`) an adapter belongs to a changed
# base; of these PEFT can take the change out again.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE = ("pissa", "corda", "olora")
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def read(file: Path, config: ModelConfig) -> Adapter:
    """The adapter in a safetensors file, told by the `adapter_config.json` beside it.

    Raises:
        RequestError: damaged files, a method or setting that cannot be carried over, or tensors that the model does
            not have.
    """
    settings_file = file.parent / CONFIG
    settings = read_json(settings_file)
    _check(settings, settings_file)
    tensors = Tensors.read(file)
    base_model = settings.get("base_model_name_or_path")
    adapter = Adapter(base_model=base_model if isinstance(base_model, str) and base_model else None)
    adapter.dropout = _number(settings, "lora_dropout", settings_file, 0.0)
    for name in tensors.paths(_ENDINGS):
        path = name.removeprefix(_PREFIX)
        if path == name:
            raise RequestError(f"{file} names a module {name}; PEFT's names begin with {_PREFIX}")
        adapter.modules[path] = _take(tensors, path, settings, settings_file, config)
    tensors.check_empty("a LoRA adapter" if not settings.get("use_dora") else "a DoRA adapter")
    return adapter


def _check(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse what our layers do not compute."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise RequestError(f"{file}: peft_type {kind} cannot be used here; LORA can, with or without DoRA.")
    initial = settings.get("init_lora_weights")
    initial = initial.lower() if isinstance(initial, str) else initial
    if initial not in _INITIAL:
        way = "merge it into that with PEFT, and give the merged model as --model"
        if str(initial).startswith(_CONVERTIBLE):
            way = "let PEFT convert the adapter to LoRA when it saves it (path_initial_model_for_weight_conversion)"
        raise RequestError(f"{file}: init_lora_weights {initial!r} changes the base model too; {way}.")
    if settings.get("bias") not in (None, "none"):
        raise RequestError(f"{file}: bias is {settings['bias']!r}, but OpenELM has no biases.")
    for name, value in settings.items():
        if value and name not in _HARMLESS and name not in ("bias", "init_lora_weights"):
            raise RequestError(f"{file}: {name} is {json.dumps(value)}, which cannot be carried over.")


def _take(
    tensors: Tensors, path: str, settings: Mapping[str, Any], settings_file: Path, config: ModelConfig
) -> LowRank:
    inputs, outputs = adapter_tensors.sides(tensors.file, path, config)
    a, b = (".lora_embedding_A", ".lora_embedding_B") if path == EMBEDDING else (".lora_A.weight", ".lora_B.weight")
    down = tensors.take(f"{_PREFIX}{path}{a}", (None, inputs))
    rank = down.shape[0]
    up = tensors.take(f"{_PREFIX}{path}{b}", (outputs, rank))
    magnitude = tensors.take(f"{_PREFIX}{path}.lora_magnitude_vector", (outputs,)) if settings.get("use_dora") else None
    told = _of_module(settings, "rank_pattern", "r", path, settings_file)
    if told != rank:
        raise RequestError(f"{tensors.file}: {path} has rank {rank}, but {settings_file.name} says {told:g}.")
    alpha = _of_module(settings, "alpha_pattern", "lora_alpha", path, settings_file)
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LowRank(down.T, up.T, scale, magnitude)


def _of_module(settings: Mapping[str, Any], pattern: str, common: str, path: str, file: Path) -> float:
    """A module's rank or alpha: of the first pattern that its path ends with, else the common one."""
    patterns = settings.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise RequestError(f"{file}: {pattern} must be an object of numbers by module.")
    for key in patterns:
        try:
            matches = re.match(rf"(.*\.)?({key})$", path)
        except re.error:
            raise RequestError(f"{file}: {pattern} has {key!r}, which is no regular expression.") from None
        if matches:
            return _number(patterns, key, file)
    return _number(settings, common, file, 8.0)


def _number(values: Mapping[str, Any], name: str, file: Path, default: float = 0.0) -> float:
    value = default if values.get(name) is None else values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{file}: {name} must be a number, got {value!r}.")
    return float(value)


def write(adapter: Adapter, folder: Path, config: ModelConfig, base_model: str | None = None) -> None:
    """Write both files into a folder.

    Raises:
        RequestError: what PEFT's format does not have: whole weights, a mixture of LoRA and DoRA, or an embedding that
            changes the output side too.
    """
    if adapter.weights:
        raise RequestError("PEFT's format holds adapters, not the weights of full fine-tuning; write mlx-lm's format.")
    embedding = adapter.modules.get(EMBEDDING)
    is_shared = config.share_input_output_layers
    if embedding is not None and embedding.output_side and (is_shared or embedding.magnitude is not None):
        raise RequestError(
            f"The adapter changes {EMBEDDING} as mlx-lm does, on the output side too; PEFT's format cannot tell that."
        )
    dora = uses_dora(adapter)
    pairs = {path: (change.rank, _alpha(change)) for path, change in adapter.modules.items()}
    (rank, alpha), _ = Counter(pairs.values()).most_common(1)[0] if pairs else ((8, 8), 0)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base_model or adapter.base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "rank_pattern": {path: own for path, (own, _) in pairs.items() if own != rank},
        "alpha_pattern": {path: own for path, (_, own) in pairs.items() if own != alpha},
        "target_modules": _targets(adapter, config),
        "modules_to_save": None,
        "layers_to_transform": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": dora,
    }
    tensors: dict[str, mx.array] = {}
    for path, change in adapter.modules.items():
        a, b = (".lora_embedding_A", ".lora_embedding_B") if path == EMBEDDING else _ENDINGS[:2]
        tensors |= {f"{_PREFIX}{path}{a}": change.a.T, f"{_PREFIX}{path}{b}": change.b.T}
        if change.magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = change.magnitude
    adapter_tensors.write(folder / WEIGHTS, tensors, "pt")
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _alpha(change: LowRank) -> float:
    """scale times rank; a whole number where it is one."""
    alpha = change.scale * change.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _targets(adapter: Adapter, config: ModelConfig) -> list[str]:
    """The last parts of the paths where they mean these modules and no others, else the whole paths."""
    names = {path.rpartition(".")[2] for path in adapter.modules}
    meant = [path for path in config.matrix_shapes() if path.rpartition(".")[2] in names]
    return sorted(names) if len(meant) == len(adapter.modules) else sorted(adapter.modules)
