"""A checkpoint with an adapter added to it: one matrix at a time, computed in float32, in the packing asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..config import EMBEDDING, HEAD, ModelConfig
from ..formats.adapter import Adapter, LowRank
from ..formats.mlx import Checkpoint
from ..formats.packing import PARTS, Plan, Quantization, cast_weights, dequantize_weights, quantize_weights, scale_dtype
from ..formats.weights import Tensor, Weights
from .attaching import check_fits
from .base_copies import Stored, check_base_copies
from .repacking import pack_again

_PIECE = 1 << 20  # values computed at a time
# No row is taken to be shorter, so that an empty one is not divided by zero.
_SHORTEST = 1e-12


@dataclass
class Deviation:
    """What was done to a tensor, or to several, in sums of squares over their values; 0 before they are written."""

    before: float = 0.0
    change: float = 0.0
    after: float = 0.0
    error: float = 0.0
    arrived: float = 0.0  # the product of the change that was meant and the one that was written

    @property
    def relative_change(self) -> float:
        """The root mean square of what the adapters change, as a share of the base's."""
        return _ratio(self.change, self.before)

    @property
    def relative_error(self) -> float:
        """The root mean square of what storing the sum in few bits adds, as a share of the sum's."""
        return _ratio(self.error, self.after)

    @property
    def kept(self) -> float:
        """How much of the change is left in what was written: 1 all of it, 0 none. Rounding takes back what is small
        beside its steps where the base lies on them, as a base that was packed before does."""
        return self.arrived / self.change if self.change else 1.0

    def add(self, other: Deviation) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


@dataclass
class Merged:
    """What `merge` made of a checkpoint. `deviations`, by module path, are filled as its weights are read.

    `exceptions` tells of matrices packed unlike the rest, `untied` whether the output layer became one of its own.
    """

    checkpoint: Checkpoint
    deviations: dict[str, Deviation] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    untied: bool = False


@dataclass(frozen=True)
class _Change:
    """What an adapter makes of one tensor: a low-rank sum, or another tensor."""

    value: LowRank | mx.array
    is_embedding: bool

    @property
    def by_column(self) -> bool:
        """Whether DoRA's lengths are those of columns: of an embedding that is changed as the input alone."""
        if not (self.is_embedding and isinstance(self.value, LowRank)):
            return False
        return self.value.magnitude is not None and not self.value.output_side

    def added(self, rows: slice) -> mx.array:
        """Some rows of what a low-rank change adds, before any magnitude."""
        assert isinstance(self.value, LowRank)
        a, b = self.value.a.astype(mx.float32), self.value.b.astype(mx.float32)
        left, right = (a[rows], b) if self.is_embedding else (b[:, rows].T, a.T)
        # A GPU may multiply float32 in fewer bits; these products are small.
        return self.value.scale * mx.matmul(left, right, stream=mx.cpu)

    def target(self, before: mx.array, rows: slice, column_lengths: mx.array | None) -> mx.array:
        """Those rows of the changed tensor; `before` is what they were."""
        if not isinstance(self.value, LowRank):
            return self.value[rows].astype(mx.float32)
        total = before + self.added(rows)
        if self.value.magnitude is None:
            return total
        magnitude = self.value.magnitude.astype(mx.float32)
        if column_lengths is not None:
            return total * (magnitude / mx.maximum(column_lengths, _SHORTEST))
        lengths = mx.maximum(mx.linalg.norm(total, axis=1), _SHORTEST)
        return total * (magnitude[rows] / lengths)[:, None]


