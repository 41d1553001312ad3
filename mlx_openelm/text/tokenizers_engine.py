"""The engine that encodes with the tokenizers package to SentencePiece's ids, and the choice between the engines."""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
from ..hub import catalog
from .sentencepiece import NORMAL, UNUSED, SentencePieceModel, bpe_merges, first_pieces, to_spec
from .sentencepiece_engine import SentencePieceEngine
from .tokenizer_json import Named, damaged, read_added, read_spec, resolve
from .tokenizer_spec import BYTE_TOKENS, SPACE, AddedToken, TokenizerSpec

# Put inside the text of an added token to have it encoded as text. A user cannot type it by chance, and a normalizer
# removes it.
LITERAL = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(12))
# Llama 2's pieces: their number, the SHA-256 of their lines, and the first id after control and byte pieces.
_LLAMA2_SIZE, _LLAMA2_FIRST = 32000, 259
_LLAMA2_PIECES = "0f97b4337921e6e7e9b4620fc73338ee570aecd3c16038bc23870a887e995045"
# transformers makes the rules for spaces of these classes from `tokenizer_config.json`.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
# The number of pieces that are compared between two files; different vocabularies differ in their first merges.
_COMPARED = 400
# A longer text is encoded in parts of this many characters, where these give its ids: the package's time for a text
# grows faster than its length, and a megabyte takes more than twice as long in one piece.
_LONG_TEXT = 1 << 13
_SPACE_BETWEEN = re.compile(r"(?<=[^\W_]) (?=[^\W_])")


