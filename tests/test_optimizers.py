"""Optimizers compared with PyTorch and NumPy; their states are saved and restored exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_openelm  # noqa: F401 (before MLX)
from mlx_openelm.training.options import OPTIMIZERS, TrainOptions
from mlx_openelm.training.step.optimizers import make_optimizer, set_learning_rate

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

EMBEDDING, MATRIX, VECTOR = "transformer.token_embeddings.weight", "transformer.layers.2.ffn.weight", "transformer.norm"
SHAPES = {EMBEDDING: (7, 4), MATRIX: (6, 4), "transformer.layers.2.attn.weight": (4, 8), VECTOR: (5,)}
RATES = [1e-2, 3e-2, 2e-2, 1e-2, 5e-3, 1e-3]

# Options that make each optimizer use all its features.
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"weight_decay": 0.3, "beta2": 0.95},
    "sgd": {"weight_decay": 0.3, "momentum": 0.9},
    "lion": {"weight_decay": 0.3},
    "adafactor": {"weight_decay": 0.3, "beta1": 0.9},
    "muon": {"weight_decay": 0.3},
}


def random(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    return random(100 + step)


def options_of(name: str, **values: Any) -> TrainOptions:
    options = TrainOptions(optimizer=name, **SETTINGS[name] | values)
    options.check()
    return options


def tree(flat: dict[str, np.ndarray]) -> Any:
    return tree_unflatten([(name, mx.array(value)) for name, value in flat.items()])


class Run:
    """Weights and their optimizer, used as in `Updater`: the state goes in and out of a function."""

    def __init__(self, options: TrainOptions, *, compiled: bool = False):
        self.optimizer = make_optimizer(options)
        # On a CPU each compiled kernel calls a compiler, so there a matrix and a vector are enough.
        names = (MATRIX, VECTOR) if compiled else SHAPES
        self.weights = {name: mx.array(random(0)[name]) for name in names}
        self.optimizer.init(tree_unflatten(self.weights))
        self.traces = 0
        self.apply: Callable[..., Any] = mx.compile(self._apply) if compiled else self._apply

    def _apply(self, weights: dict[str, mx.array], gradient: Any, state: Any, rate: mx.array) -> Any:
        self.traces += 1
        self.optimizer.state = state
        set_learning_rate(self.optimizer, rate)
        updated = self.optimizer.apply_gradients(tree_unflatten(gradient), tree_unflatten(weights))
        flat = dict(tree_flatten(updated))
        return {name: flat[name] for name in weights}, self.optimizer.state

    def step(self, step: int) -> None:
        rate, state = mx.array(RATES[step]), self.optimizer.state
        gradient = {name: mx.array(gradients(step)[name]) for name in self.weights}
        self.weights, self.optimizer.state = self.apply(self.weights, gradient, state, rate)
        mx.eval(self.weights, self.optimizer.state)

    def found(self) -> dict[str, np.ndarray]:
        return {name: np.array(value) for name, value in self.weights.items()}


def torch_weights(make: Callable[[list[dict[str, Any]]], Any], decay: float, steps: int) -> dict[str, np.ndarray]:
    """The weights after steps of PyTorch's optimizer; vectors do not decay."""
    torch = pytest.importorskip("torch")
    weights = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in random(0).items()}
    groups = [
        {"params": [weight for weight in weights.values() if weight.ndim > 1], "weight_decay": decay},
        {"params": [weight for weight in weights.values() if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for name, gradient in gradients(step).items():
            weights[name].grad = torch.from_numpy(gradient)
        optimizer.step()
    return {name: weight.detach().numpy() for name, weight in weights.items()}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_equal_pytorchs(name: str) -> None:
    torch = pytest.importorskip("torch")
    makers = {
        "adam": lambda groups: torch.optim.Adam(groups, lr=1.0),
        "adamw": lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95)),
        "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
    }
    run = Run(options_of(name))
    for step in range(6):
        run.step(step)
    expected = torch_weights(makers[name], SETTINGS[name].get("weight_decay", 0.0), 6)
    for key, value in run.found().items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=2e-6, err_msg=key)


