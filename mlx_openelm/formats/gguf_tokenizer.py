"""The tokenizer inside a GGUF file: llama.cpp's SentencePiece kind (`tokenizer.ggml.model` is `llama`).

It stores what a `tokenizer.model` does: pieces, scores and types. llama.cpp joins the neighbours whose piece has
the best score, the leftmost first, as SentencePiece does.
"""

from __future__ import annotations

import json
import tempfile
import weakref
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, quote
from ..tokenizer import Tokenizer
from .sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    bpe_merges,
    read_model,
    serialize_model,
)
from .tokenizer_json import BYTE_TOKEN, SPACE

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL = "llama"
_PREFIX = "tokenizer.ggml."


def vocabulary(tokenizer: Tokenizer) -> SentencePieceModel:
    """Pieces, scores and types with which llama.cpp gives the tokenizer's ids.

    They are those of its `tokenizer.model`; where there is only a `tokenizer.json`, the scores follow the merges.

    Raises:
        RequestError: a tokenizer that llama.cpp would encode otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        file = Path(folder) / "tokenizer.model"
        # A tokenizer.json may have tokens more than the tokenizer.model beside it.
        if file.exists() and len((model := read_model(file)).pieces) == tokenizer.vocab_size:
            if model.model_type != "bpe":
                raise RequestError(f"The tokenizer is of type {model.model_type}, of which llama.cpp knows bpe only.")
            return model
        return _from_json(tokenizer, json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8")))


def _from_json(tokenizer: Tokenizer, spec: dict[str, Any]) -> SentencePieceModel:
    byte_fallback = bool(spec["model"].get("byte_fallback"))
    unknown = spec["model"].get("unk_token")
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in spec["added_tokens"]}
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    types = []
    for token_id, piece in enumerate(pieces):
        kind = added.get(token_id, NORMAL)
        if piece == unknown:
            kind = UNKNOWN
        elif byte_fallback and BYTE_TOKEN.fullmatch(piece):
            kind = BYTE
        types.append(kind)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"].get("merges", [])]
    joined = [piece for piece, _ in groupby("".join(pair) for pair in merges)]
    scores = _scores(pieces, types, joined)
    first = tokenizer.encode("a", add_bos=False)[0]
    model = SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        model_type="bpe",
        byte_fallback=byte_fallback,
        add_dummy_prefix=tokenizer.id_to_token(first).startswith(SPACE),
        remove_extra_whitespaces=False,
    )
    # By scores every two pieces that make a third may join; merges may allow fewer, or rank them one by one.
    if len(set(joined)) != len(joined) or set(bpe_merges(model)) != {" ".join(pair) for pair in merges}:
        raise RequestError(
            "The merges of this tokenizer.json are not those of a SentencePiece model, so llama.cpp would give other "
            "ids; give the model's tokenizer.model with --tokenizer."
        )
    return model


def _scores(pieces: list[str], types: list[int], joined: list[str]) -> list[float]:
    """As SentencePiece counts: 0 for the first merge, one less for each next, then the characters that none makes."""
    merged = set(joined)
    single = [piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL and piece not in merged]
    rank = {piece: i for i, piece in enumerate([*joined, *single])}
    return [-float(rank[p]) if kind == NORMAL else 0.0 for p, kind in zip(pieces, types, strict=True)]


def write(writer: GGUFWriter, tokenizer: Tokenizer, rows: int, chat_template: str | None) -> None:
    """Add the tokenizer's keys; rows of the embedding beyond its pieces (`rows` in all) become unused tokens."""
    model = vocabulary(tokenizer)
    padding = range(len(model.pieces), rows)
    writer.add_tokenizer_model(MODEL)
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*model.pieces, *(f"[PAD{i}]" for i in padding)])
    writer.add_token_scores([*map(float, model.scores), *(-1000.0 for _ in padding)])
    writer.add_token_types([*model.types, *(UNUSED for _ in padding)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if UNKNOWN in model.types:
        writer.add_unk_token_id(model.types.index(UNKNOWN))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.add_dummy_prefix)
    if chat_template:
        writer.add_chat_template(chat_template)


def read(values: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of a file's keys. It is read from a `tokenizer.model` that lives as long as it does.

    Raises:
        RequestError: no tokenizer inside, one of another kind, or a damaged one.
    """
    kind = values.get(_PREFIX + "model")
    if kind != MODEL:
        raise RequestError(f"{path} holds a tokenizer of kind {quote(kind)}; OpenELM's is {MODEL!r} (SentencePiece).")
    kinds = {"tokens": str, "scores": float, "token_type": int}
    pieces, scores, types = (_list(values, key, kind, path) for key, kind in kinds.items())
    if not len(pieces) == len(scores) == len(types):
        raise RequestError(f"The tokenizer in {path} is damaged: tokens, scores and types must be as many.")
    if unknown := set(types) - set(range(NORMAL, BYTE + 1)):
        raise RequestError(f"The tokenizer in {path} is damaged: there are no tokens of type {min(unknown)}.")
    if not isinstance(add_space := values.get(_PREFIX + "add_space_prefix", True), bool):
        raise RequestError(f"The tokenizer in {path} is damaged: add_space_prefix is {quote(add_space)}.")
    while types and types[-1] == UNUSED:  # what fills the vocabulary up to the model's rows
        pieces, scores, types = pieces[:-1], scores[:-1], types[:-1]
    special = {}
    for name, default in (("bos", 1), ("eos", 2)):
        token_id = values.get(f"{_PREFIX}{name}_token_id", default)
        if not isinstance(token_id, int) or not 0 <= token_id < len(pieces):
            raise RequestError(f"The tokenizer in {path} is damaged: {name}_token_id is {quote(token_id)}.")
        special[name] = pieces[token_id]
    if UNKNOWN not in types:
        raise RequestError(f"The tokenizer in {path} has no unknown token, which SentencePiece needs.")
    model = SentencePieceModel(
        pieces=pieces,
        scores=scores,
        types=types,
        model_type="bpe",
        byte_fallback=BYTE in types,
        add_dummy_prefix=add_space,
        remove_extra_whitespaces=False,
    )
    # Saving the tokenizer copies its file, so the folder goes when the tokenizer does.
    folder = tempfile.TemporaryDirectory(prefix="mlx-openelm-")
    file = Path(folder.name)
    (file / "tokenizer.model").write_bytes(serialize_model(model, bos_piece=special["bos"], eos_piece=special["eos"]))
    config = {f"{name}_token": piece for name, piece in special.items()}
    (file / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if isinstance(template := values.get("tokenizer.chat_template"), str):
        (file / "chat_template.jinja").write_text(template, encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_folder(file)
    except RequestError:
        folder.cleanup()
        raise RequestError(f"The tokenizer in {path} is damaged: its pieces make no SentencePiece model.") from None
    weakref.finalize(tokenizer, folder.cleanup)
    return tokenizer


def _list(values: dict[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    value = values.get(_PREFIX + key)
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise RequestError(f"The tokenizer in {path} has no {_PREFIX}{key}.")
    return value