def merge(
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    dtype: mx.Dtype | None = None,
    plan: Plan | None = None,
    dequantize: bool = False,
) -> Merged:
    """The checkpoint with an adapter's changes; nothing is read yet, and both are used up.

    W becomes W + ΔW for LoRA, ΔW being scale * (a b)ᵀ, and m / ||W + ΔW|| * (W + ΔW) for DoRA, by row, or by column
    for an embedding that is changed as the input alone. What was packed is packed again in its own way; tensors that
    the adapter does not change stay as they are, to the bit, unless told otherwise. Where an embedding shared with
    the output layer changes as the input alone, the output layer becomes a tensor of its own.

    Args:
        dtype: the type to store what is not packed in; as it is stored unless told.
        plan: packs the matrices, those that were packed in another way as well.
        dequantize: unpacks all.

    Raises:
        RequestError: an adapter of another model's shape, or one that holds weights of another base.
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
    checkpoint.weights = Weights({})  # or what was read of it would stay
    return merged


def _weight_name(name: str) -> str:
    """The tensor that a part of a packed one stands for."""
    return f"{name.rpartition('.')[0]}.weight"


def _collect(adapter: Adapter, config: ModelConfig) -> dict[str, _Change]:
    """What changes each tensor, by its name, in the order of the model's tensors; takes whole tensors out."""
    found = {f"{path}.weight": _Change(change, path == EMBEDDING) for path, change in adapter.modules.items()}
    found |= {name: _Change(adapter.weights.pop(name), False) for name in list(adapter.weights)}
    return {name: found[name] for name in config.tensor_shapes() if name in found}


def _changes_input_only(changes: Mapping[str, _Change], config: ModelConfig) -> bool:
    """Whether the embedding is shared with the output layer, which the adapter leaves alone."""
    change = changes.get(f"{EMBEDDING}.weight")
    is_input = change is not None and isinstance(change.value, LowRank) and not change.value.output_side
    return is_input and config.share_input_output_layers


def _with_head(
    tensors: Mapping[str, Tensor], packed: Mapping[str, Quantization]
) -> tuple[dict[str, Tensor], dict[str, Quantization]]:
    """The embedding a second time as the output layer, next to it, so that it is not held for long."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{EMBEDDING}.")}
    head = {name.replace(EMBEDDING, HEAD, 1): tensor for name, tensor in own.items()}
    return own | head | dict(tensors), dict(packed) | ({HEAD: packed[EMBEDDING]} if EMBEDDING in packed else {})


@dataclass
class _Base:
    """A tensor of the base, packed or not, read when its rows are asked for."""

    parts: dict[str, Tensor]
    choice: Quantization | None
    shape: tuple[int, ...]
    _values: dict[str, mx.array] = field(default_factory=dict)

    def parts_of(self, rows: slice) -> dict[str, mx.array]:
        """Some of its rows as they are stored."""
        if not self._values:
            self._values = {name: part.read() for name, part in self.parts.items()}
            mx.eval(list(self._values.values()))
        return {name: value[rows] for name, value in self._values.items()}

    def rows(self, rows: slice) -> mx.array:
        """Some of its rows in float32."""
        parts = self.parts_of(rows)
        if self.choice is not None:
            return self.choice.unpack(parts, mx.float32)
        return parts["weight"].astype(mx.float32)

    def pieces(self) -> Iterator[slice]:
        """All rows, some at a time."""
        step = max(1, _PIECE // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            yield slice(start, start + step)

    def clear(self) -> None:
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
    """The tensors that take the base's place: all are made when the first is read, and each is kept until it is.

    Args:
        choice: how to pack it; None leaves it full, of type `kind`.
        dtype: what was asked for; without it, scales keep the type they have.
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

    pending = [change]  # until it is read, so that neither it nor the base stays after that

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
    """The changed tensor as it is stored, by part, made of some rows at a time; adds up what that did to it."""
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
            result[name][rows] = part  # in place, since nobody else has it
        mx.eval(sums, *result.values())
        deviation.add(Deviation(*sums.tolist()))  # type: ignore[misc]
    return result


def _column_lengths(base: _Base, change: _Change) -> mx.array:
    """The length of each column of an embedding with the change added."""
    total = mx.zeros(base.shape[1])
    for rows in base.pieces():
        total = total + mx.square(base.rows(rows) + change.added(rows)).sum(axis=0)
        mx.eval(total)
    return mx.sqrt(total)
