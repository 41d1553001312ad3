"""The engine that encodes with the sentencepiece package, from a `tokenizer.model`."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..errors import RequestError
from ..inputs import read_bytes
from .sentencepiece import SentencePieceModel, damaged, read_model, to_spec, with_dummy_prefix
from .tokenizer_spec import REWRITES, SPACE, TokenizerSpec

# An identity normalization keeps this: spaces at both ends, and a character that NFKC rewrites.
PROBE = "  \u2460 x "


class SentencePieceEngine:
    """Encodes with a `tokenizer.model`. Raises `RequestError` for a damaged one, and for one that rewrites text."""

    def __init__(self, path: Path, *, adds_space: bool | None = None):
        """`adds_space` replaces the file's own rule for the space in front of a text."""
        from sentencepiece import SentencePieceProcessor

        self.model_file = path
        self._processor = SentencePieceProcessor()
        data = read_bytes(path)
        try:
            self._processor.LoadFromSerializedProto(data if adds_space is None else with_dummy_prefix(data, adds_space))
        except (RuntimeError, UnicodeDecodeError):  # a message that is not UTF-8
            raise RequestError(f"{path} is damaged or not a SentencePiece model: download it again") from None
        self.adds_space = self._adds_space()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_token_id = self._optional(self._processor.bos_id())
        self.eos_token_id = self._optional(self._processor.eos_id())
        self.unk_token_id = self._optional(self._processor.unk_id())

    def _adds_space(self) -> bool:
        """Whether a space is put in front of a text, found by normalizing `PROBE`."""
        kept, normalized = PROBE.replace(" ", SPACE), self._processor.normalize(PROBE)
        if normalized not in (kept, SPACE + kept):
            raise RequestError(REWRITES.format(self.model_file))
        return normalized != kept

    @cached_property
    def model(self) -> SentencePieceModel:
        """The file's contents, with the rule for the space in front that applies here."""
        return replace(read_model(self.model_file), add_dummy_prefix=self.adds_space)

    @cached_property
    def spec(self) -> TokenizerSpec:
        """How the model splits text, for other programs; `RequestError` if merges cannot reproduce it exactly."""
        return to_spec(self.model)

    @staticmethod
    def _optional(token_id: int) -> int | None:
        return None if token_id < 0 else token_id

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of `text` without BOS; `start` changes nothing, since SentencePiece treats all texts alike."""
        return self._processor.encode(text)

    def id_to_token(self, token_id: int) -> str | None:
        try:
            return self._processor.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else None
        except UnicodeDecodeError as error:
            raise damaged(self.model_file, error) from None

    def token_to_id(self, token: str) -> int | None:
        token_id = self._processor.piece_to_id(token)  # gives the unknown id for unknown pieces
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def is_control(self, token_id: int) -> bool:
        return self._processor.is_control(token_id)

    def is_byte(self, token_id: int) -> bool:
        return self._processor.is_byte(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether a piece is a control token or the unknown one."""
        return token_id == self.unk_token_id or (token_id < self.vocab_size and self.is_control(token_id))

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """The special tokens, which are never found in a text."""
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size) if self.is_special(i)}

    @property
    def special_beyond(self) -> dict[str, int]:
        """Special tokens that were added to the model's own: this engine has none."""
        return {}
