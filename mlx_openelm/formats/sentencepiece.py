"""SentencePiece's `tokenizer.model`: the engine that encodes with one, and its way to a `tokenizer.json`.

The engine uses the sentencepiece package. The conversion keeps every id; for that the file (a protocol buffer,
sentencepiece_model.proto) is read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .tokenizer_json import PROBE, added_token, adds_space, space_decoder, space_normalizer, template_processing

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
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


def serialize_model(model: SentencePieceModel, *, bos_piece: str, eos_piece: str) -> bytes:
    """The bytes of a `tokenizer.model`, as `parse_model` and the sentencepiece package read them."""
    special = {45: model.pieces[model.types.index(UNKNOWN)], 46: bos_piece, 47: eos_piece}
    number = next(number for number, name in MODEL_TYPES.items() if name == model.model_type)
    trainer = _integer(3, number) + _integer(4, len(model.pieces)) + _integer(35, int(model.byte_fallback))
    trainer += b"".join(_bytes(field, piece.encode()) for field, piece in special.items())
    normalizer = _bytes(1, b"identity") + b"".join(
        _integer(field, int(switch))
        for field, switch in (
            (3, model.add_dummy_prefix),
            (4, model.remove_extra_whitespaces),
            (5, model.escape_whitespaces),
        )
    )
    pieces = (
        _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _integer(3, kind)  # 0x15: field 2, 4 bytes
        for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
    )
    return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint_bytes(field << 3 | 2) + _varint_bytes(len(value)) + value


def _integer(field: int, value: int) -> bytes:
    return _varint_bytes(field << 3) + _varint_bytes(value)


def _varint_bytes(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


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
        self.adds_space = adds_space(self._processor.normalize(PROBE), path)
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
