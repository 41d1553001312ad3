"""PEFT's `adapter_config.json` for LoRA: supported, ignored and rejected settings.

Source: peft/tuners/lora/config.py and layer.py, peft/tuners/tuners_utils.py (check_target_module_exists) and
peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..config import EMBEDDING, HEAD
from ..errors import QUOTED, RequestError, quote
from ..inputs import read_json
from .adapter_tensors import MAX_FLOAT32
from .name_patterns import Matcher, PatternError

# Settings that do not affect what the tensors mean. `fan_in_fan_out` is for layers whose matrices are transposed, which
# OpenELM has none of; `velora_config` changes training only; `merge_weights` told old versions what to do at load.
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
}
# Settings that are read or checked below. OpenELM's matrices have no biases, so any known `bias` will do.
READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
# Initializations that leave the base unchanged. All others modify the base, which PEFT can undo for the convertible
# ones.
_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")
_BIASES = (None, "none", "all", "lora_only")
_ALL_LINEAR = "all-linear"
_DEFAULT = 8  # of `r` and `lora_alpha`
_MAX_PATTERNS = 1000


class Settings:
    """The checked settings of one file.

    Raises:
        RequestError: the file cannot be read, or has an unsupported method or setting; the methods raise it for
            patterns and numbers that are invalid for a module.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._values = read_json(file)
        self._matcher = Matcher()
        self._left_out: dict[str, str | None] = {}
        kind = self._values.get("peft_type")
        if kind != "LORA":
            raise RequestError(f"{file}: peft_type {quote(kind)} is not supported; only LORA is, with or without DoRA.")
        self._check_initial()
        if self._values.get("bias") not in _BIASES:
            raise RequestError(f"{file}: unknown bias {quote(self._values['bias'])}; expected none, all or lora_only.")
        for name, value in self._values.items():
            if value and name not in HARMLESS | READ:
                raise RequestError(f"{file}: {name[:QUOTED]} = {quote(value)} is not supported.")
        self.is_dora = self._flag("use_dora")
        self._is_rank_stabilized = self._flag("use_rslora")
        self.dropout = self._number(self._values.get("lora_dropout"), "lora_dropout", 0.0)
        if not 0 <= self.dropout <= 1:
            raise RequestError(f"{file}: lora_dropout must be from 0 to 1, got {self.dropout:g}.")
        self._targets, self._excluded = self._modules("target_modules"), self._modules("exclude_modules")
        self._saved = self._texts("modules_to_save")
        self._layers = self._layer_numbers()
        for name in ("rank_pattern", "alpha_pattern"):
            self._check_patterns(name)

    def _check_initial(self) -> None:
        initial = self._values.get("init_lora_weights")
        initial = initial.lower() if isinstance(initial, str) else initial
        if initial in _INITIAL:
            return
        if not str(initial).startswith((*_CONVERTIBLE, "loftq")):
            raise RequestError(f"{self.file}: unknown init_lora_weights {quote(initial)}.")
        advice = "merge it into that with PEFT, and give the merged model as --model"
        if str(initial).startswith(_CONVERTIBLE):
            advice = "let PEFT convert the adapter to LoRA when it saves it (path_initial_model_for_weight_conversion)"
        raise RequestError(f"{self.file}: init_lora_weights {quote(initial)} changes the base model too; {advice}.")

    @property
    def base_model(self) -> str | None:
        """The base model's name or path, if the file has one."""
        name = self._values.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def rank(self, path: str) -> float:
        """The rank of a module's adapter."""
        return self._of_module("rank_pattern", "r", path)

    def scale(self, path: str, rank: int) -> float:
        """The scale of a module's update: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        alpha = self._of_module("alpha_pattern", "lora_alpha", path)
        return alpha / (math.sqrt(rank) if self._is_rank_stabilized else rank)

    def targets(self, path: str) -> bool:
        """Whether the settings say that a module is adapted."""
        return self._targets is not None and self.left_out_by(path) is None

    def left_out_by(self, path: str) -> str | None:
        """The setting that keeps PEFT from adapting a module, or None; PEFT ignores tensors for such a module."""
        if path not in self._left_out:
            self._left_out[path] = self._find_left_out(path)
        return self._left_out[path]

    def _find_left_out(self, path: str) -> str | None:
        if self._excluded is not None and self._is_among(self._excluded, "exclude_modules", path):
            return "exclude_modules"
        if self.saves(path):
            return "modules_to_save"
        if self._targets is None:
            return None
        if self._targets == _ALL_LINEAR:
            return "target_modules" if path in (EMBEDDING, HEAD) else None
        if not self._is_among(self._targets, "target_modules", path):
            return "target_modules"
        if self._layers is None or isinstance(self._targets, str) or self._layer_of(path) in self._layers:
            return None
        return "layers_to_transform"

    def saves(self, path: str) -> bool:
        """Whether `modules_to_save` has a module, or one that contains it."""
        ends = [dot.start() for dot in re.finditer(r"\.|$", path)]
        return any(self._has_parts("modules_to_save", name, path, ends) for name in self._saved)

    def _is_among(self, modules: str | frozenset[str], setting: str, path: str) -> bool:
        """Whether an expression matches a module's path, or a set holds the path or its last parts."""
        if isinstance(modules, str):
            return self._matches(setting, modules, partial(self._matcher.fullmatch, modules, path))
        parts = path.split(".")
        return any(".".join(parts[n:]) in modules for n in range(len(parts)))

    def _layer_of(self, path: str) -> int | None:
        """The number of the layer that a module is in, if `layers_pattern` matches what precedes the number."""
        number = re.search(r"\.(\d+)\.", path)
        if number is None:
            return None
        names = self._texts("layers_pattern") or [r"[^.]*"]
        found = any(self._has_parts("layers_pattern", name, path, [number.start()]) for name in names)
        return int(number[1]) if found else None

    def _has_parts(self, setting: str, pattern: str, path: str, ends: list[int]) -> bool:
        return self._matches(setting, pattern, partial(self._matcher.matches_parts, pattern, path, ends))

    def _of_module(self, setting: str, common: str, path: str) -> float:
        """A module's rank or alpha: that of the first pattern that matches the end of its path, else the common one."""
        patterns = self._values.get(setting) or {}
        for pattern in patterns:
            if self._matches(setting, pattern, partial(self._matcher.matches_end, pattern, path)):
                return self._number(patterns[pattern], f"{setting} of {quote(pattern)}")
        return self._number(self._values.get(common), common, _DEFAULT)

    def _matches(self, setting: str, pattern: str, match: Callable[[], bool]) -> bool:
        try:
            return match()
        except PatternError as error:
            raise RequestError(f"{self.file}: {setting} has {quote(pattern)}, which {error}.") from None

    def _check_patterns(self, name: str) -> None:
        patterns = self._values.get(name) or {}
        if not isinstance(patterns, dict):
            raise RequestError(f"{self.file}: {name} must be an object of numbers by module, got {quote(patterns)}.")
        if len(patterns) > _MAX_PATTERNS:
            raise RequestError(
                f"{self.file}: {name} has {len(patterns)} entries, more than the limit of {_MAX_PATTERNS}."
            )

    def _layer_numbers(self) -> frozenset[int] | None:
        layers = self._values.get("layers_to_transform")
        if layers is None or layers == []:
            return None
        numbers = layers if isinstance(layers, list) else [layers]
        if any(type(number) is not int for number in numbers):
            raise RequestError(f"{self.file}: layers_to_transform must be layer numbers, got {quote(layers)}.")
        return frozenset(numbers)

    def _modules(self, name: str) -> str | frozenset[str] | None:
        """An expression, a set of names, or None if the setting is absent."""
        value = self._values.get(name)
        return value if value is None or isinstance(value, str) else frozenset(self._texts(name))

    def _texts(self, name: str) -> list[str]:
        value = self._values.get(name) or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or any(not isinstance(text, str) for text in values):
            raise RequestError(f"{self.file}: {name} must be names of modules, got {quote(value)}.")
        return values

    def _flag(self, name: str) -> bool:
        value = self._values.get(name)
        if value not in (None, True, False):
            raise RequestError(f"{self.file}: {name} must be true or false, got {quote(value)}.")
        return bool(value)

    def _number(self, value: object, name: str, default: float | None = None) -> float:
        value = default if value is None else value
        if not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= MAX_FLOAT32:
            return float(value)
        raise RequestError(f"{self.file}: {name} must be a finite float32 number, got {quote(value)}.")
