"""The tasks as Apple ran them, with lm-eval's commit dc90fec of March 2024, where they have changed since.

- RACE (version 2): a solved question that ends in a blank is only that blank and the answer.
- TruthfulQA MC2 (version 2): the first answers, up to the first wrong one, count as the right ones.
- MMLU (version 0): one line break after the description, not two; the templates lost theirs.
- Examples in front of a question are drawn without leaving out the question first, one more than needed where the task
  names no test split; the question itself is left out afterwards, so that there may be one example less.

ARC, BoolQ, CrowS-Pairs, HellaSwag, PIQA, SciQ and WinoGrande ask what they asked then.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from random import Random
from typing import Any

VERSIONS = {"race": "2.0", "truthfulqa_mc2": "2.0", "mmlu": "0.0"}
_BLANK = "  _  ."


def adapt(task: Any) -> None:
    """Make a task of lm-eval ask and score as it did then."""
    name = task.config.task
    if name == "race":
        task.config.doc_to_text = race_prompt
    elif name == "truthfulqa_mc2":
        task.config.process_results = score_truthfulqa
    if task.config.description:
        task.config.description = task.config.description.removesuffix("\n")
    group = "mmlu" if name.startswith("mmlu_") else name
    if group in VERSIONS:
        task.VERSION = VERSIONS[group]
    if getattr(task.config.fewshot_config, "sampler", None) == "first_n" or not task.config.num_fewshot:
        return
    # Then, the split of examples was named only where a task's file named it.
    extra = task.config.fewshot_split == task.config.test_split
    task.sampler = _Sampler(list(task.fewshot_docs()), extra)
    render = task.fewshot_context

    def context(doc: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        task.sampler.asked = doc
        return render(doc, *args, **kwargs)

    task.fewshot_context = context


class _Sampler:
    """Draws examples as lm-eval did then."""

    def __init__(self, docs: Sequence[dict[str, Any]], extra: bool):
        self._docs, self._extra = docs, extra
        self.asked: dict[str, Any] = {}
        self.set_rnd(1234)

    def set_rnd(self, seed: int | None) -> _Sampler:
        self._rng = Random(seed)
        return self

    def sample(self, n: int, **_: Any) -> list[dict[str, Any]]:
        drawn = self._rng.sample(self._docs, n + self._extra)
        return [doc for doc in drawn if doc != self.asked][:n]


def race_prompt(doc: dict[str, Any]) -> str:
    """The prompt of RACE: the article, the solved questions, and the last one."""
    *solved, last = ast.literal_eval(doc["problems"])
    text = f"Article: {doc['article']}\n\n"
    for problem in solved:
        question, answer = problem["question"], problem["options"]["ABCD".index(problem["answer"])]
        # The mistake: what should be everything but the blank.
        text += (
            f"{question[-5:]}{answer}\n" if question.endswith(_BLANK) else f"Question: {question}\nAnswer: {answer}\n"
        )
    return text + last["question"]


def score_truthfulqa(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The share of probability on the answers in front of the first wrong one."""
    end = list(doc["mc2_targets"]["labels"]).index(0)
    masses = [math.exp(logprob) for logprob, _ in results]
    return {"acc": math.fsum(masses[:end]) / math.fsum(masses)}
