"""Adapters for the rows of batches: read when they are asked for, held up to a number of bytes, dropped by use."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..config import NORM
from ..errors import RequestError, quote
from ..formats.adapter import Adapter
from ..model import OpenELM
from ..modules import module_at
from ..wording import size
from .attaching import adapted, adapted_layers, check_base, check_fits, with_weight
from .files import read_adapter
from .rows import Division, mixed_modules
from .switching import AdapterPaths, mix, parse_paths

# The most bytes of adapters that a pool holds by default.
DEFAULT_BYTES = 1 << 30

_Paths = tuple[tuple[str, float], ...]


class PoolFullError(RequestError):
    """There is no room for an adapter until one of those in use is released."""


@dataclass(eq=False)
class _Held:
    """An adapter in memory: the modules that replace the base's, by path."""

    paths: _Paths
    modules: Mapping[str, nn.Module]
    nbytes: int
    digest: str
    users: int = 0


class AdapterHandle:
    """One use of an adapter, from `AdapterPool.acquire` to `release`.

    `name` is what was asked for, `digest` a fingerprint of the adapter's values: what is computed with it, such as
    keys and values, may be used again by whatever has the same digest. `nbytes` is its size in memory.
    """

    def __init__(self, name: str, held: _Held):
        self.name, self.digest, self.nbytes = name, held.digest, held.nbytes
        self._held: _Held | None = held

    def __repr__(self) -> str:
        return f"AdapterHandle({self.name!r}{', released' if self._held is None else ''})"


