"""`bench`: numbers from scripted times, the order of runs, and the command itself on `tiny`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

from mlx_openelm import blas, cache, load
from mlx_openelm.cli import bench as command
from mlx_openelm.cli.main import main
from mlx_openelm.errors import RequestError
from mlx_openelm.evaluation import bandwidth
from mlx_openelm.evaluation.timings import Run, Spread, mean_positions, percentile, summarize
from mlx_openelm.generation.engine import Engine
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.jobs.bench import options as bench_options
from mlx_openelm.jobs.bench import plot, processes, rows, worker
from mlx_openelm.jobs.bench.options import BenchOptions, Size
from mlx_openelm.jobs.bench.prompts import random_prompts, text_prompts
from mlx_openelm.jobs.bench.turns import Measured, measure
from mlx_openelm.model import OpenELM
from mlx_openelm.quantization.text import BUNDLED
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub
from mlx.utils import tree_flatten
from quantization_models import write_tiny

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
SIZES = [Size(16, 4), Size(32, 4)]


class Scripted:
    """A program whose prompts take 10 ms a token, one row after the other, and whose steps take 20 ms."""

    version, dtype, blas = "1.0", "float32", "loaded"
    load_seconds, weight_bytes, process_memory = 0.5, 1e6, 50_000_000

    def __init__(self, name: str, log: list[Any], factor: float = 1.0) -> None:
        self.name, self.log, self.factor = name, log, factor

    def run(self, prompts: Sequence[Sequence[int]], count: int, drafts: bool = False) -> Run:
        """With drafts, a step gives two tokens a row and half of the drafted tokens are accepted."""
        length, rows = len(prompts[0]), len(prompts)
        about = (*([rows] if rows > 1 else []), *(["drafts"] if drafts else []))
        self.log.append((self.name, length, count, *about))
        first = 0.01 * length * rows * self.factor
        times = [first + 0.02 * self.factor * ((n + 1) // 2 if drafts else n) for n in range(count)]
        counts = [2 * rows * n for n in (4, 2, 2, 4)] if drafts else [0] * 4
        return Run(length, [times] * rows, 7_000_000, 100.0, *counts)


def scripted(options: BenchOptions, sizes: Sequence[Size] = SIZES, **keywords: Any) -> tuple[Measured, list[Any]]:
    """Two scripted programs, the second half as fast, after a measurement of a memory with 1 GB/s."""
    log: list[Any] = []
    measured = Measured([Scripted("ours", log), Scripted("other", log, 2.0)], sizes)
    ticks = iter(float(n) for n in range(10_000))
    prompts = partial(random_prompts, vocab_size=100)
    measure(measured, options, prompts, copy=lambda: 10**9, clock=lambda: next(ticks), **keywords)
    return measured, log


# Numbers.


def test_the_numbers_of_scripted_times() -> None:
    runs = [
        Run(10, [[0.5, 0.6, 0.8]], 3_000, 8.0),
        Run(10, [[0.4, 0.5, 0.6]], 5_000, 8.0),
        Run(10, [[1.0, 1.4, 1.8]], 1, 8.0),
    ]
    result = summarize(runs, weight_bytes=900, bandwidth=1e5)
    assert (result.prompt_tokens, result.generation_tokens, result.rows, result.repetitions) == (10, 3, 1, 3)
    assert result.time_to_first_token == Spread(0.5, 0.4, 1.0)
    assert result.prompt_tps == Spread(20.0, 10.0, 25.0) and result.prompt_tps.margin == 7.5
    speeds = [2 / 0.3, 2 / 0.2, 2 / 0.8]
    assert result.generation_tps is not None and result.row_tps == result.generation_tps
    assert result.generation_tps.median == pytest.approx(speeds[0])
    assert (result.generation_tps.low, result.generation_tps.high) == pytest.approx((speeds[2], speeds[1]))
    intervals = [0.1, 0.2, 0.1, 0.1, 0.4, 0.4]
    expected = {percent: np.percentile(intervals, percent) for percent in (50, 95, 99)}
    assert result.token_seconds == pytest.approx(expected)
    assert result.peak_memory == 5_000
    # 11.5 positions of 8 bytes on average, after 10 and one or two more.
    assert result.bandwidth_share == pytest.approx(speeds[0] * (900 + 11.5 * 8) / 1e5)


def test_rows_count_together_while_all_of_them_decode() -> None:
    """Three rows that begin after 1, 2 and 3 seconds, with a token every second, and a run in which all take half."""
    times = [[start + n for n in range(6)] for start in (1.0, 2.0, 3.0)]
    runs = [Run(10, times, 0, 8.0), Run(10, [[moment / 2 for moment in row] for row in times], 0, 8.0)]
    result = summarize(runs, weight_bytes=900, bandwidth=1e4)
    assert (result.rows, result.generation_tokens) == (3, 6)
    assert result.time_to_first_token == Spread(1.5, 1.0, 2.0)  # the second row's
    assert result.prompt_tps == Spread(15.0, 10.0, 20.0)  # 30 tokens until the third row's
    # From 3 to 6 seconds, in which each row has 3 tokens.
    assert result.generation_tps == Spread(4.5, 3.0, 6.0) and result.row_tps == Spread(1.5, 1.0, 2.0)
    assert result.token_seconds == {50: 0.75, 95: 1.0, 99: 1.0}
    # A step of all rows reads the weights once and three caches of 13 positions on average.
    assert result.bandwidth_share == pytest.approx(1.5 * (900 + 3 * 13 * 8) / 1e4)


def test_rows_that_never_decode_together_have_no_speed() -> None:
    result = summarize([Run(4, [[0.1, 0.2], [0.2, 0.3]])], weight_bytes=1, bandwidth=1.0)
    assert (result.generation_tps, result.row_tps, result.bandwidth_share) == (None, None, None)
    assert result.token_seconds[50] == pytest.approx(0.1)


def test_a_single_new_token_has_no_decoding() -> None:
    result = summarize([Run(4, [[0.5]])], weight_bytes=1, bandwidth=1.0)
    assert (result.generation_tps, result.token_seconds, result.bandwidth_share) == (None, {}, None)


def test_the_share_is_unknown_without_a_bandwidth() -> None:
    assert summarize([Run(4, [[0.5, 0.6]])], weight_bytes=1, bandwidth=0.0).bandwidth_share is None


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = list(np.random.default_rng(count).random(count))
    for percent in (0, 37, 50, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_positions_end_at_the_window() -> None:
    assert mean_positions(10, 1) == 0
    assert mean_positions(10, 3) == 11.5
    assert mean_positions(10, 4, window=12) == pytest.approx((11 + 12 + 12) / 3)


def test_the_bandwidth_is_that_of_the_fastest_copy() -> None:
    ticks = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.0])
    assert bandwidth.rate(lambda: 100, lambda: next(ticks)) == 200


def test_a_copy_moves_what_it_says() -> None:
    assert bandwidth._cpu_copier(1 << 20, 3)() == 2 * ((1 << 20) // 3) * 3
    assert 1e8 < bandwidth.rate(bandwidth._cpu_copier(1 << 24, 2)) < 1e13


# Turns.


def test_programs_take_turns_after_a_warm_up() -> None:
    measured, log = scripted(BenchOptions(repetitions=2))
    assert log[:4] == [("ours", 32, 3)] * 2 + [("other", 32, 3)] * 2  # the estimate
    assert log[4:8] == [("ours", 16, 3), ("other", 16, 3), ("ours", 32, 3), ("other", 32, 3)]
    first = [("ours", 16, 4), ("other", 16, 4), ("ours", 32, 4), ("other", 32, 4)]
    second = [("other", 16, 4), ("ours", 16, 4), ("other", 32, 4), ("ours", 32, 4)]
    assert log[8:] == first + second
    assert measured.bandwidths == [1e9, 1e9] and measured.complete == SIZES
    ours, other = (measured.result(program, SIZES[1]) for program in measured.programs)
    assert ours.repetitions == other.repetitions == 2
    assert ours.prompt_tps.median == pytest.approx(100) and other.prompt_tps.median == pytest.approx(50)


def test_each_number_of_rows_is_warmed_up_and_measured() -> None:
    sizes = BenchOptions(prompt_tokens="16", generation_tokens="4,8", batch="1,3").sizes()
    assert sizes == [Size(16, 4), Size(16, 4, 3), Size(16, 8), Size(16, 8, 3)]
    measured, log = scripted(BenchOptions(repetitions=1), sizes)
    # The prompts of the estimate have as many tokens together as one row's.
    assert (
        log[:8] == [("ours", 16, 3)] * 2 + [("ours", 5, 3, 3)] * 2 + [("other", 16, 3)] * 2 + [("other", 5, 3, 3)] * 2
    )
    assert log[8:12] == [("ours", 16, 3), ("other", 16, 3), ("ours", 16, 3, 3), ("other", 16, 3, 3)]
    assert log[12:16] == [("ours", 16, 4), ("other", 16, 4), ("ours", 16, 4, 3), ("other", 16, 4, 3)]
    ours = measured.result(measured.programs[0], Size(16, 4, 3))
    assert ours.generation_tps is not None and ours.generation_tps.median == pytest.approx(150)


def test_progress_ends_at_its_total_and_delays_are_waited() -> None:
    seen, slept = [], []
    scripted(BenchOptions(repetitions=2, delay=1.5), progress=lambda *at: seen.append(at), sleep=slept.append)
    assert seen == [(n, 12) for n in range(13)]
    assert slept == [1.5] * 12


def test_long_work_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    scripted(BenchOptions(repetitions=2))
    assert capsys.readouterr().err == ""
    scripted(BenchOptions(repetitions=20))
    # A repetition takes 0.16 + 0.08 and 0.32 + 0.08 seconds, the other program twice as long; the prompts once more.
    assert capsys.readouterr().err == (
        "This takes about 40 seconds: 20 repetitions of 2 sizes. Ctrl-C shows what was measured by then.\n"
    )


def test_an_interrupted_measurement_has_what_every_program_ran() -> None:
    class Stops(Scripted):
        def run(self, prompts: Sequence[Sequence[int]], count: int, drafts: bool = False) -> Run:
            if self.log.count(("other", 32, 4)) == 1 and len(prompts[0]) == 32:
                raise KeyboardInterrupt
            return super().run(prompts, count, drafts)

    log: list[Any] = []
    measured = Measured([Scripted("ours", log), Stops("other", log)], SIZES)
    with pytest.raises(KeyboardInterrupt):
        prompts = partial(random_prompts, vocab_size=100)
        measure(measured, BenchOptions(repetitions=5), prompts, copy=lambda: 10**9)
    assert measured.complete == SIZES
    # The second turn, which begins with the other program, ended before it ran the longer prompt again.
    assert [measured.result(measured.programs[0], size).repetitions for size in SIZES] == [2, 1]


def test_prompts_are_the_same_every_time() -> None:
    prompts = random_prompts(100, 3, 50)
    assert prompts == random_prompts(100, 3, 50) and prompts[:1] == random_prompts(100, 1, 50)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    for prompt in prompts:
        assert len(prompt) == 100 and min(prompt) >= 0 and max(prompt) < 50 and len(set(prompt)) > 20


# Rows, tables, pictures.


def test_json_has_rows_of_both_programs() -> None:
    measured, _ = scripted(BenchOptions(repetitions=1), [Size(16, 4)])
    values = json.loads(json.dumps(rows.to_json(measured)))
    assert values["bandwidth"] == 1e9 and values["interrupted"] is False
    assert [program["name"] for program in values["programs"]] == ["ours", "other"]
    result = values["programs"][0]["results"][0]
    assert result["time_to_first_token"] == pytest.approx({"median": 0.16, "low": 0.16, "high": 0.16})
    assert result["token_seconds"] == pytest.approx({"50": 0.02, "95": 0.02, "99": 0.02})
    by_name = {row["name"]: row for row in values["rows"]}
    assert list(by_name) == [
        "cold load (s)",
        "process memory (MB)",
        "first token (s), 16+4",
        "prompt (tokens/s), 16+4",
        "decoding (tokens/s), 16+4",
        "time per token (ms), 50%, 16+4",
        "time per token (ms), 95%, 16+4",
        "time per token (ms), 99%, 16+4",
        "share of the bandwidth, 16+4",
        "MLX memory (MB), 16+4",
    ]
    assert by_name["decoding (tokens/s), 16+4"] == pytest.approx(
        {"name": "decoding (tokens/s), 16+4", "ours": 50.0, "other": 25.0, "ratio": 2.0}
    )
    assert by_name["MLX memory (MB), 16+4"]["ours"] == 7.0
    assert set(values["rows"][0]) == {"name", "ours", "other", "ratio"}


def test_json_has_the_speed_of_each_row() -> None:
    measured, _ = scripted(BenchOptions(repetitions=1), [Size(16, 4, 8)])
    values = json.loads(json.dumps(rows.to_json(measured)))
    result = values["programs"][0]["results"][0]
    assert (result["rows"], result["row_tps"]["median"]) == (8, pytest.approx(50))
    by_name = {row["name"]: row["ours"] for row in values["rows"]}
    assert by_name["decoding (tokens/s), 16+4, 8 rows"] == pytest.approx(400)
    assert by_name["decoding per row (tokens/s), 16+4, 8 rows"] == pytest.approx(50)


def test_drafts_are_measured_beside_plain_decoding() -> None:
    sizes = BenchOptions(prompt_tokens="16", generation_tokens="5", batch="1,2", prompt_lookup=True).sizes()
    assert sizes == [Size(16, 5), Size(16, 5, 1, True), Size(16, 5, 2), Size(16, 5, 2, True)]
    measured, log = scripted(BenchOptions(repetitions=2), sizes)
    assert log[8:16:2] == [("ours", 16, 3), ("ours", 16, 3, "drafts"), ("ours", 16, 3, 2), ("ours", 16, 3, 2, "drafts")]
    values = json.loads(json.dumps(rows.to_json(measured)))
    plain, drafted = values["programs"][0]["results"][:2]
    assert (plain["drafts"], plain["speedup"], plain["acceptance"], plain["tokens_per_step"]) == (False, *[None] * 3)
    assert (drafted["drafts"], drafted["acceptance"], drafted["tokens_per_step"]) == (True, 0.5, 2.0)
    assert drafted["speedup"] == pytest.approx(2.0) and drafted["bandwidth_share"] is None
    by_name = {row["name"]: row["ours"] for row in values["rows"]}
    assert by_name["speed-up by drafts, 16+5, 2 rows, drafts"] == pytest.approx(2.0)
    assert by_name["drafted tokens accepted, 16+5, drafts"] == 0.5
    assert by_name["tokens per step, 16+5, drafts"] == 2.0
    lines = [" ".join(line.split()) for line in command.report("m", alone(measured), 80)]
    assert "16+5 1 50.00 100.0 2.00 0.500 2.00" in lines and "16+5 2 100.0 200.0 2.00 0.500 2.00" in lines
    assert any(line.startswith("prompt of 16 tokens, 5 new, with drafts") for line in command.report("m", measured, 80))
    for width in (60, 80, 120):
        assert (
            max(len(line) for one in (measured, alone(measured)) for line in command.report("m", one, width)) <= width
        )


def test_prompts_for_drafts_are_text() -> None:
    _, tokenizer = load("tiny")
    prompts = text_prompts(100, 3, tokenizer)
    assert [len(prompt) for prompt in prompts] == [100] * 3 and len({tuple(prompt) for prompt in prompts}) == 3
    assert all(prompt[0] == tokenizer.bos_token_id for prompt in prompts)
    document = json.loads(BUNDLED.read_text().splitlines()[0])["text"]
    assert tokenizer.decode(prompts[0][1:21]).strip() in document
    assert len(text_prompts(200_000, 1, tokenizer)[0]) == 200_000  # longer than all of the text


def test_rows_without_decoding_are_empty() -> None:
    measured, _ = scripted(BenchOptions(repetitions=1), [Size(16, 1)])
    row = next(row for row in rows.compared(measured) if row["name"].startswith("decoding"))
    assert (row["ours"], row["other"], row["ratio"]) == (None, None, None)


def alone(measured: Measured) -> Measured:
    return Measured(measured.programs[:1], measured.sizes, None, measured.runs, measured.bandwidths)


def test_the_table_has_a_line_for_each_size() -> None:
    both, _ = scripted(BenchOptions(repetitions=3), [Size(16, 4), Size(512, 1)])
    both.runs["ours", Size(16, 4)][0] = Run(16, [[0.12, 0.14, 0.16, 0.18]], 7_000_000, 100.0)
    lines = list(command.report("m", alone(both), 80))
    assert lines[0].startswith("ours 1.0: m in float32 on ") and lines[0].endswith("; cold load: 0.50 s")
    assert lines[2:6] == [
        "size    first      prompt  decoding        ms per  token   band-  memory",
        "tokens      s    tokens/s  tokens/s   50%     95%    99%   width      MB",
        "16+4    0.160  100.0 ±17%     50.00  20.0    20.0   20.0  0.0501    7.00",
        "512+1    5.12       100.0         -     -       -      -       -    7.00",
    ]
    assert "Medians of 3 runs" in lines[7] and "1.0 GB/s" in lines[-1]


def test_the_table_tells_all_rows_from_each() -> None:
    both, _ = scripted(BenchOptions(repetitions=3), [Size(16, 4), Size(16, 4, 8)])
    lines = list(command.report("m", alone(both), 80))
    assert lines[2:6] == [
        "size        first   prompt decoding  per row      ms per token  band- memory",
        "tokens rows     s tokens/s tokens/s tokens/s  50%    95%   99%  width     MB",
        "16+4      1 0.160    100.0    50.00    50.00 20.0   20.0  20.0 0.0501   7.00",
        "16+4      8  1.28    100.0    400.0    50.00 20.0   20.0  20.0 0.0507   7.00",
    ]
    assert any("Speeds are those of all rows" in line for line in lines)


@pytest.mark.covering
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("count", [1, 16])
def test_tables_fit(width: int, count: int) -> None:
    both, _ = scripted(BenchOptions(repetitions=3), [Size(16, 4), Size(1024, 1024, count)])
    for run in both.runs.values():
        times = [[1.37 * moment for moment in row] for row in run[0].times]
        run[0] = Run(run[0].prompt_tokens, times, 12_345_678_901, 1e5)
    for measured in (both, alone(both)):
        lines = list(command.report("some/model", measured, width))
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert "1024+1024" in text or "1,024 tokens, 1,024 new" in text
        assert ("rows" in text) == (count > 1)


def test_a_narrower_table_leaves_out_the_spreads() -> None:
    both, _ = scripted(BenchOptions(repetitions=3), [Size(16, 4, 8)])
    both.runs["ours", Size(16, 4, 8)][0] = Run(16, [[1.1, 1.3, 1.5, 1.7]] * 8)
    wide, narrow = ("\n".join(command.report("m", alone(both), width)) for width in (120, 80))
    assert "±" in wide.partition("Medians")[0] and "±" not in narrow.partition("Medians")[0]
    assert "16+4" in narrow


def test_two_programs_stand_side_by_side() -> None:
    both, _ = scripted(BenchOptions(repetitions=1), [Size(16, 4)])
    lines = [" ".join(line.split()) for line in command.report("m", both, 80)]
    assert "ours other ratio" in lines
    assert "decoding (tokens/s) 50.00 25.00 2.00" in lines
    assert not any("different types" in line for line in lines)
    both.programs[1].dtype = "bfloat16"  # type: ignore[misc]
    assert any("different types" in line for line in command.report("m", both, 80))


@pytest.mark.parametrize(
    ("value", "text"), [(1234567.0, "1,234,567"), (0.012345, "0.0123"), (7.0, "7.00"), (0.0, "0.00")]
)
def test_numbers_keep_their_digits(value: float, text: str) -> None:
    assert command._number(value, 3) == text


def test_the_picture_shows_every_size_and_program() -> None:
    pytest.importorskip("matplotlib")
    both, _ = scripted(BenchOptions(repetitions=2), [Size(16, 4), Size(32, 1)])
    figure = plot.figure(both, "a model")
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "prompt (tokens/s)", "decoding (tokens/s)", "time per token (ms)",
    ]  # fmt: skip
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([100, 100, 50, 50])
    assert [bar.get_height() for bar in figure.axes[1].patches] == pytest.approx([50, 25])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["16+4", "32+1"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ours 1.0, float32", "other 1.0, float32", "50% of tokens", "95% of tokens", "99% of tokens"]
    batches, _ = scripted(BenchOptions(repetitions=1), [Size(16, 4, 8)])
    batch = plot.figure(batches, "a model").axes[1]
    assert [label.get_text() for label in batch.get_xticklabels()] == ["16+4\n8 rows"]
    assert [bar.get_height() for bar in batch.patches] == pytest.approx([400, 200])
    prompts, _ = scripted(BenchOptions(repetitions=1), [Size(16, 1)])
    assert len(plot.figure(prompts, "a model").axes) == 1


# The worker, in this process.


def settings(**changes: Any) -> dict[str, Any]:
    caches = {"max_kv_size": None, "kv_bits": None, "kv_group_size": None, "quantized_kv_start": 0}
    return {
        "model": str(FOLDER),
        "caches": caches,
        "prefill_step_size": None,
        "draft_model": None,
        "drafting": {"num_draft_tokens": None, "prompt_lookup": False},
        "loading": {"dtype": "float32"},
    } | changes


def texts(
    program: worker.Ours | worker.MlxLm, prompts: list[list[int]], count: int, drafts: bool = False
) -> list[list[int]]:
    """The tokens of each row."""
    found: list[list[int]] = [[] for _ in prompts]
    for tokens in program.start(prompts, count, drafts).steps:
        for row, token in tokens:
            found[row].append(int(token))
    return found


def test_our_runs_are_greedy_and_pass_the_end_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_with_many_ends(*args: Any, **options: Any) -> tuple[OpenELM, Tokenizer]:
        model, tokenizer = load(*args, **options)
        tokenizer.eos_token_ids = set(range(model.config.vocab_size))  # any token ends a text
        return model, tokenizer

    monkeypatch.setattr("mlx_openelm.loading.load", load_with_many_ends)
    ours = worker.Ours(settings())
    prompts = random_prompts(20, 3, ours.model.config.vocab_size)
    expected = [[token for token, _ in generate_step(ours.model, ids, max_tokens=20)] for ids in prompts]
    assert texts(ours, prompts[:1], 20) == expected[:1] and len(expected[0]) == 20
    assert texts(ours, prompts, 20) == expected


@pytest.mark.parametrize("rows", [1, 3])
def test_a_run_has_a_time_for_each_token(rows: int) -> None:
    answer = worker.run(worker.Ours(settings()), [[5, 6, 7]] * rows, 10)
    assert len(answer["times"]) == rows
    for times in answer["times"]:
        assert len(times) == 10 and times == sorted(times) and times[0] > 0
    # All rows have their tokens at the end of a step.
    assert all(times == answer["times"][0] for times in answer["times"])
    assert answer["peak_memory"] > 0 and answer["process_memory"] > 10_000_000


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("bits", "per_value"), [(None, 4.0), (8, 1 + 2 * 4 / 32)])
def test_caches_are_counted_per_position_of_a_row(bits: int | None, per_value: float, count: int) -> None:
    caches = settings()["caches"] | {"kv_bits": bits}
    ours = worker.Ours(settings(caches=caches))
    config = ours.model.config
    expected = 2 * sum(config.num_kv_heads) * config.head_dim * per_value
    assert worker.run(ours, [[5, 6, 7]] * count, 4)["position_bytes"] == pytest.approx(expected)


def test_a_rotating_cache_is_counted_per_position() -> None:
    caches = cache.make_cache(2, 8)
    for layer in caches:
        layer.update_and_fetch(mx.zeros((1, 2, 20, 32)), mx.zeros((1, 2, 20, 32)))
    assert worker.position_bytes(caches) == 2 * 2 * 2 * 32 * 4


def test_decoding_reads_every_weight_but_a_separate_embedding() -> None:
    model, _ = load(FOLDER, dtype="float32")
    parameters: Any = dict(tree_flatten(model.parameters()))
    assert worker.weight_bytes(parameters) == 4 * model.config.num_parameters
    embedding = parameters["transformer.token_embeddings.weight"]
    untied = parameters | {"lm_head.weight": embedding}
    row = 4 * embedding.shape[1]
    assert worker.weight_bytes(untied) == 4 * model.config.num_parameters + row


def test_rows_that_have_to_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = worker.Ours(settings())
    monkeypatch.setattr(Engine, "__init__", partialmethod(Engine.__init__, max_bytes=20_000_000))
    worker.run(ours, [[5, 6, 7]], 4)
    with pytest.raises(RequestError) as caught:
        worker.run(ours, [[5, 6, 7]] * 64, 4)
    assert str(caught.value) == (
        "64 rows need more memory than the 20.0 MB that they may take; measure fewer with batch, or set "
        "max_kv_size or kv_bits."
    )


def test_failures_are_answered() -> None:
    first = settings() | {"program": "mlx-openelm", "names_flags": False}
    wrong = first | {"model": "nowhere"}
    refused, loaded, ran, failed = worker.answers(
        iter([wrong, first, {"prompts": [[1]], "count": 2, "drafts": False}, {"prompts": []}])
    )
    assert refused["exit_code"] == 2 and "nowhere" in refused["error"]
    assert loaded["dtype"] == "float32" and len(ran["times"][0]) == 2
    assert failed == {"error": "mlx-openelm could not run the model: KeyError: 'count'.", "exit_code": 1}


def test_a_model_that_mlx_lm_cannot_load_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    (answer,) = worker.answers(iter([{"program": "mlx-lm", "model": str(tmp_path), "names_flags": True}]))
    assert answer["exit_code"] == 1
    assert answer["error"].startswith("mlx-lm could not load the model: ") and "config.json" in answer["error"]


def test_mlx_lm_generates_the_same_tokens() -> None:
    pytest.importorskip("mlx_lm")
    plain = {"adapter_path": None, "dtype": "float32", "head_dim": 32}
    programs = [worker.Ours(settings()), worker.MlxLm(settings(**plain))]
    for prompts in ([[5, 6, 7, 8]], random_prompts(9, 10, 200)):  # of ten rows, it processes eight prompts at a time
        found = [texts(program, prompts, 12) for program in programs]
        assert found[0] == found[1] and {len(tokens) for tokens in found[0]} == {12}
        positions = [worker.run(program, prompts, 4)["position_bytes"] for program in programs]
        assert positions[0] == positions[1] > 0
    assert worker.facts(programs[0])["weight_bytes"] == worker.facts(programs[1])["weight_bytes"]


DRAFTS = {"draft_model": str(FOLDER), "drafting": {"num_draft_tokens": 3, "prompt_lookup": False}}


@pytest.mark.parametrize("count", [1, 3])
def test_drafts_of_the_model_itself_are_all_accepted(count: int) -> None:
    ours = worker.Ours(settings(**DRAFTS))
    prompts = random_prompts(9, count, 200)
    assert texts(ours, prompts, 12, True) == texts(ours, prompts, 12)
    plain, drafted = (worker.run(ours, prompts, 12, drafts) for drafts in (False, True))
    assert [plain[name] for name in ("drafted", "accepted", "steps", "step_tokens")] == [0] * 4
    assert drafted["accepted"] == drafted["drafted"] > 0
    # Of twelve tokens the first is the prompt's; a step gives at most three drafted ones and its own.
    assert drafted["step_tokens"] == 11 * count and drafted["steps"] == 3 * count
    assert all(len(times) == 12 for times in drafted["times"])


def test_mlx_lm_drafts_the_same() -> None:
    pytest.importorskip("mlx_lm")
    program = worker.MlxLm(settings(adapter_path=None, dtype="float32", head_dim=32, **DRAFTS))
    prompts = random_prompts(9, 1, 200)
    assert texts(program, prompts, 12, True) == texts(program, prompts, 12)
    answer = worker.run(program, prompts, 12, True)
    # Its first step gives the first token too. The last tokens are all accepted.
    assert (answer["drafted"], answer["accepted"], answer["steps"], answer["step_tokens"]) == (9, 9, 3, 12)


# The command.


def run_command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_openelm", "bench", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=200,
    )


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code, the output and the errors of a command line; the programs that it measures are processes."""
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 22)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["bench", *words])
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return run


