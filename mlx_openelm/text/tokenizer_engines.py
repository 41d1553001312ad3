"""Which engine reads a tokenizer's files: the tokenizers package or the sentencepiece package."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
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
# The files that hold a tokenizer, the one that is looked for first first.
ENGINES: dict[str, type[Engine]] = {"tokenizer.json": TokenizersEngine, "tokenizer.model": SentencePieceEngine}
# Llama 2's pieces: how many, the SHA-256 of them in lines, and the first that merges make, after controls and bytes.
_LLAMA2_SIZE, _LLAMA2_FIRST = 32000, 259
_LLAMA2_PIECES = "0f97b4337921e6e7e9b4620fc73338ee570aecd3c16038bc23870a887e995045"
# So many pieces of two files are compared; any two vocabularies differ in their first merges.
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
        config, named: what `added_tokens.read` found.
        rows: how many tokens the model can take, as `added_tokens.resolve` says.
        beside: whether the `tokenizer.model` beside a `tokenizer.json` is taken where it is another tokenizer.

    Raises:
        RequestError: a damaged file, a tokenizer of another kind, added tokens that do not fit.
    """
    if path.suffix == ".json":
        engine = _open_json(path, named, rows)
        model_file = path.with_name("tokenizer.model")
        if path.name != "tokenizer.json" or not model_file.is_file():
            return engine
        try:
            difference = _difference(engine, model_file)
        except RequestError:  # nothing needs it
            return engine
        if difference is None:
            engine.model_file = model_file  # goes along when the tokenizer is saved
        if difference is None or not beside:
            return engine
        warnings.warn(
            f"{path} and the tokenizer.model beside it are two tokenizers ({difference}); tokenizer.model is used, "
            "since a tokenizer.json is made from one. Remove the one that is not the model's.",
            stacklevel=3,
        )
        path = model_file
    return _open_model(path, config, named, rows)


def _open_json(path: Path, named: Iterable[added_tokens.Named], rows: int | None) -> TokenizersEngine:
    spec = read_spec(path)
    _order_llamas_merges(spec)
    known = {token.content: token for token in spec.added}
    ids = spec.vocab | {token.content: token.id for token in spec.added}
    for token in added_tokens.resolve(named, ids.get, len(spec.vocab) + len(spec.beyond), rows):
        known[token.content] = token
    spec.added = list(known.values())
    return TokenizersEngine(spec, path)


def _order_llamas_merges(spec: TokenizerSpec) -> None:
    """Rank the merges of Llama 2's pieces as its `tokenizer.model` does, whose scores follow the ids but for runs of
    spaces, which come last. transformers 5 does not read the scores and ranks all by their ids, so that text with
    several spaces in a row gets other tokens than the models were trained on."""
    if spec.merges[:1] != [(SPACE, SPACE)] or len(spec.vocab) != _LLAMA2_SIZE:
        return
    pieces = spec.pieces
    if hashlib.sha256("\n".join(pieces).encode()).hexdigest() != _LLAMA2_PIECES:
        return
    scores = [-math.inf if piece.strip(SPACE) == "" else -float(token_id) for token_id, piece in enumerate(pieces)]
    types = [NORMAL if token_id >= _LLAMA2_FIRST else UNUSED for token_id in range(len(pieces))]
    spec.merges = bpe_merges(SentencePieceModel(pieces, scores, types))


def _open_model(path: Path, config: dict[str, Any], named: Iterable[added_tokens.Named], rows: int | None) -> Engine:
    engine = SentencePieceEngine(path)
    tokens = added_tokens.resolve(named, engine.token_to_id, engine.vocab_size, rows)
    if all(engine.is_special(token.id) for token in tokens):
        return engine
    # The sentencepiece package knows its own pieces only.
    legacy = config.get("legacy", config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"))
    try:
        spec = to_spec(read_model(path), tokens, first_only=not legacy)
    except RequestError as error:
        raise RequestError(f"{path} has added tokens beside it, which need merges: {error}") from None
    return TokenizersEngine(spec, path, model_file=path)


def _difference(engine: TokenizersEngine, model_file: Path) -> str | None:
    """A piece that a `tokenizer.json` and a `tokenizer.model` have under two ids; None where they agree."""
    for token_id, (piece, kind) in enumerate(first_pieces(model_file, _COMPARED)):
        if kind == NORMAL and engine.token_to_id(piece) != token_id:
            return f"{quote(piece)} is token {engine.token_to_id(piece)} and token {token_id}"
    return None
