"""The tokenizer inside a GGUF file: llama.cpp's SentencePiece kind (`tokenizer.ggml.model` is `llama`).

Like a `tokenizer.model` it stores pieces, scores and types; like SentencePiece, llama.cpp merges the two neighbors
whose piece has the best score, leftmost first.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, quote
from ..text.chat_template import DEFAULT, TOOL_USE
from ..text.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    bpe_merges,
    is_run,
    read_model,
    serialize_model,
)
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_spec import BYTE_TOKENS, MAX_LENGTH, MAX_TOKENS, AddedToken, TokenizerSpec
from .gguf_metadata import OTHER_ENDS, end_ids

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL = "llama"
_PREFIX = "tokenizer.ggml."
# Our own key: llama.cpp always adds a space after an added token.
_FIRST_ONLY = "mlx_openelm.no_space_after_added_tokens"
# The keys of chat templates, by their names in other files.
_TEMPLATES = {DEFAULT: "tokenizer.chat_template", TOOL_USE: "tokenizer.chat_template.tool_use"}
_UNKNOWN_PIECE = "<unk>"
_ADDED_SCORE = -1000.0  # of added and unused tokens, as llama.cpp's converter writes it


def vocabulary(tokenizer: Tokenizer) -> SentencePieceModel:
    """Pieces, scores and types that make llama.cpp give the tokenizer's ids; added tokens come last.

    They come from its `tokenizer.model`; without one that merges alike, scores are computed from the `tokenizer.json`.

    Raises:
        RequestError: llama.cpp would give other ids.
    """
    spec, file = tokenizer.spec, tokenizer.model_file
    if spec.ignore_merges or spec.splits:
        setting = "ignore_merges" if spec.ignore_merges else "split in its Metaspace"
        raise RequestError(
            f"The tokenizer.json has {setting}, which llama.cpp does not support, so its ids would differ; give the "
            "model's tokenizer.model with --tokenizer."
        )
    model = None if file is None else read_model(file)
    if model is None or model.pieces != spec.pieces or bpe_merges(model) != spec.merges:
        model = _from_merges(spec)
    added = {token.id: CONTROL if token.special else USER_DEFINED for token in spec.added}
    types = [kind if kind in (UNKNOWN, BYTE) else added.get(i, kind) for i, kind in enumerate(model.types)]
    return replace(
        model,
        add_dummy_prefix=spec.adds_space,  # a `tokenizer_config.json` may overrule the file
        pieces=[*model.pieces, *(token.content for token in spec.beyond)],
        scores=[*model.scores, *(_ADDED_SCORE for _ in spec.beyond)],
        types=[*types, *(added[token.id] for token in spec.beyond)],
    )


def _from_merges(spec: TokenizerSpec) -> SentencePieceModel:
    """The SentencePiece model whose scores rank the merges of a `tokenizer.json`; RequestError if there is none."""
    if spec.scores:
        raise RequestError("The tokenizer is of type unigram; llama.cpp supports only bpe.")
    added = {token.content: CONTROL if token.special else USER_DEFINED for token in spec.added}
    types = []
    for piece in spec.pieces:
        kind = added.get(piece, NORMAL)
        if piece == spec.unk_token:
            kind = UNKNOWN
        elif spec.byte_fallback and piece in BYTE_TOKENS:
            kind = BYTE
        types.append(kind)
    model = SentencePieceModel(
        pieces=spec.pieces,
        scores=_scores(spec, types),
        types=types,
        model_type="bpe",
        byte_fallback=spec.byte_fallback,
        add_dummy_prefix=spec.adds_space,
        remove_extra_whitespaces=False,
    )
    # With scores, any two pieces whose concatenation is a piece may merge; a list of merges may allow fewer.
    if len(set(spec.merges)) != len(spec.merges) or set(bpe_merges(model)) != set(spec.merges):
        raise _no_scores()
    return model


def _scores(spec: TokenizerSpec, types: list[int]) -> list[float]:
    """A score for each piece, as SentencePiece assigns them.

    Merged pieces score 0, -1, -2 and so on, in the order of their first merges; single characters follow. Pieces whose
    merges interleave share a score.
    """
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(spec.merges):
        ranks.setdefault("".join(pair), []).append(rank)
    score: dict[str, float] = {}
    group: list[str] = []
    end = -1
    for count, piece in enumerate(ranks):  # in the order of their first merges
        if ranks[piece][0] > end:
            _check_tied(group, spec.merges)
            group = []
        group.append(piece)
        score[piece] = -float(count) if len(group) == 1 else score[group[0]]
        end = max(end, ranks[piece][-1])
    _check_tied(group, spec.merges)
    for piece, kind in zip(spec.pieces, types, strict=True):
        if kind == NORMAL:
            score.setdefault(piece, -float(len(score)))
    return [score[p] if kind == NORMAL else 0.0 for p, kind in zip(spec.pieces, types, strict=True)]


def _check_tied(pieces: list[str], merges: list[tuple[str, str]]) -> None:
    """Refuse pieces that share a score unless their merges give SentencePiece's result, which merges leftmost first.

    They must be runs of one character: a, aa, aaa. Their merges must either be sorted by the left part, longest first,
    or, as in older versions of transformers, build runs of every length with `(aa, a)` ranked before `(a, a)`.

    Raises:
        RequestError: they do not.
    """
    if len(pieces) < 2:
        return
    if not is_run("".join(pieces)):
        raise _no_scores()
    tied, character = set(pieces), pieces[0][0]
    order = [(len(left), len(right)) for left, right in merges if left + right in tied]
    if order == sorted(order, reverse=True):
        return
    longest = max(map(len, pieces))
    if not {character * length for length in range(3, longest + 1)} <= tied:
        raise _no_scores()
    growing = [(character * length, character) for length in range(2, longest)]
    ranks = {pair: rank for rank, pair in enumerate(merges) if pair in {*growing, (character, character)}}
    if len(ranks) < longest - 1 or max(ranks, key=ranks.__getitem__) != (character, character):
        raise _no_scores()


def _no_scores() -> RequestError:
    return RequestError(
        "The merges of this tokenizer.json are not those of a SentencePiece model, so llama.cpp's ids would "
        "differ; give the model's tokenizer.model with --tokenizer."
    )


def write(writer: GGUFWriter, tokenizer: Tokenizer, rows: int, templates: Mapping[str, str]) -> None:
    """Add the tokenizer's keys; warns about what they cannot express.

    Args:
        rows: of the embedding; those beyond the tokenizer's pieces become unused tokens.
        templates: chat templates by name (see `Tokenizer.templates`).

    Raises:
        RequestError: llama.cpp would give other ids.
    """
    model, spec = vocabulary(tokenizer), tokenizer.spec
    padding = range(len(model.pieces), rows)
    writer.add_tokenizer_model(MODEL)
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*model.pieces, *(f"[PAD{i}]" for i in padding)])
    writer.add_token_scores([*map(float, model.scores), *(_ADDED_SCORE for _ in padding)])
    writer.add_token_types([*model.types, *(UNUSED for _ in padding)])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    others = sorted(tokenizer.eos_token_ids - {tokenizer.eos_token_id})
    for name, token_id in zip(OTHER_ENDS, others, strict=False):
        writer.add_uint32(f"{_PREFIX}{name}_token_id", token_id)
    _warn_of_losses(spec, others[len(OTHER_ENDS) :])
    if UNKNOWN in model.types:
        writer.add_unk_token_id(model.types.index(UNKNOWN))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.add_dummy_prefix)
    if spec.beyond and spec.adds_space and spec.first_only:
        writer.add_bool(_FIRST_ONLY, True)
    if templates:
        writer.add_chat_template([{"name": name, "template": source} for name, source in templates.items()])


def _warn_of_losses(spec: TokenizerSpec, ends: list[int]) -> None:
    flagged = [token.content for token in spec.parsed if token.lstrip or token.rstrip or token.single_word]
    if flagged:
        warnings.warn(
            f"GGUF cannot store lstrip, rstrip or single_word for added tokens; text around "
            f"{', '.join(map(quote, flagged[:4]))} will be tokenized differently.",
            stacklevel=2,
        )
    if ends:
        warnings.warn(f"GGUF stores at most three end tokens; generation will not stop at {ends}.", stacklevel=2)


def read(values: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer in a file's keys.

    It is read through a `tokenizer.model` in a temporary folder, which is removed along with it.

    Raises:
        RequestError: the file has no tokenizer, one of another kind, or a damaged one.
    """
    kind = values.get(_PREFIX + "model")
    if kind != MODEL:
        raise RequestError(f"{path} has a {quote(kind)} tokenizer; only {MODEL!r} (SentencePiece) is supported.")
    model, added = _read_vocabulary(values, path)
    special = _read_special(values, [*model.pieces, *(token.content for token in added)], path)
    config: dict[str, Any] = {f"{name}_token": piece for name, piece in special.items()}
    decoder = {str(token.id): {k: v for k, v in token.to_dict().items() if k != "id"} for token in added}
    config |= {"added_tokens_decoder": decoder, "legacy": values.get(_FIRST_ONLY) is not True}
    templates = {name: values.get(key) for name, key in _TEMPLATES.items()}
    config["chat_template"] = {name: source for name, source in templates.items() if isinstance(source, str)}
    # Saving the tokenizer copies its file, so the folder must exist as long as the tokenizer does.
    temporary = tempfile.TemporaryDirectory(prefix="mlx-openelm-")
    folder = Path(temporary.name)
    (folder / "tokenizer.model").write_bytes(serialize_model(model, bos_piece=special["bos"], eos_piece=special["eos"]))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_folder(folder, eos_token_ids=end_ids(values))
    except RequestError as error:
        temporary.cleanup()
        reason = str(error).replace(f"{folder}/", "").rstrip(".")
        raise _damaged(path, f"its pieces are not a valid SentencePiece model ({reason})") from None
    weakref.finalize(tokenizer, temporary.cleanup)
    return tokenizer