def test_lion_equals_its_paper() -> None:
    run = Run(options_of("lion"))
    weights, momentum = random(0), {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(6):
        run.step(step)
        for name, gradient in gradients(step).items():
            direction = np.sign(0.9 * momentum[name] + 0.1 * gradient)
            decay = 0.3 if weights[name].ndim > 1 else 0.0
            weights[name] = weights[name] - RATES[step] * (direction + decay * weights[name])
            momentum[name] = 0.99 * momentum[name] + 0.01 * gradient
    for key, value in run.found().items():
        np.testing.assert_allclose(value, weights[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_adafactor_equals_that_of_transformers() -> None:
    """With a fixed learning rate, relative neither to the step nor to the size of the weights."""
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    expected = torch_weights(
        lambda groups: adafactor(groups, lr=1.0, beta1=0.9, scale_parameter=False, relative_step=False), 0.3, 6
    )
    run = Run(options_of("adafactor"))
    for step in range(6):
        run.step(step)
    for key, value in run.found().items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5, err_msg=key)


def test_muon_updates_the_matrices_of_layers_and_adamw_the_rest() -> None:
    run = Run(options_of("muon"))
    for step in range(6):
        run.step(step)
    found = run.found()
    weights = {name: value.astype(np.float64) for name, value in random(0).items()}
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    torch = pytest.importorskip("torch")
    adamw = torch_weights(lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95)), 0.3, 6)
    for step in range(6):
        for name, gradient in gradients(step).items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            if "layers." in name:
                update = newton_schulz(0.05 * gradient + 0.95 * momentum[name])
                size = 0.2 * max(update.shape) ** 0.5
                weights[name] = weights[name] * (1 - RATES[step] * 0.3) - RATES[step] * size * update
    for name, value in found.items():
        expected = weights[name] if "layers." in name else adamw[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration of Muon's authors."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / np.linalg.norm(wide)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def test_muon_is_close_to_pytorchs() -> None:
    """PyTorch iterates in bfloat16, which limits the agreement."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    weight = torch.nn.Parameter(torch.from_numpy(random(0)[MATRIX].copy()))
    optimizer = torch.optim.Muon([weight], weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    run = Run(options_of("muon"))
    for step in range(6):
        run.step(step)
        optimizer.param_groups[0]["lr"] = RATES[step]
        weight.grad = torch.from_numpy(gradients(step)[MATRIX])
        optimizer.step()
    moved = np.abs(run.found()[MATRIX] - random(0)[MATRIX]).mean()
    np.testing.assert_allclose(run.found()[MATRIX], weight.detach().numpy(), atol=0.05 * moved)


def test_defaults() -> None:
    adam = make_optimizer(TrainOptions())
    assert (type(adam), adam.betas, adam.eps, adam.bias_correction) == (optim.Adam, [0.9, 0.999], 1e-8, True)
    adamw = make_optimizer(TrainOptions(optimizer="adamw"))
    assert (adamw.weight_decay, adamw.betas) == (0.01, [0.9, 0.999])
    assert make_optimizer(TrainOptions(optimizer="adamw", weight_decay=0.0)).weight_decay == 0.0
    lion = make_optimizer(TrainOptions(optimizer="lion"))
    assert (lion.weight_decay, lion.betas) == (0.0, [0.9, 0.99])
    sgd = make_optimizer(TrainOptions(optimizer="sgd"))
    assert (sgd.weight_decay, sgd.momentum) == (0.0, 0.0)
    adafactor = make_optimizer(TrainOptions(optimizer="adafactor"))
    assert (adafactor.beta_1, adafactor.weight_decay) == (None, 0.0)
    assert not make_optimizer(TrainOptions(bias_correction=False)).bias_correction


def test_sgd_without_momentum_has_no_state() -> None:
    run = Run(TrainOptions(optimizer="sgd"))
    run.step(0)
    assert {name for name, _ in tree_flatten(run.optimizer.state)} == {"step", "learning_rate"}
    for name, value in run.found().items():
        np.testing.assert_allclose(value, random(0)[name] - RATES[0] * gradients(0)[name], rtol=1e-5, atol=1e-6)


def cases() -> Iterator[Any]:
    """Every optimizer as it is and compiled; the kernels of one are compiled each time, those of all in slow tests."""
    for name in (*OPTIMIZERS, "plain sgd"):
        yield pytest.param(name, False, id=name)
        marks = [pytest.mark.compiled, *([] if name == "adamw" else [pytest.mark.slow])]
        yield pytest.param(name, True, id=f"{name}, compiled", marks=marks)


@pytest.mark.parametrize(("name", "compiled"), [*cases()])
def test_two_times_three_steps_equal_six(name: str, compiled: bool, tmp_path: Path) -> None:
    options = TrainOptions(optimizer="sgd") if name == "plain sgd" else options_of(name)
    whole = Run(options, compiled=compiled)
    for step in range(6):
        whole.step(step)
    assert whole.traces == (1 if compiled else 6)  # changing the rate does not retrace

    before = Run(options, compiled=compiled)
    for step in range(3):
        before.step(step)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), before.weights)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(before.optimizer.state)))

    after = Run(options, compiled=compiled)
    after.weights = mx.load(str(tmp_path / "weights.safetensors"))
    after.optimizer.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    for step in range(3, 6):
        after.step(step)
    expected = whole.found()
    for key, value in after.found().items():
        assert np.array_equal(value, expected[key]), key
    states = [dict(tree_flatten(run.optimizer.state)) for run in (whole, after)]
    assert states[0].keys() == states[1].keys()
    assert all(mx.array_equal(value, states[1][key]) for key, value in states[0].items())
    assert len(states[0]) > 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_reaches_every_part(name: str) -> None:
    """A rate of zero leaves every weight unchanged, whatever the other options."""
    run = Run(options_of(name, learning_rate=1.0))
    set_learning_rate(run.optimizer, mx.array(0.0))
    weights = run.optimizer.apply_gradients(tree(gradients(0)), tree_unflatten(run.weights))
    for key, value in tree_flatten(weights):
        assert np.array_equal(np.array(value), random(0)[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_only_the_last_layers(name: str) -> None:
    """`--num-layers` leaves gaps in the parameter tree; every optimizer finds the minimum."""
    mx.random.seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    model.freeze()
    model.layers[2].unfreeze()
    frozen = np.array(model.layers[1].weight)
    x = mx.random.normal((32, 6))
    target = mx.random.normal((32, 6))
    compute = nn.value_and_grad(model, lambda model: mx.mean(mx.square(model(x) - target)))
    optimizer = make_optimizer(TrainOptions(optimizer=name))
    optimizer.init(model.trainable_parameters())
    losses = []
    for _ in range(60):
        loss, gradient = compute(model)
        set_learning_rate(optimizer, mx.array(0.02))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert np.array_equal(np.array(model.layers[1].weight), frozen)
