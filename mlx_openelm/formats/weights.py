"""A model's tensors by name, read one at a time, so that memory never holds all of them together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

# Bytes of freed buffers that MLX may keep for reuse while tensors of all sizes pass through memory.
_KEPT_BYTES = 1 << 28

# The types of weights, by the names that flags and files give them.
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet: its type, its shape, and what reads it (or makes it of others)."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    read: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    def cast(self, dtype: mx.Dtype) -> Tensor:
        """The same values in another type."""
        return self if dtype == self.dtype else Tensor(dtype, self.shape, lambda: self.read().astype(dtype))


class Weights(Mapping[str, mx.array]):
    """Tensors by name: `weights[name]` reads one, `take` also forgets it, types and shapes are known before.

    It takes over the dictionary it is given, so that nobody else keeps what it forgets.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, mx.array]) -> Weights:
        """Arrays that exist already, or that MLX reads by itself when they are used."""
        # A default argument binds each array, not the loop's last.
        return cls({n: Tensor(a.dtype, a.shape, lambda array=a: array) for n, a in arrays.items()})  # type: ignore[misc]

    def __getitem__(self, name: str) -> mx.array:
        return self._tensors[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self, name: str) -> mx.array:
        """Read a tensor and forget it; what is returned may still be lazy."""
        return self._tensors.pop(name).read()

    def tensor(self, name: str) -> Tensor:
        """A tensor unread."""
        return self._tensors[name]

    def tensors(self) -> dict[str, Tensor]:
        """All of them unread, in a dictionary of one's own."""
        return dict(self._tensors)


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """A block in which tensors are read, used and dropped one after the other: MLX keeps few of their buffers."""
    limit = mx.set_cache_limit(_KEPT_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
