"""The prompts of a benchmark, always the same."""

from __future__ import annotations

import itertools
import random

from ...evaluation.windows import load_documents
from ...quantization.text import BUNDLED
from ...text.tokenizer import Tokenizer


def random_prompts(length: int, rows: int, vocab_size: int) -> list[list[int]]:
    """Random token ids for each row."""
    return [random.Random(f"{length} {row}").choices(range(vocab_size), k=length) for row in range(rows)]


def text_prompts(length: int, rows: int, tokenizer: Tokenizer) -> list[list[int]]:
    """A part of the packaged calibration text for each row, after BOS."""
    documents = itertools.cycle(load_documents(BUNDLED))
    ids: list[int] = []
    while len(ids) < rows * length:
        ids += tokenizer.encode(next(documents), add_bos=False)
    return [[tokenizer.bos_token_id, *ids[row * length :]][:length] for row in range(rows)]
