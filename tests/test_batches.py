"""Batches against brute force: every example once per epoch, every token in the right position, and no state."""

from __future__ import annotations

import math
import random
import time
from array import array
from collections import Counter
from itertools import pairwise

from mlx_openelm.errors import RequestError
from mlx_openelm.training.data.batches import IGNORED, Batch, Batches, make_batch, padded, validation_batches
from mlx_openelm.training.data.examples import Example
from mlx_openelm.training.data.packing import pack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def make_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Examples with these token counts, distinct tokens and random learned spans."""
    draw, examples, first = random.Random(seed), [], 1000
    for index, length in enumerate(lengths):
        tokens = array("i", range(first, first + length))
        first += length
        cuts = sorted(draw.sample(range(1, length + 1), min(length, draw.choice([0, 2, 4]) // 2 * 2) // 2 * 2))
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=True))
        examples.append(Example(tokens, spans, f"example {index}"))
    return examples


def mixed(number: int, longest: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(2, longest + 1) for _ in range(number)]


def pairs(batch: Batch) -> Counter:
    """Each learned (token, next token) of a batch."""
    inputs, targets = np.array(batch.inputs), np.array(batch.targets)
    return Counter(zip(inputs[targets != IGNORED].tolist(), targets[targets != IGNORED].tolist(), strict=True))


def expected_pairs(examples: list[Example]) -> Counter:
    return Counter(
        (example.tokens[i - 1], example.tokens[i])
        for example in examples
        for start, end in example.learned
        for i in range(start, end)
    )


def rows_of(batch: Batch) -> list[list[int]]:
    return np.array(batch.inputs).tolist()


SIZES = {
    "number": st.integers(1, 70),
    "per_rank": st.integers(1, 4),
    "world_size": st.integers(1, 3),
    "accumulation": st.integers(1, 4),
    "packing": st.booleans(),
    "shuffle": st.booleans(),
    "seed": st.integers(0, 3),
}


@settings(max_examples=150, deadline=None)
@given(**SIZES)
def test_every_example_is_learned_once_per_epoch(number, per_rank, world_size, accumulation, packing, shuffle, seed):
    examples = make_examples(mixed(number, 40, seed), seed)
    batch_size = per_rank * world_size
    batches = Batches(
        examples,
        batch_size=batch_size,
        grad_accumulation_steps=accumulation,
        world_size=world_size,
        packing=packing,
        max_seq_length=40,
        seed=seed,
        shuffle=shuffle,
    )
    for epoch in (0, 1, 5):
        seen, learned, targets, tokens = [], Counter(), 0, 0
        for within in range(batches.steps_per_epoch):
            index = epoch * batches.steps_per_epoch + within
            steps = [batches.step(index, rank) for rank in range(world_size)]
            assert {(s.index, s.epoch, s.num_targets, s.num_tokens, s.examples) for s in steps} == {
                (index, epoch, steps[0].num_targets, steps[0].num_tokens, steps[0].examples)
            }
            parts = [batch for step in steps for batch in step.batches]
            assert sorted(i for batch in parts for i in batch.examples) == sorted(steps[0].examples)
            assert sum(batch.num_targets for batch in parts) == steps[0].num_targets
            assert sum(batch.num_tokens for batch in parts) == steps[0].num_tokens
            assert 1 <= max(len(step.batches) for step in steps) <= accumulation
            assert all(batch.inputs.shape[0] <= per_rank for batch in parts)
            seen += steps[0].examples
            targets, tokens = targets + steps[0].num_targets, tokens + steps[0].num_tokens
            for batch in parts:
                learned += pairs(batch)
        assert sorted(seen) == list(range(number))
        # Exactly the tokens to learn are targets, each after the token before it.
        assert learned == expected_pairs(examples)
        assert (targets, tokens) == (learned.total(), sum(example.num_positions for example in examples))


@settings(max_examples=50, deadline=None)
@given(**SIZES)
def test_a_step_is_a_function_of_its_index(number, per_rank, world_size, accumulation, packing, shuffle, seed):
    examples = make_examples(mixed(number, 40, seed), seed)
    options = {
        "batch_size": per_rank * world_size,
        "grad_accumulation_steps": accumulation,
        "world_size": world_size,
        "packing": packing,
        "max_seq_length": 40,
        "seed": seed,
        "shuffle": shuffle,
    }
    run = Batches(examples, **options)
    steps = [run.step(index) for index in range(3 * run.steps_per_epoch)]
    order = list(range(len(steps)))
    random.Random(seed).shuffle(order)
    for index in order[:12]:
        again = Batches(examples, **options).step(index)
        assert again.examples == steps[index].examples
        for ours, other in zip(again.batches, steps[index].batches, strict=True):
            assert np.array_equal(ours.inputs, other.inputs) and np.array_equal(ours.targets, other.targets)


@pytest.mark.parametrize("packing", [False, True])
def test_the_order_depends_on_epoch_and_seed_only_with_shuffling(packing):
    examples = make_examples(mixed(200, 40))

    def order(epoch, **options):
        batches = Batches(examples, batch_size=4, packing=packing, max_seq_length=40, **options)
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        return [batches.step(index).examples for index in steps]

    assert len({str(order(epoch, seed=seed)) for epoch in range(3) for seed in range(3)}) == 9
    # Not only the order of the batches: few examples share a batch with the same others again.
    assert len({frozenset(batch) for batch in order(0)} & {frozenset(batch) for batch in order(1)}) < 5
    assert order(0, shuffle=False) == order(1, shuffle=False)
    if not packing:
        assert [i for batch in order(0, shuffle=False) for i in batch] == list(range(200))


def test_long_and_short_batches_are_mixed():
    batches = Batches(make_examples(mixed(400, 200)), batch_size=4, max_seq_length=200)
    lengths = [batches.step(index).batches[0].inputs.shape[1] for index in range(100)]
    longer = sum(after > before for before, after in pairwise(lengths))
    assert 35 < longer < 65


# Rows


def test_a_batch_of_padded_rows():
    examples = [
        Example(array("i", [1, 11, 12, 13, 2]), ((2, 3), (4, 5)), ""),
        Example(array("i", [1, 21, 2]), ((1, 3),), ""),
        Example(array("i", [1, 31, 32, 2]), (), ""),
    ]
    batch = make_batch(examples, [(0,), (1,), (2,)], 2048)
    x = IGNORED
    assert rows_of(batch) == [[1, 11, 12, 13, 0, 0, 0, 0], [1, 21, 0, 0, 0, 0, 0, 0], [1, 31, 32, 0, 0, 0, 0, 0]]
    assert np.array(batch.targets).tolist() == [[x, 12, x, 2, x, x, x, x], [21, 2, x, x, x, x, x, x], [x] * 8]
    assert batch.segments is None and batch.examples == (0, 1, 2)
    assert (batch.num_targets, batch.num_tokens) == (4, 9)


def test_a_batch_of_packed_rows():
    examples = [
        Example(array("i", [1, 11, 12, 13, 2]), ((2, 3), (4, 5)), ""),
        Example(array("i", [1, 21, 2]), ((1, 3),), ""),
        Example(array("i", [1, 31, 32, 2]), ((1, 4),), ""),
    ]
    batch = make_batch(examples, [(2, 0), (1,)], 7, packed=True)
    x = IGNORED
    assert rows_of(batch) == [[1, 31, 32, 1, 11, 12, 13], [1, 21, 0, 0, 0, 0, 0]]
    assert np.array(batch.targets).tolist() == [[31, 32, 2, x, 12, x, 2], [21, 2, x, x, x, x, x]]
    assert np.array(batch.segments).tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, -1, -1, -1, -1, -1]]
    assert batch.examples == (2, 0, 1)
    assert (batch.num_targets, batch.num_tokens) == (7, 9)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120), seed=st.integers(0, 9))
def test_packing_fits_loses_nothing_and_needs_the_same_rows_in_any_order(lengths, seed):
    order = list(range(len(lengths)))
    rows = pack(order, lengths, 50)
    assert sorted(index for row in rows for index in row) == order
    assert all(sum(lengths[index] for index in row) <= 50 for row in rows)
    random.Random(seed).shuffle(order)
    assert len(pack(order, lengths, 50)) == len(rows)
    assert len(rows) >= math.ceil(sum(lengths) / 50)
    # Two rows that are at most half full would have been joined.
    assert sum(sum(lengths[index] for index in row) <= 25 for row in rows) <= 1


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """The optimal number of rows, by exhaustive search."""
    best = len(lengths)

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for row, room in enumerate(rooms):
            if room >= lengths[index]:
                place(index + 1, [*rooms[:row], room - lengths[index], *rooms[row + 1 :]])
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_packing_is_close_to_optimal(lengths):
    # Best fit decreasing needs at most 11/9 of the optimum, plus one row (Johnson, 1973).
    assert len(pack(range(len(lengths)), lengths, 50)) <= 11 / 9 * fewest_rows(lengths, 50) + 1


def test_examples_that_just_fit_share_a_row():
    assert pack([0, 1, 2], [5, 3, 8], 8) == [(2,), (0, 1)]


def test_packed_rows_do_not_mix_examples():
    examples = make_examples(mixed(300, 60))
    batches = Batches(examples, batch_size=4, packing=True, max_seq_length=128)
    for index in range(batches.steps_per_epoch):
        (batch,) = batches.step(index).batches
        owners = iter(batch.examples)
        for row, targets, segments in zip(*map(np.array, (batch.inputs, batch.targets, batch.segments)), strict=True):
            assert len(row) <= 128
            for segment in range(segments.max() + 1):
                (places,) = np.nonzero(segments == segment)
                example = examples[next(owners)]
                assert np.array_equal(places, np.arange(places[0], places[0] + example.num_positions))
                assert row[places].tolist() == list(example.tokens)[:-1]
                learned = {i for start, end in example.learned for i in range(start, end)}
                expected = [token if i in learned else IGNORED for i, token in enumerate(example.tokens)]
                assert targets[places].tolist() == expected[1:]
            assert (targets[segments == -1] == IGNORED).all()
        assert next(owners, None) is None


@pytest.mark.parametrize("packing", [False, True])
def test_the_batches_of_all_processes_make_up_those_of_one(packing):
    examples = make_examples(mixed(51, 40))
    options = {"batch_size": 6, "grad_accumulation_steps": 2, "packing": packing, "max_seq_length": 40}
    alone, shared = Batches(examples, **options), Batches(examples, world_size=3, **options)
    assert alone.steps_per_epoch == shared.steps_per_epoch
    idle = 0
    for index in range(2 * alone.steps_per_epoch):
        steps = [shared.step(index, rank) for rank in range(3)]
        whole = alone.step(index)
        assert steps[0].examples == whole.examples and steps[0].num_targets == whole.num_targets
        together = Counter(pair for step in steps for batch in step.batches for pair in pairs(batch).elements())
        assert together == sum((pairs(batch) for batch in whole.batches), Counter())
        idle += sum(not step.batches for step in steps)
    if not packing:
        assert idle == 0  # 51 examples are 8 batches of 6 and one of 3: one row per process
        one_left = Batches(examples[:49], world_size=3, **options | {"grad_accumulation_steps": 1})
        made = [[len(one_left.step(index, rank).batches) for rank in range(3)] for index in range(9)]
        assert sorted(made) == [[1, 0, 0]] + 8 * [[1, 1, 1]]


# Lengths


def test_padding_is_small_and_has_few_lengths():
    lengths = {padded(length) for length in range(1, 2049)}
    assert len(lengths) == 80 and max(lengths) == 2048
    for length in range(1, 4097):
        extra = padded(length) - length
        assert 0 <= extra < max(8, length / 16 + 1) and padded(length) % 8 == 0
        assert padded(padded(length)) == padded(length)
    assert [padded(length) for length in (1, 8, 9, 256, 257, 512, 513, 1025)] == [8, 8, 16, 256, 272, 512, 544, 1088]


def test_the_incomplete_batch_alternates_between_long_and_short_examples():
    lengths = mixed(41, 500)
    batches = Batches(make_examples(lengths), batch_size=4, max_seq_length=512)
    left = [rows[0][0] for epoch in range(60) for rows in batches.plan(epoch) if len(rows) < 4]
    assert len(left) == 60
    assert min(lengths[i] for i in left) < 100 and max(lengths[i] for i in left) > 400


def padding(batches: Batches, examples: list[Example]) -> float:
    """Padding positions as a share of the examples' positions."""
    positions = sum(rows * length * number for (rows, length), number in batches.shapes().items())
    return positions / sum(example.num_positions for example in examples) - 1