def test_tiny_is_measured(in_process: Any) -> None:
    code, output, complaints = in_process("-p", "8,16", "-g", "4", "-n", "2", "--kv-bits", "8")
    assert code == 0, complaints
    lines = output.splitlines()
    assert lines[0].startswith("mlx-openelm ") and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if "+" in line] == ["8+4", "16+4"]
    # On a busy machine there is a line of progress every five seconds.
    assert all(line.startswith(("Measuring: ", "This takes about ")) for line in complaints.splitlines())


def test_tiny_with_drafts(in_process: Any) -> None:
    words = ("-p", "16", "-g", "8", "-n", "1", "--batch", "1,2", "--prompt-lookup", "--json")
    code, output, complaints = in_process(*words)
    assert code == 0, complaints
    values = json.loads(output)
    (program,) = values["programs"]
    assert [(result["rows"], result["drafts"]) for result in program["results"]] == [
        (1, False), (1, True), (2, False), (2, True),
    ]  # fmt: skip
    for result in program["results"][1::2]:
        assert result["speedup"] > 0 and result["tokens_per_step"] >= 1


def test_tiny_beside_mlx_lm(in_process: Any) -> None:
    pytest.importorskip("mlx_lm")
    words = ("-p", "8", "-g", "4", "-n", "1", "--batch", "1,3")
    code, output, complaints = in_process(*words, "--compare", "mlx-lm", "--dtype", "float32", "--json")
    assert code == 0, complaints
    values = json.loads(output)
    assert [(program["name"], program["dtype"]) for program in values["programs"]] == [
        ("mlx-openelm", "float32"), ("mlx-lm", "float32"),
    ]  # fmt: skip
    # The same BLAS in both, and the one that is loaded here.
    assert {program["blas"] for program in values["programs"]} == {blas.state}
    for row in values["rows"]:
        assert row["ours"] > 0 and row["other"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["other"])
    assert values["options"]["compare"] == "mlx-lm" and values["model"] == "tiny"


