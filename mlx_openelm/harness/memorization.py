"""How much of its training text a model continues word for word, against text that it has not seen.

After the definition of Carlini et al. (arXiv:2202.07646): a passage is memorized if greedy decoding continues it
verbatim. No text needs to be generated for that: a continuation is greedy if each of its tokens is the likeliest one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import RequestError
from ..evaluation.windows import load_documents
from .scorer import Scorer

PROMPT_WORDS, NEXT_WORDS = 50, 15
# The tasks, with the names that a folder has for their files.
SPLITS = {"train": ("train",), "held_out": ("held_out", "valid", "validation", "test")}
_SUFFIXES = (".jsonl", ".txt", ".parquet")
_MOST = 1000  # passages by default
_WORD = re.compile(r"\S+\s*")


def passages(folder: Path | None, task: str) -> list[tuple[str, str]]:
    """The beginnings of passages with what follows them, from a folder with `train` and `held_out` (or `valid`).

    Passages follow each other in a document and do not overlap; what is left at its end is not used.

    Raises:
        RequestError: there is no such file, or no passage in it.
    """
    if folder is None:
        raise RequestError("--suite memorization needs --data: a folder with train.jsonl and held_out.jsonl.")
    files = (folder / f"{name}{suffix}" for name in SPLITS[task] for suffix in _SUFFIXES)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise RequestError(f"{folder} has no {task}.jsonl, {task}.txt or {task}.parquet.")
    found = []
    for document in load_documents(file):
        words = _WORD.findall(document.lstrip())
        for start in range(0, len(words) - PROMPT_WORDS - NEXT_WORDS + 1, PROMPT_WORDS + NEXT_WORDS):
            middle, end = start + PROMPT_WORDS, start + PROMPT_WORDS + NEXT_WORDS
            found.append(("".join(words[start:middle]), "".join(words[middle:end]).rstrip()))
    if not found:
        raise RequestError(f"{file} has no passage of {PROMPT_WORDS + NEXT_WORDS} words.")
    return found


def spread(count: int, limit: int | None) -> list[int]:
    """The numbers of the passages to ask: all, or `limit` of them from everywhere."""
    most = min(count, _MOST if limit is None else limit)
    return [number * count // most for number in range(most)]


def score(
    asked: Sequence[tuple[str, str]], numbers: Sequence[int], scorer: Scorer
) -> tuple[dict[str, list[float]], list[dict[str, object]]]:
    """For each passage whether it is continued verbatim, and its log-likelihood in nats per character."""
    found = scorer.log_likelihoods([asked[number] for number in numbers])
    scores: dict[str, list[float]] = {"verbatim": [], "nats_per_character": []}
    records = []
    for number, (logprob, is_greedy) in zip(numbers, found, strict=True):
        prompt, continuation = asked[number]
        scores["verbatim"].append(float(is_greedy))
        scores["nats_per_character"].append(-logprob / len(continuation))
        records.append({"question": number, "requests": [(prompt, continuation)], "answers": [logprob],
                        "verbatim": float(is_greedy)})  # fmt: skip
    return scores, records
