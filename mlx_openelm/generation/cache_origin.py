"""What a prompt cache was computed with: model, revision, adapter, type. It is of use to nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import RequestError
from ..hub import catalog
from ..model import OpenELM

_SAMPLES = 64  # values of each parameter in a fingerprint
_WRITE_AGAIN = "or write the cache again with `mlx-openelm cache-prompt`"


@dataclass(frozen=True)
class Origin:
    """Model, revision and adapters as the user named them, the type that was computed in, and the weights' fingerprint.

    Files of mlx-lm name the model only.
    """

    model: str | None = None
    revision: str | None = None
    adapter: tuple[str, ...] = ()
    dtype: str | None = None
    fingerprint: str | None = None

    @classmethod
    def of(
        cls, model: OpenELM, name: str | None = None, revision: str | None = None, adapter: Sequence[str] = ()
    ) -> Origin:
        """The origin of what this model computes."""
        return cls(name, revision, tuple(adapter), dtype_of(model), fingerprint(model))

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any]) -> Origin:
        """From the metadata of a file."""
        try:
            adapter = tuple(map(str, json.loads(notes.get("adapter", "[]"))))
        except (ValueError, TypeError, RecursionError):
            adapter = ()
        names = ("model", "revision", "dtype", "fingerprint")
        model, revision, dtype, print_ = (notes.get(name) or None for name in names)
        return cls(model, revision, adapter, dtype, print_)

    def notes(self) -> dict[str, str]:
        """As metadata of a file."""
        values = {"model": self.model, "revision": self.revision, "dtype": self.dtype, "fingerprint": self.fingerprint}
        adapter = {"adapter": json.dumps(self.adapter)} if self.adapter else {}
        return {name: value for name, value in values.items() if value is not None} | adapter

    def __str__(self) -> str:
        revision = f", revision {self.revision}" if self.revision else ""
        adapter = f", adapter {' and '.join(self.adapter)}" if self.adapter else ""
        return f"{self.model or 'an unnamed model'}{revision}{adapter}"

    def check(self, other: Origin, source: str) -> None:
        """Refuse what `self` computed for a model that is `other`; `source` names it in messages.

        Raises:
            RequestError: the type or the weights differ, or, where they are not known, the models' names.
        """
        if self.dtype is not None and self.dtype != other.dtype:
            raise RequestError(
                f"{source} was computed in {self.dtype}, and the model computes in {other.dtype}; "
                f"give --dtype {self.dtype}, {_WRITE_AGAIN}."
            )
        if self.fingerprint is not None and other.fingerprint is not None:
            same = self.fingerprint == other.fingerprint
        else:
            same = self.model is None or other.model is None or _same_model(self.model, other.model)
        if not same:
            no_adapter = ", no adapter" if self.adapter and not other.adapter else ""
            given = f"{other}{no_adapter}" if str(other) != str(self) else "what now has this name"
            raise RequestError(f"{source} was made with {self}, not with {given}; give the same, {_WRITE_AGAIN}.")


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: the same release, or the same file."""
    releases = catalog.find(one), catalog.find(other)
    if releases[0] is not None and releases[0] == releases[1]:
        return True
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def dtype_of(model: OpenELM) -> str:
    """The type that the model computes in, such as float32: norms have it, whatever the matrices are stored in."""
    return str(model.transformer.norm.weight.dtype).removeprefix("mlx.core.")


def fingerprint(model: OpenELM) -> str:
    """A digest of the model's weights, adapters included, from a few values of each; types do not count."""
    parts, digest = [], hashlib.blake2b(digest_size=16)
    parameters: Any = tree_flatten(model.parameters())
    for name, weight in sorted(parameters):
        digest.update(f"{name}{weight.shape}".encode())
        values = weight.reshape(-1)[:: max(1, weight.size // _SAMPLES)][:_SAMPLES]
        parts.append(values if values.dtype == mx.uint32 else values.astype(mx.float32).view(mx.uint32))
    for name, module in model.named_modules():
        if isinstance(scale := getattr(module, "scale", None), float | int):  # of an adapter
            digest.update(f"{name}{float(scale)}".encode())
    digest.update(bytes(memoryview(mx.concatenate(parts))))  # type: ignore[arg-type]
    return digest.hexdigest()
