"""The update of the weights: gradients against the plain model's, exact state, and memory."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence

from mlx_openelm import load, native
from mlx_openelm.adapters.attaching import attach_new, detach
from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM
from mlx_openelm.training.data.batches import IGNORED, Batch
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS
from mlx_openelm.training.step import updater as updater_module
from mlx_openelm.training.step.evaluation import Evaluation, evaluate
from mlx_openelm.training.step.forward import hidden_states
from mlx_openelm.training.step.objectives import CrossEntropy, Forward, Objective, Sums, learned_positions
from mlx_openelm.training.step.recompute import recomputed, substituted, trainable
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from graphs import operations
from mlx.utils import tree_flatten, tree_unflatten
from small_models import small

EVERYTHING = ("token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2")


@pytest.fixture
def model() -> OpenELM:
    return load("tiny", expand=True)[0]


def adapt(model: OpenELM, **changes: object) -> None:
    """Attach a nonzero adapter."""
    options = {"target_modules": EVERYTHING, "rank": 4, "scale": 2.0, "seed": 1, **changes}
    attach_new(model, **options)  # type: ignore[arg-type]
    keys = iter(mx.random.split(mx.random.key(5), 200))
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.update(tree_unflatten([(name, 0.05 * mx.random.normal(value.shape, key=next(keys)))]))
    mx.eval(model.parameters())


def sequences(lengths: Sequence[int], vocab: int = 2048, seed: int = 0) -> list[list[int]]:
    keys = mx.random.split(mx.random.key(seed), len(lengths))
    return [mx.random.randint(3, vocab, (n,), key=key).tolist() for n, key in zip(lengths, keys, strict=True)]


def rows_of(examples: Sequence[Sequence[int]], width: int | None = None, masked: int = 0) -> Batch:
    """One example per row; the first `masked` targets of each are not learned."""
    width = width or max(map(len, examples)) - 1
    inputs, targets = [], []
    for tokens in examples:
        padding = width - len(tokens) + 1
        inputs.append([*tokens[:-1], *[0] * padding])
        targets.append([*[IGNORED] * masked, *tokens[1 + masked :], *[IGNORED] * padding])
    counted = sum(target != IGNORED for row in targets for target in row)
    tokens_read = sum(len(tokens) - 1 for tokens in examples)
    numbers = tuple(range(len(examples)))
    return Batch(mx.array(inputs), mx.array(targets), None, numbers, counted, tokens_read)


def packed(examples: Sequence[Sequence[int]], width: int) -> Batch:
    """All examples in one row."""
    inputs: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    for number, tokens in enumerate(examples):
        inputs += tokens[:-1]
        targets += tokens[1:]
        segments += [number] * (len(tokens) - 1)
    padding = width - len(inputs)
    arrays = (
        mx.array([values + [fill] * padding]) for values, fill in ((inputs, 0), (targets, IGNORED), (segments, -1))
    )
    return Batch(*arrays, tuple(range(len(examples))), len(targets), len(targets))


def plain_gradients(model: OpenELM, batch: Batch) -> tuple[float, dict[str, mx.array]]:
    """The mean loss and its gradients, with all logits, row by row and nothing recomputed."""

    def loss(model: OpenELM) -> mx.array:
        logits = model(batch.inputs)
        expected = mx.maximum(batch.targets, 0)[..., None]
        likelihood = mx.logsumexp(logits, -1) - mx.take_along_axis(logits, expected, -1)[..., 0]
        return mx.sum(mx.where(batch.targets == IGNORED, 0.0, likelihood)) / batch.num_targets

    value, gradients = nn.value_and_grad(model, lambda: loss(model))()
    return value.item(), dict(tree_flatten(gradients))


def our_gradients(model: OpenELM, batches: Sequence[Batch], **options: object) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradients of one update: SGD with a rate of 1 subtracts exactly the gradients."""
    before = dict(tree_flatten(model.trainable_parameters()))
    updater = Updater(model, optim.SGD(1.0), **options)  # type: ignore[arg-type]
    update = updater.update(batches, sum(batch.num_targets for batch in batches), 1.0, 0)
    after = dict(tree_flatten(model.trainable_parameters()))
    gradients = {name: before[name] - after[name] for name in before}
    mx.eval(gradients, update.loss)
    model.update(tree_unflatten(list(before.items())))
    return update.loss.item(), gradients


