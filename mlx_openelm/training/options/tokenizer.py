"""The options of training a tokenizer: the fields are the command's flags and the Python arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated

from ...generation.options import check_number
from ...options import Option, Options
from ...wording import flag

_MOST_TOKENS = 1 << 20  # as many as a model may have


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenizerOptions(Options):
    """How to train a tokenizer. The flags of `train-tokenizer`, with the same names and defaults.

    `vocab_size` counts all tokens: the unknown one, BOS, EOS, 256 bytes, and the pieces that are learned. The defaults
    are Llama 2's, but it drew 200 million lines.

    Raises:
        RequestError: a value outside its range.
    """

    vocab_size: Annotated[int, Option("Tokens of the vocabulary, bytes and special ones included.")] = 32000
    character_coverage: Annotated[
        float,
        Option("Share of the text's characters to have as tokens; rarer ones become bytes.", group="Training"),
    ] = 0.99995
    input_sentence_size: Annotated[
        int, Option("Train on this many lines, drawn at random, of a large text; 0 takes all.", group="Data")
    ] = 0
    seed: Annotated[int, Option("Seed for drawing lines: the same seed draws the same ones.", group="Data")] = 0
    text_key: Annotated[str, Option("Key, or column, that holds the text of a document.", group="Data")] = "text"
    skip_damaged: Annotated[
        bool, Option("Leave out documents that cannot be read, instead of stopping.", group="Data")
    ] = False

    def __post_init__(self) -> None:
        check_number("--vocab-size", self.vocab_size, 1, _MOST_TOKENS, f"1 to {_MOST_TOKENS}", kind=Integral)
        check_number("--character-coverage", self.character_coverage, 0.98, 1, "0.98 to 1")
        for name in ("input_sentence_size", "seed"):
            check_number(flag(name), getattr(self, name), 0, math.inf, "0 or more", kind=Integral)
