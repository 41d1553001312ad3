"""Hugging Face's `tokenizer.json`: the engine that encodes with one, and the parts a SentencePiece model becomes.

The engine corrects a file where it would give other ids than SentencePiece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# The tokenizers package aborts the whole process on pieces shorter than this prefix, so it must not see one.
WORD_PIECES = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
NOT_SENTENCEPIECE = "{} is no SentencePiece-style tokenizer: use Llama 2's, or one trained alike"
PROBE = "  \u2460 x "  # what an identity normalization keeps: spaces at both ends, a character NFKC rewrites


def added_token(token_id: int, content: str) -> dict[str, Any]:
    """A special token's entry under `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def space_normalizer(add_dummy_prefix: bool) -> dict[str, Any]:
    """Spaces become U+2581, one more in front. Not `Metaspace`, which adds none to text that starts with a space."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    return {"type": "Sequence", "normalizers": [prepend, replace] if add_dummy_prefix else [replace]}


def space_decoder(add_dummy_prefix: bool) -> dict[str, Any]:
    """The way back: spaces, bytes to characters, and the space in front removed."""
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def template_processing(bos_token: str, bos_token_id: int) -> dict[str, Any]:
    """A `TemplateProcessing` that puts one token in front of a text, and of each of a pair."""

    def special(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos_token, "type_id": type_id}}

    def sequence(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), sequence("A", 0)],
        "pair": [special(0), sequence("A", 0), special(1), sequence("B", 1)],
        "special_tokens": {bos_token: {"id": bos_token, "ids": [bos_token_id], "tokens": [bos_token]}},
    }


class TokenizersEngine:
    """Encodes with a `tokenizer.json`, corrected where it would give other ids than SentencePiece.

    Raises `RequestError` for a damaged file, and for a tokenizer of another kind (byte-level, WordPiece).
    """

    def __init__(self, path: Path):
        # Kept beside it so that a saved copy stays complete; the two are the same tokenizer.
        beside = path.with_name("tokenizer.model")
        self.model_file = beside if path.name == "tokenizer.json" and beside.is_file() else None
        self._path = path
        try:
            self._tokenizer = self._parse(path.read_bytes())
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
        self._correct(path)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self.token_to_id("<s>")
        self.eos_token_id = self.token_to_id("</s>")
        model = self._tokenizer.model
        self.unk_token_id = self.token_to_id(getattr(model, "unk_token", None) or "<unk>")
        self._byte_fallback = bool(getattr(model, "byte_fallback", False))
        self._sound = False  # whether no merge can build a special token
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.mark_special(() if self.unk_token_id is None else (self.unk_token_id,))

    def _parse(self, data: bytes) -> tokenizers.Tokenizer:
        from tokenizers import Tokenizer

        if WORD_PIECES.search(data):
            raise RequestError(NOT_SENTENCEPIECE.format(self._path))
        try:
            return Tokenizer.from_buffer(data)
        except Exception as error:
            raise RequestError(f"{self._path} is damaged or no tokenizer ({error}): download it again") from None

    def _correct(self, path: Path) -> None:
        """Make spaces those of SentencePiece."""
        from tokenizers import normalizers, pre_tokenizers

        before = self._tokenizer.pre_tokenizer
        if isinstance(before, pre_tokenizers.Metaspace) and before.replacement == SPACE:
            # Newer conversions have this one, which puts no space before text that starts with one.
            steps = [] if before.prepend_scheme == "never" else [normalizers.Prepend(SPACE)]
            self._tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
            self._tokenizer.pre_tokenizer = None
        elif before is not None:
            raise RequestError(NOT_SENTENCEPIECE.format(path))
        normalizer = self._tokenizer.normalizer
        self.adds_space = adds_space(normalizer.normalize_str(PROBE) if normalizer else PROBE, path)

    def mark_special(self, token_ids: Iterable[int]) -> None:
        """Make tokens special whatever the file says: typed in a text they are text, and decoding skips them."""
        from tokenizers import AddedToken

        added = self._tokenizer.get_added_tokens_decoder()
        # The package gives a normalized added token back as "\u2581<s>": its content is the truth.
        self._added = {token_id: token.content for token_id, token in added.items()}
        special = {token_id for token_id, token in added.items() if token.special} | set(token_ids)
        self._special = {token: i for i in sorted(special) if (token := self.id_to_token(i)) is not None}
        self._tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self._special]
        )
        self._tokenizer.encode_special_tokens = True
        self._control = set(self._special.values()) - {self.unk_token_id}

    def encode(self, text: str) -> list[int]:
        """The ids of `text` without BOS; special tokens typed in it are text."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._sound or self._control.isdisjoint(ids):
            return ids
        # Some files have merges that build "</s>" from its characters. Checking 60,000 of them at every start would
        # cost more than loading, so they are removed when one of them turns up.
        self._remove_merges_into_special_tokens()
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _remove_merges_into_special_tokens(self) -> None:
        spec = json.loads(self._tokenizer.to_str())
        model = spec["model"]
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model.get("merges", []))
        model["merges"] = [
            pair for pair in pairs if (piece := "".join(pair)) not in self._special and not BYTE_TOKEN.fullmatch(piece)
        ]
        model["ignore_merges"] = False
        self._tokenizer = self._parse(json.dumps(spec).encode())
        self._tokenizer.encode_special_tokens = True
        self._sound = True

    def id_to_token(self, token_id: int) -> str | None:
        return self._added.get(token_id) or self._tokenizer.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_control(self, token_id: int) -> bool:
        return token_id in self._control

    def is_byte(self, token_id: int) -> bool:
        token = self.id_to_token(token_id)
        return self._byte_fallback and token is not None and BYTE_TOKEN.fullmatch(token) is not None

    def special_tokens(self) -> dict[str, int]:
        return self._special

    def to_tokenizer_json(self, bos_token_id: int) -> dict[str, Any]:
        """The contents of a `tokenizer.json` that other programs read to the same ids, BOS first."""
        self._remove_merges_into_special_tokens()
        spec = json.loads(self._tokenizer.to_str())
        bos_token = self.id_to_token(bos_token_id) or ""
        merges = spec["model"].get("merges", [])
        # Older readers (mlx-swift's among them) know merges as one string only.
        if not any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
            spec["model"]["merges"] = [" ".join(merge) for merge in merges]
        return {
            **spec,
            "decoder": space_decoder(self.adds_space),
            "post_processor": template_processing(bos_token, bos_token_id),
        }


def adds_space(normalized: str, path: Path) -> bool:
    """Whether the tokenizer puts a space before the text, judged by what it makes of `PROBE`."""
    kept = PROBE.replace(" ", SPACE)
    if normalized not in (kept, SPACE + kept):
        raise RequestError(
            f"{path} removes spaces or rewrites characters before encoding, so text would not survive it: "
            "use Llama 2's tokenizer, or one trained alike (identity normalization, remove_extra_whitespaces false)"
        )
    return normalized != kept