@pytest.mark.slow
def test_a_model_of_the_hub_is_asked_for_once(hub: FakeHub, hub_env: dict[str, str]) -> None:
    """The programs find what the command has downloaded, without asking again: that would be timed as loading."""
    pytest.importorskip("mlx_lm")
    hub.add("me/plays", FOLDER)
    words = ("--model", "me/plays", "-p", "8", "-g", "4", "-n", "1", "--json")
    done = run_command(*words, "--compare", "mlx-lm", **hub_env)
    assert done.returncode == 0, done.stderr
    sent = len(hub.files_sent)
    assert sent > 0 and len(hub.files_sent) == len(set(hub.files_sent))
    assert run_command(*words, **hub_env | {"HF_HUB_OFFLINE": "1"}).returncode == 0
    assert len(hub.files_sent) == sent


@pytest.mark.slow
def test_what_mlx_lm_cannot_read_is_converted_for_both(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    pytest.importorskip("matplotlib")
    checkpoint = FIXTURES / "shakespeare-hf"
    named = tmp_path / "renamed"
    named.mkdir()
    for file in checkpoint.iterdir():
        name = file.name.replace("model.safetensors", "weights.safetensors")
        if not name.endswith("index.json"):
            (named / name).symlink_to(file)
    picture, temporary = tmp_path / "speed.png", tmp_path / "temporary"
    temporary.mkdir()
    done = run_command(
        *("--model", str(named), "--adapter-path", str(FIXTURES / "peft-lora"), "-p", "8", "-g", "4", "-n", "1"),
        *("--compare", "mlx-lm", "--json", "--plot", str(picture)),
        TMPDIR=str(temporary),
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout)["programs"]
    # The same files and the same adapter, rank for rank.
    assert ours["weight_bytes"] == theirs["weight_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(temporary.glob("mlx-openelm-*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_prints_what_was_measured() -> None:
    code = (
        "from mlx_openelm import console; from mlx_openelm.cli.main import main; "
        "from mlx_openelm.evaluation import bandwidth; console._LINE_SECONDS = 0.1; bandwidth._BYTES = 1 << 22; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "bench", "-p", "16", "-g", "16", "-n", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # The parent may ignore Ctrl-C, as a shell's background jobs do.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type]
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("This takes about ")
        for line in process.stderr:  # otherwise a line every 5 seconds
            if (done := re.match("Measuring: ([0-9,]+) of ", line)) and int(done[1].replace(",", "")) > 3:
                break
        process.send_signal(signal.SIGINT)
        output, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert any(line.startswith("16+16 ") for line in output.splitlines()), output
    assert complaints.endswith("Interrupted; what was measured by then is above.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-p", "0"), "--prompt-tokens must be numbers from 1 on, separated by commas, got '0'."),
        (("-g", "8,x"), "--generation-tokens must be numbers from 1 on, separated by commas, got '8,x'."),
        (("-n", "0"), "--repetitions must be 1 or more, got 0"),
        (("--delay", "-1"), "--delay must be from 0 to 3600 seconds, got -1.0"),
        (("--prefill-step-size", "0"), "--prefill-step-size must be 1 or more, got 0"),
        (("--compare", "vllm"), "--compare must be mlx-lm, got 'vllm'."),
        (("-b", "1,0"), "--batch must be numbers from 1 on, separated by commas, got '1,0'."),
        (
            ("--batch", "8", "--kv-bits", "8", "--compare", "mlx-lm"),
            "--compare mlx-lm: it has no quantized caches in batches; leave out --kv-bits or --batch.",
        ),
        (("--prompt-lookup", "--compare", "mlx-lm"), "--compare mlx-lm: it has no prompt lookup; leave out "),
        (
            ("--draft-model", "tiny", "-b", "2", "--compare", "mlx-lm"),
            "--compare mlx-lm: it has no drafts in batches; leave out --draft-model or --batch.",
        ),
        (
            ("--draft-model", "tiny", "--max-kv-size", "8", "--compare", "mlx-lm"),
            "--compare mlx-lm: it has no drafts with sliding caches; leave out --draft-model or --max-kv-size.",
        ),
        (("--num-draft-tokens", "2"), "--num-draft-tokens needs --draft-model or --prompt-lookup."),
        (("--prompt-lookup", "--num-draft-tokens", "0"), "--num-draft-tokens must be a whole number from 1 to "),
        (("--draft-model", "nowhere"), "There is no model named 'nowhere'"),
        (("--kv-bits", "7"), "--kv-bits must be 2, 3, 4, 5, 6 or 8, got 7."),
        (("--dtype", "int8"), "--dtype must be one of "),
        (
            ("-p", "1000", "-g", "26"),
            "A prompt of 1000 tokens and 26 new ones need 1025 positions; the model has 1024.",
        ),
        (("--plot", "speed.gif"), "speed.gif must end in .png, .svg, .pdf."),
        (("--adapter-path", "nowhere"), "There is no adapter 'nowhere'"),
        (("--model", "nowhere"), "There is no model named 'nowhere'"),
    ],
)
def test_wrong_requests_are_refused(words: tuple[str, ...], message: str, in_process: Any) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    code, output, complaints = in_process(*words)
    assert (code, output) == (2, "")
    assert complaints.startswith(f"error: {message}") and complaints.count("\n") == 1


