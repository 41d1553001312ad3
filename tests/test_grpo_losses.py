"""Loss, gradients, advantages and metrics of GRPO: TRL 1.16's formulas in PyTorch, and TRL itself if installed."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from mlx_openelm.training.data.prompts import Prompt
from mlx_openelm.training.options.grpo import LOSSES, GRPOOptions
from mlx_openelm.training.run.distributed import Processes
from mlx_openelm.training.run.rewards import Rewards
from mlx_openelm.training.run.rollouts import Group, Roller, Sampler, statistics_names
from mlx_openelm.training.step.advantages import score
from mlx_openelm.training.step.grpo import GroupRelative, Settings
from mlx_openelm.training.step.objectives import reported

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import tiny_model
from test_preference_losses import Accelerator, Given

torch = pytest.importorskip("torch")

GENERATIONS, LIMIT = 4, 12
# Two prompts with four completions each, in two micro-batches.
LENGTHS = [5, 12, 1, 7, 3, 9, 12, 4]
PROMPT_LENGTHS = [3, 6]
NAN = math.nan
REWARDS = [[1.0, 0.2], [0.0, NAN], [0.5, 0.1], [NAN, NAN], [2.0, 0.0], [2.0, 1.0], [0.0, 0.3], [1.0, 0.3]]
WEIGHTS = (1.0, 0.5)


def make_group(with_old: bool) -> Group:
    draw = np.random.default_rng(3)
    prompts = [Prompt(draw.integers(3, 256, n).tolist(), "", {}, "") for n in PROMPT_LENGTHS]
    tokens = [draw.integers(3, 256, n).tolist() for n in LENGTHS]
    old = [(-5.5 + draw.normal(0, 0.3, n)).astype(np.float32).tolist() for n in LENGTHS] if with_old else None
    each = [prompt for prompt in prompts for _ in range(GENERATIONS)]
    return Group(each, tokens, [n < LIMIT for n in LENGTHS], REWARDS, old)


def make_roller(**options: Any) -> Roller:
    settings = {"batch_size": 4, "grad_accumulation_steps": 2, "num_generations": GENERATIONS} | options
    chosen = GRPOOptions(max_completion_length=LIMIT, max_seq_length=32, reward_regex=("a",), **settings)
    rewards = Rewards({"one": len, "two": len}, WEIGHTS)
    return Roller(Sampler(None, chosen, rewards), Processes())  # type: ignore[arg-type]


class Rows:
    """A micro-batch in PyTorch: log-probabilities and entropies of the completions' tokens [rows, LIMIT]."""

    def __init__(self, group: Group, numbers: range, states: np.ndarray, embedding: Any, temp: float):
        self.states = torch.tensor(states.astype(np.float64), requires_grad=True)
        logits = (self.states @ embedding.T).reshape(len(numbers), -1, embedding.shape[0]) / temp
        every = logits.log_softmax(-1)
        logps, entropies, self.mask = [], [], torch.zeros(len(numbers), LIMIT, dtype=torch.float64)
        for row, n in enumerate(numbers):
            start, ids = len(group.prompts[n].tokens) - 1, torch.tensor(group.tokens[n])
            own = every[row, start : start + len(ids)]
            pad = (0, LIMIT - len(ids))
            logps.append(torch.nn.functional.pad(own.gather(1, ids[:, None])[:, 0], pad))
            entropies.append(torch.nn.functional.pad(-(own.exp() * own).sum(-1), pad))
            self.mask[row, : len(ids)] = 1
        self.logps, self.entropies = torch.stack(logps), torch.stack(entropies)


def padded(values: list[list[float]], numbers: range) -> Any:
    return torch.tensor([values[n] + [0.0] * (LIMIT - len(values[n])) for n in numbers], dtype=torch.float64)


def formula(o: GRPOOptions, rows: Rows, advantages: Any, old: Any, reference: Any, total: int, batches: int) -> Any:
    """The loss of a micro-batch, as TRL adds it up over a step; and its sums over tokens."""
    mask, logps = rows.mask, rows.logps
    log_ratio = logps - (logps.detach() if old is None else old)
    if o.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()
    clipped, limited = ratio.clamp(1 - o.epsilon, 1 + o.upper_epsilon), ratio
    if o.delta is not None:
        limited = ratio.clamp(max=o.delta)
    by_row = advantages[:, None]
    loss = -torch.min(limited * by_row, clipped * by_row)
    kl = torch.zeros_like(logps)
    if o.beta:
        kl = ((reference - logps).exp() - (reference - logps) - 1) * ratio
        loss = loss + o.beta * kl
    low, high = (limited < 1 - o.epsilon) & (by_row < 0), (limited > 1 + o.upper_epsilon) & (by_row > 0)
    sums = {
        name: (value * mask).sum().item() if value.shape[1] > 1 else value.sum().item()
        for name, value in (
            ("kl", kl.detach()),
            ("entropy", rows.entropies.detach()),
            ("clip_ratio/low_mean", low.double()),
            ("clip_ratio/high_mean", high.double()),
            ("clip_ratio/region_mean", (low | high).double()),
        )
    }
    loss = (loss * mask).sum(-1)
    count = len(mask)
    averaged = {
        "grpo": (loss / mask.sum(-1).clamp(min=1)).mean() / batches,
        "bnpo": loss.sum() / mask.sum().clamp(min=1) / batches,
        "dr_grpo": loss.sum() / (count * LIMIT) / batches,
        "dapo": loss.sum() / total,
    }
    return averaged[o.loss_type], sums


