"""CoreNet's tasks on real questions, against plain forward passes: no cache, no batch, and no code of the harness."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_openelm import load
from mlx_openelm.errors import RequestError
from mlx_openelm.harness import commonsense
from mlx_openelm.harness.commonsense import choices_of, find_task, questions
from mlx_openelm.harness.evaluating import evaluate
from mlx_openelm.harness.options import EvaluateOptions
from mlx_openelm.hub import catalog

import hub_datasets
import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
DATA = FIXTURES / "evaluation/commonsense"


# So many of each task are compared.
QUESTIONS = 6


def plain_scores(model, tokenizer, task: str) -> tuple[list[float], list[float]]:
    """CoreNet's accuracies of each question, written out after its main_eval_llmadapters.py."""
    accuracies: tuple[list[float], list[float]] = [], []
    for record in json.loads((DATA / task / "test.json").read_text())[:QUESTIONS]:
        task_line = "Below is an instruction that describes a task."
        lines = [
            f"{task_line} Write a response that appropriately completes the request.  ",
            "",
            "                ### Instruction:",
            f"                {record['instruction']}",
            "                ",
            "                ### Response:",
            "                ",
        ]
        prompt = "\n".join(lines)
        word, count = ("option", 2) if task == "winogrande" else ("answer", 4)
        if record["instruction"].endswith("answer3") or record["instruction"].endswith("answer5"):
            count = int(record["instruction"][-1])
        sums = []
        for number in range(1, count + 1):
            # lm-eval: the boundary is after the context without its white space.
            before = tokenizer.encode(prompt.rstrip())
            ids = tokenizer.encode(f"{prompt}the correct answer is {word}{number}")
            logits = np.array(model(mx.array([ids]))[0], dtype=np.float64)
            logits -= logits.max(-1, keepdims=True)
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums.append(sum(logprobs[place - 1, ids[place]] for place in range(len(before), len(ids))))
        lengths = [len(f"the correct answer is {word}{number}") for number in range(1, count + 1)]
        right = int(record["answer"][-1]) - 1
        accuracies[0].append(float(np.argmax(sums) == right))
        accuracies[1].append(float(np.argmax(np.array(sums) / lengths) == right))
    return accuracies


@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.slow), str(FIXTURES / "shakespeare-hf")])
@pytest.mark.parametrize("task", [pytest.param("ARC-Challenge", marks=pytest.mark.slow), "openbookqa", "winogrande"])
def test_accuracies_equal_plain_forward_passes(task, name):
    options = EvaluateOptions(suite="commonsense", tasks=(task,), data=str(DATA), limit=QUESTIONS)
    result = evaluate(name, options, progress=False)
    model, tokenizer = load(name, exact_activations=True)
    acc, acc_norm = plain_scores(model, tokenizer, task)
    found = result.tasks[task]
    assert (found.scores["acc"], found.scores["acc_norm"]) == (acc, acc_norm)
    assert found.metrics == pytest.approx(
        {
            "acc": np.mean(acc),
            "acc_stderr": np.std(acc, ddof=1) / len(acc) ** 0.5,
            "acc_norm": np.mean(acc_norm),
            "acc_norm_stderr": np.std(acc_norm, ddof=1) / len(acc) ** 0.5,
        }
    )
    assert found.questions == len(acc) == QUESTIONS


def test_the_choices_are_those_of_the_last_line():
    assert choices_of("Answer format: true/false") == ["true", "false"]
    assert choices_of("a\n\nOption1: b Option2: c Answer format: option1/option2") == ["option1", "option2"]
    assert choices_of("a\nAnswer format: ending1/ending2/ending3/ending4")[-1] == "ending4"
    assert choices_of("Answer format: answer1/answer2\nno more") == []


def test_equal_choices_count_as_in_corenet_the_first_one():
    class Equal:
        def log_likelihoods(self, pairs):
            return [(-1.0, False) for _ in pairs]

    asked = questions(find_task("openbookqa"), DATA)
    scores, records = commonsense.score(asked, [1, 0], Equal())
    assert scores["acc"] == [float(asked[1].answer == 0), float(asked[0].answer == 0)]
    assert [record["question"] for record in records] == [1, 0]


# As LLM-Adapters wrote the first question of each data set, from the records that the hub has.
FROM_THE_HUB = {
    "boolq": (
        {"question": "does ethanol take more energy make that produces", "answer": False},
        "Please answer the following question with true or false, question: does ethanol take more energy make that "
        "produces?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "dresser", "sol1": "replace drawer with bobby pin ", "sol2": "finish, woodgrain with  bobby pin ",
         "label": 1},
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer with bobby pin \n\n"
        "Solution2: finish, woodgrain with  bobby pin \n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "social_i_qa": (
        {"context": "Tracy didn't go home that evening and resisted Riley's attacks.",
         "question": "What does Tracy need to do before this?", "answerA": "make a new plan",
         "answerB": "Go home and see Riley", "answerC": "Find somewhere to go", "label": "3"},
        "Please choose the correct answer to the question: Tracy didn't go home that evening and resisted Riley's "
        "attacks. What does Tracy need to do before this?\n\nAnswer1: make a new plan Answer2: Go home and see Riley "
        "Answer3: Find somewhere to go\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "winogrande": (
        {"sentence": "Sarah was a much better surgeon than Maria so _ always got the easier cases.",
         "option1": "Sarah", "option2": "Maria", "answer": "2"},
        json.loads((DATA / "winogrande/test.json").read_text())[0]["instruction"],
        "option2",
    ),
    "openbookqa": (
        {"question_stem": "There is most likely going to be fog around:", "answerKey": "A",
         "choices": {"text": ["a marsh", "a tundra", "the plains", "a desert"], "label": ["A", "B", "C", "D"]}},
        json.loads((DATA / "openbookqa/test.json").read_text())[1]["instruction"],
        "answer1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", FROM_THE_HUB)