class TokenizersEngine:
    """Encodes as a `TokenizerSpec` says, once `build` was called with the special tokens.

    `token_to_id` gives the id of a piece or added token, or None. `special_beyond` are the special tokens that were
    added to the model's own and are found in a text; `control_tokens` are the model's own, which never are.
    """

    token_to_id: Callable[[str], int | None]
    special_beyond: dict[str, int]
    control_tokens: dict[str, int]

    def __init__(self, spec: TokenizerSpec, path: Path, model_file: Path | None = None):
        """`path` is for messages; `model_file` is a `tokenizer.model` to copy when the tokenizer is saved."""
        self.spec = spec
        self.model_file = model_file
        self.adds_space = spec.adds_space
        self._path = path
        ids = spec.vocab | {token.content: token.id for token in spec.added}
        self.token_to_id = ids.get
        self._pieces = sorted(ids, key=ids.__getitem__)
        self.vocab_size = len(self._pieces)
        self.bos_token_id, self.eos_token_id = ids.get("<s>"), ids.get("</s>")
        self.unk_token_id = spec.vocab[spec.unk_token]

    def build(self, special_ids: Iterable[int]) -> None:
        """Build the encoder, with these tokens and the unknown one special whatever the file says.

        Raises:
            RequestError: the tokenizers package refuses the file.
        """
        spec, added = self.spec, {token.id: token for token in self.spec.added}
        for token_id in {*special_ids, self.unk_token_id}:
            token = added.get(token_id, AddedToken(self._pieces[token_id], token_id))
            added[token_id] = replace(token, special=True, normalized=False)
        spec.added = [added[token_id] for token_id in sorted(added)]
        special = {token.content: token.id for token in spec.added if token.special}
        self.special_beyond = {text: token_id for text, token_id in special.items() if text not in spec.vocab}
        self.control_tokens = {text: token_id for text, token_id in special.items() if text in spec.vocab}
        self._without_text = {*special.values()} - {self.unk_token_id}
        # Some files have merges that build "</s>" or "<0x0A>" from its characters.
        reserved = self.control_tokens.keys() | (BYTE_TOKENS if spec.byte_fallback else set())
        if not reserved.isdisjoint(map("".join, spec.merges)):
            spec.merges = [pair for pair in spec.merges if "".join(pair) not in reserved]
        found = self._found = [token for token in spec.added if token.content not in self.control_tokens]
        # SentencePiece also puts the space in front of a text that starts with one of its user-defined pieces.
        own = [token.content for token in found if token.content in spec.vocab]
        self._own = tuple(own) if spec.adds_space and spec.first_only else ()
        try:
            self._make_tokenizers(found, reserved)
        except BaseException as error:  # a panic in Rust is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise damaged(self._path, " ".join(str(error).split())) from None

    def _make_tokenizers(self, found: list[AddedToken], reserved: Iterable[str]) -> None:
        """The package's tokenizers for a text and for text that follows a token: our normalizer, space rule and the
        added tokens that are `found` in a text, around one model."""
        from tokenizers import AddedToken as TheirToken
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        spec = self.spec
        if spec.scores:
            vocab = list(zip(spec.pieces, spec.scores, strict=True))
            model: Any = models.Unigram(vocab, self.unk_token_id, spec.byte_fallback)
        else:
            model = models.BPE(
                spec.vocab,
                spec.merges,
                unk_token=spec.unk_token,
                fuse_unk=spec.fuse_unk,
                byte_fallback=spec.byte_fallback,
                ignore_merges=spec.ignore_merges,
            )
        literal = [normalizers.Replace(LITERAL, "")] if self.vocab_size > len(spec.vocab) else []
        # The package's `special` stays unset: exactly the tokens to find in a text are added.
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        tokens = [TheirToken(t.content, **{flag: getattr(t, flag) for flag in flags}) for t in found]
        made = []
        for adds_space in (spec.adds_space, spec.adds_space and not spec.first_only):
            tokenizer = Tokenizer(model)
            tokenizer.normalizer = normalizers.Sequence([*literal, normalizers.Replace(" ", SPACE)])
            # After the normalizer no plain space is left, so this step puts one before any text, even one that starts
            # with a space; the next turns it into U+2581. `saving` writes the same steps.
            parts: list[Any] = []
            if adds_space:
                parts.append(pre_tokenizers.Metaspace(" ", "first" if spec.first_only else "always", False))
            if adds_space or spec.splits:
                parts.append(pre_tokenizers.Metaspace(SPACE, "never", spec.splits))
            if spec.ignore_merges:
                parts.append(pre_tokenizers.Split(Regex(_after_the_first(reserved)), "isolated"))
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
            tokenizer.add_tokens(tokens)
            made.append(tokenizer)
        self._start, self._later = made

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of `text` without BOS; `start` is false for text that follows a token.

        Added tokens are found in the text, but not the model's own control tokens. While a long text is encoded, other
        threads go on.
        """
        encoder = self._start if start else self._later
        if len(text) <= _LONG_TEXT:
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
        else:
            text, *rest = _cut_between_words(text) if self._words_are_apart else [text]
            space = "" if self.spec.adds_space and not self.spec.first_only else " "  # or it is put there
            found = encoder.encode_batch_fast([text], add_special_tokens=False)
            found += self._later.encode_batch_fast([space + part for part in rest], add_special_tokens=False)
            ids = [token for encoding in found for token in encoding.ids]
        if start and self._own and text.startswith(self._own) and self._pieces[ids[0]] in self._own:
            ids = [*(token.id for token in self._start.model.tokenize(SPACE)), *ids]
        return ids

    @cached_property
    def _words_are_apart(self) -> bool:
        """Whether a text that is cut between two words has the ids of its parts: no piece or added token spans them."""
        spec = self.spec
        is_plain = not (spec.scores or spec.ignore_merges or self._found)
        return is_plain and not any(SPACE in piece.lstrip(SPACE) for piece in spec.vocab)

    def id_to_token(self, token_id: int) -> str | None:
        """The text of a token; None for ids out of range."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else None

    def is_control(self, token_id: int) -> bool:
        return token_id in self._without_text

    def is_byte(self, token_id: int) -> bool:
        return self.spec.byte_fallback and self.id_to_token(token_id) in BYTE_TOKENS


Engine = TokenizersEngine | SentencePieceEngine
# The files that hold a tokenizer, in order of preference.
ENGINES: dict[str, type[Engine]] = {"tokenizer.json": TokenizersEngine, "tokenizer.model": SentencePieceEngine}