def test_examples_of_about_the_same_length_share_a_batch():
    examples = make_examples(mixed(3000, 500))
    bucketed = Batches(examples, batch_size=4, max_seq_length=512)
    random_batches = Batches(examples, batch_size=4, max_seq_length=512, shuffle=False)
    assert padding(bucketed, examples) < 0.03
    # Within a percentage point of sorting by length.
    by_length = sorted(example.num_positions for example in examples)
    best = sum(4 * padded(by_length[i]) for i in range(3, 3000, 4)) / sum(by_length) - 1
    assert padding(bucketed, examples) < best + 0.01
    assert padding(random_batches, examples) > 0.5
    packed = Batches(examples, batch_size=4, packing=True, max_seq_length=2048)
    assert padding(packed, examples) < 0.01


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_shapes_match_the_batches(packing, world_size):
    examples = make_examples(mixed(203, 90))
    batches = Batches(examples, batch_size=4, world_size=world_size, packing=packing, max_seq_length=100)
    made = [
        batch
        for index in range(batches.steps_per_epoch, 2 * batches.steps_per_epoch)
        for rank in range(world_size)
        for batch in batches.step(index, rank).batches
    ]
    assert batches.shapes(1) == Counter(batch.inputs.shape for batch in made)
    rows, length = batches.largest_shape()
    assert all(shape[0] <= rows and shape[1] <= length for shape in batches.shapes(1))
    assert rows == max(shape[0] for shape in batches.shapes(1)) and length <= 100


