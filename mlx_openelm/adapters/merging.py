"""Adding an adapter to a checkpoint: one matrix at a time, in float32, packed as requested."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..config import ModelConfig
from ..formats.adapter import EMBEDDING, Adapter, LowRank
from ..formats.mlx import Checkpoint
from ..formats.packing import PARTS, Plan, Quantization, cast_weights, dequantize_weights, quantize_weights, scale_dtype
from ..formats.weights import Tensor, Weights
from .attaching import check_fits
from .base_copies import Stored, check_base_copies
from .repacking import pack_again

HEAD = "lm_head"

_PIECE = 1 << 20  # values computed at a time
# The least norm of a row or column, so that an empty one is not divided by zero.
_MIN_NORM = 1e-12


@dataclass
class Deviation:
    """What merging changed in one or more tensors, as sums of squares over their values; 0 until they are written."""

    before: float = 0.0
    change: float = 0.0
    after: float = 0.0
    error: float = 0.0
    arrived: float = 0.0  # the product of the intended change and the written one

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
        """The share of the change that survives storing: 1 all of it, 0 none. If the base was packed before, its values
        lie on the steps of rounding, and rounding undoes a change that is small beside a step."""
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


@dataclass
class Merged:
    """A merged checkpoint.

    Attributes:
        checkpoint: with unread weights.
        deviations: by module path, filled as the weights are read.
        exceptions: descriptions of matrices packed differently from the rest, by module path.
        untied: whether the output layer, shared with the embedding before, became a tensor of its own.
    """

    checkpoint: Checkpoint
    deviations: dict[str, Deviation] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    untied: bool = False


@dataclass(frozen=True)
class _Change:
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
            return total * (magnitude / mx.maximum(column_lengths, _MIN_NORM))
        lengths = mx.maximum(mx.linalg.norm(total, axis=1), _MIN_NORM)
        return total * (magnitude[rows] / lengths)[:, None]


def merge(
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    dtype: mx.Dtype | None = None,
    plan: Plan | None = None,
    dequantize: bool = False,
) -> Merged:
    """The checkpoint with an adapter's changes; nothing is read yet, and both arguments are emptied.

    LoRA turns W into W + ΔW, where ΔW is scale * (a b)ᵀ. DoRA turns it into m / ||W + ΔW|| * (W + ΔW), with norms of
    rows, or of columns for an embedding that is changed on the input side only. By default packed matrices are packed
    again in the same way, and tensors that the adapter does not change keep every bit. If an embedding that is shared
    with the output layer changes on the input side only, the output layer becomes a tensor of its own.

    Args:
        dtype: the type of what is not packed; the stored type by default.
        plan: packs all matrices, also those that were packed in another way.
        dequantize: unpack all matrices.

    Raises:
        RequestError: an adapter that does not fit the model, or that has copies of another base's weights.
    """
    config, packed = checkpoint.config, checkpoint.quantization
    check_fits(adapter, config)
    tensors = checkpoint.weights.tensors()

    def stored_parts(name: str) -> Stored:
        path = name.rpartition(".")[0]
        parts = {part: tensors[f"{path}.{part}"].read() for part in PARTS if f"{path}.{part}" in tensors}
        return parts, packed.get(path)

    check_base_copies(adapter, stored_parts)
    changes = _collect(adapter, config)
    stored = dtype or checkpoint.dtype
    untied = _changes_input_only(changes, config)
    if untied:
        tensors, packed = _with_head(tensors, packed)
        config = replace(config, share_input_output_layers=False)

    merged = Merged(replace(checkpoint, config=config), untied=untied)
    choices = {} if dequantize else packed
    if plan is not None:
        choices, merged.exceptions = plan(config)

    rest = Weights({name: tensor for name, tensor in tensors.items() if _weight_name(name) not in changes})
    if dequantize or plan is not None:
        rest = dequantize_weights(rest, packed, stored if dequantize else mx.float32)
    if dtype is not None:
        rest = cast_weights(rest, choices if plan is None else {}, dtype)
    if plan is not None:
        rest = quantize_weights(rest, choices)

    result = rest.tensors()
    for name, change in changes.items():
        path, _, _ = name.rpartition(".")
        parts = {part: tensors[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in tensors}
        base = _Base(parts, packed.get(path), config.tensor_shapes()[name])
        merged.deviations[path] = Deviation()
        kind = dtype or (stored if path in packed else parts["weight"].dtype)
        result |= _merged(path, base, change, choices.get(path), kind, dtype, merged.deviations[path])
    order = {name.rpartition(".")[0]: index for index, name in enumerate(tensors)}
    ordered = sorted(result.items(), key=lambda item: order[item[0].rpartition(".")[0]])
    merged.checkpoint.weights, merged.checkpoint.quantization = Weights(dict(ordered)), dict(choices)
    if dequantize:
        merged.checkpoint.rounded_to = checkpoint.rounding
    checkpoint.weights = Weights({})  # so that it keeps no weights that were read
    return merged


def _weight_name(name: str) -> str:
    """The name of the tensor that a packed part belongs to."""
    return f"{name.rpartition('.')[0]}.weight"


def _collect(adapter: Adapter, config: ModelConfig) -> dict[str, _Change]:
    """The change of each tensor by name, in the model's order; takes whole tensors out of the adapter."""
    found = {f"{path}.weight": _Change(change, path == EMBEDDING) for path, change in adapter.modules.items()}
    found |= {name: _Change(adapter.weights.pop(name), False) for name in list(adapter.weights)}
    return {name: found[name] for name in config.tensor_shapes() if name in found}


