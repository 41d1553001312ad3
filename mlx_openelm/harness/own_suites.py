"""The suites that need no lm-eval: CoreNet's tasks, and the probe for memorization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import OpenELMError, RequestError
from . import commonsense, memorization
from .options import EvaluateOptions
from .results import TaskResult, prompts_hash
from .scorer import Scorer
from .suites import wanted

Records = list[dict[str, Any]]
# Called with a task's name when its requests begin.
Began = Callable[[str], object]
# For each task its name, its results or the reason why it cannot run, and its questions.
Runner = Callable[[Scorer, Began], Iterator[tuple[str, dict[str, TaskResult] | str, Records]]]
# A task's questions, the numbers of those to ask, and the function that asks the questions of some numbers.
_Asked = tuple[Sequence[Any], Sequence[int], Callable[[Sequence[int], Scorer], tuple[dict[str, list[float]], Records]]]


def runner(options: EvaluateOptions) -> Runner:
    """The function that runs the tasks of such a suite.

    Raises:
        RequestError: a name that the suite does not have.
    """
    assert options.suite is not None
    names = [task.name for task in wanted(options.suite, options.task_names)]
    chosen = {wanted(options.suite, [name])[0].name: numbers for name, numbers in options.chosen.items()}
    if unknown := chosen.keys() - set(names):
        raise RequestError(f"--samples names {min(unknown)!r}, which is not among the tasks.")
    ask = {"commonsense": _ask_commonsense, "memorization": _ask_memorization}[options.suite]
    return lambda scorer, began: _run(ask, names, chosen, scorer, options, began)


def _ask_commonsense(name: str, options: EvaluateOptions) -> _Asked:
    task = commonsense.find_task(name)
    questions = commonsense.questions(task, options.data_folder)
    return (
        [(question.prompt, question.choices) for question in questions],
        range(len(questions))[: options.limit],
        lambda numbers, scorer: commonsense.score(questions, numbers, scorer),
    )


def _ask_memorization(name: str, options: EvaluateOptions) -> _Asked:
    passages = memorization.passages(options.data_folder, name)
    numbers = memorization.spread(len(passages), options.limit)
    return passages, numbers, lambda numbers, scorer: memorization.score(passages, numbers, scorer)


def _run(
    ask: Callable[[str, EvaluateOptions], _Asked],
    names: Sequence[str],
    chosen: dict[str, list[int]],
    scorer: Scorer,
    options: EvaluateOptions,
    began: Began,
) -> Iterator[tuple[str, dict[str, TaskResult] | str, Records]]:
    for name, wanted_numbers in chosen.items():
        try:
            questions, _, _ = ask(name, options)
        except OpenELMError:  # reported when its turn comes
            continue
        if (last := max(wanted_numbers)) >= len(questions):
            raise RequestError(f"--samples asks for question {last} of {name}, which has {len(questions)}.")
    for name in names:
        try:
            questions, numbers, score = ask(name, options)
        except OpenELMError as error:
            yield name, str(error).rstrip("."), []
            continue
        numbers = chosen.get(name, numbers)
        began(name)
        scores, records = score(numbers, scorer)
        asked = prompts_hash([questions[number] for number in numbers])
        result = TaskResult.of(scores, prompts=asked, data=options.data)
        yield name, {name: result}, [{"task": name, **record} for record in records]