def assert_equal_gradients(ours: dict[str, mx.array], expected: dict[str, mx.array], tolerance: float = 1e-4) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        # A difference of two weights has the precision of the weights.
        assert mx.abs(ours[name] - gradient).max().item() <= tolerance * mx.abs(gradient).max().item() + 2e-7, name


METHODS = {
    "lora": lambda model: adapt(model),
    "dora": lambda model: adapt(model, dora=True),
    "full": lambda model: model.unfreeze(),
    "last layers": lambda model: (model.freeze(), [layer.unfreeze() for layer in model.layers[-2:]]),
}


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recompute", [NOTHING, PARTS, LAYERS])
def test_gradients_equal_the_plain_models(model, method, recompute):
    METHODS[method](model)
    model.train()
    batch = rows_of(sequences([140, 20, 3]), masked=1)  # several blocks of queries, padding, prompts
    loss, expected = plain_gradients(model, batch)
    value, gradients = our_gradients(model, [batch], recompute=recompute)
    assert value == pytest.approx(loss, rel=1e-5)
    assert_equal_gradients(gradients, expected)


def test_gradients_agree_with_finite_differences(model):
    adapt(model)
    batch = rows_of(sequences([140, 3]))
    _, gradients = our_gradients(model, [batch])
    updater = Updater(model, optim.SGD(0.0))
    for name in ("transformer.layers.0.attn.qkv_proj.lora_b", "transformer.token_embeddings.lora_b"):
        weight = dict(tree_flatten(model.parameters()))[name]
        # Along the gradient the loss changes most, so its rounding matters least.
        norm = mx.sqrt(mx.sum(mx.square(gradients[name])))
        losses = []
        for side in (1, -1):
            model.update(tree_unflatten([(name, weight + side * 0.05 * gradients[name] / norm)]))
            losses.append(updater.update([batch], batch.num_targets, 0.0, 0).loss.item())
        model.update(tree_unflatten([(name, weight)]))
        assert (losses[0] - losses[1]) / 0.1 == pytest.approx(norm.item(), rel=5e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_micro_batches_add_up_to_one_batch(model, method):
    METHODS[method](model)
    examples = sequences([40, 11, 25, 33])
    loss, expected = our_gradients(model, [rows_of(examples, masked=2)])
    value, gradients = our_gradients(model, [rows_of([tokens], masked=2) for tokens in examples])
    assert value == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(gradients, expected, 1e-5)


def test_half_precision_gradients_do_not_underflow_in_steps_of_many_tokens():
    """A token's share of a step may be 1e-6; scaled by it, float16 gradients of activations would underflow."""
    batch, found = rows_of(sequences([100, 60], vocab=200)), {}
    for dtype in (mx.float32, mx.float16):
        model = small(dtype)
        adapt(model)
        updater, before = Updater(model, optim.SGD(1.0)), dict(tree_flatten(model.trainable_parameters()))
        updater.update([batch], 1_000_000, 1e6, 0)
        found[dtype] = {name: value - before[name] for name, value in tree_flatten(model.trainable_parameters())}
    for name, change in found[mx.float32].items():
        error = mx.sqrt(mx.sum(mx.square(found[mx.float16][name] - change)) / mx.sum(mx.square(change)))
        assert error.item() < 0.01, name


@pytest.mark.slow
@pytest.mark.compiled
def test_only_the_graphs_of_a_few_shapes_are_kept(model, monkeypatch):
    traced = []

    class Tracing(CrossEntropy):
        def __call__(self, forward, arrays):
            traced.append(arrays[0].shape)
            return super().__call__(forward, arrays)

    monkeypatch.setattr(updater_module, "GRAPHS", 3)
    adapt(model)
    updater = Updater(model, optim.SGD(0.0), objective=Tracing())
    batches = [rows_of(sequences([10 + number])) for number in range(5)]
    losses, traces = [], []
    for number in (0, 1, 2, 0, 3, 3, 4, 0):  # the fourth shape, number 3, drops all graphs before it
        losses.append((number, updater.update([batches[number]], 10, 0.0, 0).loss.item()))
        traces.append(len(traced))
    assert traces == [1, 2, 3, 3, 4, 4, 5, 6]
    assert len(set(losses)) == 5


def test_numbers_of_learned_positions_are_padded_to_few_sizes(model):
    adapt(model)
    sizes = set()
    for count in (1, 128, 129, 1000, 2047, 2048, 2049, 2303, 2305, 4095):
        targets = mx.where(mx.random.permutation(4096, key=mx.random.key(count)) < count, 7, IGNORED).reshape(4, -1)
        rows, expected, counts = learned_positions(Batch(targets, targets, None, (0,), count, 4096))
        rows = mx.arange(4096) if rows is None else rows  # all
        assert expected.tolist() == mx.maximum(targets.reshape(-1)[rows], 0).tolist() and mx.sum(counts).item() == count
        learned = [index for index, target in enumerate(targets.reshape(-1).tolist()) if target != IGNORED]
        assert rows.tolist() == sorted(rows.tolist()) and set(learned) <= set(rows.tolist())
        assert len(set(rows.tolist())) == rows.size <= max(128, count * 1.125 + 128)
        sizes.add(rows.size)
    assert sizes == {128, 256, 1024, 2048, 2304, 2560, 4096}


def test_padding_changes_nothing(model):
    adapt(model)
    examples = sequences([30, 12])
    loss, expected = our_gradients(model, [rows_of(examples)])
    value, gradients = our_gradients(model, [rows_of(examples, width=190)])
    assert value == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(gradients, expected, 1e-5)


def test_packed_examples_do_not_attend_to_each_other(model):
    adapt(model)
    examples = sequences([140, 9, 77])
    loss, expected = our_gradients(model, [rows_of([tokens]) for tokens in examples])
    for recompute in (NOTHING, PARTS, LAYERS):
        value, gradients = our_gradients(model, [packed(examples, 240)], recompute=recompute)
        assert value == pytest.approx(loss, rel=1e-5)
        assert_equal_gradients(gradients, expected)
    apart = evaluate(model, [rows_of([tokens]) for tokens in examples])
    together = evaluate(model, [packed(examples, 240)])
    assert together.tokens == apart.tokens
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)