# Validation


def test_validation_takes_all_examples_or_a_fixed_fair_sample():
    examples = make_examples(mixed(103, 60))
    every = validation_batches(examples, 4, max_seq_length=64)
    assert sorted(i for batch in every for i in batch.examples) == list(range(103)) and len(every) == 26
    part = validation_batches(examples, 4, num_batches=10, max_seq_length=64)
    chosen = [i for batch in part for i in batch.examples]
    assert len(part) == 10 and len(set(chosen)) == 40
    assert all(examples[i].num_targets for i in chosen)
    again = validation_batches(examples, 4, num_batches=10, max_seq_length=64)
    assert [batch.examples for batch in again] == [batch.examples for batch in part]
    # Neither the first ones nor the shortest.
    lengths = sorted(example.num_positions for example in examples)
    mean = sum(examples[i].num_positions for i in chosen) / 40
    assert abs(mean - sum(lengths) / 103) < 8 and mean > sum(lengths[:40]) / 40 + 10
    assert max(chosen) > 80
    assert len(validation_batches(examples, 4, num_batches=1000, max_seq_length=64)) == 26


def test_validation_is_shared_by_the_processes():
    examples = make_examples(mixed(21, 60))
    whole = validation_batches(examples, 4, num_batches=-1, max_seq_length=64)
    parts = [validation_batches(examples, 4, max_seq_length=64, world_size=2, rank=rank) for rank in range(2)]
    assert sorted(i for part in parts for batch in part for i in batch.examples) == list(range(21))
    assert [len(part) for part in parts] == [6, 5] and len(whole) == 6


