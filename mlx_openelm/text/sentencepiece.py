"""SentencePiece's `tokenizer.model` (a protocol buffer, sentencepiece_model.proto): reading, writing, and the
conversion to merges and a `tokenizer.json`, which keeps every id.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..inputs import read_bytes
from .tokenizer_spec import MAX_LENGTH, MAX_TOKENS, SPACE, AddedToken, TokenizerSpec

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
        return parse_model(read_bytes(path))
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise damaged(path, error) from None


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
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
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


def first_pieces(path: Path, count: int) -> list[tuple[str, int]]:
    """The first pieces of a `tokenizer.model` with their types; `RequestError` when it is not one."""
    try:
        messages = (dict(_fields(value)) for number, value in _fields(read_bytes(path)) if number == 1)
        return [(piece[1].decode(), piece.get(3, NORMAL)) for piece in islice(messages, count)]
    except (ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path} is damaged or not a SentencePiece model ({error}): download it again")


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
        if shift > 63:
            raise ValueError("a number has more than 64 bits")


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


def with_dummy_prefix(data: bytes, adds_space: bool) -> bytes:
    """The bytes of a `tokenizer.model` with another `add_dummy_prefix`: of a field that occurs twice the last counts,
    and messages are merged."""
    return data + _bytes(3, _integer(3, int(adds_space)))


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


def to_spec(model: SentencePieceModel, added: Iterable[AddedToken] = (), *, first_only: bool = False) -> TokenizerSpec:
    """The spec whose ids equal SentencePiece's for every text.

    Args:
        added: further tokens, or flags of pieces.
        first_only: whether text after one of them gets no space in front; after user-defined pieces it never does.

    Raises:
        RequestError: what the tokenizers library cannot reproduce exactly: anything but BPE, unused pieces,
            normalizers that rewrite text or remove spaces, scores that leave open which pieces join first.
    """
    _require_convertible(model)
    kinds = {piece: kind for piece, kind in zip(model.pieces, model.types, strict=True) if kind in _LISTED}
    tokens = {
        piece: AddedToken(piece, i, kinds[piece] != USER_DEFINED)
        for i, piece in enumerate(model.pieces)
        if piece in kinds
    }
    return TokenizerSpec(
        vocab={piece: i for i, piece in enumerate(model.pieces)},
        merges=bpe_merges(model),
        added=list((tokens | {token.content: token for token in added}).values()),
        unk_token=model.pieces[model.types.index(UNKNOWN)],
        byte_fallback=model.byte_fallback,
        adds_space=model.add_dummy_prefix,
        first_only=first_only or USER_DEFINED in model.types,
    )


_LISTED = (UNKNOWN, CONTROL, USER_DEFINED)


def _require_convertible(model: SentencePieceModel) -> None:
    user_defined = [piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == USER_DEFINED]
    reason = None
    if model.model_type != "bpe":
        reason = f"its type is {model.model_type}, not bpe"
    elif model.rewrites_text:
        reason = "it rewrites text before encoding (a normalization rule other than identity)"
    elif model.remove_extra_whitespaces or not model.escape_whitespaces:
        reason = "it removes extra spaces (remove_extra_whitespaces) or does not escape them"
    elif UNKNOWN not in model.types:
        reason = "it has no unknown piece"
    elif UNUSED in model.types:
        reason = "it has unused pieces"
    elif any(SPACE in piece for piece in user_defined):
        reason = "a user-defined piece has a space"
    elif any(" " in piece for piece in model.pieces):
        reason = "a piece has a plain space"
    elif "" in model.pieces or len(set(model.pieces)) != len(model.pieces):
        reason = "a piece is empty or occurs twice"
    elif max(map(len, model.pieces)) > MAX_LENGTH or len(model.pieces) > MAX_TOKENS:
        reason = f"it has more than {MAX_TOKENS} pieces, or one of more than {MAX_LENGTH} characters"
    elif not all(map(math.isfinite, model.scores)):
        reason = "a score is not a finite number"
    elif not _ties_are_safe(model):
        reason = "two pieces have the same score, so the order of merges is not defined"
    if reason:
        raise RequestError(
            f"This SentencePiece model cannot become a tokenizer.json with the same ids: {reason}; "
            "use a tokenizer trained as Llama's (bpe, identity normalization, byte fallback)"
        )


def _ties_are_safe(model: SentencePieceModel) -> bool:
    """Whether all pieces that share a score are runs of one character.

    Among equal scores SentencePiece joins the leftmost pair, whereas merges join the best-ranked one. In a run of one
    character both give the same pieces: the first piece grows from the left until no longer one exists, because merges
    are ranked by the length of their left part. Other pieces with equal scores can overlap; then the
    results differ.
    """
    tied: dict[float, set[str]] = {}
    for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True):
        if kind == NORMAL and len(piece) > 1:
            tied.setdefault(score, set()).add(piece)
    return all(len(pieces) == 1 or is_run("".join(pieces)) for pieces in tied.values())


def is_run(text: str) -> bool:
    """Whether a text is one character repeated."""
    return len(set(text)) == 1


def bpe_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Merge rules (left, right), best first: every split of a piece into two pieces, by the score, then by the length
    of the left part, both descending.

    SentencePiece stores no merges: it joins whichever neighbors make the best-scored piece. Only normal pieces
    join, or the typed characters of a control or byte piece would become its id.
    """
    score = {p: s for p, s, t in zip(model.pieces, model.scores, model.types, strict=True) if t == NORMAL}
    ranked = sorted((piece for piece in score if len(piece) > 1), key=score.__getitem__, reverse=True)
    merges: list[tuple[str, str]] = []
    for _, tied in groupby(ranked, key=score.__getitem__):
        splits = [(p[:cut], p[cut:]) for p in tied for cut in range(len(p) - 1, 0, -1)]
        known = [split for split in splits if split[0] in score and split[1] in score]
        merges += sorted(known, key=lambda split: (len(split[0]), len(split[1])), reverse=True)
    return merges
