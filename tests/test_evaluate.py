"""`evaluate`: suites, tasks of lm-eval, results, and runs that go on where they were killed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.harness import compare, data, paper_tasks
from mlx_openelm.harness.commonsense import find_task, questions
from mlx_openelm.harness.evaluating import evaluate
from mlx_openelm.harness.options import EvaluateOptions
from mlx_openelm.harness.results import Result
from mlx_openelm.harness.suites import Wanted, wanted

import hub_datasets
import pytest

FIXTURES = Path(__file__).parent / "fixtures/evaluation"
DATA = FIXTURES / "commonsense"


def run(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, words)])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def test_the_command_writes_the_result_and_prints_the_table(capsys, tmp_path):
    output = tmp_path / "result.json"
    words = ["--model", "tiny", "--suite", "commonsense", "--tasks", "openbookqa", "--data", DATA]
    code, out, err = run(capsys, *words, "--limit", 5, "--output", output)
    assert code == 0
    values = json.loads(output.read_text())
    metrics = values["results"]["openbookqa"]
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert f"{100 * metrics['acc']:.2f} ± {100 * metrics['acc_stderr']:.2f}" in out
    assert "LoRA 270M" in out and "28.00" in out and "31.20" in out  # the published table
    assert f"Wrote {output}; the answers are in" in err
    assert values["tasks"]["openbookqa"]["questions"] == 5
    assert len((tmp_path / "result.answers.jsonl").read_text().splitlines()) == 20


def test_a_result_names_all_that_it_depends_on(tmp_path):
    options = EvaluateOptions(
        suite="commonsense", tasks=("obqa",), data=str(DATA), limit=2, output=f"{tmp_path}/r.json"
    )
    first = evaluate("tiny", options, progress=False)
    assert first.model["name"] == "tiny" and first.model["dtype"] == "float32" and first.model["bits"] == 8.52
    assert {"revision", "adapter", "fingerprint", "parameters", "bytes", "device"} <= first.model.keys()
    assert {"mlx-openelm", "mlx", "python"} <= first.versions.keys()
    assert first.settings["seed"] == 1234 and first.settings["limit"] == 2
    assert first.speed["requests"] == 8
    again = Result.read(tmp_path / "r.json")
    assert again == first
    other = evaluate("tiny", EvaluateOptions(suite="commonsense", tasks=("obqa",), data=str(DATA), limit=3))
    assert other.tasks["openbookqa"].prompts != first.tasks["openbookqa"].prompts


KILLED = """
import os, signal
from mlx_openelm.cli.main import main
from mlx_openelm.harness.answers import Answers
add = Answers.add
def killing(self, answers):
    add(self, answers)
    if self.path.read_bytes().count(b"\\n") >= 20:
        os.kill(os.getpid(), signal.SIGKILL)
