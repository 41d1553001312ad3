"""mlx-lm's nested keys of a configuration file: `lora_parameters`, `lr_schedule`, `optimizer_config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import EMBEDDING, LAYER_MATRICES
from ..errors import RequestError, quote
from ..formats.adapter import TARGET_MODULES

# lr_schedule is also one of our flat keys, when its value is a name.
KEYS = ("lora_parameters", "lr_schedule", "optimizer_config")

_SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
# The settings of their optimizers, by our names; `betas` is handled separately.
_SETTINGS = {
    "eps": "eps",
    "weight_decay": "weight_decay",
    "bias_correction": "bias_correction",
    "momentum": "momentum",
    "beta_1": "beta1",
}
# Further settings of their optimizers, accepted if they have the values that are used here anyway.
_SAME_HERE: dict[str, dict[str, Any]] = {
    "sgd": {"dampening": 0, "nesterov": False},
    "muon": {"nesterov": True, "ns_steps": 5},
    "adafactor": {"relative_step": False, "scale_parameter": False, "warmup_init": False, "clip_threshold": 1.0},
}
# Their paths, within a layer or in the model, of the modules that can have an adapter.
_MODULES = {
    **{path: path.rpartition(".")[2] for path in (*LAYER_MATRICES, EMBEDDING)},
    **{name: name for name in TARGET_MODULES},
}


def flatten(values: Mapping[str, Any], place: str, *, optimizer: str, fine_tune_type: str | None) -> dict[str, Any]:
    """The values of a file with nested keys turned into flat ones; a nested one overrides a flat one, as in mlx-lm.

    Args:
        place: what messages call the file.
        optimizer: the one in use; its part of `optimizer_config` is read.
        fine_tune_type: the one in use; with `full`, `lora_parameters` is ignored, as in mlx-lm.

    Raises:
        RequestError: a nested key has no flat equivalent; the message names it.
    """
    flat = {key: value for key, value in values.items() if key not in KEYS}
    readers: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
        "lora_parameters": _lora if fine_tune_type != "full" else lambda *_: {},
        "lr_schedule": _schedule,
        "optimizer_config": lambda section, where: _optimizer(section, optimizer, where),
    }
    for key, reader in readers.items():
        section = values.get(key)
        where = f"{place}: {key}"
        if isinstance(section, dict):
            flat |= reader({name: value for name, value in section.items() if value is not None}, where)
        elif key == "lr_schedule" and section is not None:
            flat[key] = section
        elif section is not None:
            raise RequestError(f"{where} must hold keys with values, got {quote(section)}.")
    return flat


def _lora(section: dict[str, Any], where: str) -> dict[str, Any]:
    """Our keys for mlx-lm's `lora_parameters`."""
    _refuse_others(section, ("rank", "scale", "alpha", "dropout", "keys"), where)
    flat: dict[str, Any] = {key: section[key] for key in ("rank", "scale", "alpha", "dropout") if key in section}
    if "keys" in section:
        keys = section["keys"]
        if not isinstance(keys, list):
            raise RequestError(f"{where}.keys must be a list, got {quote(keys)}.")
        unknown = [key for key in keys if not isinstance(key, str) or key not in _MODULES]
        if unknown:
            raise RequestError(
                f"{where}.keys has {quote(unknown[0])}, which OpenELM does not have; "
                f"choose from {', '.join(TARGET_MODULES)}."
            )
        flat["target_modules"] = [_MODULES[key] for key in dict.fromkeys(keys)]
    return flat


def _schedule(section: dict[str, Any], where: str) -> dict[str, Any]:
    """mlx-lm's schedules are MLX functions with their positional arguments: rates and steps, in each one's order."""
    _refuse_others(section, ("name", "warmup", "warmup_init", "arguments"), where)
    name, arguments = section.get("name"), section.get("arguments")
    if not isinstance(name, str) or name not in _SCHEDULES:
        raise RequestError(f"{where}.name must be {' or '.join(_SCHEDULES)}, got {quote(name)}.")
    order = ("learning_rate", "decay_steps", "min_learning_rate")
    if name == "linear_schedule":
        order = ("learning_rate", "min_learning_rate", "decay_steps")
    least = 3 if name == "linear_schedule" else 2
    if not isinstance(arguments, list) or not least <= len(arguments) <= 3:
        raise RequestError(f"{where}.arguments must be the list {', '.join(order)}, got {quote(arguments)}.")
    flat = {"lr_schedule": _SCHEDULES[name], "min_learning_rate": 0.0}
    flat |= dict(zip(order, arguments, strict=False))
    if section.get("warmup"):
        flat |= {key: section[key] for key in ("warmup", "warmup_init") if key in section}
    return flat


def _optimizer(section: dict[str, Any], optimizer: str, where: str) -> dict[str, Any]:
    """Our keys for the settings of `optimizer` in mlx-lm's `optimizer_config`."""
    settings = section.get(optimizer) or {}
    where = f"{where}.{optimizer}"
    if not isinstance(settings, dict):
        raise RequestError(f"{where} must hold keys with values, got {quote(settings)}.")
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        same = _SAME_HERE.get(optimizer, {})
        if key == "betas":
            if not isinstance(value, list) or len(value) != 2:
                raise RequestError(f"{where}.betas must be a list of two numbers, got {quote(value)}.")
            flat |= dict(zip(("beta1", "beta2"), value, strict=True))
        elif key in same:
            if value != same[key]:
                raise RequestError(
                    f"{where}.{key} must be {same[key]}, other values are not offered; got {quote(value)}."
                )
        elif key in _SETTINGS:
            flat[_SETTINGS[key]] = value
        else:
            raise RequestError(f"{where} has {key}, which is not offered; leave it out.")
    return flat


def _refuse_others(section: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in section:
        if key not in known:
            raise RequestError(f"{where} has an unknown key {quote(key)}; choose from {', '.join(known)}.")