class AdapterPool:
    """Adapters of one model, a different one for each row of a batch.

    Any thread may acquire and release. `rows`, and the forward passes in it, belong to the one thread that runs the
    model. Nobody else may replace the model's modules as long as the pool is used, as `AdapterSwitch` does.

    Args:
        model: the base, without an adapter; it is put in evaluation mode. Whole weights that full fine-tuning trained
            and `load` attached count as the base's own.
        max_bytes: the most memory of all adapters together, 1 GiB by default. Of those that no row uses, the least
            recently used are dropped first. A step with several adapters copies those in use, about half their size.
        read: reads the adapter at a path; by default `read_adapter`.

    Raises:
        RequestError: a model with an adapter, or a negative number of bytes.
    """

    def __init__(self, model: OpenELM, *, max_bytes: int = DEFAULT_BYTES, read: Callable[[str], Adapter] | None = None):
        if next(adapted_layers(model), None) is not None:
            raise RequestError(
                "The model was loaded with an adapter, which all rows would have: load it without, and give the "
                "adapter to the rows that use it."
            )
        if not isinstance(max_bytes, int) or max_bytes < 0:
            raise RequestError(f"max_bytes must be a whole number of bytes, 0 or above, got {quote(max_bytes)}.")
        model.eval()
        self.model, self.max_bytes, self.nbytes = model, max_bytes, 0
        self._read = read if read is not None else lambda path: read_adapter(path, model.config)
        self._paths: dict[str, str] = {}
        self._sizes: dict[_Paths, int] = {}  # of all adapters so far, so that waiting for room reads no file twice
        self._held: OrderedDict[_Paths, _Held] = OrderedDict()  # the least recently used first
        self._lock, self._reading = threading.Lock(), threading.Lock()
        # Every module that has weights, the one above it, and its name there.
        self._base: dict[str, nn.Module] = {}
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for path in {name.rpartition(".")[0] for name in model.config.tensor_shapes()}:
            above, _, name = path.rpartition(".")
            self._base[path], self._places[path] = module_at(model, path), (module_at(model, above), name)
        self._division = Division()
        self._in_rows = False
        self._last_rows: list[_Held | None] = []
        self._mixed: tuple[tuple[_Held | None, ...], dict[str, nn.Module]] = (), {}

    @property
    def names(self) -> list[str]:
        """The names that were added."""
        return list(self._paths)

    @property
    def held(self) -> list[str]:
        """The adapters in memory, the least recently used first."""
        with self._lock:
            return [_to_text(paths) for paths in self._held]

    @property
    def room_needed(self) -> int:
        """The most bytes that the adapters read so far may take besides those in memory, copies in steps included."""
        total = min(self.max_bytes, sum(self._sizes.values()))
        return max(0, total - self.nbytes) + (total // 2 if len(self._sizes) > 1 else 0)

    def add(self, name: str, path: str | Path) -> None:
        """Give an adapter's path a name; it is read when a row asks for it.

        Raises:
            RequestError: the name is taken.
        """
        if name in self._paths:
            raise RequestError(f"There is already an adapter named {quote(name)}; give this one another name.")
        self._paths[name] = str(path)

    def acquire(self, adapter: AdapterPaths) -> AdapterHandle:
        """Get an adapter for a row, read from its files unless it is in memory. `release` it when the row ends.

        Args:
            adapter: a name that was added, a path as for `read_adapter`, or a mixture as for `load`.

        Raises:
            PoolFullError: there is no room as long as others are in use.
            RequestError: it does not match the model, alone exceeds the pool's bytes, or as `read_adapter` and `mix`.
            OpenELMError: a download that failed.
        """
        paths = self._to_paths(adapter)
        name = os.fspath(adapter) if isinstance(adapter, str | os.PathLike) else _to_text(paths)
        if (held := self._use(paths)) is None:
            with self._reading:
                if (held := self._use(paths)) is None:
                    with self._lock:
                        self._check_room(name, self._sizes.get(paths, 0))
                    held = self._load(name, paths)
                    self._keep(name, held)
        return AdapterHandle(name, held)

    def release(self, handle: AdapterHandle) -> None:
        """End a row's use of its adapter, which stays in memory until its room is needed.

        Raises:
            ValueError: the handle was released before.
        """
        with self._lock:
            held = _held_by(handle)
            held.users -= 1
            self._held.move_to_end(held.paths)
            handle._held = None

    @contextmanager
    def rows(self, handles: Sequence[AdapterHandle | None]) -> Iterator[None]:
        """Inside, the model computes each row with its adapter: row i of `hidden_states` and `logits` with handles[i].

        With different adapters, rows are one position each, as in a decoding step. If all handles are the same one,
        the model takes any number of rows and positions, such as a piece of a prompt; if all are None, it stays as it
        is. Blocks cannot be nested.

        Raises:
            ValueError: a released handle, or none given; or the model is called with another number of rows.
        """
        if self._in_rows:
            raise RuntimeError("The rows of a batch have their adapters already: blocks cannot be nested.")
        with self._lock:
            modules = self._modules([None if handle is None else _held_by(handle) for handle in handles])
        self._in_rows = True
        try:
            for path, module in modules.items():
                above, name = self._places[path]
                above[name] = module  # a module is a dictionary; setting an attribute does more than is needed
            yield
        finally:
            for path in modules:
                above, name = self._places[path]
                above[name] = self._base[path]
            self._in_rows = False

    def _modules(self, rows: list[_Held | None]) -> Mapping[str, nn.Module]:
        """The modules to put in the model for these rows."""
        if not rows:
            raise ValueError("No rows were given.")
        if all(held is rows[0] for held in rows):
            return {} if rows[0] is None else rows[0].modules
        if rows != self._last_rows:
            choices = self._mixed[0]
            if not set(choices).issuperset(rows):
                # All in use, since each may be in one of the next steps, and stacking them takes a while.
                choices = (None, *(held for held in self._held.values() if held.users))
                adapters = [{} if held is None else held.modules for held in choices]
                dtype = self._base[NORM]["weight"].dtype
                self._mixed = choices, mixed_modules(self._base, adapters, self._division, dtype)
            number = {held: number for number, held in enumerate(choices)}
            self._division.assign([number[held] for held in rows])
            self._last_rows = rows
        return self._mixed[1]

    def _to_paths(self, adapter: AdapterPaths) -> _Paths:
        if isinstance(adapter, str) and adapter in self._paths:
            return ((self._paths[adapter], 1.0),)
        return tuple((self._paths.get(path, path), weight) for path, weight in parse_paths(adapter))

    def _use(self, paths: _Paths) -> _Held | None:
        with self._lock:
            if (held := self._held.get(paths)) is not None:
                held.users += 1
                self._held.move_to_end(paths)
            return held

    def _load(self, name: str, paths: _Paths) -> _Held:
        adapter = mix([(path, self._read(path), weight) for path, weight in paths])
        check_fits(adapter, self.model.config, f"The adapter {name}")
        check_base(adapter, self.model, dict(self._base))
        dtype = self._base[NORM]["weight"].dtype
        modules: dict[str, nn.Module] = {}
        nbytes = 0
        for path, change in adapter.modules.items():
            modules[path] = layer = adapted(self._base[path], change)
            mx.eval(layer.trainable_parameters())
            nbytes += layer.nbytes(dtype)
        for tensor, weight in adapter.weights.items():
            path = tensor.rpartition(".")[0]
            modules[path] = with_weight(self._base[path], weight.astype(dtype))
            mx.eval(modules[path]["weight"])
            nbytes += modules[path]["weight"].nbytes
        return _Held(paths, modules, nbytes, _digest(adapter))

    def _keep(self, name: str, held: _Held) -> None:
        self._sizes[held.paths] = held.nbytes
        with self._lock:
            self._check_room(name, held.nbytes)
            for paths, other in list(self._held.items()):
                if self.nbytes + held.nbytes <= self.max_bytes:
                    break
                if not other.users:
                    del self._held[paths]
                    self.nbytes -= other.nbytes
                    if other in self._mixed[0]:
                        self._mixed, self._last_rows = ((), {}), []
            held.users += 1
            self._held[held.paths] = held
            self.nbytes += held.nbytes

    def _check_room(self, name: str, nbytes: int) -> None:
        if nbytes > self.max_bytes:
            raise RequestError(
                f"The adapter {name} takes {size(nbytes)} of memory, and all together may take {size(self.max_bytes)}; "
                "raise max_bytes."
            )
        in_use = sum(held.nbytes for held in self._held.values() if held.users)
        if in_use + nbytes > self.max_bytes:
            raise PoolFullError(
                f"The adapter {name} takes {size(nbytes)} of memory, but others in use take {size(in_use)} of "
                f"{size(self.max_bytes)}; release one, or raise max_bytes."
            )


def _held_by(handle: AdapterHandle) -> _Held:
    if handle._held is None:
        raise ValueError(f"The adapter {handle.name} was released.")
    return handle._held


def _to_text(paths: _Paths) -> str:
    return ", ".join(path if weight == 1 else f"{path}={weight:g}" for path, weight in paths)


def _digest(adapter: Adapter) -> str:
    """A fingerprint of an adapter's values."""
    digest = hashlib.blake2b(digest_size=16)
    arrays: list[tuple[str, mx.array | None]] = list(adapter.weights.items())
    for path, change in adapter.modules.items():
        arrays += [(f"{path} {change.scale} {change.output_side}", change.a), ("", change.b), ("", change.magnitude)]
    for name, array in arrays:
        digest.update(f"{name} {None if array is None else (array.shape, array.dtype)};".encode())
        if array is not None:
            values: Any = mx.contiguous(array).reshape(-1).view(mx.uint8)
            digest.update(values)
    return digest.hexdigest()
