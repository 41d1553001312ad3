"""Verbatim continuations, against greedy decoding itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mlx_openelm import batch_generate, load
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.harness import memorization
from mlx_openelm.harness.evaluating import evaluate
from mlx_openelm.harness.options import EvaluateOptions

import pytest


def write(folder: Path, name: str, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))


def test_what_greedy_decoding_continues_counts_as_memorized(tmp_path):
    """`tiny`'s own continuations of prompts are its memory; the same prompts with other words are not."""
    model, tokenizer = load("tiny", exact_activations=True)
    lines = (Path(__file__).parent / "fixtures/valid.jsonl").read_text().splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    known, other = [], []
    prompts = [" ".join(words[number * 60 : number * 60 + memorization.PROMPT_WORDS]) for number in range(5)]
    for prompt, found in zip(prompts, batch_generate(model, tokenizer, prompts, max_tokens=80), strict=True):
        ids = [*tokenizer.encode(prompt), *found.tokens]
        count = memorization.PROMPT_WORDS + memorization.NEXT_WORDS
        continued = re.match(rf"(\s*\S+){{{count}}}", prompt + found.text)
        # A model may write a word in other tokens than those that encode it.
        if continued is not None and tokenizer.encode(continued[0]) == ids[: len(tokenizer.encode(continued[0]))]:
            known.append(continued[0])
        other.append(f"{prompt} {' '.join(['unlikely'] * memorization.NEXT_WORDS)}")
    assert known
    write(tmp_path, "train", known)
    write(tmp_path, "valid", other)
    result = evaluate("tiny", EvaluateOptions(suite="memorization", data=str(tmp_path)), progress=False)
    assert result.results["train"]["verbatim"] == 1
    assert result.results["held_out"]["verbatim"] == 0
    assert result.results["train"]["nats_per_character"] < result.results["held_out"]["nats_per_character"]


def test_passages_follow_each_other_and_keep_their_white_space(tmp_path):
    count = memorization.PROMPT_WORDS + memorization.NEXT_WORDS
    text = "  " + "\n".join(f"word{number}" for number in range(2 * count + 5))
    write(tmp_path, "train", [text, "too short"])
    found = memorization.passages(tmp_path, "train")
    assert len(found) == 2
    assert found[0][0].startswith("word0\nword1\n") and found[0][0].endswith(f"word{memorization.PROMPT_WORDS - 1}\n")
    assert "".join(found[0]) + "\n" + "".join(found[1]) == "\n".join(f"word{number}" for number in range(2 * count))
    assert memorization.spread(10, 4) == [0, 2, 5, 7]
    assert memorization.spread(3, None) == [0, 1, 2]


def test_missing_texts_are_named(tmp_path):
    with pytest.raises(RequestError, match="needs data: a folder with train.jsonl"):
        memorization.passages(None, "train")
    with pytest.raises(RequestError, match="has no held_out.jsonl"):
        memorization.passages(tmp_path, "held_out")
    write(tmp_path, "train", ["short"])
    with pytest.raises(RequestError, match="no passage of 65 words"):
        memorization.passages(tmp_path, "train")
    with pytest.raises(OpenELMError, match="No task could run: train: "):
        evaluate("tiny", EvaluateOptions(suite="memorization", data=str(tmp_path)), progress=False)
