"""Losses, gradients and metrics of preference tuning: TRL 1.16's formulas in PyTorch, and TRL itself if installed."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from mlx_openelm.training.data.answers import Answer, Answers
from mlx_openelm.training.data.pairs import PreferenceBatch, PreferenceMaker
from mlx_openelm.training.step import preference_losses
from mlx_openelm.training.step.objectives import reported
from mlx_openelm.training.step.preference_losses import Settings
from mlx_openelm.training.step.preferences import LabeledPreference, Preference

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import tiny_model

torch = pytest.importorskip("torch")
F = torch.nn.functional

# Two answers each; the lengths of prompt and completions. Some completions are much longer than the other.
PAIRS = [(3, 5, 2), (1, 4, 9), (6, 3, 3), (4, 12, 1)]
LABELS = [True, False, False, True]


def make_answers(
    labeled: bool = False, learns_prompts: bool = False
) -> tuple[list[Answers], list[tuple[float, float]]]:
    draw = np.random.default_rng(7)
    items = []
    for number, (prompt, *lengths) in enumerate(PAIRS):
        start = draw.integers(3, 256, prompt)
        answers = []
        for side, length in enumerate(lengths):
            tokens = array("i", [int(token) for token in [*start, *draw.integers(3, 256, length)]])
            first = 1 if learns_prompts and side == 0 else prompt
            answers.append(Answer(tokens, ((first, len(tokens)),), f"line {number}", prompt))
        items.append(Answers((answers[0], answers[1]), f"line {number}", LABELS[number] if labeled else None))
    lengths = [[item.answers[side].num_completed for side in (0, 1)] for item in items]
    reference = [(-5.0 * a + draw.normal(), -5.5 * b + draw.normal()) for a, b in lengths]
    return items, reference


def lowered(items: list[Answers], reference: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The second of each answers' log-probabilities, but much lower."""
    pairs = zip(items, reference, strict=True)
    return [(one, other - 4 * item.answers[1].num_completed) for item, (one, other) in pairs]


@dataclasses.dataclass(frozen=True)
class Given:
    """In place of a forward pass: hidden states that are given, for each array of tokens."""

    model: Any
    states: list[tuple[mx.array, mx.array]]
    differentiable: bool = True

    def hidden_states(self, inputs: mx.array, segments: mx.array | None = None) -> mx.array:
        return next(states for tokens, states in self.states if tokens is inputs)


def ours(objective: Any, batch: PreferenceBatch, states: list[np.ndarray], *, trains_embedding: bool = True) -> Any:
    """Loss, gradients for hidden states and embedding, and metrics, all as means."""
    model = tiny_model()
    model.freeze()
    if trains_embedding:
        model.transformer.token_embeddings.unfreeze()
    arrays = objective.arrays(batch)
    parts = [arrays] if batch.others is None else [arrays["own"], arrays["others"]]
    tokens = [part["inputs"] for part in parts]

    def sums(values: list[mx.array], embedding: mx.array) -> Any:
        if trains_embedding:
            model.transformer.token_embeddings.weight = embedding
        found = objective(Given(model, list(zip(tokens, values, strict=True))), arrays)
        return found.objective, found.loss, [found.metrics[name] for name in objective.metrics]

    given = [mx.array(value) for value in states], mx.array(model.transformer.token_embeddings.weight)
    (total, loss, metrics), (by_states, by_embedding) = mx.value_and_grad(sums, argnums=(0, 1))(*given)
    count = batch.num_targets
    assert total.item() == loss.item()
    means = {name: float(value.item()) / count for name, value in zip(objective.metrics, metrics, strict=True)}
    gradients = [np.array(gradient) / count for gradient in by_states], np.array(by_embedding) / count
    return total.item() / count, gradients, reported(objective, means)


def hidden(batch: PreferenceBatch, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (batch.tokens.inputs.size, 64)).astype(np.float32)


# PyTorch's side.


