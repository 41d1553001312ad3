"""Log-probabilities as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..generation.piece import Piece
from ..text.tokenizer import Tokenizer
from .protocol import finite


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """A token's text and bytes; bytes that are not text are written as `bytes:\\xe2\\x80`."""
    data = tokenizer.token_bytes(token)
    if data is None:
        return tokenizer.id_to_token(token) or "", None
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def shown(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces whose tokens are part of the text: all but the one that ends it."""
    return [piece for piece in pieces if piece.token not in tokenizer.eos_token_ids]


def chat_logprobs(tokenizer: Tokenizer, pieces: Iterable[Piece], top: int) -> list[dict[str, Any]]:
    """The `content` of a chat's logprobs: for each token its own and those of the `top` likeliest."""
    return [
        {
            **_one(tokenizer, piece.token, piece.logprob),
            "top_logprobs": [_one(tokenizer, token, logprob) for token, logprob in piece.top_logprobs[:top]],
        }
        for piece in shown(tokenizer, pieces)
    ]


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    name, data = token_text(tokenizer, token)
    return {"token": name, "logprob": finite(logprob), "bytes": data}


# Of each token: its id, its log-probability, the likeliest tokens with theirs, and its text's place.
Place = tuple[int, float | None, Sequence[tuple[int, float]], int]


def completion_logprobs(tokenizer: Tokenizer, places: Sequence[Place], top: int) -> dict[str, Any]:
    """The logprobs of a completion."""
    return {
        "tokens": [token_text(tokenizer, token)[0] for token, *_ in places],
        "token_logprobs": [None if logprob is None else finite(logprob) for _, logprob, *_ in places],
        "top_logprobs": [
            None if logprob is None else _by_text(tokenizer, likeliest[:top]) for _, logprob, likeliest, _ in places
        ]
        if top
        else None,
        "text_offset": [offset for *_, offset in places],
    }


def _by_text(tokenizer: Tokenizer, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in likeliest:
        found.setdefault(token_text(tokenizer, token)[0], finite(logprob))
    return found
