"""One update of the weights: gradients of each micro-batch, summed over all processes, clipped, and applied."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ...adapters.attaching import adapted_layers, dropout_layers
from ...model import OpenELM
from ..options import PARTS
from . import compact
from .evaluation import Evaluation, evaluate
from .objectives import CrossEntropy, Forward, Objective
from .optimizers import set_learning_rate
from .recompute import Parameters, substituted, trainable
from .strategy import here

# Compiled graphs are kept for this many shapes of batches. One takes up to 2 MB per layer, and many data sets have
# hundreds of shapes.
GRAPHS = 64

_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."
_CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class Update:
    """The numbers of one step, float32 scalars that are not evaluated yet.

    Args:
        loss: before the update, over all processes: for cross-entropy the mean negative log-likelihood of the step's
            learned tokens.
        objective: what was minimized; for cross-entropy with z-loss and label smoothing.
        grad_norm: the norm of the gradient before clipping.
        metrics: the means of the objective's further sums.
        skipped: a boolean, whether the batch was skipped because it exceeded the limits; None without limits.
    """

    loss: mx.array
    objective: mx.array
    grad_norm: mx.array
    metrics: dict[str, mx.array] = field(default_factory=dict)
    skipped: mx.array | None = None


class Limits(NamedTuple):
    """The highest loss and gradient norm of a batch that is learned from; a batch that exceeds one is skipped."""

    loss: float
    grad_norm: float


class Updater:
    """Updates the trainable parameters of a model: its master weights, in float32.

    Args:
        optimizer: as `optimizers.make_optimizer` gives it.
        objective: what is minimized.
        compute_dtype: trainable parameters are cast to this in the forward pass; None leaves them float32. `casts`
            says whether they are cast. The copies are kept, since an update then writes them along with the masters.
        is_compact: hold masters, copies and the optimizer's state as in `compact`, which must support the optimizer.
        recompute: what the backward pass computes again, as in `forward.hidden_states`; it may be set until the first
            update.
        max_grad_norm: scale gradients down to this norm.
        seed: dropout's random numbers derive from it, the step and the micro-batch.
        group: the processes that share the work, `mx.distributed.init()`.
    """

    def __init__(
        self,
        model: OpenELM,
        optimizer: optim.Optimizer,
        *,
        objective: Objective = _CROSS_ENTROPY,
        compute_dtype: mx.Dtype | None = None,
        is_compact: bool = False,
        recompute: str = PARTS,
        max_grad_norm: float | None = None,
        seed: int = 0,
        group: mx.distributed.Group | None = None,
    ):
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self._parameters, values = trainable([model])
        self.compute_dtype = compute_dtype or model.transformer.norm["weight"].dtype
        self.casts, self.is_compact = compute_dtype is not None, is_compact
        self._adapted = {id(layer) for _, layer in adapted_layers(model)}
        self.recompute, self._max_grad_norm = recompute, max_grad_norm
        self._seed, self._group = seed, group
        self._dropout_layers = dropout_layers(model)
        self._names = _names(model, self._parameters)
        self._low: list[mx.array] = []  # with a compact state the masters' low bits; the model has the high ones
        self._set_masters(values)
        optimizer.init(self._tree(self._values()))
        self._masters: list[mx.array] = []  # those that the copies are of
        self._copies: list[mx.array] = []
        self._settled_bytes = compact.settled_bytes() if is_compact else here().settled_bytes
        self._evaluates_in_groups = sum(value.nbytes for value in self.state().values()) > self._settled_bytes
        # Bound once: MLX traces a function again for every new function object and every new combination of shapes.
        self._gradients: Callable[..., Any] = mx.compile(self._compute_gradients)
        self._add_up: Callable[..., Any] = mx.compile(self._sums_and_norm)
        self._apply: Callable[..., Any] = mx.compile(self._apply_gradients)
        self._shapes: set[tuple[Any, ...]] = set()

    def update(
        self,
        batches: Sequence[Any],
        num_targets: int,
        learning_rate: float,
        step: int,
        limits: Limits | None = None,
    ) -> Update:
        """Update the weights once.

        Args:
            batches: the micro-batches of this process; it can be empty where other processes have all examples of the
                step.
            num_targets: the learned tokens of the step (or what else the objective counts), over all micro-batches
                and processes: each has the same weight.
            step: the number of the update, from which random numbers derive.
            limits: beyond them, or if they are not finite, loss and gradient change nothing.
        """
        weights, copies = self._values(), self._cast_weights()
        sums, gradients = [mx.array(0.0) for _ in range(2 + len(self.objective.metrics))], None
        for index, batch in enumerate(batch for batch in batches if batch.num_targets):
            if gradients is not None:
                gradients = [gradient.astype(mx.float32) for gradient in gradients]
                mx.eval(gradients)  # otherwise MLX could compute several micro-batches at the same time
            arrays = self.objective.arrays(batch)
            self._limit_graphs(arrays, gradients is None)
            sums, gradients = self._gradients(copies, gradients, sums, arrays, self._keys(step, index))
        if gradients is None:
            gradients = [mx.zeros_like(weight) for weight in weights]
        elif here().starts_early:
            mx.async_eval(sums, gradients)
        state = self.optimizer.state
        share, rate = mx.array(1.0 / max(1, num_targets)), mx.array(learning_rate)
        bounds = None if limits is None else [mx.array(limit) for limit in limits]
        sums, gradients, norm = self._add_up(sums, gradients, share)
        values, low, copies, state, scalars, skipped = self._apply(
            weights, self._low, gradients, sums, norm, state, share, rate, bounds
        )
        self.optimizer.state, self._low = state, low
        self._set(values, values if self.is_compact else copies)
        # Free the old arrays before the new ones are evaluated.
        del weights, copies, gradients, values, low, state
        if self._evaluates_in_groups:
            self._evaluate_in_groups()
        (loss, objective), metrics = scalars[:2], scalars[2:]
        return Update(loss, objective, norm, dict(zip(self.objective.metrics, metrics, strict=True)), skipped)

    def _limit_graphs(self, arrays: Any, is_first: bool) -> None:
        """Before a batch with these arrays: drop all compiled graphs if there are too many. MLX itself never does."""
        leaves: list[tuple[str, Any]] = tree_flatten(arrays)  # type: ignore[assignment]
        key = is_first, *(array.shape for _, array in leaves if array is not None)
        if key not in self._shapes and len(self._shapes) == GRAPHS:
            self._gradients = mx.compile(self._compute_gradients)
            self._shapes.clear()
        self._shapes.add(key)

    def _evaluate_in_groups(self) -> None:
        """Evaluate large weights a few at a time: MLX works ahead, and would hold the old and the new of many."""
        by_parameter: dict[str, list[mx.array]] = {}
        for name, value in self._flat_state():
            by_parameter.setdefault(name.rpartition(".")[0], []).append(value)
        for name, value, copy in zip(self._names, self._values(), self._copies, strict=True):
            # A weight that is not cast is its own copy, and counts once.
            by_parameter.setdefault(name, []).extend([value] if copy is value else [value, copy])
        if self.is_compact:
            for name, low in zip(self._names, self._low, strict=True):
                by_parameter[name].append(low)
        group: list[mx.array] = []
        size = 0
        for arrays in by_parameter.values():
            group += arrays
            size += sum(array.nbytes for array in arrays)
            if size > self._settled_bytes:
                mx.eval(group)
                group, size = [], 0

    def held(self) -> list[Any]:
        """All arrays that an update replaces, to be evaluated."""
        return [self._values(), self._low, self._copies, self.optimizer.state]

    def state(self) -> dict[str, mx.array]:
        """All that an update changes, by name: the weights in float32, and the optimizer's state."""
        weights = dict(zip((_WEIGHTS + name for name in self._names), self._exact_values(), strict=True))
        optimizer: dict[str, mx.array] = {_OPTIMIZER + name: value for name, value in self._flat_state()}
        return weights | optimizer

    def restore(self, state: dict[str, mx.array]) -> None:
        """Set everything back to what `state` returned, here or in an updater whose optimizer has other types."""
        self._set_masters([state[_WEIGHTS + name] for name in self._names])
        types = {name: value.dtype for name, value in self._flat_state()}
        prefix = len(_OPTIMIZER)
        own = [(name[prefix:], value) for name, value in state.items() if name.startswith(_OPTIMIZER)]
        own = [(name, value.astype(types.get(name, value.dtype))) for name, value in own]
        self.optimizer.state = tree_unflatten(own)

    def evaluate(self, batches: Iterable[Any], progress: Callable[[Any], None] | None = None) -> Evaluation:
        """The objective's loss on batches that are not learned from, without dropout.

        Args:
            progress: called with each batch when it is done.
        """
        with self.computing():
            return evaluate(self.model, batches, objective=self.objective, group=self._group, progress=progress)

    @contextmanager
    def computing(self) -> Iterator[OpenELM]:
        """The model with its trained weights in the type to compute in, and without dropout, while the block runs."""
        with substituted(self._parameters, self._cast_weights()):
            self.model.eval()
            yield self.model

    @contextmanager
    def exact(self) -> Iterator[OpenELM]:
        """The model with its trained weights in float32, while the block runs."""
        with substituted(self._parameters, self._exact_values()):
            yield self.model

    def _cast(self, values: Sequence[mx.array]) -> list[mx.array]:
        """The master weights in the type to compute in; adapters cast their own, some of them after using them."""
        if not self.casts or self.is_compact:
            return list(values)
        pairs = zip(self._parameters, values, strict=True)
        dtype = self.compute_dtype
        return [value if id(module) in self._adapted else value.astype(dtype) for (module, _), value in pairs]

    def _cast_weights(self) -> list[mx.array]:
        """`_cast` of the masters, kept until one is replaced."""
        values = self._values()
        if not self._masters or any(a is not b for a, b in zip(self._masters, values, strict=True)):
            self._masters, self._copies = values, self._cast(values)
        return self._copies

    def _values(self) -> list[mx.array]:
        return [module[name] for module, name in self._parameters]

    def _exact_values(self) -> list[mx.array]:
        """The master weights in float32."""
        values = self._values()
        return list(map(compact.joined, values, self._low)) if self.is_compact else values

    def _set(self, values: Sequence[mx.array], copies: Sequence[mx.array] = ()) -> None:
        """Replace the masters, and their copies if they are known."""
        for (module, name), value in zip(self._parameters, values, strict=True):
            module[name] = value
        self._masters, self._copies = list(values) if copies else [], list(copies)

    def _set_masters(self, values: Sequence[mx.array]) -> None:
        """Replace the masters by values of any type."""
        masters = [value.astype(mx.float32) for value in values]
        if self.is_compact:
            pairs = list(map(compact.split, masters))
            masters, self._low = [high for high, _ in pairs], [low for _, low in pairs]
        self._set(masters)

    def _flat_state(self) -> list[tuple[str, mx.array]]:
        return tree_flatten(self.optimizer.state)  # type: ignore[return-value]

    def _tree(self, values: Sequence[mx.array]) -> Any:
        return tree_unflatten(list(zip(self._names, values, strict=True)))

    def _keys(self, step: int, micro_batch: int) -> list[mx.array]:
        """One random key per layer with dropout; they differ between steps, micro-batches and processes."""
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
        arrays: Any,
        keys: list[mx.array],
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Add the objective's sums and their gradients for one batch to `sums` and `gradients`.

        Args:
            weights: in the type to compute in; so are the gradients of a step's first batch.
            gradients: of the batches before, in float32; None for the first one of a step.
            sums: objective, loss, then the objective's metrics.
        """
        self.model.train()
        forward = Forward(self.model, self.recompute)

        def sums_of(weights: list[mx.array]) -> tuple[mx.array, ...]:
            with substituted(self._parameters, weights):
                found = self.objective(forward, arrays)
            return found.objective, found.loss, *(found.metrics[name] for name in self.objective.metrics)

        with self._dropout(keys):  # around the backward pass too, which recomputes parts of the forward pass
            found, slopes = mx.value_and_grad(sums_of)(weights)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
        return sums, slopes if gradients is None else [a + b for a, b in zip(gradients, slopes, strict=True)]

    @contextmanager
    def _dropout(self, keys: list[mx.array]) -> Iterator[None]:
        layers = self._dropout_layers
        for layer, key in zip(layers, keys, strict=True):
            layer.set_dropout_key(key)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_dropout_key(None)

    def _sums_and_norm(
        self, sums: list[mx.array], gradients: list[mx.array], share: mx.array
    ) -> tuple[list[mx.array], list[mx.array], mx.array]:
        """Sums and gradients over all processes, and the norm of the gradient of the mean.

        It is compiled apart from the update, which would share its float32 gradients: they would be written to memory.
        """
        sums, gradients = self._over_all_processes(sums, gradients)
        squares = [mx.sum(mx.square(gradient.astype(mx.float32))) for gradient in gradients]
        return sums, gradients, share * mx.sqrt(mx.sum(mx.stack(squares)))

    def _apply_gradients(
        self,
        weights: list[mx.array],
        low: list[mx.array],
        gradients: list[mx.array],
        sums: list[mx.array],
        norm: mx.array,
        state: Any,
        share: mx.array,
        rate: mx.array,
        bounds: list[mx.array] | None,
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array], Any, list[mx.array], mx.array | None]:
        """New weights, their low bits and copies, the optimizer's new state, the step's numbers, and if it is skipped.

        The numbers are loss, objective and metrics. A step is skipped if loss or norm exceed their `bounds`: weights
        and state are the old ones.

        `share`, one over the number of learned tokens, turns sums into means. It is applied last: multiplied earlier,
        so small a number would make float16 gradients of activations zero. Here it is also fused into the optimizer's
        kernels.
        """
        objective, loss, *metrics = sums
        factor = share
        if self._max_grad_norm is not None:
            factor = share * mx.minimum(self._max_grad_norm / (norm + 1e-6), 1.0)
        scalars = [share * loss, share * objective, *(share * metric for metric in metrics)]
        learns = None
        if bounds is not None:
            learns = (scalars[0] <= bounds[0]) & (norm <= bounds[1])  # false for NaN
        skipped = None if learns is None else mx.logical_not(learns)
        if self.is_compact:
            pairs = list(zip(weights, low, strict=True))
            pairs, new = compact.update(self.optimizer, state, self._names, pairs, gradients, factor, rate, learns)
            values = [high for high, _ in pairs]
            return values, [low for _, low in pairs], [], new, scalars, skipped
        gradients = [gradient.astype(mx.float32) * factor for gradient in gradients]
        self.optimizer.state = tree_map(lambda value: value, state)  # a copy, which the optimizer changes
        set_learning_rate(self.optimizer, rate)
        updated = self.optimizer.apply_gradients(self._tree(gradients), self._tree(weights))
        by_name = dict(tree_flatten(updated))
        values, new = [by_name[name] for name in self._names], self.optimizer.state
        if learns is not None:
            values, new = tree_map(partial(mx.where, learns), (values, new), (weights, state))
        return values, [], self._cast(values), new, scalars, skipped

    def _over_all_processes(self, *trees: list[mx.array]) -> Any:
        """The sums over all processes, of several in float32."""
        if self._group is None or self._group.size() == 1:
            return trees
        size = self._group.size()
        exact = tree_map(lambda a: a.astype(mx.float32), trees)
        return tree_map(lambda a: a * size, nn.average_gradients(exact, self._group))


def _names(model: nn.Module, parameters: Parameters) -> list[str]:
    """The path of each parameter in the model."""
    prefixes = {id(module): path for path, module in model.named_modules()}
    return [f"{prefixes[id(module)]}.{name}".lstrip(".") for module, name in parameters]
