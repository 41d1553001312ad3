"""From the text of a document to tokens: whole for `packed` rows, in pieces for CoreNet's."""

from __future__ import annotations

import hashlib
import re
import string
from array import array
from collections import Counter
from dataclasses import dataclass

from ....errors import RequestError
from ....text.tokenizer import Tokenizer
from ....wording import install

# The counts of what is not learned from.
LEFT_OUT = (
    "damaged documents",
    "empty documents",
    "pieces with too few characters",
    "pieces with too few tokens",
    "tokens skipped",
    "tokens cut off",
)
# ftfy leaves these characters as they are: printable ASCII without `&`, which may begin an HTML entity.
_PLAIN = re.compile(r"[\t\n -%'-~]*")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass
class Encoder:
    """Encodes documents.

    Args:
        tokenizer: encodes the text; its BOS and EOS mark where documents begin and end.
        repairs: whether text passes through `ftfy.fix_text` with NFC normalization first.
        piece_words: None encodes a document whole, as its ids and EOS. A number cuts it, at single spaces, into pieces
            of so many words, each encoded as BOS, its ids, EOS, as in CoreNet.
        min_characters, min_tokens: pieces with fewer are skipped.
        max_tokens: longer pieces lose their end.
    """

    tokenizer: Tokenizer
    repairs: bool = False
    piece_words: int | None = None
    min_characters: int = 0
    min_tokens: int = 0
    max_tokens: int = 0

    def __call__(self, text: str, counts: Counter[str]) -> list[array[int]]:
        """The tokens of a document: one array, or one for each piece that is kept. `counts` says what was dropped."""
        counts["documents"] += 1
        if self.piece_words is None:
            ids = self._encode(text)
            counts["empty documents"] += not ids
            return [array("i", [*ids, self.tokenizer.eos_token_id])] if ids else []
        words = text.split(" ")
        starts = range(0, len(words), self.piece_words)
        pieces = (self._piece(" ".join(words[at : at + self.piece_words]), counts) for at in starts)
        return [piece for piece in pieces if piece is not None]

    def _piece(self, text: str, counts: Counter[str]) -> array[int] | None:
        # The order and the counting are those of BaseLMIterableDataset._tokenize_text in CoreNet.
        counts["pieces"] += 1
        if _counted_characters(text) < self.min_characters:
            counts["pieces with too few characters"] += 1
            return None
        ids = [self.tokenizer.bos_token_id, *self._encode(text), self.tokenizer.eos_token_id]
        if len(ids) < self.min_tokens:
            counts["pieces with too few tokens"] += 1
            counts["tokens skipped"] += len(ids)
            return None
        counts["tokens cut off"] += max(0, len(ids) - self.max_tokens)
        return array("i", ids[: self.max_tokens])

    def _encode(self, text: str) -> list[int]:
        if self.repairs:
            text = repaired(text)
        return self.tokenizer.encode(text, add_bos=False)

    def fingerprint(self, tokenizer: str) -> str:
        """A hash of everything that the tokens of a text depend on; `tokenizer` is the tokenizer's fingerprint."""
        settings = [self.repairs, self.piece_words, self.min_characters, self.min_tokens, self.max_tokens]
        version = _ftfy().__version__ if self.repairs else None
        return hashlib.sha256(repr([tokenizer, *settings, version]).encode()).hexdigest()[:32]


def repaired(text: str) -> str:
    """`ftfy.fix_text(text, normalization="NFC")`; it works line by line, and lines that it would not change are kept.

    Most lines of English are such, and ftfy would take longer than tokenizing.
    """
    if _PLAIN.fullmatch(text):
        return text
    fix = _ftfy().fix_text
    unescape_html: str | bool = "auto"
    fixed = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if not _PLAIN.fullmatch(line):
            fixed.append(fix(line, unescape_html=unescape_html, normalization="NFC"))
        else:
            fixed.append(line)
        if "<" in line:  # from here on the text is HTML, whose entities ftfy keeps
            unescape_html = False
    return "".join(fixed)


def check_ftfy() -> None:
    """Refuse a run that needs ftfy where it is missing.

    Raises:
        RequestError: it is not installed.
    """
    _ftfy()


def _counted_characters(text: str) -> int:
    """The characters of a text after lower-casing, without punctuation, with each run of spaces as one."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return len(re.sub(r"\s+", " ", text.strip()))


def _ftfy():
    try:
        import ftfy
    except ImportError:
        raise RequestError(
            f"Repairing text needs the package ftfy: {install('pretrain')}; or give --no-ftfy."
        ) from None
    return ftfy
