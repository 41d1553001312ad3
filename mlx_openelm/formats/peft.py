"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`; LoRA, rsLoRA and DoRA.

Source: peft/tuners/lora and peft/utils/save_and_load.py. The settings are read in `peft_settings`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import EMBEDDING, HEAD, ModelConfig
from ..errors import RequestError
from . import adapter_tensors
from .adapter import CONFIG, PEFT_WEIGHTS, Adapter, BaseCopy, LowRank
from .adapter_tensors import Tensors
from .leftovers import UNUSED
from .mlx_adapter import uses_dora
from .peft_settings import Settings

WEIGHTS = PEFT_WEIGHTS
_PREFIX = "base_model.model."
_HEAD = f"{HEAD}.weight"
_MAGNITUDE = ".lora_magnitude_vector"
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_ADAPTER_NAME = re.compile(r"(\.lora_(?:[AB]|embedding_[AB]|magnitude_vector|velora_embed))\.default(?=\.weight$|$)")
# Name infixes that PEFT's wrappers insert into the base's weights.
_WRAPPER = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.weight$)")
# A buffer of VeLoRA's backward pass.
_TRAINING_ONLY = ".lora_velora_embed"


def read(file: Path, config: ModelConfig) -> Adapter:
    """The adapter in a safetensors file, described by the `adapter_config.json` beside it.

    Weights of the base in the file become `base_copies`, for comparison with the base. As in PEFT, target modules
    missing from the file stay unchanged; warns about them.

    Raises:
        RequestError: damaged files, an unsupported method or setting, or tensors that the model does not have.
    """
    settings = Settings(file.parent / CONFIG)
    tensors = Tensors.read(file, _usual_name)
    if not config.share_input_output_layers:  # PEFT's `all-linear` adapts it too
        tensors.discard(prefix=f"{_PREFIX}{UNUSED}.")
    adapter = Adapter(base_model=settings.base_model, dropout=settings.dropout)
    for name in tensors.paths(_ENDINGS):
        path = name.removeprefix(_PREFIX)
        adapter.modules[path] = _take(tensors, path, settings, config)
        if (setting := settings.left_out_by(path)) is not None:
            raise RequestError(
                f"{file} has weights for {path}, but {setting} in {CONFIG} excludes it, so PEFT would ignore them."
            )
    adapter.base_copies = _take_copies(tensors, settings, config)
    tensors.discard(suffix=_TRAINING_ONLY)
    tensors.check_empty("a LoRA adapter" if not settings.is_dora else "a DoRA adapter")
    _warn_of_missing(adapter, settings, file, config)
    return adapter


def _usual_name(name: str) -> str:
    """A tensor's name as PEFT saves it.

    In a model's whole state dictionary it also contains the adapter's name, usually `default`; transformers leaves the
    prefix out.
    """
    name = name if name.startswith(_PREFIX) else _PREFIX + name
    name = _ADAPTER_NAME.sub(r"\1", name)
    return name.removesuffix(".weight") if name.endswith(f"{_MAGNITUDE}.weight") else name


def _tensor_names(path: str) -> tuple[str, str]:
    """The names of A and B of a module's adapter."""
    a, b = (".lora_embedding_A", ".lora_embedding_B") if path == EMBEDDING else (".lora_A.weight", ".lora_B.weight")
    return f"{_PREFIX}{path}{a}", f"{_PREFIX}{path}{b}"


def _take(tensors: Tensors, path: str, settings: Settings, config: ModelConfig) -> LowRank:
    inputs, outputs = adapter_tensors.sides(tensors.file, path, config)
    name_a, name_b = _tensor_names(path)
    a = tensors.take(name_a, (None, inputs))  # [rank, in]
    rank = a.shape[0]
    b = tensors.take(name_b, (outputs, rank))  # [out, rank]
    magnitude = tensors.take(f"{_PREFIX}{path}{_MAGNITUDE}", (outputs,)) if settings.is_dora else None
    if (expected := settings.rank(path)) != rank:
        raise RequestError(f"{tensors.file}: {path} has rank {rank}, but {settings.file.name} says {expected:g}.")
    return LowRank(a.T, b.T, settings.scale(path, rank), magnitude)


