"""A model's tensors by name, read one at a time, so that they are never all in memory together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

# Bytes of freed buffers that MLX may keep for reuse while tensors of many sizes pass through memory.
_KEPT_BYTES = 1 << 28

# The types of weights, by the names that flags and files give them.
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet: its type, its shape, and the function that reads or computes it."""

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
    """Tensors by name: `weights[name]` reads one, `take` also forgets it; types and shapes are known without reading.

    It owns the dictionary it is given, so that a tensor it forgets is freed.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, mx.array]) -> Weights:
        """From arrays that exist already, or that MLX reads when they are first used."""
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
        """Read a tensor and forget it; the array may still be lazy."""
        return self._tensors.pop(name).read()

    def drain(self) -> Iterator[tuple[str, mx.array]]:
        """Take every tensor with its name, the largest first; the arrays may still be lazy."""
        sizes = {name: tensor.nbytes for name, tensor in self._tensors.items()}
        for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
            yield name, self._tensors.pop(name).read()

    def tensor(self, name: str) -> Tensor:
        """A tensor, unread."""
        return self._tensors[name]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, unread, in a new dictionary."""
        return dict(self._tensors)


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """A block in which tensors are read, used and dropped one by one: MLX keeps few of their buffers for reuse."""
    limit = mx.set_cache_limit(_KEPT_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)
