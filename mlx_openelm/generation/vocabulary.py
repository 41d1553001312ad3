"""A tokenizer handed to llguidance: the bytes that each token adds to a text, and how forced text is split."""

from __future__ import annotations

import weakref
from typing import Any

from ..text.tokenizer import Tokenizer

# Building one takes a quarter of a second for 32,000 tokens.
_built: weakref.WeakKeyDictionary[Tokenizer, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def llguidance_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """llguidance's `LLTokenizer` for the tokens of a model with `vocab_size` rows; the last one built is kept."""
    from llguidance import LLTokenizer

    key = vocab_size, frozenset(tokenizer.eos_token_ids)
    kept = _built.get(tokenizer)
    if kept is None or kept[0] != key:
        ends = sorted(token for token in tokenizer.eos_token_ids if token < vocab_size)
        vocabulary: Any = Vocabulary(tokenizer, vocab_size)
        kept = key, LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=ends)
        _built[tokenizer] = kept
    return kept[1]


class Vocabulary:
    """What `LLTokenizer` reads: each token's bytes, which tokens have no text, and how a text is split, by a call.

    Tokens that end the text, control tokens, the unknown token and rows that the tokenizer lacks have no text, so that
    no constraint can be met with them.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self._tokenizer = weakref.ref(tokenizer)  # llguidance keeps this object for as long as the tokenizer lives
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token in range(vocab_size):
            text = tokenizer.token_bytes(token)
            if token in tokenizer.eos_token_ids or text is None:
                name = tokenizer.id_to_token(token) if token < tokenizer.vocab_size else None
                self.special_token_ids += [token] if name else []
                self.tokens.append((name or "").encode())
            else:
                # llguidance begins its names of special tokens with the byte 0xFF, which no text has.
                self.tokens.append(b"" if text.startswith(b"\xff") else text)
        special = set(self.special_token_ids)
        self._ids = {text: token for token, text in enumerate(self.tokens) if text and token not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """The ids of text that follows other text: no space is put in front."""
        data = text.encode() if isinstance(text, str) else text
        tokenizer = self._tokenizer()
        ids = tokenizer and tokenizer.encode_after("\x02", data.decode(errors="surrogateescape"))
        if ids and max(ids) < len(self.tokens) and b"".join(self.tokens[token] for token in ids) == data:
            return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        """Tokens whose bytes are `data`, each the longest that fits; as many as the vocabulary can write."""
        ids, start = [], 0
        while start < len(data):
            for end in range(min(start + self._longest, len(data)), start, -1):
                if (token := self._ids.get(data[start:end])) is not None:
                    break
            else:
                break
            ids.append(token)
            start = end
        return ids