def expected_advantages(scale: str) -> Any:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    sums = (rewards * torch.tensor(WEIGHTS, dtype=torch.float64)).nansum(1)
    sums[rewards.isnan().all(1)] = NAN
    groups = sums.reshape(-1, GENERATIONS)

    def std(values: Any) -> float:
        return values[~values.isnan()].std().item()

    found = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        found = found / torch.tensor([[std(row) + 1e-4] for row in groups])
    if scale == "batch":
        found = found / (std(sums) + 1e-4)
    return found.reshape(-1).nan_to_num(0.0)


CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in LOSSES),
    *({"loss_type": name, "num_iterations": 2, "beta": 0.3} for name in LOSSES),
    {"num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.28, "temp": 0.7},
    {"num_iterations": 2, "delta": 1.4, "scale_rewards": "batch"},
    {"num_iterations": 2, "importance_sampling_level": "sequence", "beta": 0.1, "epsilon": 0.05},
    {"mask_truncated_completions": True, "num_iterations": 2, "scale_rewards": "none"},
    {"mask_truncated_completions": True, "loss_type": "grpo"},
]


def computed(options: dict[str, Any]) -> Any:
    """Ours and PyTorch's: losses, gradients for hidden states and embedding, metrics; and what they come from."""
    group, roller = make_group(options.get("num_iterations", 1) > 1), make_roller(**options)
    o = roller.sampler.options
    draw = np.random.default_rng(5)
    reference = [(-5.5 + draw.normal(0, 0.3, n)).astype(np.float32).tolist() for n in LENGTHS]
    batches = roller.batches(group)
    assert len(batches) == 2
    settings = Settings(o.beta, o.epsilon, o.upper_epsilon, o.delta, o.temp, o.importance_sampling_level)
    objective = GroupRelative(settings, statistics_names(roller.sampler.rewards))
    model = tiny_model()
    model.freeze()
    model.transformer.token_embeddings.unfreeze()
    weight = model.transformer.token_embeddings.weight
    states = [draw.normal(0, 0.5, (batch.tokens.inputs.size, 64)).astype(np.float32) for batch in batches]
    parts = [range(4), range(4, 8)]
    if o.beta:
        batches = [
            dataclasses.replace(b, reference=roller._placed(group, part, reference, b.tokens.inputs.shape))
            for b, part in zip(batches, parts, strict=True)
        ]
    arrays = [objective.arrays(batch) for batch in batches]

    def sums(values: list[mx.array], embedding: mx.array) -> Any:
        model.transformer.token_embeddings.weight = embedding
        found = [
            objective(Given(model, [(part["inputs"], value)]), part) for part, value in zip(arrays, values, strict=True)
        ]
        metrics = {name: sum(one.metrics[name] for one in found) for name in objective.metrics}
        return sum(one.objective for one in found), sum(one.loss for one in found), metrics

    (total, loss, metrics), (by_states, by_weight) = mx.value_and_grad(sums, argnums=(0, 1))(
        [mx.array(value) for value in states], mx.array(weight)
    )
    assert total.item() == loss.item()
    means = reported(objective, {name: value.item() / 8 for name, value in metrics.items()})
    ours = total.item() / 8, [np.array(g) / 8 for g in by_states], np.array(by_weight) / 8, means

    table = torch.tensor(np.array(weight).astype(np.float64), requires_grad=True)
    rows = [Rows(group, part, value, table, o.temp) for part, value in zip(parts, states, strict=True)]
    for part, one in zip(parts, rows, strict=True):
        for row, n in enumerate(part):
            if o.mask_truncated_completions and not group.finished[n]:
                one.mask[row] = 0
    return o, group, ours, rows, parts, reference, table