Answers.add = killing
main()
"""


def test_killed_runs_go_on_without_asking_again(capsys, tmp_path):
    """A process is killed with -9 in the middle; the next run computes only what is missing, with the same result."""
    words = ["--suite", "commonsense", "--tasks", "openbookqa,winogrande", "--limit", "6"]
    words += ["--data", str(DATA), "--batch-size", "4", "--json", "--output"]
    answers = tmp_path / "killed.answers.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, "evaluate", *words, str(tmp_path / "killed.json")])
    assert killed.returncode == -signal.SIGKILL
    before = answers.read_bytes().count(b"\n")
    assert 20 <= before < 24  # of 36, in the middle of the first task
    assert not (tmp_path / "killed.json").exists()
    with answers.open("ab") as file:
        file.write(b'{"key": "unfin')  # as a kill in the middle of writing would leave it
    done, whole = (json.loads(run(capsys, *words, tmp_path / name)[1]) for name in ("killed.json", "whole.json"))
    assert done["results"] == whole["results"]
    total = whole["speed"]["requests"]
    assert done["speed"]["requests"] == total - before
    keys = [json.loads(line)["key"] for line in answers.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == total

    # Both computed the same, bit for bit.
    def sorted_answers(name: str) -> list[str]:
        return sorted((tmp_path / f"{name}.answers.jsonl").read_text().splitlines())

    assert sorted_answers("killed") == sorted_answers("whole")


def test_an_output_of_something_else_is_kept(capsys, tmp_path):
    output = tmp_path / "r.json"
    words = ["--suite", "commonsense", "--tasks", "openbookqa", "--data", DATA, "--limit", 1, "--output", output]
    output.write_text("{}")
    assert run(capsys, *words)[::2] == (
        2, f"error: {output} exists, and is no result of an evaluation; give another --output, or --overwrite.\n"
    )  # fmt: skip
    assert run(capsys, *words, "--overwrite")[0] == 0
    assert run(capsys, *words)[0] == 0  # the same again
    code, _, err = run(capsys, *words, "--model", "tiny-draft")
    assert code == 2 and "is the result of another model, tiny;" in err
    code, _, err = run(capsys, *words, "--max-length", 400)
    assert code == 2 and "is a result with another --max-length;" in err
    words[3] = "winogrande"
    code, _, err = run(capsys, *words)
    assert code == 2 and "is the result of other tasks;" in err


def test_missing_data_is_named_and_the_rest_runs(capsys, hub):
    code, out, err = run(capsys, "--suite", "commonsense", "--data", DATA, "--limit", 1)
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()[1:4]} == {"winogrande", "ARC-Challenge", "openbookqa"}
    assert f"piqa did not run: {DATA} has no piqa/test.json and no baber/piqa with the split validation" in err
    assert "average" not in out  # of three tasks it would be compared with that of eight
    code, _, err = run(capsys, "--suite", "commonsense", "--tasks", "piqa", "--data", DATA)
    assert code == 1 and err.startswith("error: No task could run: piqa: ")


def test_chosen_questions(tmp_path):
    numbers = tmp_path / "numbers.json"
    numbers.write_text('{"openbookqa": [3, 1]}')
    found = [
        evaluate("tiny", EvaluateOptions(suite="commonsense", tasks=("obqa",), data=str(DATA), **chosen), progress=None)
        for chosen in ({"limit": 4}, {"samples": '{"obqa": [3, 1, 3]}'}, {"samples": str(numbers)})
    ]
    every, some, same = (result.tasks["openbookqa"].scores["acc"] for result in found)
    assert some == same == [every[3], every[1]]
    with pytest.raises(RequestError, match="asks for question 99 of openbookqa, which has 16"):
        samples = '{"openbookqa": [99]}'
        options = EvaluateOptions(suite="commonsense", tasks=("boolq,obqa",), data=str(DATA), samples=samples)
        evaluate("tiny", options, progress=lambda *shown: pytest.fail("a task began"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to run"),
        ({"suite": "all"}, "suite must be zero_shot, openllm, llm360, commonsense, risk or memorization"),
        ({"suite": "openllm", "mode": "old"}, "mode must be paper or current"),
        ({"tasks": "piqa", "limit": 0}, "limit must be 1 or more"),
        ({"tasks": "piqa", "num_fewshot": -1}, "num_fewshot must be 0 or more"),
        ({"tasks": "piqa", "seed": 1 << 32}, "seed must be 0 to 4294967295, got 4294967296"),
        ({"tasks": "piqa", "limit": 1, "samples": "{}"}, "exclude each other"),
        ({"tasks": "piqa", "log_samples": True}, "log_samples needs output"),
        ({"tasks": "piqa", "data": "/nowhere"}, "data must be a folder"),
        ({"suite": "commonsense", "samples": '{"a": "b"}'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": '{"a": [-1]}'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": '{"obqa": []}'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": '{"obqa": "12"}'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": '{"obqa": [0.7, 1]}'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": '{"obqa": [true]}'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": "[1]"}, "samples must be an object of lists"),
        ({"suite": "commonsense", "samples": '{"obqa": [1'}, "samples must be an object of lists"),
        ({"suite": "commonsense", "tasks": "obqa", "samples": '{"boolq": [1]}'}, "samples names 'boolq', which is not"),
        ({"suite": "commonsense", "num_fewshot": 5}, "commonsense has prompts of its own, without num_fewshot"),
        ({"suite": "memorization", "apply_chat_template": True}, "of its own, without apply_chat_template"),
        ({"tasks": "piqa", "fewshot_as_multiturn": True}, "fewshot_as_multiturn needs apply_chat_template"),
        ({"tasks": "piqa", "gen_kwargs": ("temperature",)}, "gen_kwargs needs name=value"),
        ({"tasks": "piqa", "gen_kwargs": ('{"a": ',)}, "gen_kwargs is not JSON"),
        ({"tasks": "piqa", "batch_size": "many"}, "batch_size must be a whole number or auto"),
        ({"suite": "commonsense", "tasks": ("gsm8k",)}, "suite commonsense has no task 'gsm8k'"),
        ({"suite": "commonsense", "batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        evaluate("tiny", EvaluateOptions(**options))


def test_options_as_users_type_them():
    options = EvaluateOptions(
        tasks=("arc_easy, piqa", "piqa"), gen_kwargs=("temperature=0.5,until=\\n", "do_sample=True")
    )
    assert options.task_names == ["arc_easy", "piqa"]
    assert options.generation == {"temperature": 0.5, "until": "\\n", "do_sample": True}
    assert EvaluateOptions(tasks="a", gen_kwargs='{"until": ["a,b"], "top_k": 4}').generation == {
        "until": ["a,b"], "top_k": 4
    }  # fmt: skip
    assert [EvaluateOptions(tasks="a", batch_size=size).batch_size for size in ("auto", "auto:4", "8", 3)] == [
        16, 16, 8, 3
    ]  # fmt: skip


def test_the_suites_are_the_papers():
    assert wanted("openllm", []) == [
        Wanted("arc_challenge", 25), Wanted("hellaswag", 10), Wanted("mmlu", 5), Wanted("truthfulqa_mc2", 0),
        Wanted("winogrande", 5),
    ]  # fmt: skip
    assert wanted("llm360", ["race", "crows_pairs_english"]) == [Wanted("race", 0), Wanted("crows_pairs_english", 25)]
    assert len(wanted("zero_shot", [])) == 7
    with pytest.raises(RequestError, match="suite zero_shot has no task 'mmlu'"):
        wanted("zero_shot", ["mmlu"])


class TestData:
    """Data sets in folders as on the hub."""

    @pytest.mark.parametrize(
        "name",
        ["allenai/openbookqa/main/test.jsonl", "openbookqa/main/test-00000-of-00001.jsonl", "x/openbookqa/test.jsonl",
         "allenai/openbookqa/main/test/0000.jsonl", "openbookqa/data/test.jsonl", "openbookqa/main.jsonl"],
    )  # fmt: skip
    def test_layouts(self, tmp_path, name):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        row = {"question_stem": "Who?", "choices": {"text": ["I", "you"], "label": ["A", "B"]}, "answerKey": "B"}
        path.write_text(f"{json.dumps(row)}\n")
        [question] = questions(find_task("obqa"), tmp_path)
        assert (question.answer, len(question.choices)) == (1, 2)

    def test_formats(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        rows = [{"a": "1", "b": "x, y"}, {"a": "2", "b": "z\u2028\x0b\x85z"}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
        (tmp_path / "train.json").write_text(json.dumps(rows))
        (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / "train.csv").write_text('a,b\n1,"x, y"\n2,z\u2028\x0b\x85z\n')
        for suffix in data.SUFFIXES:
            assert data.read_rows([tmp_path / f"train{suffix}"]) == rows
        (tmp_path / "train.parquet").write_bytes(b"PAR1")
        (tmp_path / "train.json").write_text("[1]")
        (tmp_path / "train.jsonl").write_text("[" * 100_000)
        (tmp_path / "train.csv").write_text(f"a\n{'x' * 200_000}\n")  # more than csv takes
        for suffix in data.SUFFIXES:
            with pytest.raises(RequestError, match=f"train{suffix}"):
                data.read_rows([tmp_path / f"train{suffix}"])

    def test_splits_may_have_different_formats(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        (tmp_path / "mixed").mkdir()
        (tmp_path / "mixed" / "train.csv").write_text("a\nx\n")
        (tmp_path / "mixed" / "test.jsonl").write_text('{"a": "y"}\n')
        with data.local_first(tmp_path):
            found = datasets.load_dataset("owner/mixed")
        assert {split: rows.to_list() for split, rows in found.items()} == {"train": [{"a": "x"}], "test": [{"a": "y"}]}

    def test_lists_in_csv_are_refused(self, tmp_path):
        """Their letters would be a task's choices."""
        datasets = pytest.importorskip("datasets")
        (tmp_path / "listed").mkdir()
        table = tmp_path / "listed" / "train.csv"
        table.write_text("context,endings\n[note] a,\"['one', 'two']\"\n[note],\"['three' 'four']\"\n")
        with data.local_first(tmp_path), pytest.raises(RequestError, match="lists in the column 'endings', which CSV"):
            datasets.load_dataset("owner/listed")
        table.write_text("context,endings\n[note],\n[1] see [2],\n{x},\n")
        with data.local_first(tmp_path):
            assert datasets.load_dataset("owner/listed")["train"].num_rows == 3

    def test_what_is_not_in_a_folder_comes_from_the_hub(self, hub, tmp_path):
        hub_datasets.make(tmp_path / "sets", mmlu=False)
        hub.add("datasets/allenai/openbookqa", tmp_path / "sets/allenai/openbookqa")
        assert len(questions(find_task("obqa"), None)) == 6
        with pytest.raises(OpenELMError, match="social_i_qa"):
            questions(find_task("siqa"), None)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    hub_datasets.make(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
class TestLmEval:
    """Tasks of lm-eval itself, on made-up data sets in a folder."""

    def test_paper_mode_asks_what_the_harness_asked_at_apples_commit(self, sets):
        """The fixture holds hashes of what lm-eval asked at commit dc90fec, where it ran on the same data."""
        from mlx_openelm.harness import lm_tasks

        lm_tasks.prepare()
        expected = json.loads((FIXTURES / "paper-requests.json").read_text())["requests"]
        shots = {task.name: task.shots for suite in ("zero_shot", "llm360") for task in wanted(suite, [])}
        manager = lm_tasks.make_manager(list(shots), None)
        assert expected.keys() <= lm_tasks._with_parts(shots, manager)
        subjects = [name for name in expected if name.startswith("mmlu_")]  # two of 57, each with files of its own
        shots |= dict.fromkeys(subjects, shots.pop("mmlu"))
        found, differing = {}, set()
        for name, count in shots.items():
            with data.local_first(sets):
                loaded = lm_tasks._load(manager, Wanted(name, count), None)
            [task] = lm_tasks._tasks_of(loaded)
            digests = []
            for paper in (False, True):
                if paper:
                    paper_tasks.adapt(task)
                task.set_fewshot_seed(seed=1234)
                task._instances = None
                task.build_all_requests(limit=None, rank=0, world_size=1)
                requests = json.dumps([list(instance.args) for instance in task.instances])
                digests.append(hashlib.sha256(requests.encode()).hexdigest()[:32])
            found[task.config.task] = digests[1]
            differing |= {task.config.task} if digests[0] != digests[1] else set()
        assert found == expected
        # What has changed since: these, and the scores of TruthfulQA.
        assert differing == {"race", "crows_pairs_english", "mmlu_anatomy", "mmlu_us_foreign_policy"}

    def test_paper_mode_scores_truthfulqa_as_it_was(self):
        doc = {"mc2_targets": {"labels": [1, 1, 0, 1, 0]}}
        masses = [0.1, 0.2, 0.3, 0.05, 0.35]
        results = [(math.log(mass), False) for mass in masses]
        assert paper_tasks.score_truthfulqa(doc, results)["acc"] == pytest.approx(0.3)
        from lm_eval.tasks.truthfulqa.utils import process_results_mc2

        assert process_results_mc2(doc, results)["acc"] == pytest.approx(0.35)

    def test_a_suite_runs_offline_and_names_what_is_missing(self, sets, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        folder = tmp_path / "sets"
        for name in ("EleutherAI", "truthfulqa", "jannalu"):
            folder.mkdir(exist_ok=True)
            (folder / name).symlink_to(sets / name)
        names = ("race", "truthfulqa_mc2", "crows_pairs_english", "piqa")
        found = {}
        for mode in ("paper", "current"):
            options = EvaluateOptions(suite="llm360", tasks=names, data=str(folder), limit=1, mode=mode)
            found[mode] = evaluate("tiny", options, progress=False)
        paper, current = found["paper"], found["current"]
        assert list(paper.tasks) == ["race", "truthfulqa_mc2", "crows_pairs_english"]
        assert "neither in" in paper.missing["piqa"]
        assert [task.version for task in paper.tasks.values()] == ["2.0", "2.0", "1.0"]
        assert [task.version for task in current.tasks.values()] == ["3.0", "3.0", "1.0"]
        assert [task.num_fewshot for task in paper.tasks.values()] == [0, 0, 25]
        assert paper.tasks["race"].prompts != current.tasks["race"].prompts
        assert paper.tasks["truthfulqa_mc2"].metrics != current.tasks["truthfulqa_mc2"].metrics
        assert paper.tasks["crows_pairs_english"].scores["pct_stereotype"] != []

    def test_lm_eval_needs_no_pytorch_and_licenses_are_named(self, sets):
        words = ["evaluate", "--tasks", "race", "--limit", "1", "--data", str(sets)]
        code = (
            "import sys\nfrom mlx_openelm.cli.main import main\n"
            f"try:\n    main({words})\nfinally:\n    print(*sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not {"torch", "transformers"} & set(done.stdout.split("\n")[-2].split())
        assert "The data set of race is for research that is not commercial." in done.stderr

    def test_a_group_has_its_parts(self, sets, tmp_path, monkeypatch):
        import lm_eval.tasks

        folder = tmp_path / "tasks"
        folder.mkdir()
        for subject in ("anatomy", "virology"):
            (folder / f"{subject}.yaml").write_text(
                f"task: my_{subject}\ndataset_path: cais/mmlu\ndataset_name: {subject}\noutput_type: multiple_choice\n"
                'test_split: test\nfewshot_split: dev\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
                'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc\n'
            )
        (folder / "few.yaml").write_text(
            "group: few\ntask: [my_anatomy, my_virology]\n"
            "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
        )
        options = EvaluateOptions(tasks=("few",), include_path=str(folder), data=str(sets), num_fewshot=2, limit=2)
        result = evaluate("tiny", options, progress=False)
        assert set(result.tasks) == {"few", "my_anatomy", "my_virology"}
        parts = [result.results[f"my_{name}"]["acc"] for name in ("anatomy", "virology")]
        assert result.results["few"]["acc"] == pytest.approx(sum(parts) / 2)
        assert result.tasks["my_anatomy"].num_fewshot == result.tasks["few"].num_fewshot == 2
        assert result.tasks["few"].questions == 4
        assert [row.task for row in compare.rows(result)] == ["few"]
        chosen = EvaluateOptions(
            tasks=("few",), include_path=str(folder), data=str(sets), samples='{"few": [0, 1], "my_virology": [1]}'
        )
        result = evaluate("tiny", chosen, progress=False)
        assert [result.tasks[name].questions for name in ("my_anatomy", "my_virology", "few")] == [2, 1, 3]
        for values, message in (
            ({"samples": '{"my_physics": [0]}'}, "samples names 'my_physics', which is not among the tasks"),
            ({"samples": '{"my_anatomy": [999]}'}, "asks for question 999 of my_anatomy, which has"),
            (
                {"tasks": ("my_anatomy,my_virology",), "samples": '{"my_virology": [999]}'},
                "asks for question 999 of my_virology, which has",
            ),
            ({"num_fewshot": 99}, "few: The task has 5 examples for its prompts, and 99 are wanted"),
        ):
            wrong = dataclasses.replace(options, limit=None, **{"samples": None, "num_fewshot": None, **values})
            with pytest.raises(OpenELMError, match=message):
                evaluate("tiny", wrong, progress=lambda *shown: pytest.fail("a task began"))
        (folder / "more.yaml").write_text("group: more\ntask:\n  - task: my_anatomy\n    num_fewshot: 1\n")
        # lm-eval's own tasks, which a pattern may match too, take seconds to read.
        every = lm_eval.tasks.TaskManager
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: every(**{**given, "include_defaults": False}))
        found = evaluate("tiny", dataclasses.replace(options, tasks=("my_*",), limit=1), progress=False)
        assert list(found.tasks) == ["my_anatomy", "my_virology"]
        for unknown in ("your_*", "Q" * 5000):
            with pytest.raises(RequestError, match=f"There is no task '{re.escape(unknown[:50])}"):
                evaluate("tiny", dataclasses.replace(options, tasks=(unknown,)))
        twice = dataclasses.replace(options, tasks=("my_anatomy,more",), num_fewshot=None, limit=1)
        with pytest.raises(RequestError, match="more has the task my_anatomy with 1 examples, and another of tasks"):
            evaluate("tiny", twice, progress=False)

    def test_own_tasks_generate_and_write_what_was_asked(self, capsys, tmp_path):
        folder = tmp_path / "tasks"
        folder.mkdir()
        hub_datasets.write(
            tmp_path / "sets/me/sums", "test", [{"q": f"{n} and {n}", "a": str(2 * n)} for n in range(4)]
        )
        hub_datasets.write(tmp_path / "sets/me/sums", "train", [{"q": f"{n} and 1", "a": str(n + 1)} for n in range(9)])
        (folder / "sums.yaml").write_text(
            "task: sums\ndataset_path: me/sums\noutput_type: generate_until\ntraining_split: train\ntest_split: test\n"
            'doc_to_text: "{{q}} is"\ndoc_to_target: "{{a}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 5\n'
            "metric_list:\n  - metric: exact_match\n"
        )
        output = tmp_path / "r.json"
        words = ["--tasks", "sums", "--include-path", folder, "--data", tmp_path / "sets", "--output", output]
        code, out, _ = run(capsys, *words, "--num-shots", 2, "--log-samples", "--gen-kwargs", "max_gen_toks=3")
        assert code == 0 and "exact_match" in out
        records = [json.loads(line) for line in (tmp_path / "r.samples.jsonl").read_text().splitlines()]
        assert len(records) == 4
        prompt, arguments = records[0]["requests"][0]
        assert prompt.count("\n\n") == 2 and prompt.endswith("0 and 0 is")
        assert arguments["max_gen_toks"] == 3 and arguments["until"] == ["\n"]
        assert records[0]["answers"] and records[0]["target"] == "0"
        # As a chat: the examples as turns of their own, or all in one.
        seen = []
        for flags in (["--no-fewshot-as-multiturn"], []):
            words[-1] = tmp_path / f"chat{len(flags)}.json"
            code, _, _ = run(capsys, *words, "--num-fewshot", 2, "--log-samples", "--chat-template", "corenet", *flags)
            line = (tmp_path / f"chat{len(flags)}.samples.jsonl").read_text().splitlines()[0]
            seen.append(json.loads(line)["requests"][0][0])
        assert all(text.startswith("<s><|user|>\n") and text.endswith("<|assistant|>\n") for text in seen)
        assert [text.count("<|user|>") for text in seen] == [1, 3]

    @pytest.mark.slow  # lm-eval reads all of its tasks
    def test_names_that_lm_eval_does_not_have(self, capsys):
        code, _, err = run(capsys, "--tasks", "arc_chalenge")
        assert code == 2
        assert err.startswith("error: There is no task 'arc_chalenge' in lm-eval (did you mean arc_challenge")

    @pytest.mark.slow  # lm-eval reads all of its tasks
    def test_lm_evals_own_command_knows_the_model(self, sets, tmp_path):
        task = tmp_path / "tasks/own.yaml"
        task.parent.mkdir()
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"q": "To be", "a": " or not"}\n{"q": "Who", "a": " goes"}\n')
        task.write_text(
            f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n"
            'output_type: loglikelihood\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
            "metric_list:\n  - metric: perplexity\n"
        )
        command = [sys.executable, "-m", "mlx_openelm.harness", "--model", "openelm", "--model_args", "pretrained=tiny"]
        command += ["--include_path", str(task.parent), "--tasks", "own", "--output_path", str(tmp_path / "out")]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "own" in done.stdout and "perplexity" in done.stdout
        command[5] = "pretrained=nowhere"
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 2 and "\nerror: There is no model named 'nowhere'" in f"\n{done.stderr}"
