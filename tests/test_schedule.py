"""The learning rate of each step, compared with PyTorch's and MLX's schedules and CoreNet's formula."""

from __future__ import annotations

import math
from typing import Any

import mlx_openelm  # noqa: F401 (before MLX)
from mlx_openelm.errors import RequestError
from mlx_openelm.training.options import TrainOptions
from mlx_openelm.training.step.schedule import learning_rate

import mlx.core as mx
import mlx.optimizers as optim
import pytest


def rates(total: int, **values: Any) -> list[float]:
    options = TrainOptions(iters=total, **values)
    options.check()
    return [learning_rate(options, step, total) for step in range(total)]


def test_constant() -> None:
    assert rates(5, learning_rate=3e-4) == [3e-4] * 5


def test_warm_up_goes_from_its_initial_rate_to_the_learning_rate() -> None:
    assert rates(6, learning_rate=1e-3, warmup=4) == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3], abs=1e-18)
    assert rates(4, learning_rate=1e-3, warmup=2, warmup_init=5e-4) == pytest.approx([5e-4, 7.5e-4, 1e-3, 1e-3])


def test_linear() -> None:
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.85, 0.7, 0.55, 0.4]
    found = rates(9, lr_schedule="linear", learning_rate=1, min_learning_rate=0.4, warmup=4, warmup_init=0.2)
    assert found == pytest.approx(expected)


def test_cosine_by_hand() -> None:
    found = rates(5, lr_schedule="cosine", learning_rate=2, min_learning_rate=1)
    assert found == pytest.approx([2, 1.5 + math.sqrt(2) / 4, 1.5, 1.5 - math.sqrt(2) / 4, 1])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_equal_pytorchs(schedule: str) -> None:
    torch = pytest.importorskip("torch")
    total, warmup, top, low, first = 60, 11, 3e-4, 3e-5, 1e-6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=top)
    schedulers = torch.optim.lr_scheduler
    rise = schedulers.LinearLR(optimizer, start_factor=first / top, total_iters=warmup)
    length = total - 1 - warmup
    fall = (
        schedulers.CosineAnnealingLR(optimizer, T_max=length, eta_min=low)
        if schedule == "cosine"
        else schedulers.LinearLR(optimizer, start_factor=1.0, end_factor=low / top, total_iters=length)
    )
    scheduler = schedulers.SequentialLR(optimizer, [rise, fall], [warmup])
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = rates(
        total, lr_schedule=schedule, learning_rate=top, min_learning_rate=low, warmup=warmup, warmup_init=first
    )
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_steps_equal_mlxs(schedule: str) -> None:
    """After them the rate stays constant, as with mlx-lm's `arguments: [rate, steps, end]`."""
    mlx = optim.cosine_decay(1e-3, 7, 1e-4) if schedule == "cosine" else optim.linear_schedule(1e-3, 1e-4, 7)
    expected = [float(mlx(mx.array(step))) for step in range(12)]
    found = rates(12, lr_schedule=schedule, learning_rate=1e-3, min_learning_rate=1e-4, decay_steps=7)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[7:] == [pytest.approx(1e-4)] * 5


def test_corenets_recipe() -> None:
    """CoreNet's formula (corenet/optims/scheduler/cosine.py) stops two steps before the end of its cosine."""
    total, warmup, top, low = 4375, 1000, 3e-4, 3e-5
    found = rates(
        total, lr_schedule="cosine", learning_rate=top, min_learning_rate=low, warmup=warmup, warmup_init=1e-6
    )
    period = total - warmup + 1
    for step, rate in enumerate(found):
        if step < warmup:
            expected = 1e-6 + step * (top - 1e-6) / warmup
        else:
            expected = low + 0.5 * (top - low) * (1 + math.cos(math.pi * (step - warmup) / period))
        assert rate == pytest.approx(expected, abs=2 * top / period)
    assert (found[0], found[warmup], found[-1]) == (1e-6, top, low)
    assert max(found) == top and min(found[warmup:]) == low


def test_a_single_step_has_the_full_rate() -> None:
    assert rates(1, lr_schedule="cosine", learning_rate=1e-3) == [1e-3]
    assert rates(3, lr_schedule="linear", learning_rate=1e-3, warmup=2)[-1] == 1e-3


def test_a_run_of_warm_up_alone_is_refused() -> None:
    options = TrainOptions(warmup=50, epochs=1.0)
    options.check()
    with pytest.raises(RequestError, match="warmup 50 takes all 40 steps"):
        learning_rate(options, 0, 40)
