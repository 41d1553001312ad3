"""Hugging Face's `tokenizer.json`: the parts that define how text is split into tokens, read and written.

A SentencePiece-style tokenizer consists of a vocabulary, merges, added tokens, and a rule for the space in front.
Everything else in a file is checked or ignored: we add and skip special tokens ourselves, so its post-processor,
truncation, padding, dropout and decoder are not used, and its normalizers must be SentencePiece's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

from ..errors import RequestError, quote
from ..inputs import MAX_BYTES, read_json
from . import added_tokens
from .added_tokens import MAX_TOKENS, AddedToken

SPACE = "\u2581"  # SentencePiece's character for a space
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
NOT_SENTENCEPIECE = "{} is not a SentencePiece-style tokenizer ({}): use Llama 2's, or one trained the same way"
REWRITES = (
    "{} removes spaces or rewrites characters before encoding, so text would change: use Llama 2's tokenizer, "
    "or one trained the same way (identity normalization, remove_extra_whitespaces false)"
)


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


def read_spec(path: Path) -> TokenizerSpec:
    """The tokenizer in a `tokenizer.json`.

    Raises:
        RequestError: a damaged file, or a tokenizer of another kind (byte-level, WordPiece).
    """
    values = read_json(path, max_bytes=MAX_BYTES)
    spec = _read_model(values.get("model"), path)
    spec.adds_space, spec.first_only, splits = _read_spaces(values, path)
    spec.splits = splits and (spec.ignore_merges or spec.spans_words)
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_TOKENS:
        raise damaged(path, "added_tokens must be a list")
    spec.added = [added_tokens.parse(entry, f"{path}") for entry in added]
    if len({token.content for token in spec.added}) != len(spec.added):
        raise damaged(path, "it adds a token twice")
    for next_id, token in enumerate(spec.beyond, len(spec.vocab)):
        if token.id < next_id:
            raise damaged(path, f"the added token {quote(token.content)} has the id {token.id} of another one")
        if token.id > next_id:  # the tokenizers package would give it `next_id`
            raise RequestError(
                f"{path} gives the added token {quote(token.content)} the id {token.id}, but added ids must have no "
                f"gaps, and the next is {next_id}: give it that id if the model was trained with it, else put unused "
                f"tokens (such as <|unused_{next_id}|>) before it."
            )
    for token in spec.added:
        if spec.vocab.get(token.content, token.id) != token.id:
            raise damaged(path, f"{quote(token.content)} has two ids")
    return spec


def damaged(path: Path, why: str) -> RequestError:
    """The error for a `tokenizer.json` that cannot be right."""
    return RequestError(f"{path} is damaged or not a tokenizer ({why}): download it again")


def _read_model(model: Any, path: Path) -> TokenizerSpec:
    """The vocabulary with merges or scores, the unknown token, and the model's switches."""
    if not isinstance(model, dict):
        raise damaged(path, "it has no model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind not in ("BPE", "Unigram"):
        raise RequestError(NOT_SENTENCEPIECE.format(path, f"its model is of type {quote(kind)}"))
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise RequestError(NOT_SENTENCEPIECE.format(path, f"it has a {key}"))
    if kind == "Unigram":
        spec = _read_unigram(model, path)
    else:
        spec = _read_bpe(model, path)
        if (unknown := model.get("unk_token")) is not None:  # transformers 5 leaves it out
            spec.unk_token = unknown
    lengths = [*map(len, spec.vocab)]
    if min(lengths) == 0 or max(lengths) > added_tokens.MAX_LENGTH:
        raise damaged(path, f"its pieces must have 1 to {added_tokens.MAX_LENGTH} characters")
    if not isinstance(spec.unk_token, str) or spec.unk_token not in spec.vocab:
        raise damaged(path, f"its unknown token, {quote(spec.unk_token)}, is not a piece")
    spec.byte_fallback, spec.fuse_unk = (_read_flag(model, key, path) for key in ("byte_fallback", "fuse_unk"))
    spec.ignore_merges = kind == "BPE" and _read_flag(model, "ignore_merges", path)
    return spec


def _read_flag(values: dict[str, Any], key: str, path: Path, default: bool = False) -> bool:
    if not isinstance(flag := values.get(key, default), bool):
        raise damaged(path, f"{key} must be true or false")
    return flag


def _read_bpe(model: dict[str, Any], path: Path) -> TokenizerSpec:
    """The pieces by id, and the merges, which older files write as one string each."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_TOKENS:
        raise damaged(path, f"its vocabulary must have 1 to {MAX_TOKENS} pieces")
    # Tables are as long as the largest id, so a single large one could cost gigabytes.
    if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != list(range(len(vocab))):
        raise damaged(path, f"its {len(vocab)} pieces must have the ids from 0 to {len(vocab) - 1}")
    if not isinstance(merges, list):
        raise damaged(path, "its merges must be a list")
    try:
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    except TypeError:
        pairs = [()]
    if {*map(len, pairs)} - {2} or {*map(type, chain.from_iterable(pairs))} - {str}:
        raise damaged(path, "a merge is not a pair of pieces")
    return TokenizerSpec(vocab, cast(list[tuple[str, str]], pairs))


def _read_unigram(model: dict[str, Any], path: Path) -> TokenizerSpec:
    """The pieces and their scores, by id, and the unknown token."""
    vocab, unknown = model.get("vocab"), cast(int, model.get("unk_id"))
    if not isinstance(vocab, list) or not 0 < len(vocab) <= MAX_TOKENS:
        raise damaged(path, f"its vocabulary must have 1 to {MAX_TOKENS} pieces")
    try:
        pieces = [str(piece) for piece, _ in vocab]
        scores = [float(score) for _, score in vocab]
        unk_token = pieces[unknown]
    except (TypeError, ValueError, IndexError, OverflowError):
        raise damaged(path, "its vocabulary must be pairs of a piece and a score") from None
    if len(set(pieces)) != len(pieces) or not all(map(math.isfinite, scores)):
        raise damaged(path, "a piece occurs twice, or a score is not finite")
    return TokenizerSpec({piece: i for i, piece in enumerate(pieces)}, scores=scores, unk_token=unk_token)


def _read_spaces(values: dict[str, Any], path: Path) -> tuple[bool, bool, bool]:
    """(adds_space, first_only, splits) of a `TokenizerSpec`, from the normalizers and pre-tokenizers.

    `Metaspace` does not add a space to a text that starts with one. SentencePiece does, and so do we.
    """
    adds_space = first_only = replaces = splits = False
    for step in _steps(values.get("normalizer"), "normalizers", path):
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            adds_space = True
        elif step.get("type") == "Replace" and step.get("pattern") in _SPACES and step.get("content") == SPACE:
            replaces = True
        elif step != _DOUBLED_SPACE:
            parts = {key: step[key] for key in ("type", "pattern", "content") if key in step}
            raise RequestError(REWRITES.format(f"the normalizer {quote(parts)} in {path}"))
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers", path):
        if step.get("type") != "Metaspace" or step.get("replacement") not in (SPACE, " "):
            raise RequestError(NOT_SENTENCEPIECE.format(path, f"its pre-tokenizer is {quote(step.get('type'))}"))
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        # If spaces are U+2581 already, a step that looks for plain spaces does not find any.
        splits |= _read_flag(step, "split", path, default=True) and not (replaces and step["replacement"] == " ")
        replaces = replaces or step["replacement"] == SPACE
        first_only = first_only or (scheme == "first" and not adds_space)
        adds_space = adds_space or scheme != "never"
    if not replaces:
        raise RequestError(REWRITES.format(path))
    return adds_space, first_only, splits


_SPACES = ({"String": " "}, {"Regex": " "})
_MOST_STEPS = 100
# With this step, transformers 5 makes `Metaspace` add a space even to a text that starts with one.
_DOUBLED_SPACE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}


def _steps(value: Any, key: str, path: Path) -> Iterable[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with every `Sequence` flattened."""
    left = [] if value is None else [value]
    while left:
        if len(left) > _MOST_STEPS:
            raise damaged(path, f"it has more than {_MOST_STEPS} {key}")
        step = left.pop(0)
        if not isinstance(step, dict):
            raise damaged(path, f"one of its {key} is {quote(step)}")
        if step.get("type") == "Sequence":
            parts = step.get(key)
            left[:0] = parts if isinstance(parts, list) else [parts]
        else:
            yield step


def write_spec(spec: TokenizerSpec, bos_token_id: int) -> dict[str, Any]:
    """The contents of a `tokenizer.json` that other programs read to the same ids, BOS first."""
    bos_token = next((t.content for t in spec.added if t.id == bos_token_id), None) or next(
        piece for piece, i in spec.vocab.items() if i == bos_token_id
    )
    # Prepending in the normalizer would also change the tokens that are matched in normalized text.
    prepends = spec.adds_space and not spec.first_only and not any(token.normalized for token in spec.added)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token.to_dict() for token in sorted(spec.added, key=lambda token: token.id)],
        "normalizer": _space_normalizer(prepends),
        "pre_tokenizer": _space_pre_tokenizer(spec, prepends=prepends),
        "post_processor": _template_processing(bos_token, bos_token_id),
        "decoder": _space_decoder(spec.adds_space),
        "model": _write_model(spec),
    }