def _read_vocabulary(values: dict[str, Any], path: Path) -> tuple[SentencePieceModel, list[AddedToken]]:
    """The pieces of the SentencePiece model, and the tokens that were added to it."""
    if not isinstance(add_space := values.get(_PREFIX + "add_space_prefix", True), bool):
        raise _damaged(path, f"add_space_prefix is {quote(add_space)}")
    pieces, scores, types = (
        _list(values, key, kind, path) for key, kind in (("tokens", str), ("scores", float), ("token_type", int))
    )
    if not len(pieces) == len(scores) == len(types):
        raise _damaged(path, "tokens, scores and types must have the same length")
    if len(pieces) > MAX_TOKENS or max(map(len, pieces), default=0) > MAX_LENGTH:
        raise _damaged(path, f"it has more than {MAX_TOKENS} tokens, or one of more than {MAX_LENGTH} characters")
    if unknown := set(types) - set(range(NORMAL, BYTE + 1)):
        raise _damaged(path, f"it has tokens of unknown type {min(unknown)}")
    if not all(map(math.isfinite, scores)):
        raise _damaged(path, "a score is not finite")
    _mark_unknown(values, pieces, types, path)
    while types[-1] == UNUSED:  # padding up to the rows of the embedding
        types.pop()
    added = []
    # SentencePiece's own control tokens come first; those at the end were added.
    while (kind := types[-1]) in (CONTROL, USER_DEFINED):
        types.pop()
        added.append(AddedToken(pieces[len(types)], len(types), special=kind == CONTROL))
    model = SentencePieceModel(
        pieces=pieces[: len(types)],
        scores=scores[: len(types)],
        types=types,
        model_type="bpe",
        byte_fallback=BYTE in types,
        add_dummy_prefix=add_space,
        remove_extra_whitespaces=False,
    )
    return model, added[::-1]


