"""One tensor with an adapter's change: computed in float32 some rows at a time, and stored as requested."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..finite import check_finite
from ..formats.adapter import MIN_NORM, LowRank
from ..formats.mlx import Quantization, scale_dtype
from ..formats.safetensors import Tensor
from .repacking import pack_again

PIECE = 1 << 20  # values computed at a time


@dataclass
class Deviation:
    """What merging changed in one or more tensors, as sums of squares over their values; 0 until they are written."""

    before: float = 0.0
    change: float = 0.0
    after: float = 0.0
    error: float = 0.0
    arrived: float = 0.0  # the inner product of the intended change and the written one

    @property
    def relative_change(self) -> float:
        """The root mean square of the adapters' change, as a share of the base's."""
        return _ratio(self.change, self.before)

    @property
    def relative_error(self) -> float:
        """The root mean square of the error of storing the sum in few bits, as a share of the sum's."""
        return _ratio(self.error, self.after)

    @property
    def kept(self) -> float:
        """The share of the change that survives storing, from 0 (none) to 1 (all).

        The values of a base that was packed before lie on quantization steps, and rounding undoes a change that is much
        smaller than a step.
        """
        return self.arrived / self.change if self.change else 1.0

    def add(self, other: Deviation) -> None:
        """Add the sums of another tensor, or of more rows of this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @classmethod
    def total(cls, deviations: Iterable[Deviation]) -> Deviation:
        """The sums over several tensors."""
        result = cls()
        for deviation in deviations:
            result.add(deviation)
        return result


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


@dataclass(frozen=True)
class Change:
    """An adapter's change of one tensor: a low-rank sum, or a whole tensor in its place."""

    value: LowRank | mx.array
    is_embedding: bool

    @property
    def by_column(self) -> bool:
        """Whether DoRA normalizes columns: for an embedding that is changed on the input side only."""
        if not (self.is_embedding and isinstance(self.value, LowRank)):
            return False
        return self.value.magnitude is not None and not self.value.output_side

    def added(self, rows: slice) -> mx.array:
        """Some rows of a low-rank change, before any magnitude: [rows, in]."""
        assert isinstance(self.value, LowRank)
        a, b = self.value.a.astype(mx.float32), self.value.b.astype(mx.float32)
        left, right = (a[rows], b) if self.is_embedding else (b[:, rows].T, a.T)
        # A GPU may multiply float32 in fewer bits; these products are small.
        return self.value.scale * mx.matmul(left, right, stream=mx.cpu)

    def target(self, before: mx.array, rows: slice, column_lengths: mx.array | None) -> mx.array:
        """The same rows of the changed tensor; `before` are those of the base."""
        if not isinstance(self.value, LowRank):
            return self.value[rows].astype(mx.float32)
        total = before + self.added(rows)
        if self.value.magnitude is None:
            return total
        magnitude = self.value.magnitude.astype(mx.float32)
        if column_lengths is not None:
            return total * (magnitude / mx.maximum(column_lengths, MIN_NORM))
        lengths = mx.maximum(mx.linalg.norm(total, axis=1), MIN_NORM)
        return total * (magnitude[rows] / lengths)[:, None]


