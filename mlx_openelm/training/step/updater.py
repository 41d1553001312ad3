"""One update of the weights: gradients of each micro-batch, summed over all machines, clipped, and applied."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ...adapters.attaching import adapted_layers, dropout_layers
from ...model import OpenELM
from ..data.batches import IGNORED, Batch
from .forward import hidden_states
from .loss import cross_entropy, split_targets
from .optimizers import set_learning_rate
from .recompute import Parameters, substituted, trainable
from .strategy import CHUNK, PARTS, here

# What the loss is made of: some positions (None: all), their targets, and which of these are learned.
_Learned = tuple[mx.array | None, mx.array, mx.array]
# Inputs, segments, and that.
_Arrays = tuple[mx.array, mx.array | None, _Learned]

# The shapes of batches whose graphs are kept; one is up to 2 MB a layer, and many sets have hundreds of shapes.
GRAPHS = 64

_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."


@dataclass(frozen=True)
class Update:
    """What a step gave, not evaluated yet: three float32 scalars.

    `loss` is the mean negative log-likelihood of the learned tokens of the whole step, over all machines, before the
    update; `objective` what was minimized, z-loss and label smoothing included; `grad_norm` the gradient's norm before
    clipping.
    """

    loss: mx.array
    objective: mx.array
    grad_norm: mx.array


@dataclass(frozen=True)
class Evaluation:
    """The mean negative log-likelihood (natural) of so many learned tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Updater:
    """Updates the trainable parameters of a model, which are its master weights, in float32.

    Args:
        optimizer: as `optimizers.make_optimizer` gives it.
        compute_dtype: what trainable parameters are cast to in the forward pass; None leaves them float32. `casts`
            says whether they are.
        recompute: what the backward pass computes again, as in `forward.hidden_states`; it may be set until the first
            update.
        max_grad_norm: scale gradients down to this norm.
        z_loss, label_smoothing: as in `loss.cross_entropy`.
        seed: random numbers, for dropout, derive from it, the step and the micro-batch.
        group: the machines that share the work, `mx.distributed.init()`.
    """

    def __init__(
        self,
        model: OpenELM,
        optimizer: optim.Optimizer,
        *,
        compute_dtype: mx.Dtype | None = None,
        recompute: str = PARTS,
        max_grad_norm: float | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        seed: int = 0,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.optimizer = model, optimizer
        self._places, values = trainable([model])
        self.compute_dtype = compute_dtype or model.transformer.norm["weight"].dtype
        self.casts = compute_dtype is not None
        self._adapted = {id(layer) for _, layer in adapted_layers(model)}
        self.recompute, self._max_grad_norm = recompute, max_grad_norm
        self._z_loss, self._label_smoothing = z_loss, label_smoothing
        self._seed, self._group = seed, group
        self._dropout_layers = dropout_layers(model)
        self._names = _names(model, self._places)
        for (module, name), value in zip(self._places, values, strict=True):
            module[name] = value.astype(mx.float32)
        optimizer.init(self._tree(self._values()))
        self._settles = sum(value.nbytes for value in self.state().values()) > here().settled_bytes
        # A compiled function holds on to what it was made with, so a graph is made anew only for new shapes.
        self._gradients: Callable[..., Any] = mx.compile(self._compute_gradients)
        self._apply: Callable[..., Any] = mx.compile(self._apply_gradients)
        self._shapes: set[tuple[Any, ...]] = set()

    def update(self, batches: Sequence[Batch], num_targets: int, learning_rate: float, step: int) -> Update:
        """Update the weights once.

        Args:
            batches: the micro-batches of this process; none where the others have all the examples of the step.
            num_targets: the learned tokens of the step, over all micro-batches and processes: each counts the same.
            step: the number of the update, from which random numbers derive.
        """
        weights = self._values()
        sums, gradients = [mx.array(0.0), mx.array(0.0)], None
        for index, batch in enumerate(batch for batch in batches if batch.num_targets):
            if index:
                mx.eval(gradients)  # else the next micro-batch could be computed beside this one
            arrays = (batch.inputs, batch.segments, _learned(batch))
            self._forget_graphs(batch.inputs.shape, arrays[2][1].size, gradients is None)
            sums, gradients = self._gradients(weights, gradients, sums, arrays, self._keys(step, index))
        if gradients is None:
            gradients = [mx.zeros_like(weight) for weight in weights]
        state = self.optimizer.state
        numbers = mx.array(1.0 / max(1, num_targets)), mx.array(learning_rate)
        values, state, scalars = self._apply(weights, gradients, sums, state, *numbers)
        self.optimizer.state = state
        self._set(values)
        del weights, gradients, values, state  # what they hold is not to live longer than it is needed
        if self._settles:
            self._settle()
        return Update(*scalars)

    def _forget_graphs(self, *shape: Any) -> None:
        """Before a batch of this shape: let go of all graphs if there are too many, which MLX never does."""
        if shape not in self._shapes and len(self._shapes) == GRAPHS:
            self._gradients = mx.compile(self._compute_gradients)
            self._shapes.clear()
        self._shapes.add(shape)

    def _settle(self) -> None:
        """Evaluate large weights some at a time: MLX works ahead, and would hold many of them old and new."""
        by_parameter: dict[str, list[mx.array]] = {}
        for name, value in self._flat_state():
            by_parameter.setdefault(name.rpartition(".")[0], []).append(value)
        for name, value in zip(self._names, self._values(), strict=True):
            by_parameter.setdefault(name, []).append(value)
        group: list[mx.array] = []
        size = 0
        for arrays in by_parameter.values():
            group += arrays
            size += sum(array.nbytes for array in arrays)
            if size > here().settled_bytes:
                mx.eval(group)
                group, size = [], 0

    def state(self) -> dict[str, mx.array]:
        """All that an update changes, by name: the weights and what the optimizer remembers."""
        weights = dict(zip((_WEIGHTS + name for name in self._names), self._values(), strict=True))
        remembered: dict[str, mx.array] = {_OPTIMIZER + name: value for name, value in self._flat_state()}
        return weights | remembered

    def restore(self, state: dict[str, mx.array]) -> None:
        """Go back to what `state` gave."""
        self._set([state[_WEIGHTS + name] for name in self._names])
        prefix = len(_OPTIMIZER)
        own = [(name[prefix:], value) for name, value in state.items() if name.startswith(_OPTIMIZER)]
        self.optimizer.state = tree_unflatten(own)

    def evaluate(self, batches: Iterable[Batch], progress: Callable[[Batch], None] | None = None) -> Evaluation:
        """The loss on other batches, as the model computes it when it is used.

        Args:
            progress: called with each batch that is done.
        """
        with substituted(self._places, self._cast(self._values())):
            return evaluate(self.model, batches, group=self._group, progress=progress)

    def _cast(self, values: Sequence[mx.array]) -> list[mx.array]:
        """The master weights in the type to compute in; low-rank layers cast their own, in part after using them."""
        if not self.casts:
            return list(values)
        pairs = zip(self._places, values, strict=True)
        dtype = self.compute_dtype
        return [value if id(module) in self._adapted else value.astype(dtype) for (module, _), value in pairs]

    def _values(self) -> list[mx.array]:
        return [module[name] for module, name in self._places]

    def _set(self, values: Sequence[mx.array]) -> None:
        for (module, name), value in zip(self._places, values, strict=True):
            module[name] = value

    def _flat_state(self) -> list[tuple[str, mx.array]]:
        return tree_flatten(self.optimizer.state)  # type: ignore[return-value]

    def _tree(self, values: Sequence[mx.array]) -> Any:
        return tree_unflatten(list(zip(self._names, values, strict=True)))

    def _keys(self, step: int, micro_batch: int) -> list[mx.array]:
        """One key a layer with dropout, unlike those of other steps, micro-batches and processes."""
        if not self._dropout_layers:
            return []
        rank = 0 if self._group is None else self._group.rank()
        number = random.Random(f"{self._seed} {step} {micro_batch} {rank}").getrandbits(63)
        return list(mx.random.split(mx.random.key(number), len(self._dropout_layers)))

    def _compute_gradients(
        self,
        weights: list[mx.array],
        gradients: list[mx.array] | None,
        sums: list[mx.array],
        batch: _Arrays,
        keys: list[mx.array],
    ) -> tuple[list[mx.array], list[mx.array]]:
        """`sums` and `gradients`, if there are any yet, with those of a batch added: sums over learned tokens."""
        self.model.train()

        def objective(weights: list[mx.array]) -> tuple[mx.array, mx.array]:
            with substituted(self._places, self._cast(weights)):
                inputs, segments, (rows, targets, learned) = batch
                hidden = hidden_states(self.model, inputs, segments, recompute=self.recompute)
                hidden = hidden if rows is None else hidden[rows]
                losses = cross_entropy(
                    self.model,
                    hidden,
                    targets,
                    learned=learned,
                    z_loss=self._z_loss,
                    label_smoothing=self._label_smoothing,
                )
            return losses

        with self._dropout(keys):  # in the backward pass, too, which computes much again
            found, slopes = mx.value_and_grad(objective)(weights)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        return sums, slopes if gradients is None else [a + b for a, b in zip(gradients, slopes, strict=True)]

    @contextmanager
    def _dropout(self, keys: list[mx.array]) -> Iterator[None]:
        layers = self._dropout_layers
        for layer, key in zip(layers, keys, strict=True):
            layer._dropout_key = key
        try:
            yield
        finally:
            for layer in layers:
                layer._dropout_key = None

    def _apply_gradients(
        self,
        weights: list[mx.array],
        gradients: list[mx.array],
        sums: list[mx.array],
        state: Any,
        share: mx.array,
        rate: mx.array,
    ) -> tuple[list[mx.array], Any, list[mx.array]]:
        """New weights, the optimizer's new state, and the likelihood, objective and gradient norm of the step.

        `share`, one over the learned tokens, makes means of sums. It is small, so it comes last: gradients of
        activations in float16 would become zero by it; and here it is part of the optimizer's own kernels.
        """
        (objective, likelihood), gradients = self._over_all_machines(sums, gradients)
        squares = [mx.sum(mx.square(gradient)) for gradient in gradients]
        norm, factor = share * mx.sqrt(mx.sum(mx.stack(squares))), share
        if self._max_grad_norm is not None:
            factor = share * mx.minimum(self._max_grad_norm / (norm + 1e-6), 1.0)
        gradients = [gradient * factor for gradient in gradients]
        self.optimizer.state = state
        set_learning_rate(self.optimizer, rate)
        updated = self.optimizer.apply_gradients(self._tree(gradients), self._tree(weights))
        by_name = dict(tree_flatten(updated))
        scalars = [share * likelihood, share * objective, norm]
        return [by_name[name] for name in self._names], self.optimizer.state, scalars

    def _over_all_machines(self, *trees: list[mx.array]) -> Any:
        if self._group is None or self._group.size() == 1:
            return trees
        size = self._group.size()
        # What is averaged here are shares of the whole step, which add up.
        return tree_map(lambda a: a * size, nn.average_gradients(trees, self._group))


def evaluate(
    model: OpenELM,
    batches: Iterable[Batch],
    *,
    group: mx.distributed.Group | None = None,
    progress: Callable[[Batch], None] | None = None,
) -> Evaluation:
    """The mean negative log-likelihood of the learned tokens of `batches`; with `group`, of all machines' batches."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        if batch.num_targets:
            rows, targets, learned = _learned(batch)
            hidden = hidden_states(model, batch.inputs, batch.segments)  # whose attention holds less than the model's
            hidden = hidden if rows is None else hidden[rows]
            losses = cross_entropy(model, hidden, targets, learned=learned, differentiable=False)
            total += float(losses[1].item())  # type: ignore[arg-type]
            count += batch.num_targets
        if progress is not None:
            progress(batch)
    if group is not None and group.size() > 1:
        # Numbers of tokens are exact in two float32 halves; sums of losses need no more.
        parts = mx.distributed.all_sum(mx.array([total, count // 65536, count % 65536]), group=group)
        total, high, low = (float(part.item()) for part in parts)  # type: ignore[arg-type]
        count = int(high) * 65536 + int(low)
    return Evaluation(total / count if count else float("nan"), count)


def _learned(batch: Batch) -> _Learned:
    """The positions that are learned, in order, and as many others as fill the last chunks of the loss.

    Logits are computed for these alone; whole chunks, of many an eighth at a time, so that few different shapes have
    to be compiled.
    """
    chunks = -(-batch.num_targets // CHUNK)
    unit = CHUNK << max(0, chunks.bit_length() - 4)
    targets = batch.targets.reshape(-1)
    count = min(targets.size, -(-batch.num_targets // unit) * unit)
    rows = None
    with mx.stream(mx.cpu):  # a GPU would compile a kernel for each of these
        if count < targets.size:
            rows = mx.sort(mx.argsort(targets == IGNORED)[:count])
            targets = targets[rows]
        targets, learned = split_targets(targets)
        mx.eval(rows, targets, learned)  # so that a GPU's stream never waits for the CPU's
    return rows, targets, learned


def _names(model: nn.Module, places: Parameters) -> list[str]:
    """The path of each parameter in the model."""
    prefixes = {id(module): path for path, module in model.named_modules()}
    return [f"{prefixes[id(module)]}.{name}".lstrip(".") for module, name in places]