def test_a_step_without_learned_tokens_leaves_the_weights(model):
    adapt(model)
    batch = rows_of(sequences([5]), masked=4)
    assert batch.num_targets == 0
    loss, gradients = our_gradients(model, [batch])
    assert loss == 0
    assert all(mx.abs(gradient).max().item() == 0 for gradient in gradients.values())
    assert our_gradients(model, [])[0] == 0
    assert math.isnan(evaluate(model, [batch]).loss)


def test_perplexity_of_a_huge_loss_is_infinite():
    assert Evaluation(math.log(7), 1).perplexity == pytest.approx(7)
    assert Evaluation(1e5, 1).perplexity == math.inf


def test_gradients_are_clipped_to_the_norm(model):
    adapt(model)
    batch = rows_of(sequences([50]))
    _, gradients = our_gradients(model, [batch])
    norm = math.sqrt(sum(mx.sum(gradient**2).item() for gradient in gradients.values()))
    _, clipped = our_gradients(model, [batch], max_grad_norm=norm / 4)
    assert_equal_gradients(clipped, {name: gradient / 4 for name, gradient in gradients.items()}, 1e-4)
    updater = Updater(model, optim.SGD(0.0), max_grad_norm=norm / 4)
    assert updater.update([batch], batch.num_targets, 0.0, 0).grad_norm.item() == pytest.approx(norm, rel=1e-4)


def test_z_loss_and_smoothing_are_minimized_and_not_reported(model):
    adapt(model)
    batch = rows_of(sequences([50]))
    updater = Updater(model, optim.SGD(0.0), objective=CrossEntropy(z_loss=0.1, label_smoothing=0.1))
    update = updater.update([batch], batch.num_targets, 0.0, 0)
    assert update.loss.item() == pytest.approx(evaluate(model, [batch]).loss, rel=1e-5)
    assert update.objective.item() > update.loss.item()


def test_the_learning_rate_of_each_update_is_used(model):
    adapt(model)
    batch = rows_of(sequences([20]))
    updater = Updater(model, optim.SGD(0.3))
    before = updater.state()
    updater.update([batch], batch.num_targets, 0.0, 0)
    after = updater.state()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before if name.startswith("weights."))
    updater.update([batch], batch.num_targets, 0.1, 1)
    assert any(not mx.array_equal(before[name], value).item() for name, value in updater.state().items())