# Refusals


def test_invalid_settings_are_refused():
    examples = make_examples([5, 6])
    for changed, expected in (
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"batch_size": 3, "world_size": 2}, "batch_size is shared by the 2 processes"),
        ({"grad_accumulation_steps": 0}, "grad_accumulation_steps must be 1 or more"),
        ({"max_seq_length": 4}, "has 5 positions, more than max_seq_length 4"),
    ):
        with pytest.raises(RequestError, match=expected):
            Batches(examples, **{"batch_size": 2, "max_seq_length": 8} | changed)
    with pytest.raises(RequestError, match="no examples"):
        Batches([], batch_size=1, max_seq_length=8)
    with pytest.raises(RequestError, match="or -1 for all"):
        validation_batches(examples, 2, num_batches=0, max_seq_length=8)


def test_fewer_examples_than_the_batch_size_are_one_batch():
    examples = make_examples([5, 6, 7])
    batches = Batches(examples, batch_size=8, grad_accumulation_steps=4, max_seq_length=16)
    assert batches.steps_per_epoch == 1 and batches.step(5).epoch == 5
    assert batches.step(0).batches[0].inputs.shape == (3, 8) and batches.largest_shape() == (3, 8)


def test_batches_are_made_fast():
    examples = make_examples([2049] * 8)
    make_batch(examples, [(index,) for index in range(8)], 2048)
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        make_batch(examples, [(index,) for index in range(8)], 2048)
        best = min(best, time.perf_counter() - started)
    assert best < 0.01  # a tenth of that on an idle machine; Python lists would take several times as long
