"""The number of drafted tokens, in simulations with scripted step times and acceptance."""

from __future__ import annotations

import random

from mlx_openelm.generation.draft_length import AcceptanceRates, DraftLengths, Plan, StepCosts

import pytest

COSTS = {
    "nearly free": lambda n: 1 + 0.02 * (n - 1),
    "linear": lambda n: 1 + 0.3 * (n - 1),
    "dear": lambda n: 1 + 0.8 * (n - 1),
    "stairs": lambda n: 1.0 + 0.6 * ((n - 1) // 4),
    "a jump after 8": lambda n: 1 + 0.05 * (n - 1) + 2.0 * (n > 8),
}


class Simulation:
    """Rows whose drafted tokens are right with a chance each; a clock that only the steps move.

    A step that begins late takes `lateness` longer; by default there is no difference.
    """

    def __init__(self, cost, rates, draft_seconds=0.0, seed=0, noise=0.0, fixed=None, lateness=0.0, **options):
        self.cost, self.rates, self.draft_seconds, self.noise = cost, rates, draft_seconds, noise
        self.random = random.Random(seed)
        self.fixed, self.lateness = fixed, lateness
        self.lengths = DraftLengths(**options)
        self.seen = [AcceptanceRates([0.7]) for _ in rates]
        self.drafted: list[list[int]] = []

    def run(self, steps):
        """Tokens a second, where a plain step of one row takes a second."""
        tokens, clock, rows, drafted = 0.0, 0.0, len(self.rates), False
        for _ in range(steps):
            plans = [Plan(seen.chances(0, 16), 0.0, self.draft_seconds, self.fixed) for seen in self.seen]
            is_late = drafted or any(self.lengths.choose(plans, is_late=False))
            lengths = self.lengths.choose(plans) if is_late else [0] * rows
            drafted = any(lengths)
            right = []
            for rate, seen, length in zip(self.rates, self.seen, lengths, strict=True):
                count = 0
                while count < length and self.random.random() < rate:
                    count += 1
                for place in range(min(count + 1, length)):
                    seen.observe(place, place < count)
                if not length and not self.draft_seconds:  # lookup sees what would have been right
                    seen.observe(0, self.random.random() < rate)
                right.append(count)
            positions = rows + sum(lengths)
            seconds = self.cost(positions) + is_late * self.lateness
            disturbed = seconds * (1 + self.noise * self.random.expovariate(1))
            drafting = self.draft_seconds * max(lengths)
            self.lengths.observe(rows, positions, rows + sum(right), disturbed, drafting, is_late=is_late)
            clock += seconds + drafting
            chosen = zip(self.rates, lengths, strict=True)
            tokens += sum(rate**n for rate, length in chosen for n in range(length + 1))  # expected, without luck
            self.drafted.append(lengths)
        return tokens / clock


def speed(cost, rate, draft_seconds, length):
    """The expected tokens a second with this many drafted tokens."""
    return sum(rate**n for n in range(length + 1)) / (cost(1 + length) + draft_seconds * length)


@pytest.mark.covering
@pytest.mark.parametrize("rate", [0.0, pytest.param(0.3, marks=pytest.mark.slow), 0.6, 0.8, 0.95])
@pytest.mark.parametrize("draft_seconds", [0.0, pytest.param(0.05, marks=pytest.mark.slow), 0.25])
@pytest.mark.parametrize("cost", [*COSTS.values()], ids=[*COSTS])
def test_the_speed_is_close_to_that_of_the_best_number(cost, rate, draft_seconds):
    best = max(speed(cost, rate, draft_seconds, length) for length in range(17))
    assert Simulation(cost, [rate], draft_seconds).run(1500) > 0.94 * best
    assert Simulation(cost, [rate], draft_seconds, noise=0.2).run(1500) > 0.9 * best


@pytest.mark.covering
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("draft_seconds", [0.0, 0.25])
@pytest.mark.parametrize("cost", [*COSTS.values()], ids=[*COSTS])
def test_bad_drafts_cost_little_even_in_a_short_text(cost, draft_seconds, seed):
    for steps in (250, 2000):
        assert Simulation(cost, [0.01], draft_seconds, seed, noise=0.1).run(steps) > 0.97


@pytest.mark.parametrize("cost", ["nearly free", "linear"])
def test_what_late_steps_cost_is_counted(cost):
    for steps in (250, 2000):
        assert Simulation(COSTS[cost], [0.05], noise=0.1, lateness=0.8).run(steps) > 0.97
    best = max(speed(lambda n: COSTS[cost](n) + 0.8, 0.95, 0.0, length) for length in range(17))
    assert Simulation(COSTS[cost], [0.95], noise=0.1, lateness=0.8).run(1500) > 0.9 * best


def test_drafting_pauses_and_comes_back():
    simulation = Simulation(COSTS["linear"], [0.9], 0.25)
    simulation.run(200)
    assert sum(map(sum, simulation.drafted[-50:])) > 80
    simulation.rates = [0.0]
    simulation.run(300)
    drafted = simulation.drafted[-150:]
    assert 0 < sum(map(sum, drafted)) < 15  # trials
    assert max(map(max, drafted)) == 1
    simulation.rates = [0.9]
    simulation.run(250)
    assert sum(map(sum, simulation.drafted[-50:])) > 80


def test_rows_of_a_batch_get_tokens_as_their_drafts_deserve():
    rates = [0.95, 0.0, 0.6, 0.0]
    simulation = Simulation(lambda n: 2 + 0.15 * n, rates)
    reached = simulation.run(2000)
    drafted = [sum(lengths[row] for lengths in simulation.drafted[-500:]) / 500 for row in range(4)]
    assert drafted[0] > drafted[2] > 0.5 > 0.2 > max(drafted[1], drafted[3])
    best = max(
        (2 + sum(0.95**n for n in range(a + 1)) + sum(0.6**n for n in range(b + 1))) / (2 + 0.15 * (4 + a + b))
        for a in range(17)
        for b in range(17)
    )
    assert reached > 0.95 * best


def test_a_fixed_number_is_drafted_whatever_happens():
    simulation = Simulation(COSTS["dear"], [0.0, 0.5], fixed=5)
    simulation.run(20)
    assert simulation.drafted == [[5, 5]] * 20
    assert simulation.lengths.choose([Plan([0.1] * 3, fixed=5), Plan([], fixed=5)]) == [3, 0]


def test_rates_are_those_of_the_level_and_fade():
    rates = AcceptanceRates([0.0, 0.1, 0.5])
    assert rates.chances(1, 3) == pytest.approx([0.1, 0.05, 0.025])
    for n in range(400):
        rates.observe(5, n % 4 > 0)
        rates.observe(1, False)
    assert rates.chances(6, 1)[0] == pytest.approx(0.75, abs=0.05)  # 5 to 7 are one band
    assert rates.chances(1, 1)[0] < 0.01
    for _ in range(100):
        rates.observe(1, True)
    assert rates.chances(1, 1)[0] > 0.9


def test_step_times_outlast_a_disturbance_and_are_forgotten():
    costs = StepCosts()
    costs.observe(1, 1.0)
    assert costs.known() == {}
    costs.observe(1, 1.1)
    assert costs.known() == {1: 1.0}
    for seconds in (9.0, 1.0, 1.0):
        costs.observe(1, seconds)
    assert costs.known() == {1: 1.0}
    for _ in range(2):
        costs.observe(2, 5.0)  # both disturbed, as a longer step shows
        costs.observe(3, 2.0)
    assert costs.known() == {1: 1.0, 2: 2.0, 3: 2.0}
    for _ in range(1100):
        costs.observe(3, 2.0)
    assert costs.known() == {3: 2.0}
