"""The engine that encodes with the tokenizers package, to the ids that SentencePiece gives."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .added_tokens import AddedToken
from .tokenizer_json import BYTE_TOKENS, SPACE, TokenizerSpec, damaged, space_pre_tokenizer

if TYPE_CHECKING:
    import tokenizers

# Nobody can have typed this: what it stands in is text, whatever it reads. A normalizer removes it.
LITERAL = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(12))


class TokenizersEngine:
    """Encodes as a `TokenizerSpec` says, once `mark_special` has told it which tokens are special."""

    def __init__(self, spec: TokenizerSpec, path: Path, model_file: Path | None = None):
        """`path` is for messages; `model_file` a `tokenizer.model` that goes along when the tokenizer is saved."""
        self.spec = spec
        self.model_file = model_file
        self.adds_space = spec.adds_space
        self._path = path
        self._pieces = [*spec.pieces, *(token.content for token in spec.beyond)]
        self._ids = {**spec.vocab, **{token.content: token.id for token in spec.beyond}}
        self.vocab_size = len(self._pieces)
        self.bos_token_id = self.token_to_id("<s>")
        self.eos_token_id = self.token_to_id("</s>")
        self.unk_token_id = spec.vocab[spec.unk_token]

    def mark_special(self, token_ids: Iterable[int]) -> None:
        """Make these tokens, and the unknown one, special whatever the file says.

        Raises:
            RequestError: the tokenizers package refuses the file.
        """
        spec, added = self.spec, {token.id: token for token in self.spec.added}
        for token_id in {*token_ids, self.unk_token_id}:
            token = added.get(token_id, AddedToken(self._pieces[token_id], token_id))
            added[token_id] = replace(token, special=True, normalized=False)
        spec.added = [added[token_id] for token_id in sorted(added)]
        self._control = {token.id for token in spec.added if token.special} - {self.unk_token_id}
        # SentencePiece puts the space in front of a text also where a user-defined piece of its own starts it.
        own = [token.content for token in spec.parsed if token.content in spec.vocab]
        self._own = tuple(own) if spec.adds_space and spec.first_only else ()
        self._remove_merges_into_control_tokens()
        with _rust_errors(self._path):
            model = self._make_model()
            self._start = self._make_tokenizer(model, spec.adds_space)
            self._later = self._make_tokenizer(model, spec.adds_space and not spec.first_only)

    def _remove_merges_into_control_tokens(self) -> None:
        """Some files have merges that build "</s>" or "<0x0A>" from its characters."""
        spec = self.spec
        self._reserved = {token.content for token in spec.added if token.special} & spec.vocab.keys()
        self._reserved |= BYTE_TOKENS if spec.byte_fallback else set()
        if not self._reserved.isdisjoint(map("".join, spec.merges)):
            spec.merges = [pair for pair in spec.merges if "".join(pair) not in self._reserved]

    def _make_model(self) -> Any:
        from tokenizers import models

        spec = self.spec
        if spec.scores:
            vocab = list(zip(spec.pieces, spec.scores, strict=True))
            return models.Unigram(vocab, spec.vocab[spec.unk_token], spec.byte_fallback)
        return models.BPE(
            spec.vocab,
            spec.merges,
            unk_token=spec.unk_token,
            fuse_unk=spec.fuse_unk,
            byte_fallback=spec.byte_fallback,
            ignore_merges=spec.ignore_merges,
        )

    def _make_tokenizer(self, model: Any, adds_space: bool) -> tokenizers.Tokenizer:
        from tokenizers import AddedToken as TheirToken
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

        tokenizer = Tokenizer(model)
        literal = [normalizers.Replace(LITERAL, "")] if self.spec.beyond else []
        tokenizer.normalizer = normalizers.Sequence([*literal, normalizers.Replace(" ", SPACE)])
        cut = space_pre_tokenizer(replace(self.spec, adds_space=adds_space), prepends=False)
        steps = [] if cut is None else cut.get("pretokenizers", [cut])
        parts: list[Any] = [
            pre_tokenizers.Metaspace(step["replacement"], step["prepend_scheme"], step["split"]) for step in steps
        ]
        if self.spec.ignore_merges:
            parts.append(pre_tokenizers.Split(Regex(_after_the_first(self._reserved)), "isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        # None is special to the package: which are found in a text is settled already.
        tokenizer.add_tokens(
            [
                TheirToken(
                    t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized
                )
                for t in self.spec.parsed
            ]
        )
        return tokenizer

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of `text` without BOS; `start` is false for text that follows a token.

        Added tokens are found in it, but not the control tokens of the model itself.
        """
        ids: list[int] = (self._start if start else self._later).encode(text, add_special_tokens=False).ids
        if start and self._own and text.startswith(self._own) and self._pieces[ids[0]] in self._own:
            ids = [*(token.id for token in self._start.model.tokenize(SPACE)), *ids]
        return ids

    def id_to_token(self, token_id: int) -> str | None:
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def is_byte(self, token_id: int) -> bool:
        return self.spec.byte_fallback and self.id_to_token(token_id) in BYTE_TOKENS

    @property
    def control_tokens(self) -> dict[str, int]:
        """The special tokens of the model itself, which are never found in a text."""
        return {t.content: t.id for t in self.spec.added if t.special and t.content in self.spec.vocab}

    @property
    def special_beyond(self) -> dict[str, int]:
        """The special tokens that were added to the model's own, which are found in a text."""
        return {token.content: token.id for token in self.spec.beyond if token.special}


def _after_the_first(pieces: Iterable[str]) -> str:
    """A regex that finds the first character of a text that is one of these, so that it is typed characters again."""
    found = (rf"{re.escape(piece[0])}(?={re.escape(piece[1:])}\z)" for piece in sorted(pieces) if len(piece) > 1)
    return rf"\A(?:{'|'.join(found)})"


@contextmanager
def _rust_errors(path: Path) -> Iterator[None]:
    """What the tokenizers package raises for a bad file, as one line."""
    try:
        yield
    except Exception as error:
        raise damaged(path, " ".join(str(error).split())) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic in Rust, which is no Exception
            raise
        raise damaged(path, " ".join(str(error).split())) from None