class Rows:
    """The rows of a batch in PyTorch, and the logits of its positions."""

    def __init__(self, items: list[Any], states: np.ndarray, embedding: Any):
        self.states = torch.tensor(states.astype(np.float64), requires_grad=True)
        length = len(states) // len(items)
        self.logits = (self.states @ embedding.T).reshape(len(items), length, -1)
        self.ids = torch.zeros(len(items), length + 1, dtype=torch.long)
        self.mask, self.all = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
        for row, answer in enumerate(items):
            self.ids[row, : len(answer.tokens)] = torch.tensor(list(answer.tokens))
            self.mask[row, answer.start : len(answer.tokens)] = 1
            self.all[row, : len(answer.tokens)] = 1
        found = self.logits.log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]
        self.per_token = found * self.mask[:, 1:]
        self.logps = self.per_token.sum(1)
        self.lengths = self.mask.sum(1)
        self.mean_logits = self.logits.mean(-1)


def embedding() -> Any:
    weight = np.array(tiny_model().transformer.token_embeddings.weight)
    return torch.tensor(weight.astype(np.float64), requires_grad=True)


def formula(name: str, chosen: Any, rejected: Any, lengths: Any, s: Settings) -> Any:
    """The loss of each pair; chosen and rejected are relative to the reference, except for cpo, simpo and orpo."""
    delta, (long, short) = chosen - rejected, lengths
    mean = chosen / long - rejected / short
    if name == "sigmoid" or name == "cpo":
        return (
            -F.logsigmoid(s.beta * delta) * (1 - s.label_smoothing) - F.logsigmoid(-s.beta * delta) * s.label_smoothing
        )
    if name == "hinge":
        return torch.relu(1 - s.beta * delta)
    if name == "ipo":
        return (mean - 1 / (2 * s.beta)) ** 2
    if name == "robust":
        clean, flipped = -F.logsigmoid(s.beta * delta), -F.logsigmoid(-s.beta * delta)
        return ((1 - s.label_smoothing) * clean - s.label_smoothing * flipped) / (1 - 2 * s.label_smoothing)
    if name == "apo_zero":
        return (1 - torch.sigmoid(s.beta * chosen)) + torch.sigmoid(s.beta * rejected)
    if name == "sigmoid_norm":
        return -F.logsigmoid(s.beta * mean)
    if name == "simpo":
        margin = s.beta * (mean - s.simpo_gamma / s.beta)
        return -F.logsigmoid(margin) * (1 - s.label_smoothing) - F.logsigmoid(-margin) * s.label_smoothing
    if name == "orpo":
        odds = (chosen / long).exp(), (rejected / short).exp()
        log_odds = torch.log(odds[0] / (1 - odds[0])) - torch.log(odds[1] / (1 - odds[1]))
        return -s.beta * F.logsigmoid(log_odds)
    assert name == "sft"
    return 0 * chosen


CASES: list[tuple[tuple[str, ...], Settings]] = [
    (("sigmoid",), Settings()),
    (("sigmoid",), Settings(beta=0.01)),
    (("sigmoid",), Settings(label_smoothing=0.2)),
    (("hinge",), Settings(beta=0.01)),
    (("ipo",), Settings(beta=0.3)),
    (("robust",), Settings(label_smoothing=0.1)),
    (("apo_zero",), Settings()),
    (("sigmoid_norm",), Settings(beta=2.0)),
    (("sft",), Settings()),
    (("sigmoid", "ipo", "sft"), Settings(beta=0.2)),
    (("cpo",), Settings(cpo_alpha=0.7, label_smoothing=0.1)),
    (("simpo",), Settings(beta=2.0, cpo_alpha=0.0, label_smoothing=0.1)),
    (("simpo",), Settings(beta=2.0, simpo_gamma=1.0, cpo_alpha=0.5)),
    (("orpo",), Settings()),
]
WEIGHTS = (0.8, 0.3, 1.5)
NO_REFERENCE = ("orpo", "cpo", "simpo")