def _mark_unknown(values: dict[str, Any], pieces: list[str], types: list[int], path: Path) -> None:
    """Give the unknown token its type if none has it.

    llama.cpp's converter writes `CONTROL` for every special token in transformers 4's `added_tokens_decoder`, which
    includes the unknown one.

    Raises:
        RequestError: no control token can be it.
    """
    if UNKNOWN in types:
        return
    named = values.get(_PREFIX + "unknown_token_id")
    if named is None:
        named = pieces.index(_UNKNOWN_PIECE) if _UNKNOWN_PIECE in pieces else 0  # llama.cpp's default
    if type(named) is not int or not 0 <= named < len(types) or types[named] != CONTROL:
        raise RequestError(f"The tokenizer in {path} has no unknown token, which SentencePiece needs.")
    types[named] = UNKNOWN


def _read_special(values: dict[str, Any], pieces: list[str], path: Path) -> dict[str, str]:
    """The pieces of `bos` and `eos`; without a key they have Llama's ids."""
    special = {}
    for name, default in (("bos", 1), ("eos", 2)):
        token_id = values.get(f"{_PREFIX}{name}_token_id", default)
        if not isinstance(token_id, int) or not 0 <= token_id < len(pieces):
            raise _damaged(path, f"{name}_token_id is {quote(token_id)}")
        special[name] = pieces[token_id]
    return special


def _list(values: dict[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    value = values.get(_PREFIX + key)
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise RequestError(f"The tokenizer in {path} has no {_PREFIX}{key}.")
    return value


def _damaged(path: Path, reason: str) -> RequestError:
    return RequestError(f"The tokenizer in {path} is damaged: {reason}.")