def test_a_missing_mlx_lm_is_one_line(in_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_options, "find_spec", lambda name: None)
    code, output, complaints = in_process("--compare", "mlx-lm")
    assert (code, output) == (2, "")
    assert complaints == "error: --compare mlx-lm needs mlx-lm, which is not installed: pip install mlx-lm.\n"


def test_the_last_position_is_used(in_process: Any, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", max_context_length=40, rope_max_length=40)
    model = ("--model", str(folder), "-p", "32", "-n", "1")
    code, output, _ = in_process(*model, "-g", "9")
    assert code == 0 and "32+9" in output
    code, _, complaints = in_process(*model, "-g", "10")
    assert code == 2 and "32 tokens and 10 new ones need 41 positions; the model has 40." in complaints


def test_a_program_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    process = processes.Process(settings() | {"program": "mlx-openelm"})
    try:
        assert len(process.run([[1, 2]], 3).times[0]) == 3
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(processes.OpenELMError, match="^mlx-openelm ended unexpectedly: it was killed, as happens"):
            process.run([[1, 2]], 3)
    finally:
        process.close()


def test_an_error_of_a_program_is_the_commands() -> None:
    with pytest.raises(RequestError, match="no model named 'nowhere'"):
        processes.Process(settings(model="nowhere") | {"program": "mlx-openelm"})
