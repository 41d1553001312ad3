"""The two files a SentencePiece tokenizer comes in: its own `tokenizer.model`, and Hugging Face's `tokenizer.json`.

An engine encodes with the package that reads its file: `SentencePieceEngine` with sentencepiece,
`TokenizersEngine` with tokenizers. Only the one needed is imported. `to_tokenizer_json` turns the first file into
the second with the same ids; for that, `tokenizer.model` (a protocol buffer, sentencepiece_model.proto) is read here.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_openelm.errors import RequestError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # SentencePiece writes a space as this character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# The tokenizers package aborts the whole process on pieces shorter than this prefix, so it must not see one.
WORD_PIECES = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
NOT_SENTENCEPIECE = "{} is no SentencePiece-style tokenizer: use Llama 2's, or one trained alike"
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PROBE = "  \u2460 x "  # what an identity normalization keeps: spaces at both ends, a character NFKC rewrites
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` holds: per id a piece, a score (log-probability, or minus the merge rank for BPE)
    and a type (`NORMAL`, `UNKNOWN`, `CONTROL`, `USER_DEFINED`, `UNUSED` or `BYTE`), and how text is prepared."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    model_type: str = "unigram"
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    rewrites_text: bool = False  # a character map, such as NFKC, is applied before encoding


def read_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model` without the sentencepiece package; `RequestError` when it is not one."""
    try:
        return parse_model(path.read_bytes())
    except (ValueError, IndexError, TypeError, struct.error) as error:
        raise RequestError(f"{path} is damaged or no SentencePiece model ({error}): download it again") from None


def parse_model(data: bytes) -> SentencePieceModel:
    """Parse the bytes of a `tokenizer.model`; raises `ValueError`, `IndexError`, `TypeError` or `struct.error`."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            pieces.append(piece[1].decode() if 1 in piece else "")
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        model_type=MODEL_TYPES.get(trainer.get(3, 1), "unknown"),
        byte_fallback=bool(trainer.get(35, False)),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
        rewrites_text=bool(normalizer.get(2)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of one protocol buffer message: ints for varints, bytes for the rest."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field type {kind} at byte {position}")
        if position + length > end:
            raise ValueError("it ends too early")
        yield tag >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def to_tokenizer_json(model: SentencePieceModel, bos_token_id: int) -> dict[str, Any]:
    """The `tokenizer.json` whose ids equal SentencePiece's for every text, BOS first.

    Raises `RequestError` for what the tokenizers library cannot reproduce exactly: anything but BPE, user-defined or
    unused pieces, and normalizers that rewrite text or remove spaces (Llama's and OpenELM's do none of it).
    """
    _require_convertible(model)
    special = [i for i, kind in enumerate(model.types) if kind in (UNKNOWN, CONTROL)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, model.pieces[i]) for i in special],
        "normalizer": space_normalizer(model.add_dummy_prefix),
        "pre_tokenizer": None,
        "post_processor": template_processing(model.pieces[bos_token_id], bos_token_id),
        "decoder": space_decoder(model.add_dummy_prefix),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.types.index(UNKNOWN)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(model.pieces)},
            "merges": bpe_merges(model),
        },
    }


def _require_convertible(model: SentencePieceModel) -> None:
    normal_scores = [
        s for s, t, p in zip(model.scores, model.types, model.pieces, strict=True) if t == NORMAL and len(p) > 1
    ]
    reason = None
    if model.model_type != "bpe":
        reason = f"its type is {model.model_type}, not bpe"
    elif model.rewrites_text:
        reason = "it rewrites text before encoding (a normalization rule other than identity)"
    elif model.remove_extra_whitespaces or not model.escape_whitespaces:
        reason = "it removes extra spaces (remove_extra_whitespaces) or does not escape them"
    elif UNKNOWN not in model.types:
        reason = "it has no unknown piece"
    elif USER_DEFINED in model.types or UNUSED in model.types:
        reason = "it has user-defined or unused pieces"
    elif any(" " in piece for piece in model.pieces):
        reason = "a piece has a plain space"
    elif len(set(model.pieces)) != len(model.pieces):
        reason = "a piece occurs twice"
    elif len(set(normal_scores)) != len(normal_scores):
        reason = "two pieces have the same score, so the order of merges is not defined"
    if reason:
        raise RequestError(
            f"this SentencePiece model cannot become a tokenizer.json with the same ids: {reason}; "
            "use a tokenizer trained as Llama's (bpe, identity normalization, byte fallback)"
        )


def bpe_merges(model: SentencePieceModel) -> list[str]:
    """Merge rules "left right", best first: every split of a piece into two pieces, in the order of the scores.

    SentencePiece stores no merges: it joins whichever neighbours make the best-scored piece. Only normal pieces
    join, or the typed characters of a control or byte piece would become its id.
    """
    score = {p: s for p, s, t in zip(model.pieces, model.scores, model.types, strict=True) if t == NORMAL}
    return [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in sorted((p for p in score if len(p) > 1), key=score.__getitem__, reverse=True)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in score and piece[cut:] in score
    ]


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


class SentencePieceEngine:
    """Encodes with a `tokenizer.model`. Raises `RequestError` for a damaged one, and for one that rewrites text."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        self.model_file = path
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError):
            raise RequestError(f"{path} is damaged or no SentencePiece model: download it again") from None
        self.adds_space = _adds_space(self._processor.normalize(PROBE), path)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_token_id = self._optional(self._processor.bos_id())
        self.eos_token_id = self._optional(self._processor.eos_id())
        self.unk_token_id = self._optional(self._processor.unk_id())

    @staticmethod
    def _optional(token_id: int) -> int | None:
        return None if token_id < 0 else token_id

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def id_to_token(self, token_id: int) -> str | None:
        return self._processor.id_to_piece(token_id) if token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        token_id = self._processor.piece_to_id(token)  # the unknown id for what is no piece
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def is_control(self, token_id: int) -> bool:
        return self._processor.is_control(token_id)

    def is_byte(self, token_id: int) -> bool:
        return self._processor.is_byte(token_id)

    def special_tokens(self) -> dict[str, int]:
        special = (i for i in range(self.vocab_size) if self.is_control(i) or i == self.unk_token_id)
        return {self._processor.id_to_piece(token_id): token_id for token_id in special}

    def to_tokenizer_json(self, bos_token_id: int) -> dict[str, Any]:
        return to_tokenizer_json(read_model(self.model_file), bos_token_id)


class TokenizersEngine:
    """Encodes with a `tokenizer.json`, corrected where it would give other ids than SentencePiece.

    Raises `RequestError` for a damaged file, and for a tokenizer of another kind (byte-level, WordPiece).
    """

    def __init__(self, path: Path):
        # Kept beside it so that a saved copy stays complete; the two are the same tokenizer.
        beside = path.with_name("tokenizer.model")
        self.model_file = beside if path.name == "tokenizer.json" and beside.is_file() else None
        self._path = path
        self._tokenizer = self._parse(path.read_bytes())
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
        self.adds_space = _adds_space(normalizer.normalize_str(PROBE) if normalizer else PROBE, path)

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


def _adds_space(normalized: str, path: Path) -> bool:
    """Whether the tokenizer puts a space before the text, judged by what it makes of `PROBE`."""
    kept = PROBE.replace(" ", SPACE)
    if normalized not in (kept, SPACE + kept):
        raise RequestError(
            f"{path} removes spaces or rewrites characters before encoding, so text would not survive it: "
            "use Llama 2's tokenizer, or one trained alike (identity normalization, remove_extra_whitespaces false)"
        )
    return normalized != kept