def _changes_input_only(changes: Mapping[str, _Change], config: ModelConfig) -> bool:
    """Whether the adapter changes a shared embedding on the input side only."""
    change = changes.get(f"{EMBEDDING}.weight")
    is_input = change is not None and isinstance(change.value, LowRank) and not change.value.output_side
    return is_input and config.share_input_output_layers


def _with_head(
    tensors: Mapping[str, Tensor], packed: Mapping[str, Quantization]
) -> tuple[dict[str, Tensor], dict[str, Quantization]]:
    """Add a copy of the embedding as the output layer, next to it, so that both are read one after the other."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{EMBEDDING}.")}
    head = {name.replace(EMBEDDING, HEAD, 1): tensor for name, tensor in own.items()}
    return own | head | dict(tensors), dict(packed) | ({HEAD: packed[EMBEDDING]} if EMBEDDING in packed else {})


@dataclass
class _Base:
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
        """Slices that cover all rows, about `_PIECE` values each."""
        step = max(1, _PIECE // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            yield slice(start, start + step)

    def clear(self) -> None:
        """Free what was read."""
        self.parts.clear()
        self._values.clear()


def _merged(
    path: str,
    base: _Base,
    change: _Change,
    choice: Quantization | None,
    kind: mx.Dtype,
    dtype: mx.Dtype | None,
    deviation: Deviation,
) -> dict[str, Tensor]:
    """The tensors that replace the base's: all are computed when the first is read, and each is kept until it is read.

    Args:
        choice: how to pack the tensor; None leaves it full, in type `kind`.
        dtype: the requested type; None keeps the type of the scales.
    """
    made: dict[str, mx.array] = {}
    scales = scale_dtype(kind)
    if dtype is None and base.choice is not None and base.choice.mode == "affine":
        scales = base.parts["scales"].dtype

    def store(values: mx.array, rows: slice) -> dict[str, mx.array]:
        if choice is None:
            return {"weight": values.astype(kind)}
        if choice == base.choice and choice.mode == "affine":
            return pack_again(values, base.parts_of(rows), choice, scales)
        return choice.pack(values.astype(mx.float16) if scales == mx.float16 else values)

    pending = [change]  # emptied by the first read, which also frees the base

    def read(part: str) -> mx.array:
        if pending:
            made.update(_compute(base, pending.pop(), choice, store, deviation))
            base.clear()
        return made.pop(part)

    if choice is None:
        return {f"{path}.weight": Tensor(kind, base.shape, functools.partial(read, "weight"))}
    kinds = {"weight": mx.uint32, "scales": scales if choice.mode == "affine" else mx.uint8, "biases": scales}
    return {
        f"{path}.{part}": Tensor(kinds[part], shape, functools.partial(read, part))
        for part, shape in choice.packed_shapes(base.shape).items()
    }


def _compute(
    base: _Base,
    change: _Change,
    choice: Quantization | None,
    store: Callable[[mx.array, slice], dict[str, mx.array]],
    deviation: Deviation,
) -> dict[str, mx.array]:
    """The changed tensor as stored, by part, computed some rows at a time; adds its sums to `deviation`."""
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
        deviation.add(Deviation(*sums.tolist()))  # type: ignore[misc]
    return result


def _column_lengths(base: _Base, change: _Change) -> mx.array:
    """The norm of each column [in] of an embedding with the change added."""
    total = mx.zeros(base.shape[1])
    for rows in base.pieces():
        total = total + mx.square(base.rows(rows) + change.added(rows)).sum(axis=0)
        mx.eval(total)
    return mx.sqrt(total)