def test_state_restores_bit_for_bit(model):
    adapt(model, dropout=0.2)
    batches = [rows_of(sequences([9, 14], seed=seed)) for seed in range(4)]
    updater = Updater(model, optim.AdamW(1e-2), seed=7)

    def run(updater: Updater, steps: range) -> list[float]:
        return [updater.update([batches[i]], batches[i].num_targets, 1e-2, i).loss.item() for i in steps]

    run(updater, range(2))
    middle = updater.state()
    mx.eval(middle)
    losses, end = run(updater, range(2, 4)), updater.state()
    again = Updater(model, optim.AdamW(1e-2), seed=7)
    again.restore(middle)
    assert run(again, range(2, 4)) == losses
    assert again.state().keys() == end.keys()
    assert all(mx.array_equal(again.state()[name], value).item() for name, value in end.items())


@pytest.mark.parametrize("recompute", [NOTHING, PARTS, LAYERS])
def test_dropout_uses_the_same_masks_in_the_backward_pass(model, recompute):
    """The loss is linear in `lora_b` of the last matrix to first order: its gradient must belong to the same masks."""
    adapt(model, dropout=0.5, target_modules=("proj_2", "out_proj"))
    model.train()
    batch = rows_of(sequences([40]))
    updater = Updater(model, optim.SGD(1.0), seed=3, recompute=recompute)
    places, values = trainable([model])
    names = [name for name in updater.state() if name.startswith("weights.")]
    index = next(i for i, name in enumerate(names) if name.endswith("layers.3.ffn.proj_2.lora_b"))

    def loss(weight: mx.array) -> float:
        with substituted(places, [*values[:index], weight, *values[index + 1 :]]):
            before = [module[name] for module, name in places]
            value = updater.update([batch], batch.num_targets, 0.0, 5).loss.item()
            for (module, name), old in zip(places, before, strict=True):
                module[name] = old
        return value

    updater.update([batch], batch.num_targets, 1.0, 5)
    gradient = values[index] - places[index][0][places[index][1]]
    mx.eval(gradient)
    for (module, name), value in zip(places, values, strict=True):
        module[name] = value
    norm = mx.sqrt(mx.sum(mx.square(gradient)))
    step = 0.01 * gradient / norm
    slope = (loss(values[index] + step) - loss(values[index] - step)) / 0.02
    assert slope == pytest.approx(norm.item(), rel=1e-2)


def test_dropout_differs_between_steps_but_not_between_runs(model):
    adapt(model, dropout=0.5)
    model.train()
    batch = rows_of(sequences([12]))

    def loss(step: int, seed: int = 0) -> float:
        updater = Updater(model, optim.SGD(0.0), seed=seed)
        return updater.update([batch], batch.num_targets, 0.0, step).loss.item()

    assert loss(0) == loss(0)
    assert len({loss(0), loss(1), loss(0, seed=1), evaluate(model, [batch]).loss}) == 4


def test_weights_are_stored_in_float32_and_used_in_bfloat16():
    seen = set()

    class NotingForward(Forward):
        def hidden_states(self, inputs, segments=None):
            hidden = super().hidden_states(inputs, segments)
            seen.add(hidden.dtype)
            return hidden

    class Noting(CrossEntropy):
        def __call__(self, forward, arrays):
            noting = NotingForward(forward.model, forward.recompute, forward.differentiable)
            return super().__call__(noting, arrays)

    model = small(mx.bfloat16)
    model.unfreeze()
    batch = rows_of(sequences([30, 30], vocab=200))
    updater = Updater(model, optim.SGD(1e-3), objective=Noting(), compute_dtype=mx.bfloat16)
    assert {value.dtype for _, value in tree_flatten(model.trainable_parameters())} == {mx.float32}
    loss = updater.update([batch], batch.num_targets, 1e-4, 0).loss.item()
    assert updater.evaluate([batch]).loss == pytest.approx(loss, rel=0.05)
    assert seen == {mx.bfloat16}
    assert {value.dtype for _, value in tree_flatten(model.trainable_parameters())} == {mx.float32}


def test_a_replaced_weight_is_noticed():
    """The update keeps copies of the weights in the type to compute in."""
    model = small(mx.bfloat16)
    model.unfreeze()
    batch = rows_of(sequences([30, 30], vocab=200))
    updater = Updater(model, optim.SGD(1e-3), compute_dtype=mx.bfloat16)
    first = updater.update([batch], batch.num_targets, 1e-1, 0).loss.item()
    after = updater.evaluate([batch]).loss
    saved = updater.state()
    norm = model.transformer.norm
    norm.weight = 0 * norm.weight
    assert updater.evaluate([batch]).loss == pytest.approx(math.log(200), rel=1e-3)
    assert updater.update([batch], batch.num_targets, 0.0, 1).loss.item() == pytest.approx(math.log(200), rel=1e-3)
    updater.restore(saved)
    assert updater.evaluate([batch]).loss == after != first


