"""Decoding: from token ids back to text, one token at a time.

We decode ourselves, so that streaming and decoding all at once cannot differ.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from .tokenizer_spec import SPACE
from .tokenizers_engine import Engine

UNKNOWN_TEXT = " \u2047 ".encode()  # SentencePiece's text for the unknown token
ONE_PER_BYTE = "mlx_openelm.one_per_byte"
# SentencePiece's rule for bytes that are not UTF-8: one replacement character for each byte.
codecs.register_error(ONE_PER_BYTE, lambda error: ("\ufffd", getattr(error, "start", 0) + 1))


class TokenBytes(dict[int, bytes | None]):
    """The bytes that each token adds to a text, filled in when first needed; None for tokens without text."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine

    def __missing__(self, token_id: int) -> bytes | None:
        engine, piece = self.engine, None
        token = engine.id_to_token(token_id)
        if token is not None and not engine.is_control(token_id):
            if token_id == engine.unk_token_id:
                piece = UNKNOWN_TEXT
            elif engine.is_byte(token_id):
                piece = bytes([int(token[3:5], 16)])  # "<0x0A>"
            else:
                piece = token.replace(SPACE, " ").encode()
        self[token_id] = piece
        return piece


class StreamingDecoder:
    """Decodes token by token; the concatenated results of `add` and `finish` equal `decode` of all tokens."""

    def __init__(self, token_bytes: TokenBytes, after: Iterable[int] = (), keeps_space: bool = False):
        self._token_bytes = token_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")(ONE_PER_BYTE)
        self._strip_space = token_bytes.engine.adds_space and not keeps_space
        for token_id in after:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The whole characters that this token completes; empty while a character's bytes are still coming."""
        piece = self._token_bytes[token_id]
        if piece is None:
            return self.finish()  # a character cannot continue after a control token
        if self._strip_space:
            self._strip_space = False
            if (self._token_bytes.engine.id_to_token(token_id) or "").startswith(SPACE):
                piece = piece[1:]
        return self._characters.decode(piece)

    def finish(self) -> str:
        """The rest at the end: U+FFFD for each byte of an unfinished character."""
        return self._characters.decode(b"", True)