def _write_model(spec: TokenizerSpec) -> dict[str, Any]:
    if spec.scores:
        vocab = [[piece, score] for piece, score in zip(spec.pieces, spec.scores, strict=True)]
        unknown = spec.vocab[spec.unk_token]
        return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": spec.byte_fallback}
    # Older readers (mlx-swift's among them) accept merges only as one string.
    as_pairs = any(" " in piece for pair in spec.merges for piece in pair)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": spec.unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": spec.fuse_unk,
        "byte_fallback": spec.byte_fallback,
        "ignore_merges": spec.ignore_merges,
        "vocab": spec.vocab,
        "merges": [list(pair) if as_pairs else " ".join(pair) for pair in spec.merges],
    }


def _space_normalizer(prepends: bool) -> dict[str, Any]:
    """Spaces become U+2581, with one more in front if it `prepends`. `Metaspace` would not add one to text that starts
    with a space."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    return {"type": "Sequence", "normalizers": [prepend, replace] if prepends else [replace]}


def metaspaces(*, adds_space: bool, first_only: bool, splits: bool) -> list[tuple[str, str, bool]]:
    """The `Metaspace` steps (replacement, prepend_scheme, split) that put a space in front of a text, and unless
    `first_only` also in front of the text after an added token.

    After the normalizer no plain space is left, so that the first step puts one before any text; the second turns it
    into U+2581.
    """
    last = (SPACE, "never", splits)
    if adds_space:
        return [(" ", "first" if first_only else "always", False), last]
    return [last] if splits else []


def _space_pre_tokenizer(spec: TokenizerSpec, *, prepends: bool) -> dict[str, Any] | None:
    """The steps of `metaspaces` as JSON; the space in front may be the normalizer's, which then `prepends` it."""
    steps = [
        {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": split}
        for replacement, scheme, split in metaspaces(
            adds_space=spec.adds_space and not prepends, first_only=spec.first_only, splits=spec.splits
        )
    ]
    if len(steps) > 1:
        return {"type": "Sequence", "pretokenizers": steps}
    return steps[0] if steps else None


def _space_decoder(adds_space: bool) -> dict[str, Any]:
    """From pieces back to text: U+2581 to spaces, bytes to characters, and the space in front removed."""
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if adds_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _template_processing(bos_token: str, bos_token_id: int) -> dict[str, Any]:
    """A `TemplateProcessing` that puts one token in front of a text, and of both texts of a pair."""

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
