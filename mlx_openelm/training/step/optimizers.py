"""MLX's optimizers, changed so that weight decay applies to matrices only, and one learning rate suits all parts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from ...config import EMBEDDING
from ..options import TrainOptions

# Defaults: MLX's own, and for Muon's AdamW those of its authors.
_WEIGHT_DECAY = {"adamw": 0.01, "muon": 0.01}
_BETAS = {"adam": (0.9, 0.999), "adamw": (0.9, 0.999), "lion": (0.9, 0.99), "muon": (0.9, 0.95)}
_EPS = 1e-8
_MUON_MOMENTUM = 0.95


def make_optimizer(
    options: TrainOptions, *, embedding_learning_rate: float | None = None, ema_decay: float | None = None
) -> optim.Optimizer:
    """The optimizer that the options name; they are checked already.

    Only matrices decay, not norms or DoRA's magnitudes. Adafactor uses the learning rate as it is, not relative to step
    and weights. Muon updates the matrices of layers, AdamW the embedding, the output layer and vectors.

    Args:
        embedding_learning_rate: the embedding's rate when that of the rest is `options.learning_rate`; both follow the
            same schedule.
        ema_decay: also keep an average of the weights, see `Averaging`.
    """
    name = options.optimizer
    others = "adamw" if name == "muon" else name
    parts: list[tuple[Any, optim.Optimizer]] = []
    if embedding_learning_rate is not None:
        embedding = _make(others, options)
        embedding.rate_factor = embedding_learning_rate / options.learning_rate
        parts.append((_is_embedding, embedding))
    if name == "muon":
        parts.append((_is_matrix_of_layer, _make(name, options)))
    optimizer = _make(others, options)
    if parts:
        filters, optimizers = zip(*parts, strict=True)
        optimizer = optim.MultiOptimizer([*optimizers, optimizer], list(filters))
    return optimizer if ema_decay is None else Averaging(optimizer, ema_decay)


def _make(name: str, options: TrainOptions) -> Any:
    """One of MLX's optimizers with the options' settings."""
    rate = options.learning_rate
    decay = _WEIGHT_DECAY.get(name, 0.0) if options.weight_decay is None else options.weight_decay
    if name == "muon":
        momentum = _MUON_MOMENTUM if options.momentum is None else options.momentum
        return _Muon(rate, momentum=momentum, weight_decay=decay)
    if name == "sgd":
        return _SGD(rate, momentum=options.momentum or 0.0, weight_decay=decay)
    if name == "adafactor":
        return _Adafactor(rate, beta_1=options.beta1, weight_decay=decay, scale_parameter=False, relative_step=False)
    usual = _BETAS[options.optimizer]
    betas = [
        usual[0] if options.beta1 is None else options.beta1,
        usual[1] if options.beta2 is None else options.beta2,
    ]
    if name == "lion":
        return _Lion(rate, betas, weight_decay=decay)
    eps = _EPS if options.eps is None else options.eps
    if name == "adam":
        return optim.Adam(rate, betas, eps, bias_correction=options.bias_correction)
    return AdamW(rate, betas, eps, weight_decay=decay, bias_correction=options.bias_correction)


def set_learning_rate(optimizer: optim.Optimizer, rate: mx.array) -> None:
    """Set the learning rate of every part of an optimizer to a float32 scalar, which may be traced."""
    for part in getattr(optimizer, "optimizers", [optimizer]):
        part.state["learning_rate"] = rate * getattr(part, "rate_factor", 1.0)


def _is_embedding(path: str, parameter: mx.array) -> bool:
    return path.startswith(EMBEDDING)


def _is_matrix_of_layer(path: str, parameter: mx.array) -> bool:
    return parameter.ndim == 2 and "layers." in path


class _MatrixDecay:
    """Applies weight decay to matrices only."""

    weight_decay: float

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        decay = self.weight_decay
        self.weight_decay = decay if parameter.ndim > 1 else 0.0
        try:
            return super().apply_single(gradient, parameter, state)  # type: ignore[misc]
        finally:
            self.weight_decay = decay


class AdamW(_MatrixDecay, optim.AdamW):
    pass


class _Lion(_MatrixDecay, optim.Lion):
    pass


class _Adafactor(_MatrixDecay, optim.Adafactor):
    pass


class _SGD(_MatrixDecay, optim.SGD):
    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        if self.momentum > 0:  # without momentum MLX would store zeros as large as the weights
            super().init_single(parameter, state)


class _Muon(optim.Muon):
    """Muon with updates as large as AdamW's, so that one learning rate suits both (arXiv:2502.16982, section 2.2).

    Weight decay is decoupled as in AdamW; MLX's Muon would add it to the gradient before orthogonalizing. The iteration
    that orthogonalizes is computed in float32.
    """

    def __init__(self, learning_rate: float, *, momentum: float, weight_decay: float):
        super().__init__(learning_rate, momentum=momentum, weight_decay=0.0)
        self._decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        rows, columns = parameter.shape
        change = super().apply_single(gradient, mx.zeros((), parameter.dtype), state)
        # An orthogonal matrix has a root mean square of 1 / sqrt(longer side), AdamW's update one of about 0.2. MLX has
        # already multiplied by sqrt(max(1, rows / columns)).
        change = change * (0.2 * max(rows, columns) ** 0.5 / max(1, rows / columns) ** 0.5)
        return parameter * (1 - self.learning_rate.astype(parameter.dtype) * self._decay) + change

    def _zeropower_via_newtonschulz5(self, X: mx.array, steps: int) -> mx.array:
        return super()._zeropower_via_newtonschulz5(X.astype(mx.float32), steps)


class Averaging(optim.Optimizer):
    """An optimizer that also keeps an exponential moving average of the weights, which nothing else depends on.

    After step t the average keeps the share min(decay, (1 + t) / (10 + t)) of itself, so that the first weights are
    soon forgotten. It is in the state as `average`, beside the state of `optimizer`.
    """

    def __init__(self, optimizer: optim.Optimizer, decay: float):
        super().__init__()
        self._optimizer, self._decay = optimizer, decay
        self.optimizers = getattr(optimizer, "optimizers", [optimizer])
        self._average: Any = {}

    def init(self, parameters: Any) -> None:
        self._optimizer.init(parameters)
        self._average = tree_map(lambda parameter: parameter, parameters)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The new parameters, as MLX's optimizers give them."""
        updated = self._optimizer.apply_gradients(gradients, parameters)
        step = self.optimizers[0].step.astype(mx.float32)
        kept = mx.minimum(self._decay, (1 + step) / (10 + step))
        self._average = tree_map(lambda average, new: kept * average + (1 - kept) * new, self._average, updated)
        return updated

    @property
    def state(self) -> dict[str, Any]:  # type: ignore[override]
        return {"optimizer": self._optimizer.state, "average": self._average}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._optimizer.state, self._average = state["optimizer"], state["average"]