def open_engine(path: Path, *, rows: int | None = None, beside: bool = False) -> tuple[Engine, dict[str, Any]]:
    """The engine for a tokenizer file and the `tokenizer_config.json` beside it, with the added tokens of both.

    Args:
        path: a `tokenizer.json` or a `tokenizer.model`, under any name with that ending.
        rows: the number of tokens the model can take, as in `tokenizer_json.resolve`.
        beside: whether to use the `tokenizer.model` beside a `tokenizer.json` if it is a different tokenizer.

    Raises:
        RequestError: a damaged file, a tokenizer of another kind, added tokens that do not fit.
    """
    config, named = read_added(path.parent)
    # For Llama's classes alone, transformers replaces the file's own rule for the space in front.
    adds_space = config.get("add_prefix_space")
    if adds_space not in (True, False) or config.get("tokenizer_class") not in _LLAMA_CLASSES:
        adds_space = None
    if path.suffix != ".json":
        return _open_model(path, config, named, rows, adds_space), config
    spec = read_spec(path)
    if adds_space is not None and adds_space != spec.adds_space:
        spec.adds_space, spec.first_only = adds_space, adds_space and not _is_legacy(config)
    if spec.merges[:1] == [(SPACE, SPACE)] and len(spec.vocab) == _LLAMA2_SIZE:
        _order_llamas_merges(spec)
    known = {token.content: token for token in spec.added}
    ids = spec.vocab | {token.content: token.id for token in spec.added}
    known |= {token.content: token for token in resolve(named, ids.get, len(ids), rows)}
    spec.added = list(known.values())
    engine = TokenizersEngine(spec, path)
    model_file = path.with_name("tokenizer.model")
    if path.name != "tokenizer.json" or not model_file.is_file():
        return engine, config
    try:
        # The pairs of files in the package need not be compared here; a test does.
        difference = None if path.parent in catalog.PACKAGED.values() else _difference(engine, model_file)
    except RequestError:  # a damaged tokenizer.model that is not needed
        return engine, config
    if difference is None:
        engine.model_file = model_file  # copied when the tokenizer is saved
    if difference is None or not beside:
        return engine, config
    warnings.warn(
        f"{path} and the tokenizer.model beside it are different tokenizers ({difference}); tokenizer.model is used, "
        "since a tokenizer.json is made from one. Remove the one that is not the model's.",
        stacklevel=3,
    )
    return _open_model(model_file, config, named, rows, adds_space), config


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


def _open_model(
    path: Path, config: dict[str, Any], named: Iterable[Named], rows: int | None, adds_space: bool | None
) -> Engine:
    """The engine for a `tokenizer.model`: the tokenizers package if the files beside it add tokens."""
    engine = SentencePieceEngine(path, adds_space=adds_space)
    tokens = resolve(named, engine.token_to_id, engine.vocab_size, rows)
    if all(engine.is_special(token.id) for token in tokens):
        return engine
    # The sentencepiece package knows only the model's own pieces.
    try:
        spec = to_spec(engine.model, tokens, first_only=not _is_legacy(config))
    except RequestError as error:
        raise RequestError(f"{path} has added tokens beside it, which need merges: {error}") from None
    return TokenizersEngine(spec, path, model_file=path)


def _is_legacy(config: dict[str, Any]) -> bool:
    """Whether text after an added token gets a space too."""
    return bool(config.get("legacy", config.get("tokenizer_class") not in _LLAMA_CLASSES))


def _difference(engine: TokenizersEngine, model_file: Path) -> str | None:
    """How a `tokenizer.json` and a `tokenizer.model` differ: a piece with two ids; None if they agree."""
    for token_id, (piece, kind) in enumerate(first_pieces(model_file, _COMPARED)):
        if kind == NORMAL and engine.token_to_id(piece) != token_id:
            return f"{quote(piece)} is token {engine.token_to_id(piece)} and token {token_id}"
    return None


def _cut_between_words(text: str) -> list[str]:
    """A text in parts of about `_LONG_TEXT` characters, without the space between them."""
    parts, start = [], 0
    while found := _SPACE_BETWEEN.search(text, start + _LONG_TEXT):
        parts.append(text[start : found.start()])
        start = found.end()
    return [*parts, text[start:]]


def _after_the_first(pieces: Iterable[str]) -> str:
    """A regex for the first character of a text that equals one of `pieces`. Splitting there keeps it from becoming
    that piece."""
    found = (rf"{re.escape(piece[0])}(?={re.escape(piece[1:])}\z)" for piece in sorted(pieces) if len(piece) > 1)
    return rf"\A(?:{'|'.join(found)})"
