"""Comparison with Apple's numbers, leaderboard, paired tests, and scores over checkpoints."""

from __future__ import annotations

import json
import math
import statistics as plain
from pathlib import Path

from mlx_openelm.cli.main import main
from mlx_openelm.errors import RequestError
from mlx_openelm.harness import checkpoints, compare, leaderboard
from mlx_openelm.harness.options import EvaluateOptions
from mlx_openelm.harness.results import Result, TaskResult
from mlx_openelm.harness.statistics import paired, standard_error

import pytest

DATA = Path(__file__).parent / "fixtures/evaluation/commonsense"
# Apple's five tasks of the OpenLLM leaderboard for 1.1B, whose average is the paper's headline (45.93).
APPLE = {"arc_challenge": 36.69, "hellaswag": 65.71, "mmlu": 27.05, "truthfulqa_mc2": 36.98, "winogrande": 63.22}
SHOTS = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5}
METRIC = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm"}


def run(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def result(shift: float = 0.0, error: float = 0.01, *, name: str = "1.1b", suite: str = "openllm", **about) -> Result:
    """A result of the release 1.1B, each score `shift` above Apple's; MMLU with a subject."""
    model = {"name": name, "release": "OpenELM-1_1B", "parameters": 1_079_891_456, "bytes": 2 * 1_079_891_456, **about}
    tasks = {}
    for task, value in APPLE.items():
        metric = METRIC.get(task, "acc")
        metrics = {metric: value / 100 + shift, f"{metric}_stderr": error, "other": 0.9}
        tasks[task] = TaskResult(metrics, 100, {metric: [0.0, 1.0, 1.0, 0.0]}, "prompts", SHOTS[task])
    scores = {"acc": [1.0, 0.0, 0.0, shift]}
    tasks["mmlu_anatomy"] = TaskResult({"acc": 0.3, "acc_stderr": 0.1}, 10, scores, "of anatomy")
    tasks["mmlu"].parts, tasks["mmlu"].scores, tasks["mmlu"].prompts = ["mmlu_anatomy"], {}, ""
    return Result(model, tasks, suite=suite, mode="paper", speed={"requests": 5, "requests_per_second": 12.5})


def test_differences_from_apples_table():
    rows = {row.task: row for row in compare.rows(result(0.015))}
    assert list(rows) == [*APPLE, "average"]  # without the subjects of MMLU
    for task, value in APPLE.items():
        row = rows[task]
        assert row.metric == METRIC.get(task, "acc")
        assert row.published == {"Apple OpenELM-1.1B": pytest.approx(value / 100)}
        assert row.difference("Apple OpenELM-1.1B") == pytest.approx(0.015)
        assert row.is_outside("Apple OpenELM-1.1B") is False
    average = rows["average"]
    assert average.published["Apple OpenELM-1.1B"] == pytest.approx(0.4593)
    assert average.ours == pytest.approx(0.4593 + 0.015)
    assert average.error == pytest.approx(0.01 / math.sqrt(5))
    assert average.is_outside("Apple OpenELM-1.1B")  # 0.015 is more than 1.96 * 0.0045
    assert all(row.is_outside("Apple OpenELM-1.1B") for row in compare.rows(result(0.02)))


def test_tasks_of_a_group_count_once_and_are_tested_with_it():
    rows = compare.rows(result())
    assert [row.task for row in rows if row.task.startswith("mmlu")] == ["mmlu"]
    assert leaderboard.common_tasks([result()]) == list(APPLE)
    assert leaderboard.tests(result(1.0), result(0.0))["mmlu"].better == 1
    plain = result()
    plain.tasks["mmlu"].metrics = {}  # a group without a score of its own stands for none of its tasks
    assert "mmlu_anatomy" in {row.task for row in compare.rows(plain)}


def test_metrics_behind_a_filter_have_their_errors(capsys):
    metrics = {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "exact_match,loose": 0.5,
               "exact_match_stderr,loose": 0.2, "word_perplexity": 12.0}  # fmt: skip
    found = Result({"name": "a", "parameters": 1, "bytes": 1}, {"sums": TaskResult(metrics, 4)})
    [row] = compare.rows(found)
    assert (row.metric, row.error) == ("exact_match,strict", 0.1)
    assert [line[-1] for line in compare.table(found)[1:]] == ["25.00 ± 10.00", "50.00 ± 20.00", "12.0000"]
    assert leaderboard.entries([found])[0].error == pytest.approx(0.1)


def test_an_error_of_zero_shows_nothing():
    """All of a few questions answered alike: the difference may well be chance."""
    row = compare.Row("a", "acc", 1.0, 0.0, 2, {"Apple": 0.5})
    assert row.is_outside("Apple") is None


def test_the_average_needs_all_tasks():
    some = result()
    del some.tasks["mmlu"], some.tasks["mmlu_anatomy"]
    rows = compare.rows(some)
    assert rows[-1].task == "average" and rows[-1].published == {}
    some.missing["mmlu"] = "its data is gone"
    assert [row.task for row in compare.rows(some)][-1] == "winogrande"
    other = result()
    other.model["release"] = None
    assert all(row.published == {} for row in compare.rows(other))


def test_the_papers_headline(capsys, tmp_path):
    path = tmp_path / "1.1b.json"
    result().save(path)
    code, out, _ = run(capsys, "leaderboard", path)
    assert code == 0
    for line in (
        "OPT-1.3B",
        "0.2T         41.49",
        "Pythia-1.4B",
        "MobiLlama-1.3B",
        "OLMo-1.2B",
        "3.0T         43.57",
        "45.93",
    ):
        assert line in out
    assert "1.1b (ours)" in out and "45.93 ± 0.45" in out
    _, out, _ = run(capsys, "leaderboard", path, "--format", "markdown")
    assert "| task | shots | metric | questions | ours | Apple OpenELM-1.1B | difference |" in out
    assert "| arc_challenge | 25 | acc_norm | 100 | 36.69 ± 1.00 | 36.69 | +0.00  |" in out
    _, out, _ = run(capsys, "leaderboard", path, "--json")
    comparison = {row["task"]: row for row in json.loads(out)["comparison"]}
    assert comparison["mmlu"]["published"]["Apple OpenELM-1.1B"]["value"] == pytest.approx(0.2705)
    assert comparison["mmlu"]["standard_error"] == 0.01


@pytest.mark.parametrize("change", ["fewer tasks", "other shots"])
def test_the_headline_is_for_the_whole_suite_with_the_papers_examples(change, capsys, tmp_path):
    some, path = result(), tmp_path / "some.json"
    if change == "fewer tasks":
        del some.tasks["winogrande"]
    else:
        some.tasks["winogrande"].num_fewshot = 0
    some.save(path)
    _, out, _ = run(capsys, "leaderboard", path)
    assert "OLMo-1.2B" not in out and "65.71" in out
    assert ("Nothing is compared where" in " ".join(out.split())) == (change == "other shots")
    rows = {row.task: row for row in compare.rows(some)}
    assert rows["average"].published == {} != rows["hellaswag"].published
    code, out, error = run(capsys, "leaderboard", path, "--published")
    if change == "fewer tasks":
        assert code == 0 and "(Apple)" in out
    else:
        assert rows["winogrande"].published == {} and rows["winogrande"].is_outside("Apple OpenELM-1.1B") is None
        assert code == 2 and "1.1b was asked winogrande with other numbers of examples" in error


def test_leaderboard_sorts_by_average_and_lists_apples_models(capsys, tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    result(0.01, name="plain").save(paths[0])
    result(-0.01, name="packed", bytes=680_000_000).save(paths[1])
    code, out, _ = run(capsys, "leaderboard", *paths, "--published")
    assert code == 0
    names = [line.split("  ")[0] for line in out.splitlines()[1:11]]
    assert names.index("plain") < names.index("OpenELM-1.1B (Apple)") < names.index("packed")
    assert names[0] == "OpenELM-3B-Instruct (Apple)" and len(names) == 10
    line = next(line for line in out.splitlines() if line.startswith("packed"))
    assert line.split()[1:4] == ["44.93", "±", "0.45"]
    assert line.split()[-5:] == ["1,080M", "5.04", "680.0", "MB", "12.5"]
    _, out, _ = run(capsys, "leaderboard", *paths, "--json")
    values = json.loads(out)
    assert [entry["name"] for entry in values["leaderboard"]] == ["plain", "packed"]
    assert values["tests"]["mmlu"]["questions"] == 4


def test_pictures(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    result(0.01).save(paths[0])
    result().save(paths[1])
    for files in (paths, paths[:1]):
        picture = tmp_path / f"{len(files)}.png"
        assert run(capsys, "leaderboard", *files, "--plot", picture)[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        code, _, err = run(capsys, "leaderboard", *files, "--plot", picture)
        assert code == 2 and "exists; choose another file" in err


def test_bad_files_and_unlike_results_are_refused(capsys, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"results": {}}')
    assert run(capsys, "leaderboard", path)[::2] == (
        2, f"error: {path} is not a result of `mlx-openelm evaluate`.\n"
    )  # fmt: skip
    assert run(capsys, "leaderboard")[0] == 2
    assert run(capsys, "leaderboard", path, "--format", "html")[0] == 2
    with pytest.raises(RequestError, match="of different suites: openllm in mode paper, zero_shot in mode paper"):
        leaderboard.entries([result(), result(suite="zero_shot")])
    other = result()
    other.tasks = {"new": TaskResult({"acc": 1.0}, 1)}
    with pytest.raises(RequestError, match="no task in common"):
        leaderboard.entries([result(), other])
    with pytest.raises(RequestError, match="Apple has no such table for results of suite commonsense"):
        leaderboard.entries([result(suite="commonsense")], published=True)


def test_paired_tests_equal_the_textbooks():
    first, second = [1.0] * 9 + [0.0] * 3 + [1.0] * 4, [0.0] * 9 + [1.0] * 3 + [1.0] * 4
    test = paired(first, second)
    # McNemar's exact test of 9 against 3: twice the binomial tail.
    assert test.p_value == pytest.approx(2 * sum(math.comb(12, k) for k in range(4)) / 2**12)
    differences = [1.0] * 9 + [-1.0] * 3 + [0.0] * 4
    assert (test.better, test.worse, test.questions) == (9, 3, 16)
    assert test.difference == pytest.approx(6 / 16)
    assert test.standard_error == pytest.approx(plain.stdev(differences) / 4)
    assert paired([1.0], [1.0]).p_value == 1
    assert paired([1.0] * 5000 + [0.0] * 4000, [0.0] * 5000 + [1.0] * 4000).p_value < 1e-20
    assert standard_error([0.0, 1.0, 1.0]) == pytest.approx(plain.stdev([0, 1, 1]) / 3**0.5)


def test_only_equal_prompts_are_paired(capsys, tmp_path):
    first, second = result(), result()
    second.tasks["mmlu_anatomy"].prompts = "others"
    assert set(leaderboard.tests(first, second)) == APPLE.keys() - {"mmlu"}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    first.save(paths[0])
    second.save(paths[1])
    assert "warning: The results asked different questions, or with other prompts, in mmlu." in run(
        capsys, "leaderboard", *paths
    )[2]  # fmt: skip
    assert run(capsys, "leaderboard", paths[0], paths[0])[2] == ""


def test_scores_over_the_published_checkpoints(capsys, tmp_path, monkeypatch):
    """Eleven checkpoints, each with its own answers; here they are all `tiny`."""
    evaluate, asked = checkpoints.evaluate, []

    def stand_in(model, options, **given):
        asked.append(model)
        return evaluate("tiny", options, **given)

    monkeypatch.setattr(checkpoints, "evaluate", stand_in)
    output, picture = tmp_path / "course.json", tmp_path / "course.png"
    words = ["evaluate", "--checkpoints", "corenet:270M", "--suite", "commonsense", "--tasks", "openbookqa"]
    words += ["--data", DATA, "--limit", 1, "--output", output]
    if pytest.importorskip("matplotlib"):
        words += ["--plot", picture]
    code, out, _ = run(capsys, *words)
    assert code == 0 and picture.exists()
    assert asked[0] == "corenet:270M/checkpoint_epoch_0_iter_49999"
    assert asked[-1] == "corenet:270M/checkpoint_epoch_0_iter_349999" and len(asked) == 11
    lines = out.splitlines()
    assert lines[0].split() == ["iteration", "openbookqa"]
    assert [line.split()[0] for line in lines[1:]][::5] == ["50,000", "300,000", "350,000"]
    values = json.loads(output.read_text())["results"]
    assert list(values) == ["50000", "100000", "150000", "200000", "250000", "300000", "330000", "335000", "340000",
                            "345000", "350000"]  # fmt: skip
    assert (tmp_path / "course-50000.answers.jsonl").exists()
    other = tmp_path / "270m.json"
    other.write_text("the result of another run")
    words[words.index(output)] = other
    code, _, err = run(capsys, *words[: words.index(other) + 1])
    assert code == 2 and "is no evaluation of checkpoints; give another --output" in err and len(asked) == 11
    assert other.read_text() == "the result of another run"
    for name in ("270M", "corenet:270M/mlx", "corenet:", "corenet:7B"):
        with pytest.raises(RequestError):
            checkpoints.evaluate_checkpoints(name, EvaluateOptions(suite="commonsense"))
    code, _, err = run(capsys, *words[:3], "--suite", "commonsense", "--adapter-path", "a")
    assert code == 2 and "--checkpoints and --adapter-path exclude each other" in err
    code, _, err = run(capsys, *words[:3], "--suite", "commonsense", "--model", "270m")
    assert code == 2 and "--checkpoints and --model exclude each other" in err