def test_gradients_of_several_batches_are_added_up_in_float32():
    """In bfloat16 the second of two batches, a thousandth of the first, would be lost."""
    model = small(mx.bfloat16)
    model.unfreeze()
    large, little = rows_of(sequences([200], vocab=200)), rows_of(sequences([2], vocab=200))
    batches = [large, *[little] * 20]
    weights = dict(tree_flatten(model.trainable_parameters()))
    found = {}
    for name, given in (("both", batches), ("large", [large]), ("little", [little])):
        model.update(tree_unflatten(list(weights.items())))
        updater = Updater(model, optim.SGD(1.0), compute_dtype=mx.bfloat16)
        before = dict(tree_flatten(model.trainable_parameters()))
        updater.update(given, 1, 1.0, 0)
        after = dict(tree_flatten(model.trainable_parameters()))
        found[name] = {key: before[key] - after[key] for key in before}
    for key, both in found["both"].items():
        expected = found["large"][key] + 20 * found["little"][key]
        assert mx.abs(both - expected).max().item() <= 1e-4 * mx.abs(expected).max().item(), key


@pytest.mark.compiled
def test_an_update_of_a_weight_and_its_copy_are_one_kernel(tmp_path):
    model = small(mx.bfloat16)
    model.freeze()
    model.layers[0].attn.out_proj.unfreeze()
    updater = Updater(model, optim.AdamW(1e-3), compute_dtype=mx.bfloat16)
    batch = rows_of(sequences([20], vocab=200))
    mx.eval(updater.update([batch], batch.num_targets, 1e-3, 0).loss, updater.state())
    gradients = [mx.ones(value.shape, mx.bfloat16) for value in updater._values()]
    numbers = [mx.array(1.0)] * 2
    mx.eval(gradients, numbers)
    weights, _, copies, state, *_ = updater._apply(
        updater._values(), [], gradients, numbers, numbers[0], updater.optimizer.state, *numbers, None
    )
    moments = [value for name, value in tree_flatten(state) if name.endswith((".m", ".v"))]
    found = operations([*weights, *copies, *moments], tmp_path)
    # The other one is of a number, the learning rate.
    assert sorted(name[:8] for name in found) == ["Compiled", "Multiply"]


def test_training_learns_and_leaves_the_base_unchanged(model):
    base = dict(tree_flatten(model.parameters()))
    attach_new(model, rank=8, scale=4.0)
    batch = rows_of(sequences([12, 12]))
    updater = Updater(model, optim.Adam(1e-3))
    losses = [updater.update([batch], batch.num_targets, 1e-3, step).loss.item() for step in range(6)]
    assert losses[-1] < losses[0] / 2
    detach(model)
    assert all(mx.array_equal(value, base[name]).item() for name, value in tree_flatten(model.parameters()))


def test_recomputed_gives_gradients_to_inputs_and_parameters(model):
    layer = nn.Linear(4, 3)
    x = mx.random.normal((5, 4), key=mx.random.key(0))

    def loss(run, parameters, x):
        layer.update(parameters)
        return mx.sum(mx.square(run(x)))

    arguments = layer.parameters(), x
    expected = mx.grad(lambda p, x: loss(layer, p, x), argnums=(0, 1))(*arguments)
    ours = mx.grad(lambda p, x: loss(lambda x: recomputed([layer], layer, x), p, x), argnums=(0, 1))(*arguments)
    for (name, gradient), (_, other) in zip(tree_flatten(expected), tree_flatten(ours), strict=True):
        assert mx.allclose(gradient, other, rtol=1e-5).item(), name


def peak(model: OpenELM, *batches: Batch, **options: object) -> float:
    """The peak bytes of an update above those in use before it.

    MLX allocates ahead of the operation that runs, by how much depends on the machine's load: the median of some
    updates varies by a few percent.
    """
    updater = Updater(model, optim.Adam(1e-5), **options)  # type: ignore[arg-type]
    peaks = []
    for step in range(3):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        update = updater.update(batches, sum(batch.num_targets for batch in batches), 1e-5, step)
        mx.eval(update.loss, updater.state())
        peaks.append(mx.get_peak_memory() - before)
    return statistics.median(peaks[1:])


