"""How a SentencePiece-style tokenizer splits text: what the readers of its files produce, and engines encode with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SPACE = "\u2581"  # SentencePiece's character for a space
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# The largest vocabularies in use have about 300,000 tokens. Ids are bounded because tables are as long as the largest.
MAX_TOKENS = 1 << 20
# The longest token; SentencePiece's own pieces have at most 16 characters by default.
MAX_LENGTH = 1000
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
REWRITES = (
    "{} removes spaces or rewrites characters before encoding, so text would change: use Llama 2's tokenizer, "
    "or one trained the same way (identity normalization, remove_extra_whitespaces false)"
)


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the tokenizer's model sees it.

    `single_word` matches whole words only, `lstrip` and `rstrip` also match the spaces beside it, `normalized` tokens
    are matched after the others. `special` tokens decode to no text.
    """

    content: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Its entry in `tokenizer.json`; in `added_tokens_decoder` the id is the key instead."""
        flags = {flag: getattr(self, flag) for flag in FLAGS}
        return {"id": self.id, "content": self.content, **flags, "special": self.special}


@dataclass
class TokenizerSpec:
    """How a SentencePiece-style tokenizer splits text.

    Args:
        vocab: the id of every piece of the model; ids from 0 without gaps.
        merges: pairs of pieces that join, best first; empty for a Unigram model.
        scores: the log-probability per id of a Unigram model; empty for BPE.
        added: tokens that are found in a text first, or are special; ids of new ones follow the pieces'.
        adds_space: whether a space is put in front of a text.
        first_only: whether text after an added token gets no space (`legacy: false` in transformers).
        splits: whether text is split before each space, so that no piece spans two words.
        ignore_merges: whether a word that is a piece becomes that piece whatever the merges.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    added: list[AddedToken] = field(default_factory=list)
    unk_token: str = "<unk>"
    byte_fallback: bool = False
    fuse_unk: bool = True
    adds_space: bool = True
    first_only: bool = False
    splits: bool = False
    ignore_merges: bool = False

    @property
    def spans_words(self) -> bool:
        """Whether a text can become a piece with a space after its first character."""
        return any(SPACE in piece[1:] for piece in (self.vocab if self.scores else map("".join, self.merges)))

    @property
    def pieces(self) -> list[str]:
        """The model's pieces in the order of their ids."""
        return sorted(self.vocab, key=self.vocab.__getitem__)

    @property
    def beyond(self) -> list[AddedToken]:
        """The added tokens that are not pieces of the model, in the order of their ids."""
        return sorted((t for t in self.added if t.content not in self.vocab), key=lambda token: token.id)

    @property
    def parsed(self) -> list[AddedToken]:
        """The added tokens that are found in a text: all but the model's own control tokens."""
        return [token for token in self.added if not token.special or token.content not in self.vocab]
