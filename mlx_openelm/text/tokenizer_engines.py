"""Choosing the engine for a tokenizer's files: the tokenizers package or the sentencepiece package."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
from ..hub import catalog
from . import added_tokens
from .sentencepiece import (
    NORMAL,
    UNUSED,
    SentencePieceEngine,
    SentencePieceModel,
    bpe_merges,
    first_pieces,
    read_model,
    to_spec,
)
from .tokenizer_json import SPACE, TokenizerSpec, read_spec
from .tokenizers_engine import TokenizersEngine

Engine = TokenizersEngine | SentencePieceEngine
# The files that hold a tokenizer, in order of preference.
ENGINES: dict[str, type[Engine]] = {"tokenizer.json": TokenizersEngine, "tokenizer.model": SentencePieceEngine}
# Llama 2's pieces: their number, the SHA-256 of their lines, and the first id after control and byte pieces.
_LLAMA2_SIZE, _LLAMA2_FIRST = 32000, 259
_LLAMA2_PIECES = "0f97b4337921e6e7e9b4620fc73338ee570aecd3c16038bc23870a887e995045"
# The number of pieces that are compared between two files; different vocabularies differ in their first merges.
_COMPARED = 400


def open_engine(
    path: Path,
    config: dict[str, Any],
    named: Iterable[added_tokens.Named],
    *,
    rows: int | None = None,
    beside: bool = False,
) -> Engine:
    """The engine for a tokenizer file.

    Args:
        path: a `tokenizer.json` or a `tokenizer.model`, under any name with that ending.
        config, named: the result of `added_tokens.read`.
        rows: the number of tokens the model can take, as in `added_tokens.resolve`.
        beside: whether to use the `tokenizer.model` beside a `tokenizer.json` if it is a different tokenizer.

    Raises:
        RequestError: a damaged file, a tokenizer of another kind, added tokens that do not fit.
    """
    if path.suffix != ".json":
        return _open_model(path, config, named, rows)
    engine = _open_json(path, named, rows)
    model_file = path.with_name("tokenizer.model")
    if path.name != "tokenizer.json" or not model_file.is_file():
        return engine
    if path.parent == catalog.TINY_FOLDER:  # our own pair of files, which a test compares
        difference = None
    else:
        try:
            difference = _difference(engine, model_file)
        except RequestError:  # a damaged tokenizer.model that is not needed
            return engine
    if difference is None:
        engine.model_file = model_file  # copied when the tokenizer is saved
    if difference is None or not beside:
        return engine
    warnings.warn(
        f"{path} and the tokenizer.model beside it are different tokenizers ({difference}); tokenizer.model is used, "
        "since a tokenizer.json is made from one. Remove the one that is not the model's.",
        stacklevel=3,
    )
    return _open_model(model_file, config, named, rows)


def _open_json(path: Path, named: Iterable[added_tokens.Named], rows: int | None) -> TokenizersEngine:
    """The engine for a `tokenizer.json`, with the tokens that the files beside it name."""
    spec = read_spec(path)
    if spec.merges[:1] == [(SPACE, SPACE)] and len(spec.vocab) == _LLAMA2_SIZE:
        _order_llamas_merges(spec)
    known = {token.content: token for token in spec.added}
    ids = spec.vocab | {token.content: token.id for token in spec.added}
    for token in added_tokens.resolve(named, ids.get, len(ids), rows):
        known[token.content] = token
    spec.added = list(known.values())
    return TokenizersEngine(spec, path)


def _order_llamas_merges(spec: TokenizerSpec) -> None:
    """Rank the merges of Llama 2's pieces as its `tokenizer.model` does: by id, but runs of spaces last.

    transformers 5 ignores the scores and ranks all merges by id, so that text with several spaces in a row would get
    other tokens than the models were trained on. Other vocabularies are left alone.
    """
    pieces = spec.pieces
    if hashlib.sha256("\n".join(pieces).encode()).hexdigest() != _LLAMA2_PIECES:
        return
    scores = [-math.inf if piece.strip(SPACE) == "" else -float(token_id) for token_id, piece in enumerate(pieces)]
    types = [NORMAL if token_id >= _LLAMA2_FIRST else UNUSED for token_id in range(len(pieces))]
    spec.merges = bpe_merges(SentencePieceModel(pieces, scores, types))


def _open_model(path: Path, config: dict[str, Any], named: Iterable[added_tokens.Named], rows: int | None) -> Engine:
    """The engine for a `tokenizer.model`: the tokenizers package if the files beside it add tokens."""
    engine = SentencePieceEngine(path)
    tokens = added_tokens.resolve(named, engine.token_to_id, engine.vocab_size, rows)
    if all(engine.is_special(token.id) for token in tokens):
        return engine
    # The sentencepiece package knows only the model's own pieces.
    legacy = config.get("legacy", config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"))
    try:
        spec = to_spec(read_model(path), tokens, first_only=not legacy)
    except RequestError as error:
        raise RequestError(f"{path} has added tokens beside it, which need merges: {error}") from None
    return TokenizersEngine(spec, path, model_file=path)


def _difference(engine: TokenizersEngine, model_file: Path) -> str | None:
    """How a `tokenizer.json` and a `tokenizer.model` differ: a piece with two ids; None if they agree."""
    for token_id, (piece, kind) in enumerate(first_pieces(model_file, _COMPARED)):
        if kind == NORMAL and engine.token_to_id(piece) != token_id:
            return f"{quote(piece)} is token {engine.token_to_id(piece)} and token {token_id}"
    return None