@pytest.mark.parametrize("options", CASES)
def test_loss_gradients_and_metrics(options):
    o, group, (loss, by_states, by_weight, metrics), rows, parts, reference, table = computed(options)
    advantages = expected_advantages(o.scale_rewards)
    tokens = sum(int(one.mask.sum()) for one in rows)
    expected, sums = torch.zeros(()), defaultdict(float)
    for one, part in zip(rows, parts, strict=True):
        old = None if group.old is None else padded(group.old, part)
        found, own = formula(o, one, advantages[list(part)], old, padded(reference, part), tokens, 2)
        expected = expected + found
        for name, value in own.items():
            sums[name] += value
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for ours, one in zip(by_states, rows, strict=True):
        np.testing.assert_allclose(ours, one.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(by_weight, table.grad.numpy(), atol=2e-6, rtol=1e-4)
    assert np.abs(by_weight).max() > 1e-3
    by_row = o.importance_sampling_level == "sequence"
    wanted = {
        name: value / (8 if by_row and name.startswith("clip") else tokens)
        for name, value in sums.items()
        if name != "kl" or o.beta
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    if o.num_iterations > 1 and o.importance_sampling_level == "token":
        assert wanted["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    found = score(REWARDS, WEIGHTS, GENERATIONS, scale)
    np.testing.assert_allclose(found.advantages, expected_advantages(scale).numpy(), atol=1e-6)
    assert found.advantages[3] == 0 and math.isnan(found.rewards[3])
    equal = score([[1.0]] * 4, (1.0,), 4, scale)
    assert equal.advantages == [0.0] * 4 and all(equal.is_constant)


def test_statistics_of_a_step():
    _, _, (_, _, _, metrics), *_ = computed({})
    sums = [1.1, 0.0, 0.55, 2.0, 2.5, 0.15, 1.15]
    ended = [n for n in LENGTHS if n < LIMIT]
    wanted = {
        "reward": np.mean(sums),
        "reward_std": np.std(sums, ddof=1),
        "frac_reward_zero_std": 0.0,
        "rewards/one/mean": np.mean([1, 0, 0.5, 2, 2, 0, 1]),
        "rewards/one/std": np.std([1, 0, 0.5, 2, 2, 0, 1], ddof=1),
        "rewards/two/mean": np.mean([0.2, 0.1, 0, 1, 0.3, 0.3]),
        "rewards/two/std": np.std([0.2, 0.1, 0, 1, 0.3, 0.3], ddof=1),
        "completions/mean_length": np.mean(LENGTHS),
        "completions/min_length": 1,
        "completions/max_length": 12,
        "completions/mean_terminated_length": np.mean(ended),
        "completions/min_terminated_length": 1,
        "completions/max_terminated_length": 9,
        "completions/clipped_ratio": 0.25,
    }
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_a_reward_that_applies_nowhere_is_not_reported():
    objective = GroupRelative(Settings(), ("reward", "rewards/a/mean"))
    means = dict.fromkeys(objective.metrics, 0.0) | {"tokens": 4.0, "reward": 0.5, "valid/reward": 0.5}
    found = objective.report(means)
    assert found["reward"] == 1.0 and "rewards/a/mean" not in found and not any("valid" in name for name in found)


@pytest.mark.parametrize("options", [case for case in CASES if case.get("num_iterations")])
def test_trl_computes_the_same(options):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError).GRPOTrainer
    o, group, (loss, by_states, by_weight, metrics), rows, parts, reference, table = computed(options)
    advantages = expected_advantages(o.scale_rewards)
    tokens = torch.tensor(float(sum(one.mask.sum() for one in rows)))
    accelerator = Accelerator()
    accelerator.num_processes, accelerator.reduce = 1, lambda value, reduction: value  # type: ignore[attr-defined]
    expected, seen = torch.zeros(()), defaultdict(list)
    for one, part in zip(rows, parts, strict=True):
        this = SimpleNamespace(
            model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False,
            top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
            importance_sampling_level=o.importance_sampling_level, beta=o.beta, epsilon_low=o.epsilon,
            epsilon_high=o.upper_epsilon, loss_type=o.loss_type, max_completion_length=LIMIT,
            current_gradient_accumulation_steps=2, _metrics={"train": seen},
            args=SimpleNamespace(use_bias_correction_kl=True, delta=o.delta, steps_per_generation=2),
            _get_per_token_logps_and_entropies=lambda *_, one=one, **__: (one.logps, one.entropies, None),
        )  # fmt: skip
        empty = torch.zeros(len(part), 1, dtype=torch.long)
        inputs = {
            "prompt_ids": empty, "prompt_mask": empty, "completion_ids": torch.zeros(len(part), LIMIT).long(),
            "completion_mask": one.mask, "advantages": advantages[list(part)], "num_items_in_batch": tokens,
            "ref_per_token_logps": padded(reference, part), "old_per_token_logps": padded(group.old, part),
        }  # fmt: skip
        expected = expected + trainer._compute_loss(this, None, inputs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for ours, one in zip(by_states, rows, strict=True):
        np.testing.assert_allclose(ours, one.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(by_weight, table.grad.numpy(), atol=2e-6, rtol=1e-4)
    # TRL averages the means of micro-batches; ours are over all tokens, or all completions.
    shares = [one.mask.sum().item() / tokens.item() for one in rows]
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        if name in seen:
            by_row = o.importance_sampling_level == "sequence" and name.startswith("clip")
            parts = [0.5, 0.5] if by_row else shares
            wanted = sum(share * value for share, value in zip(parts, seen[name], strict=True))
            assert metrics[name] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