@dataclass
class Base:
    """A tensor of the base, packed or not, which is read at the first access."""

    parts: dict[str, Tensor]
    choice: Quantization | None
    shape: tuple[int, ...]
    _values: dict[str, mx.array] = field(default_factory=dict)

    def parts_of(self, rows: slice) -> dict[str, mx.array]:
        """Some rows as stored, by part."""
        if not self._values:
            self._values = {name: part.read() for name, part in self.parts.items()}
            mx.eval(list(self._values.values()))
        return {name: value[rows] for name, value in self._values.items()}

    def rows(self, rows: slice) -> mx.array:
        """Some rows in float32: [rows, in]."""
        parts = self.parts_of(rows)
        if self.choice is not None:
            return self.choice.unpack(parts, mx.float32)
        return parts["weight"].astype(mx.float32)

    def pieces(self) -> Iterator[slice]:
        """Slices that cover all rows, about `PIECE` values each."""
        step = max(1, PIECE // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            yield slice(start, start + step)

    def clear(self) -> None:
        """Free what was read."""
        self.parts.clear()
        self._values.clear()


def merged_tensors(
    path: str,
    base: Base,
    change: Change,
    choice: Quantization | None,
    full_dtype: mx.Dtype,
    dtype: mx.Dtype | None,
    deviation: Deviation,
) -> dict[str, Tensor]:
    """The tensors that replace the base's: all are computed when the first is read, and each is kept until it is read.

    Args:
        choice: how to pack the tensor; None leaves it unpacked, in type `full_dtype`.
        dtype: the requested type; None keeps the type of the scales.
    """
    made: dict[str, mx.array] = {}
    scales = scale_dtype(full_dtype)
    if dtype is None and base.choice is not None and base.choice.mode == "affine":
        scales = base.parts["scales"].dtype

    def store(values: mx.array, rows: slice) -> dict[str, mx.array]:
        if choice is None:
            return {"weight": values.astype(full_dtype)}
        if choice == base.choice and choice.mode == "affine":
            return pack_again(values, base.parts_of(rows), choice, scales)
        return choice.pack(values.astype(mx.float16) if scales == mx.float16 else values)

    pending = [change]  # emptied by the first read, which also frees the base

    def read(part: str) -> mx.array:
        if pending:
            made.update(_compute(path, base, pending.pop(), choice, store, deviation))
            base.clear()
        return made.pop(part)

    if choice is None:
        return {f"{path}.weight": Tensor(full_dtype, base.shape, functools.partial(read, "weight"))}
    dtypes = {"weight": mx.uint32, "scales": scales if choice.mode == "affine" else mx.uint8, "biases": scales}
    return {
        f"{path}.{part}": Tensor(dtypes[part], shape, functools.partial(read, part))
        for part, shape in choice.packed_shapes(base.shape).items()
    }


def _compute(
    path: str,
    base: Base,
    change: Change,
    choice: Quantization | None,
    store: Callable[[mx.array, slice], dict[str, mx.array]],
    deviation: Deviation,
) -> dict[str, mx.array]:
    """The changed tensor as stored, by part, computed some rows at a time; adds its sums to `deviation`.

    Raises:
        OpenELMError: the base or the changed tensor is not finite.
    """
    column_lengths = _column_lengths(base, change) if change.by_column else None
    result: dict[str, mx.array] = {}
    for rows in base.pieces():
        before = base.rows(rows)
        after = change.target(before, rows, column_lengths)
        parts = store(after, rows)
        written = parts["weight"].astype(mx.float32) if choice is None else choice.unpack(parts, mx.float32)
        added, error = after - before, written - after
        pairs = ((before, before), (added, added), (after, after), (error, error), (written - before, added))
        sums = mx.stack([(left * right).sum() for left, right in pairs])
        for name, part in parts.items():
            if name not in result:
                result[name] = mx.zeros((base.shape[0], *part.shape[1:]), part.dtype)
            result[name][rows] = part  # in place, since this is the only reference
        mx.eval(sums, *result.values())
        squares: Any = sums.tolist()
        if not all(map(math.isfinite, squares)):
            for values in (before, after, *parts.values()):
                check_finite(values, f"{path}.weight", "fused")
        deviation.add(Deviation(*squares))
    return result


def _column_lengths(base: Base, change: Change) -> mx.array:
    """The norm of each column [in] of an embedding with the change added."""
    total = mx.zeros(base.shape[1])
    for rows in base.pieces():
        total = total + mx.square(base.rows(rows) + change.added(rows)).sum(axis=0)
        mx.eval(total)
    return mx.sqrt(total)
