"""The engine that encodes with the tokenizers package, giving the same ids as SentencePiece."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .added_tokens import AddedToken
from .tokenizer_json import BYTE_TOKENS, SPACE, TokenizerSpec, damaged, metaspaces

if TYPE_CHECKING:
    import tokenizers

# Put inside the text of an added token to have it encoded as text. A user cannot type it by chance, and a normalizer
# removes it.
LITERAL = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(12))


class TokenizersEngine:
    """Encodes as a `TokenizerSpec` says, once `build` was called with the special tokens."""

    def __init__(self, spec: TokenizerSpec, path: Path, model_file: Path | None = None):
        """`path` is for messages; `model_file` is a `tokenizer.model` to copy when the tokenizer is saved."""
        self.spec = spec
        self.model_file = model_file
        self.adds_space = spec.adds_space
        self._path = path
        beyond = spec.beyond
        self._pieces = [*spec.pieces, *(token.content for token in beyond)]
        self._ids = {**spec.vocab, **{token.content: token.id for token in beyond}}
        self.vocab_size = len(self._pieces)
        self.bos_token_id, self.eos_token_id = self._ids.get("<s>"), self._ids.get("</s>")
        self.unk_token_id = spec.vocab[spec.unk_token]

    def build(self, special_ids: Iterable[int]) -> None:
        """Build the encoder, with these tokens and the unknown one special whatever the file says.

        Raises:
            RequestError: the tokenizers package refuses the file.
        """
        from tokenizers import models

        spec, added = self.spec, {token.id: token for token in self.spec.added}
        for token_id in {*special_ids, self.unk_token_id}:
            token = added.get(token_id, AddedToken(self._pieces[token_id], token_id))
            added[token_id] = replace(token, special=True, normalized=False)
        spec.added = [added[token_id] for token_id in sorted(added)]
        special = {token.content: token.id for token in spec.added if token.special}
        # Added special tokens: found in a text, unlike the model's own control tokens.
        self.special_beyond = {text: token_id for text, token_id in special.items() if text not in spec.vocab}
        self._control = {*special.values()} - {self.unk_token_id}
        # Some files have merges that build "</s>" or "<0x0A>" from its characters.
        self._reserved = (special.keys() & spec.vocab.keys()) | (BYTE_TOKENS if spec.byte_fallback else set())
        if not self._reserved.isdisjoint(map("".join, spec.merges)):
            spec.merges = [pair for pair in spec.merges if "".join(pair) not in self._reserved]
        # SentencePiece also puts the space in front of a text that starts with one of its user-defined pieces.
        own = [token.content for token in spec.parsed if token.content in spec.vocab]
        self._own = tuple(own) if spec.adds_space and spec.first_only else ()
        with _rust_errors(self._path):
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
            self._start = self._make_tokenizer(model, spec.adds_space)
            self._later = self._make_tokenizer(model, spec.adds_space and not spec.first_only)

    def _make_tokenizer(self, model: Any, adds_space: bool) -> tokenizers.Tokenizer:
        """The package's tokenizer with our normalizer, space rule and added tokens around a model."""
        from tokenizers import AddedToken as TheirToken
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

        spec, tokenizer = self.spec, Tokenizer(model)
        literal = [normalizers.Replace(LITERAL, "")] if len(self._pieces) > len(spec.vocab) else []
        tokenizer.normalizer = normalizers.Sequence([*literal, normalizers.Replace(" ", SPACE)])
        steps = metaspaces(adds_space=adds_space, first_only=spec.first_only, splits=spec.splits)
        parts: list[Any] = [pre_tokenizers.Metaspace(*step) for step in steps]
        if spec.ignore_merges:
            parts.append(pre_tokenizers.Split(Regex(_after_the_first(self._reserved)), "isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        # The package's `special` stays unset: `spec.parsed` already has exactly the tokens to find in a text.
        tokenizer.add_tokens(
            [
                TheirToken(
                    t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized
                )
                for t in spec.parsed
            ]
        )
        return tokenizer

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of `text` without BOS; `start` is false for text that follows a token.

        Added tokens are found in the text, but not the model's own control tokens.
        """
        ids: list[int] = (self._start if start else self._later).encode(text, add_special_tokens=False).ids
        if start and self._own and text.startswith(self._own) and self._pieces[ids[0]] in self._own:
            ids = [*(token.id for token in self._start.model.tokenize(SPACE)), *ids]
        return ids

    def id_to_token(self, token_id: int) -> str | None:
        """The text of a token; None for ids out of range."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece or added token; None if there is none."""
        return self._ids.get(token)

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def is_byte(self, token_id: int) -> bool:
        return self.spec.byte_fallback and self.id_to_token(token_id) in BYTE_TOKENS

    @property
    def control_tokens(self) -> dict[str, int]:
        """The model's own special tokens, which are never found in a text."""
        return {t.content: t.id for t in self.spec.added if t.special and t.content in self.spec.vocab}


def _after_the_first(pieces: Iterable[str]) -> str:
    """A regex for the first character of a text that equals one of `pieces`. Splitting there keeps it from becoming
    that piece."""
    found = (rf"{re.escape(piece[0])}(?={re.escape(piece[1:])}\z)" for piece in sorted(pieces) if len(piece) > 1)
    return rf"\A(?:{'|'.join(found)})"


@contextmanager
def _rust_errors(path: Path) -> Iterator[None]:
    """Turn what the tokenizers package raises for a bad file into one line."""
    try:
        yield
    except Exception as error:
        raise damaged(path, " ".join(str(error).split())) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic in Rust, which is not an Exception
            raise
        raise damaged(path, " ".join(str(error).split())) from None