def kept(model: OpenELM, batch: Batch, objective: Objective, recompute: str = PARTS) -> int:
    """The bytes that exist between the forward and the backward pass of a batch, beside the model. They are exact."""
    parameters, values = trainable([model])
    arrays = objective.arrays(batch)

    def total(values: list[mx.array]) -> mx.array:
        with substituted(parameters, values):
            return objective(Forward(model, recompute), arrays).objective

    mx.eval(total(values))  # what a first pass makes once and keeps, such as tables of positions
    mx.synchronize()
    gc.collect()  # else what earlier tests left might be freed meanwhile
    before = mx.get_active_memory()
    loss, gradients = mx.value_and_grad(total)(values)
    mx.eval(loss)
    mx.synchronize()
    bytes_kept = mx.get_active_memory() - before
    del gradients  # not evaluated: they hold what they need
    return bytes_kept


@pytest.fixture(scope="module")
def wide() -> OpenELM:
    """A model whose logits would be most of its memory: 2000 of them beside 128 features."""
    config = ModelConfig.from_dict(
        {
            "num_transformer_layers": 4,
            "model_dim": 128,
            "head_dim": 32,
            "ffn_multipliers": [1.0, 4.0],
            "qkv_multipliers": [0.5, 1.0],
            "vocab_size": 2000,
            "max_context_length": 512,
            "rope_max_length": 1024,
        }
    )
    model = OpenELM(config)
    attach_new(model, rank=8)
    mx.eval(model.parameters())
    return model


class Squares(CrossEntropy):
    """A loss without logits."""

    def __call__(self, forward: Forward, arrays) -> Sums:
        total = mx.sum(mx.square(forward.hidden_states(*arrays[:2])))
        return Sums(total, total)


class PlainForward(Forward):
    """The model's own forward pass, which keeps everything for the backward pass."""

    def hidden_states(self, inputs: mx.array, segments: mx.array | None = None) -> mx.array:
        return self.model.hidden_states(inputs).reshape(inputs.size, -1)


class Plain(CrossEntropy):
    def __call__(self, forward: Forward, arrays) -> Sums:
        return super().__call__(PlainForward(forward.model), arrays)


@pytest.mark.parametrize("recompute", [PARTS, pytest.param(LAYERS, marks=pytest.mark.slow)])
def test_the_loss_adds_little_memory_to_a_step(wide, recompute):
    batch = rows_of(sequences([513, 513], vocab=2000))
    ours = peak(wide, batch, recompute=recompute)
    assert ours <= 1.1 * peak(wide, batch, recompute=recompute, objective=Squares())


def test_micro_batches_are_computed_one_after_the_other(wide):
    batch = rows_of(sequences([65, 65], vocab=2000))
    assert peak(wide, *[batch] * 3) <= 1.2 * peak(wide, batch)


@pytest.mark.slow
def test_recomputing_saves_memory(wide):
    batch = rows_of(sequences([513, 513], vocab=2000))
    # Four layers keep little; one layer's gradients are most of the peak.
    assert peak(wide, batch, recompute=LAYERS) < 0.9 * peak(wide, batch)


@pytest.mark.parametrize("recompute", [pytest.param(NOTHING, marks=pytest.mark.slow), PARTS, LAYERS])
def test_what_is_kept_for_the_backward_pass(wide, recompute):
    batch = rows_of(sequences([257, 257], vocab=2000))
    width = 2 * 256 * 4  # bytes of a value per position
    values = 0
    config = wide.config
    for queries, kv_heads, inner in zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True):
        queries, kv = queries * 32, kv_heads * 32
        # The input; queries, keys and values; attention's output; the second residual; gate and up.
        values += {LAYERS: 128, PARTS: 2 * 128 + 2 * queries + 2 * kv + 2 * inner}.get(recompute, 0)
        # Also the output of both norms and of SwiGLU.
        values += 4 * 128 + 2 * queries + 2 * kv + 3 * inner if recompute == NOTHING else 0
    values += 2 * 128  # the last layer's output, and its gradient from the loss
    found = kept(wide, batch, CrossEntropy(), recompute)
    assert found == pytest.approx(values * width, rel=0.05)
    # The model's own forward pass; our kernels keep no attention weights either.
    plain = kept(wide, batch, Plain())
    assert recompute == NOTHING or found < (0.75 if native.kernels is not None else 0.6) * plain


def test_hidden_states_equal_the_models(model):
    adapt(model)
    inputs = mx.array(sequences([140, 140]))
    ours = hidden_states(model, inputs, None)
    assert mx.abs(ours - model.hidden_states(inputs).reshape(ours.shape)).max().item() < 1e-4