def _take_copies(tensors: Tensors, settings: Settings, config: ModelConfig) -> list[BaseCopy]:
    """The weights of the base in the file; PEFT would use them instead of the base's own."""
    shapes, copies = config.tensor_shapes(), []
    for name in tensors.names():
        own = _WRAPPER.sub("", name.removeprefix(_PREFIX))
        if own == _HEAD and config.share_input_output_layers:
            own = f"{EMBEDDING}.weight"
        if own in shapes:
            copies.append(_take_copy(tensors, name, own, shapes[own], settings))
    return copies


def _take_copy(tensors: Tensors, name: str, own: str, shape: tuple[int, ...], settings: Settings) -> BaseCopy:
    setting = "a weight of the base"
    if settings.saves(own.removesuffix(".weight")) or settings.saves(name.removeprefix(_PREFIX)):
        setting = "modules_to_save"
    elif own in (f"{EMBEDDING}.weight", _HEAD):
        setting = "save_embedding_layers"
    refusal = (
        f"{tensors.file} contains {name} ({setting}), which differs from the base model's; merge the adapter into the "
        "model it was trained on with PEFT, and give the result as --model."
    )
    value = tensors.take_stored(name)
    if value.shape != shape:
        raise RequestError(f"{refusal[:-1]}: its shape is {list(value.shape)}, the model's {list(shape)}.")
    return BaseCopy(own, value, refusal)


def _warn_of_missing(adapter: Adapter, settings: Settings, file: Path, config: ModelConfig) -> None:
    targets = [path for path in config.matrix_shapes() if settings.targets(path)]
    missing = [path for path in targets if path not in adapter.modules]
    if missing and adapter.modules:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warnings.warn(
            f"{file} has no tensors for {missing[0]}{more}, which target_modules names; it stays as in the base model.",
            stacklevel=2,
        )


def write(adapter: Adapter, folder: Path, config: ModelConfig, base_model: str | None = None) -> None:
    """Write both files into a folder.

    Args:
        base_model: the base model's name; by default the one in the adapter.

    Raises:
        RequestError: whole weights, a mixture of LoRA and DoRA, or an embedding that changes the output side too;
            PEFT's format cannot store these.
    """
    if adapter.weights:
        raise RequestError("PEFT's format holds adapters, not the weights of full fine-tuning; write mlx-lm's format.")
    embedding = adapter.modules.get(EMBEDDING)
    is_shared = config.share_input_output_layers
    if embedding is not None and embedding.output_side and (is_shared or embedding.magnitude is not None):
        raise RequestError(
            f"The adapter changes {EMBEDDING} as mlx-lm does, on the output side too; PEFT cannot express that."
        )
    settings = _settings(adapter, config, base_model or adapter.base_model)
    tensors: dict[str, mx.array] = {}
    for path, change in adapter.modules.items():
        name_a, name_b = _tensor_names(path)
        tensors |= {name_a: change.a.T, name_b: change.b.T}
        if change.magnitude is not None:
            tensors[f"{_PREFIX}{path}{_MAGNITUDE}"] = change.magnitude
    adapter_tensors.write(folder / WEIGHTS, tensors, "pt")
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(adapter: Adapter, config: ModelConfig, base_model: str | None) -> dict[str, Any]:
    """The values of `adapter_config.json`; ranks and alphas other than the most common ones become patterns."""
    pairs = {path: (change.rank, _alpha(change)) for path, change in adapter.modules.items()}
    (rank, alpha), _ = Counter(pairs.values()).most_common(1)[0] if pairs else ((8, 8), 0)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
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
        "use_dora": uses_dora(adapter),
    }


def _alpha(change: LowRank) -> float:
    """`lora_alpha`: the scale times the rank, as an int if it is whole."""
    alpha = change.scale * change.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _targets(adapter: Adapter, config: ModelConfig) -> list[str]:
    """`target_modules`: module suffixes if they are unambiguous, else whole paths."""
    names = {path.rpartition(".")[2] for path in adapter.modules}
    meant = [path for path in config.matrix_shapes() if path.rpartition(".")[2] in names]
    return sorted(names) if len(meant) == len(adapter.modules) else sorted(adapter.modules)