def test_records_of_the_hub_become_llm_adapters_instructions(task, tmp_path):
    row, instruction, answer = FROM_THE_HUB[task]
    found = find_task(task)
    folder = tmp_path / found.dataset / (found.config or "data")
    hub_datasets.write(folder, found.split, [row])
    [question] = questions(found, tmp_path)
    assert question.instruction == instruction
    assert question.choices[question.answer] == f"the correct answer is {answer}"


@pytest.mark.parametrize(
    ("task", "key", "value", "answer"),
    [
        *(("boolq", "answer", value, 0) for value in (True, 1, "True", "true", "1")),
        *(("boolq", "answer", value, 1) for value in (False, 0, "False", "false", "0")),
        ("piqa", "label", "0", 0),
        ("social_i_qa", "label", 1, 0),
        ("social_i_qa", "label", "2\n", 1),
        ("winogrande", "answer", 1, 0),
    ],
)
def test_labels_may_be_text_as_in_csv(task, key, value, answer):
    row = {**FROM_THE_HUB[task][0], key: value}
    assert find_task(task).instruction(row)[1] == answer


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("boolq", {"answer": -1}, "`answer` is -1, not true or false"),
        ("boolq", {"answer": ""}, "`answer` is '', not true or false"),
        ("boolq", {"question": None}, "`question` is null, not text"),
        ("piqa", {"label": -1}, "`label` is -1, not a number from 0 to 1"),
        ("social_i_qa", {"label": 0}, "`label` is 0, not a number from 1 to 3"),
        ("winogrande", {"answer": ""}, "`answer` is '', not a number from 1 to 2"),
        ("openbookqa", {"choices": "{'text': ['a marsh']}"}, "`choices` is a string, not an object; CSV has none"),
        ("openbookqa", {"answerKey": ""}, "`answerKey` is '', not one of A, B, C, D"),
    ],
)
def test_records_without_a_known_answer_are_refused(task, changed, message, tmp_path):
    found = find_task(task)
    row = FROM_THE_HUB[task][0] | changed
    hub_datasets.write(tmp_path / found.dataset / (found.config or "data"), found.split, [row])
    with pytest.raises(RequestError, match=message):
        questions(found, tmp_path)


def test_csv_has_no_lists(tmp_path):
    folder = tmp_path / "Rowan/hellaswag"
    folder.mkdir(parents=True)
    (folder / "validation.csv").write_text("activity_label,ctx,endings,label\nCook,A man,\"['eats', 'runs']\",0\n")
    with pytest.raises(RequestError, match="`endings` is a string, not a list of texts; CSV has none, give .jsonl"):
        questions(find_task("hellaswag"), tmp_path)


def test_all_eight_tasks_run_from_a_folder_in_the_hubs_layout(tmp_path):
    hub_datasets.make(tmp_path, mmlu=False)
    result = evaluate("tiny", EvaluateOptions(suite="commonsense", data=str(tmp_path), limit=1), progress=False)
    assert list(result.results) == [task.name for task in commonsense.TASKS]
    assert result.missing == {}


def test_bad_records_and_names_are_refused(tmp_path):
    folder = tmp_path / "openbookqa"
    for record, message in (
        ({"instruction": "a", "answer": "answer1"}, "record 1, has the answer 'answer1'"),
        ({"answer": "answer1"}, "record 1, needs the texts"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "test.json").write_text(json.dumps([record]))
        with pytest.raises(RequestError, match=message):
            questions(find_task("obqa"), tmp_path)
    for text in ("[]", ""):
        (folder / "test.json").write_text(text)
        with pytest.raises(RequestError, match="openbookqa/test.json has no questions"):
            questions(find_task("obqa"), tmp_path)
    hub_datasets.write(tmp_path / "baber/piqa", "validation", [{"goal": "a"}])
    with pytest.raises(RequestError, match="record 1, is not one of baber/piqa: no 'sol1'"):
        questions(find_task("piqa"), tmp_path)
    with pytest.raises(RequestError, match="has no task 'gsm8k'; it has boolq, piqa"):
        find_task("gsm8k")
    assert find_task("arc_challenge") is find_task("ARC-Challenge")


def test_the_published_tables_are_consistent():
    """The paper gives the average of each line; the line of LoRA for 270M is in CoreNet's README too."""
    scores = catalog.published_scores()
    tables = scores["peft_commonsense"]
    assert list(tables) == ["270M", "450M", "1.1B", "3B"]
    for table in (table for size in tables.values() for table in size.values()):
        tasks = [value for name, value in table.items() if name != "average"]
        assert len(tasks) == 8
        assert np.mean(tasks) == pytest.approx(table["average"], abs=0.0051)
    assert scores["peft_270M_lora_expected"].items() <= tables["270M"]["LoRA"].items()
    assert {task.published for task in commonsense.TASKS} == tables["3B"]["DoRA"].keys() - {"average"}
