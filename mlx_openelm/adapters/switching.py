"""Several adapters on one base: switch between them without loading the base again, or mix them with weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError, quote
from ..formats.adapter import Adapter, LowRank
from ..inputs import path_list
from ..model import OpenELM
from .attaching import (
    Adapted,
    Replaced,
    adapted_layers,
    attach,
    base_of,
    check_base,
    check_fits,
    detach,
    make_layers,
    put,
)
from .files import find_local, read_adapter

# One adapter, several, or several with weights; a string may end in `=WEIGHT`.
AdapterPaths = str | Path | Sequence[str | Path] | Mapping[str, float]


@contextmanager
def without_adapters(model: OpenELM) -> Iterator[None]:
    """Switch a model's adapters off while the block runs: inside, the base's own layers compute.

    This is the reference model of DPO. It works inside functions that MLX compiles or differentiates too. Treat
    values computed inside as constants (`mx.stop_gradient`): the backward pass runs after the block, when the
    adapters are on again. Blocks may be nested. Whole weights, which full fine-tuning trains, stay as they are.
    """
    layers = dict(adapted_layers(model))
    put(model, {path: base_of(layer) for path, layer in layers.items()})
    try:
        yield
    finally:
        for layer in layers.values():
            layer.train(base_of(layer).training)  # model.train() and eval() inside did not reach the adapters
        put(model, layers)


class AdapterSwitch:
    """Adapters by name; the model uses one of them, a mixture, or none.

    A key-value cache belongs to the adapters in use when it was filled. Do not switch while the model runs.
    """

    def __init__(self, model: OpenELM):
        """The model must not have an adapter yet."""
        self.model = model
        self.in_use: dict[str, float] = {}
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, dict[str, Adapted]] = {}
        self._replaced: Replaced = {}

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order they were added."""
        return list(self._adapters)

    def add(self, name: str, adapter: str | Path | Adapter) -> None:
        """Add an adapter under a name; it is not used yet.

        Raises:
            RequestError: the name is taken, the adapter does not match the model, or as `read_adapter`.
        """
        if name in self._adapters:
            raise RequestError(f"There is already an adapter named {quote(name)}; remove it first.")
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter, self.model.config)
        check_fits(adapter, self.model.config, f"The adapter {name}")
        check_base(adapter, self.model, self._replaced)
        mx.eval([[change.a, change.b] for change in adapter.modules.values()])
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter; if it is in use, the model goes back to the base.

        Raises:
            RequestError: an unknown name.
        """
        self._get(name)
        if name in self.in_use:
            self.use(None)
        del self._adapters[name]
        self._layers.pop(name, None)

    def use(self, choice: str | Mapping[str, float] | None) -> None:
        """Use one adapter, a mixture (weight by name), or with None the base alone.

        Raises:
            RequestError: an unknown name, or an invalid mixture; the adapters in use stay.
        """
        weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
        if choice is not None and not weights:
            raise RequestError("A mixture needs an adapter; give None for the base alone.")
        parts = [(name, self._get(name), weight) for name, weight in weights.items()]
        mixed = mix(parts)
        self._clear()
        if list(weights.values()) == [1.0]:
            (name,) = weights
            self._use_one(name)
        else:
            put(self.model, make_layers(self.model, mixed))
        self.in_use = weights

    def _use_one(self, name: str) -> None:
        """Use an adapter with weight 1. Its layers are kept, so DoRA computes the norms of the base only once."""
        adapter = self._adapters[name]
        if adapter.weights:
            self._replaced = attach(self.model, adapter)
            return
        if name not in self._layers:
            self._layers[name] = make_layers(self.model, adapter)
        put(self.model, self._layers[name])

    def _clear(self) -> None:
        detach(self.model)
        put(self.model, self._replaced)
        self._replaced, self.in_use = {}, {}

    def _get(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise RequestError(f"No adapter is named {quote(name)}; there are {', '.join(self._adapters) or 'none'}.")
        return self._adapters[name]


def mix(adapters: Sequence[tuple[str, Adapter, float]]) -> Adapter:
    """One adapter that adds the weighted changes of several; its rank is the sum of theirs.

    Args:
        adapters: name, adapter and weight.

    Raises:
        RequestError: a weight that is not finite, or adapters other than LoRA, which cannot be added.
    """
    if len(adapters) == 1 and adapters[0][2] == 1:
        return adapters[0][1]
    changes: dict[str, list[tuple[LowRank, float]]] = {}
    for name, adapter, weight in adapters:
        if not math.isfinite(weight):
            raise RequestError(f"The weight of the adapter {name} must be a number, got {weight}.")
        method = "full fine-tuning" if adapter.weights else "DoRA" if _is_dora(adapter) else None
        if method is not None:
            raise RequestError(f"The adapter {name} is {method}, which can only be used alone, with weight 1.")
        for path, change in adapter.modules.items():
            changes.setdefault(path, []).append((change, weight))
    copies = [copy for _, adapter, _ in adapters for copy in adapter.base_copies]
    return Adapter({path: _sum(path, parts) for path, parts in changes.items()}, base_copies=copies)


def _is_dora(adapter: Adapter) -> bool:
    return any(change.magnitude is not None for change in adapter.modules.values())


def _sum(path: str, parts: Sequence[tuple[LowRank, float]]) -> LowRank:
    output_sides = {change.output_side for change, _ in parts}
    if len(output_sides) > 1:
        raise RequestError(
            f"One adapter changes {path} as mlx-lm does, on the output side too, and another does not: "
            "they cannot be mixed."
        )
    a = mx.concatenate([change.a for change, _ in parts], axis=1)
    b = mx.concatenate([weight * change.scale * change.b for change, weight in parts], axis=0)
    return LowRank(a, b, 1.0, output_side=output_sides.pop())


def read_mixture(adapter_path: AdapterPaths, config: ModelConfig) -> Adapter:
    """The adapter, or the mixture of adapters, at the given paths.

    Raises:
        RequestError: as `parse_paths`, `read_adapter` and `mix`.
        OpenELMError: a download that failed.
    """
    return mix([(path, read_adapter(path, config), weight) for path, weight in parse_paths(adapter_path)])


def parse_paths(adapter_path: AdapterPaths) -> list[tuple[str, float]]:
    """Adapters with their weights, from one path, several, `PATH=WEIGHT`, or a mapping.

    Raises:
        RequestError: no adapter, something that is no path, or a weight that is not a number.
    """
    if isinstance(adapter_path, Mapping):
        paths = [os.fspath(path) for path in path_list(list(adapter_path), "--adapter-path")]
        found = [(path, _to_weight(path, weight)) for path, weight in zip(paths, adapter_path.values(), strict=True)]
    else:
        found = [_parse_path(path) for path in path_list(adapter_path, "--adapter-path")]
    if not found:
        raise RequestError("--adapter-path is empty; give an adapter.")
    return found


def _to_weight(path: str, weight: object) -> float:
    try:
        return float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RequestError(
            f"The weight of the adapter {path} must be a number, got {quote(weight)}; other settings than adapters are "
            "given by name."
        ) from None


def _parse_path(path: str | os.PathLike[str]) -> tuple[str, float]:
    """Path and weight; a path that exists may itself end in `=` and a number."""
    text = os.fspath(path)
    name, equals, number = text.rpartition("=")
    if not isinstance(path, str) or not equals or find_local(text) is not None:
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        return text, 1.0
