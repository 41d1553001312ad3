"""The eight tasks of CommonSense170k (LLM-Adapters, arXiv:2304.01933), asked and scored as CoreNet does it.

From corenet/cli/main_eval_llmadapters.py: the prompt is the one of fine-tuning without a response, the choices are
`the correct answer is answer1` and so on, as many as the last line of the instruction says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, RequestError, quote
from ..inputs import kind_of
from ..text.instructions import instruction_prompt
from . import data
from .scorer import Scorer

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question with its choices, the number of the right one, and its instruction."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    instruction: str


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        name: CoreNet's name, which is LLM-Adapters' folder.
        published: its name in the published tables.
        dataset, config, split: the data set on the hub, where it is made from.
        instruction: writes the instruction and the answer's number, from 0, for a record of the hub.
        others: further names that are understood.
    """

    name: str
    published: str
    dataset: str
    config: str | None
    split: str
    instruction: Callable[[Row], tuple[str, int]]
    others: tuple[str, ...] = ()


def _listed(word: str, texts: Sequence[str], separator: str = " ") -> str:
    return separator.join(f"{word}{number}: {text}" for number, text in enumerate(texts, 1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{number}" for number in range(1, count + 1))


def _choose(question: str, texts: Sequence[str]) -> str:
    return (
        f"Please choose the correct answer to the question: {question}\n\n{_listed('Answer', texts)}\n\n"
        f"{_format('answer', len(texts))}"
    )


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is {kind_of(value)}, not text")
    return value


def _texts(values: Row, key: str) -> list[str]:
    """A list of texts of a record, which CSV does not have."""
    found = values[key]
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"`{key}` is {kind_of(found)}, not a list of texts; CSV has none, give .jsonl or .parquet")
    return found


def _number(row: Row, key: str, first: int, last: int) -> int:
    """A label from `first` to `last`, as a number or its text; test sets without answers have others."""
    value = row[key].strip() if isinstance(row[key], str) else row[key]
    known = [kind(number) for number in range(first, last + 1) for kind in (int, str)]
    if value not in known:
        raise ValueError(f"`{key}` is {quote(value)}, not a number from {first} to {last}")
    return int(value)


def _truth(row: Row, key: str) -> bool:
    """A label that is true or false, or 1 or 0; CSV has them as text."""
    word = str(row[key]).strip().lower()
    if word not in ("true", "1", "false", "0"):
        raise ValueError(f"`{key}` is {quote(row[key])}, not true or false")
    return word in ("true", "1")


def _boolq(row: Row) -> tuple[str, int]:
    is_true = _truth(row, "answer" if "answer" in row else "label")
    text = f"Please answer the following question with true or false, question: {_text(row, 'question')}?"
    return f"{text}\n\nAnswer format: true/false", 0 if is_true else 1


def _piqa(row: Row) -> tuple[str, int]:
    solutions = _listed("Solution", (_text(row, "sol1"), _text(row, "sol2")), "\n\n")
    text = f"Please choose the correct solution to the question: {_text(row, 'goal')}\n\n{solutions}"
    return f"{text}\n\n{_format('solution', 2)}", _number(row, "label", 0, 1)


def _social(row: Row) -> tuple[str, int]:
    texts = [_text(row, f"answer{letter}") for letter in "ABC"]
    question = f"{_text(row, 'context')} {_text(row, 'question')}"
    return _choose(question, texts), _number(row, "label", 1, 3) - 1


def _hellaswag(row: Row) -> tuple[str, int]:
    endings = _texts(row, "endings")
    sentence = f"{_text(row, 'activity_label')}: {_text(row, 'ctx')}"
    text = f"Please choose the correct ending to complete the given sentence: {sentence}"
    text += f"\n\n{_listed('Ending', endings)}\n\n{_format('ending', len(endings))}"
    return text, _number(row, "label", 0, len(endings) - 1)


def _winogrande(row: Row) -> tuple[str, int]:
    options = _listed("Option", (_text(row, "option1"), _text(row, "option2")))
    sentence = _text(row, "sentence")
    text = f"Please choose the correct answer to fill in the blank to complete the given sentence: {sentence}"
    return f"{text}\n\n{options} {_format('option', 2)}", _number(row, "answer", 1, 2) - 1


def _exam(row: Row) -> tuple[str, int]:
    """ARC, and OpenBookQA, whose question has another name."""
    question = row.get("question_stem") or _text(row, "question")
    choices = row["choices"]
    if not isinstance(choices, dict):
        raise ValueError(f"`choices` is {kind_of(choices)}, not an object; CSV has none, give .jsonl or .parquet")
    labels = _texts(choices, "label")
    if row["answerKey"] not in labels:
        raise ValueError(f"`answerKey` is {quote(row['answerKey'])}, not one of {', '.join(map(str, labels))}")
    return _choose(question, _texts(choices, "text")), labels.index(row["answerKey"])


TASKS = (
    Task("boolq", "boolq", "google/boolq", None, "validation", _boolq),
    Task("piqa", "piqa", "baber/piqa", None, "validation", _piqa),
    Task("social_i_qa", "siqa", "allenai/social_i_qa", None, "validation", _social, ("siqa", "social_iqa")),
    Task("hellaswag", "hellaswag", "Rowan/hellaswag", None, "validation", _hellaswag),
    Task("winogrande", "winogrande", "allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    Task("ARC-Easy", "arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", _exam, ("arc_easy",)),
    Task("ARC-Challenge", "arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", _exam, ("arc_challenge",)),
    Task("openbookqa", "obqa", "allenai/openbookqa", "main", "test", _exam, ("obqa",)),
)
_WORDS = ("answer", "ending", "option", "solution")


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        RequestError: there is none.
    """
    for task in TASKS:
        if name.lower() in {known.lower() for known in (task.name, *task.others)}:
            return task
    raise RequestError(f"The suite commonsense has no task {name!r}; it has {', '.join(task.name for task in TASKS)}.")


def questions(task: Task, folder: Path | None) -> list[Question]:
    """The questions of a task, from `folder` (FOLDER/openbookqa/test.json, or as on the hub), else from the hub.

    Raises:
        RequestError: there is no data, or a record is not understood; the message names it.
        OpenELMError: a download that failed.
    """
    absent = ""
    if folder is not None:
        own = folder / task.name / "test.json"
        if own.is_file():
            rows = enumerate(data.read_rows([own]), 1)
            return _some([_question(row, f"{own}, record {number}") for number, row in rows], own)
        root = data.find(folder, task.dataset)
        files = {} if root is None else data.split_files(root, task.config)
        if task.split in files:
            return _from_hub(task, files[task.split])
        absent = f"{folder} has no {own.relative_to(folder)} and no {task.dataset} with the split {task.split}. "
    try:
        return _from_hub(task, data.download_split(task.dataset, task.config, task.split))
    except OpenELMError as error:
        raise type(error)(f"{absent}{error}") from None


def _from_hub(task: Task, files: Sequence[Path]) -> list[Question]:
    found = []
    for number, row in enumerate(data.read_rows(files), 1):
        try:
            instruction, answer = task.instruction(row)
        except KeyError as error:
            raise RequestError(f"{files[0]}, record {number}, is not one of {task.dataset}: no {error}.") from None
        except ValueError as error:
            raise RequestError(f"{files[0]}, record {number}, is not one of {task.dataset}: {error}.") from None
        found.append(_ask(instruction, choices_of(instruction), answer))
    return _some(found, files[0])


def _some(found: list[Question], file: Path) -> list[Question]:
    if not found:
        raise RequestError(f"{file} has no questions.")
    return found


def _question(row: Row, place: str) -> Question:
    """The question of a record in LLM-Adapters' layout."""
    instruction, answer = row.get("instruction"), row.get("answer")
    if not isinstance(instruction, str) or not isinstance(answer, str):
        raise RequestError(f"{place}, needs the texts `instruction` and `answer`.")
    choices = choices_of(instruction)
    if answer not in choices:
        raise RequestError(f"{place}, has the answer {answer!r}, which its instruction does not offer.")
    return _ask(instruction, choices, choices.index(answer))


def _ask(instruction: str, choices: Sequence[str], answer: int) -> Question:
    texts = tuple(f"the correct answer is {choice}" for choice in choices)
    return Question(instruction_prompt(instruction), texts, answer, instruction)


def choices_of(instruction: str) -> list[str]:
    """The answers that the last line of an instruction offers; none if it offers none."""
    last = instruction.rsplit("\n", 1)[-1]
    if re.match(".*Answer format: true/false", last):
        return ["true", "false"]
    for word in _WORDS:
        if re.match(rf".*Answer format: .*{word}\d$", last):
            return [f"{word}{number}" for number in range(1, int(last[-1]) + 1)]
    return []


def score(
    asked: Sequence[Question], numbers: Sequence[int], scorer: Scorer
) -> tuple[dict[str, list[float]], list[Row]]:
    """Ask the questions of these numbers; returns `acc` and `acc_norm` of each, 0 or 1, and what was asked.

    The likeliest choice counts, for `acc_norm` by log-likelihood over the choice's length in characters; of equals the
    first.
    """
    found = iter(scorer.log_likelihoods([(asked[n].prompt, choice) for n in numbers for choice in asked[n].choices]))
    scores: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    records = []
    for number in numbers:
        question = asked[number]
        logprobs = [next(found)[0] for _ in question.choices]
        by_length = [logprob / len(choice) for logprob, choice in zip(logprobs, question.choices, strict=True)]
        right = [float(values.index(max(values)) == question.answer) for values in (logprobs, by_length)]
        scores["acc"].append(right[0])
        scores["acc_norm"].append(right[1])
        records.append(
            {
                "question": number,
                "target": question.answer,
                "requests": [(question.prompt, choice) for choice in question.choices],
                "answers": logprobs,
                "acc": right[0],
                "acc_norm": right[1],
            }
        )
    return scores, records