@pytest.mark.parametrize("trains_embedding", [True, False])
@pytest.mark.parametrize(("names", "settings"), CASES)
def test_losses_gradients_and_metrics_of_pairs(names, settings, trains_embedding):
    alone = names[0] in NO_REFERENCE
    items, reference = make_answers(learns_prompts="orpo" in names)
    batch = PreferenceMaker(items, reference, 64)([(i,) for i in range(len(items))], 0, 1)
    states = hidden(batch, 1)
    weights = dict(zip(names, WEIGHTS if len(names) > 1 else (1.0,), strict=False))
    objective = Preference(weights, settings, uses_reference=not alone)
    loss, ((by_states,), by_embedding), metrics = ours(objective, batch, [states], trains_embedding=trains_embedding)

    weight = embedding()
    rows = Rows([answer for item in items for answer in item.answers], states, weight)
    ref = torch.tensor([value for pair in reference for value in pair], dtype=torch.float64)
    relative = rows.logps if alone else rows.logps - ref
    lengths = rows.lengths[0::2], rows.lengths[1::2]
    expected = sum(
        share * formula(name, relative[0::2], relative[1::2], lengths, settings).mean()
        for name, share in weights.items()
    )
    counted = (rows.all if "orpo" in names else rows.mask)[0::2, 1:].bool()
    found = rows.logits.log_softmax(-1).gather(-1, rows.ids[:, 1:, None])[..., 0][0::2]
    nll = -found[counted].mean()
    share = {"orpo": 1.0, "cpo": settings.cpo_alpha, "simpo": settings.cpo_alpha}.get(names[0], weights.get("sft", 0.0))
    expected = expected + share * nll
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(by_states, rows.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    if trains_embedding:
        np.testing.assert_allclose(by_embedding, weight.grad.numpy(), atol=2e-6, rtol=1e-4)

    per_token = names[0] in ("orpo", "simpo")
    rewards = settings.beta * (relative / rows.lengths if per_token else relative).detach()
    logps = (rows.logps / rows.lengths if per_token else rows.logps).detach()
    wanted = {
        "rewards/chosen": rewards[0::2].mean(),
        "rewards/rejected": rewards[1::2].mean(),
        "rewards/accuracies": (rewards[0::2] > rewards[1::2]).double().mean(),
        "rewards/margins": (rewards[0::2] - rewards[1::2]).mean(),
        "logps/chosen": logps[0::2].mean(),
        "logps/rejected": logps[1::2].mean(),
        "logits/chosen": rows.mean_logits[0::2][rows.mask[0::2, 1:].bool()].mean(),
        "logits/rejected": rows.mean_logits[1::2][rows.mask[1::2, 1:].bool()].mean(),
    }
    if names[0] in NO_REFERENCE or "sft" in names:
        wanted["nll_loss"] = nll
    if names[0] == "orpo":
        odds = logps - torch.log(1 - logps.exp())
        wanted["log_odds_chosen"] = (odds[0::2] - odds[1::2]).mean()
        wanted["log_odds_ratio"] = F.logsigmoid(odds[0::2] - odds[1::2]).mean()
    assert metrics == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", [Settings(), Settings(beta=0.02, desirable_weight=1.3, undesirable_weight=0.6)])
def test_losses_gradients_and_metrics_of_labeled_answers(settings):
    items, reference = make_answers(labeled=True)
    # The model is closer to the mismatched answers than the reference, so that their divergence counts.
    reference = lowered(items, reference)
    batch = PreferenceMaker(items, reference, 64)([(i,) for i in range(len(items))], 0, 1)
    assert batch.others is not None
    states, others = hidden(batch, 1), hidden(batch.others, 2)
    loss, ((by_states, by_others), by_embedding), metrics = ours(LabeledPreference(settings), batch, [states, others])
    weight = embedding()
    rows = Rows([item.answers[0] for item in items], states, weight)
    mismatched = Rows([item.answers[1] for item in items], others, weight)
    ref = torch.tensor(reference, dtype=torch.float64)
    kl = (mismatched.logps - ref[:, 1]).mean().detach().clamp(min=0)
    assert kl > 0
    relative, label = rows.logps - ref[:, 0], torch.tensor(LABELS)
    good = settings.desirable_weight * (1 - torch.sigmoid(settings.beta * (relative - kl)))
    bad = settings.undesirable_weight * (1 - torch.sigmoid(settings.beta * (kl - relative)))
    expected = torch.where(label, good, bad).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(by_states, rows.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(by_embedding, weight.grad.numpy(), atol=2e-6, rtol=1e-4)
    assert not by_others.any()
    wanted = {"kl": kl.item()}
    for side, which in (("chosen", label), ("rejected", ~label)):
        wanted[f"rewards/{side}"] = settings.beta * relative[which].mean().item()
        wanted[f"logps/{side}"] = rows.logps[which].mean().item()
        wanted[f"logits/{side}"] = rows.mean_logits[which][rows.mask[which][:, 1:].bool()].mean().item()
    wanted["rewards/margins"] = wanted["rewards/chosen"] - wanted["rewards/rejected"]
    assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_batch_of_one_label_reports_nothing_of_the_other():
    objective = LabeledPreference()
    means = dict.fromkeys(objective.metrics, 0.0) | {"answers/chosen": 1.0, "tokens/chosen": 4.0, "logits/chosen": 2.0}
    assert objective.report(means) == {"kl": 0.0, "rewards/chosen": 0.0, "logps/chosen": 0.0, "logits/chosen": 0.5}


@pytest.mark.parametrize("logarithm", [-1e-6, -1e-3, -0.6931, -0.6932, -5.0, -40.0])
def test_the_odds_are_exact_near_certainty_and_far_from_it(logarithm):
    with np.errstate(all="raise"):
        expected = math.log(-math.expm1(logarithm))
    found = preference_losses._log_of_rest(mx.array(logarithm)).item()
    assert found == pytest.approx(expected, rel=1e-3 if logarithm > -1e-5 else 1e-5, abs=1e-9)
    slope = mx.grad(preference_losses._log_of_rest)(mx.array(logarithm)).item()
    assert slope == pytest.approx(-1 / math.expm1(-logarithm), rel=1e-3)


# TRL itself.


class Accelerator:
    device = "cpu"

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def outputs(rows: Rows, order: list[int]) -> Any:
    """What TRL's model returns for the rows in this order."""
    mask = rows.mask[order, 1:]
    zeros = torch.zeros_like(rows.per_token[order])
    return SimpleNamespace(
        log_probs=rows.per_token[order],
        entropy=zeros,
        mean_logits=rows.mean_logits[order] * mask,
        is_top1=zeros.bool(),
        logits=rows.logits[order],
    )


@pytest.mark.parametrize(("names", "settings"), [case for case in CASES if case[0][0] not in NO_REFERENCE])
def test_trl_computes_the_same_for_pairs(names, settings):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", exc_type=ImportError).DPOTrainer
    if settings.label_smoothing and "robust" not in names:
        pytest.skip("TRL smooths labels in robust alone")
    items, reference = make_answers()
    batch = PreferenceMaker(items, reference, 64)([(i,) for i in range(len(items))], 0, 1)
    states = hidden(batch, 1)
    weights = dict(zip(names, WEIGHTS if len(names) > 1 else (1.0,), strict=False))
    loss, ((by_states,), by_embedding), metrics = ours(Preference(weights, settings), batch, [states])
    weight = embedding()
    rows = Rows([answer for item in items for answer in item.answers], states, weight)
    order = [*range(0, 2 * len(items), 2), *range(1, 2 * len(items), 2)]
    this = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=list(weights),
        loss_weights=list(weights.values()), beta=settings.beta, label_smoothing=settings.label_smoothing,
        use_weighting=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": rows.ids[order],
        "attention_mask": rows.all[order],
        "completion_mask": rows.mask[order],
        "ref_chosen_logps": torch.tensor([one for one, _ in reference], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor([other for _, other in reference], dtype=torch.float64),
    }
    expected = trainer._compute_loss(this, lambda **_: outputs(rows, order), inputs, False)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(by_states, rows.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(by_embedding, weight.grad.numpy(), atol=2e-6, rtol=1e-4)
    theirs = {name: values[0] for name, values in this._metrics["train"].items()}
    assert metrics == pytest.approx({name: theirs.get(name, metrics[name]) for name in metrics}, rel=1e-4, abs=1e-5)
    assert set(metrics) - set(theirs) <= {"nll_loss"}


def test_trl_computes_the_same_for_labeled_answers():
    trainer = pytest.importorskip("trl.trainer.kto_trainer", exc_type=ImportError).KTOTrainer
    settings = Settings(desirable_weight=1.3, undesirable_weight=0.6)
    items, reference = make_answers(labeled=True)
    reference = lowered(items, reference)
    batch = PreferenceMaker(items, reference, 64)([(i,) for i in range(len(items))], 0, 1)
    assert batch.others is not None
    states, others = hidden(batch, 1), hidden(batch.others, 2)
    loss, ((by_states, _), by_embedding), metrics = ours(LabeledPreference(settings), batch, [states, others])
    weight = embedding()
    rows = Rows([item.answers[0] for item in items], states, weight)
    mismatched = Rows([item.answers[1] for item in items], others, weight)
    order = list(range(len(items)))
    this = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False,
        precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=settings.beta,
        desirable_weight=settings.desirable_weight, undesirable_weight=settings.undesirable_weight,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, batch: mismatched.logps.detach(),
    )  # fmt: skip
    inputs = {
        "input_ids": rows.ids, "attention_mask": rows.all, "completion_mask": rows.mask, "label": torch.tensor(LABELS),
        "ref_logps": torch.tensor([one for one, _ in reference], dtype=torch.float64),
        "ref_KL_logps": torch.tensor([other for _, other in reference], dtype=torch.float64),
    }  # fmt: skip
    expected = trainer._compute_loss(this, lambda **_: outputs(rows, order), inputs, False)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(by_states, rows.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(by_embedding, weight.grad.numpy(), atol=2e-6, rtol=1e-4)
    theirs = {name: values[0] for name, values in this._metrics["train"].items()}
    assert metrics == pytest.approx({name: theirs[name] for name in metrics}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("names", "settings"), [case for case in CASES if case[0][0] in NO_REFERENCE])
def test_trl_computes_the_same_without_a_reference(names, settings):
    (name,) = names
    module = pytest.importorskip(f"trl.experimental.{'orpo' if name == 'orpo' else 'cpo'}", exc_type=ImportError)
    trainer = module.ORPOTrainer if name == "orpo" else module.CPOTrainer
    items, reference = make_answers(learns_prompts=name == "orpo")
    batch = PreferenceMaker(items, reference, 64)([(i,) for i in range(len(items))], 0, 1)
    states = hidden(batch, 1)
    objective = Preference({name: 1.0}, settings, uses_reference=False)
    loss, ((by_states,), by_embedding), metrics = ours(objective, batch, [states])
    weight = embedding()
    rows = Rows([answer for item in items for answer in item.answers], states, weight)

    def model(*_: Any, **__: Any) -> Any:
        # TRL's logits have one position more, which predicts nothing.
        logits = torch.cat([rows.logits, rows.logits[:, -1:]], dim=1)
        return SimpleNamespace(logits=logits[[*range(0, len(logits), 2), *range(1, len(logits), 2)]])

    this = SimpleNamespace(
        accelerator=Accelerator(), aux_loss_enabled=False, is_encoder_decoder=False, padding_value=0, pad_token_id=0,
        beta=settings.beta, label_smoothing=settings.label_smoothing, simpo_gamma=settings.simpo_gamma, alpha=0.0,
        cpo_alpha=settings.cpo_alpha, loss_type="simpo" if name == "simpo" else "sigmoid",
    )  # fmt: skip
    for method in ("concatenated_inputs", "concatenated_forward", "get_batch_logps", "odds_ratio_loss", "cpo_loss"):
        if hasattr(trainer, method):
            own = vars(trainer)[method]
            setattr(this, method, own.__func__ if isinstance(own, staticmethod) else own.__get__(this))
    ids, labels = rows.ids, torch.where(rows.mask == 1, rows.ids, -100)
    inputs = {}
    for side, key in enumerate(("chosen", "rejected")):
        inputs |= {
            f"{key}_input_ids": ids[side::2],
            f"{key}_attention_mask": rows.all[side::2],
            f"{key}_labels": labels[side::2],
        }
    expected, theirs = trainer.get_batch_loss_metrics(this, model, inputs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(by_states, rows.states.grad.numpy(), atol=2e-6, rtol=1e-4)
    np.testing.assert_allclose(by_embedding, weight.grad.numpy(), atol=2e-6, rtol=1e-4)
    theirs = {key: float(value) for key, value in theirs.items()}
    # These trainers average logits over prompts and padding too.
    compared = {key: value for key, value in metrics.items() if not key.startswith("logits/")}
    if settings.cpo_alpha == 0:
        del compared["nll_loss"], theirs["nll_loss"]  # TRL does not compute it
    assert compared == pytest.approx({key: theirs[key] for key in compared}, rel=1e-4, abs=1e-5)
