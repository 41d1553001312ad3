"""Hugging Face's tokenizer files: `tokenizer.json`, and the files beside a tokenizer that list added tokens.

Of a `tokenizer.json`, the vocabulary, the merges, the added tokens and the rule for the space in front are read.
Everything else in it is checked or ignored: we add and skip special tokens ourselves, so its post-processor,
truncation, padding, dropout and decoder are not used, and its normalizers must be SentencePiece's.

transformers keeps added tokens in `added_tokens_decoder` of `tokenizer_config.json`. Older versions kept them in
`added_tokens.json` and `special_tokens_map.json`, which are still read if the first is missing. A special token named
there without an id becomes a new token unless it is a piece. All of this follows transformers 5
(`PreTrainedTokenizerBase._from_pretrained`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from ..errors import RequestError, quote
from ..inputs import MAX_BYTES, read_json
from .tokenizer_spec import FLAGS, MAX_LENGTH, MAX_TOKENS, REWRITES, SPACE, AddedToken, TokenizerSpec

NOT_SENTENCEPIECE = "{} is not a SentencePiece-style tokenizer ({}): use Llama 2's, or one trained the same way"
_SPACES = ({"String": " "}, {"Regex": " "})
_MOST_STEPS = 100
# With this step, transformers 5 makes `Metaspace` add a space even to a text that starts with one.
_DOUBLED_SPACE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
_OLD_FILES = ("special_tokens_map.json", "added_tokens.json")
_OLD_EXTRA = "additional_special_tokens"
_SURROGATE = re.compile("[\ud800-\udfff]")  # a lone surrogate cannot occur in UTF-8 text
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class Named:
    """A token that the file `where` names; without an id it takes its own piece's, or the next free one."""

    token: AddedToken
    where: str
    id: int | None = None


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
    spec.added = [_parse(entry, f"{path}") for entry in added]
    if len({token.content for token in spec.added}) != len(spec.added):
        raise damaged(path, "it adds a token twice")
    beyond = [token for token in spec.added if token.content not in spec.vocab]
    for next_id, token in enumerate(sorted(beyond, key=lambda token: token.id), len(spec.vocab)):
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
    vocab: Any = model.get("vocab")
    if not isinstance(vocab, dict if kind == "BPE" else list) or not 0 < len(vocab) <= MAX_TOKENS:
        raise damaged(path, f"its vocabulary must have 1 to {MAX_TOKENS} pieces")
    if isinstance(vocab, list):  # Unigram
        spec = _read_unigram(vocab, model.get("unk_id"), path)
    else:
        # Tables are as long as the largest id, so a single large one could cost gigabytes.
        if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != list(range(len(vocab))):
            raise damaged(path, f"its {len(vocab)} pieces must have the ids from 0 to {len(vocab) - 1}")
        if not isinstance(merges := model.get("merges"), list):
            raise damaged(path, "its merges must be a list")
        try:  # older files write a merge as one string
            pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
        except TypeError:
            pairs = [()]
        if {*map(len, pairs)} - {2} or {*map(type, chain.from_iterable(pairs))} - {str}:
            raise damaged(path, "a merge is not a pair of pieces")
        unk_token = "<unk>" if model.get("unk_token") is None else model["unk_token"]  # transformers 5 leaves it out
        spec = TokenizerSpec(vocab, cast(list[tuple[str, str]], pairs), unk_token=unk_token)
    lengths = [*map(len, spec.vocab)]
    if min(lengths) == 0 or max(lengths) > MAX_LENGTH:
        raise damaged(path, f"its pieces must have 1 to {MAX_LENGTH} characters")
    if not isinstance(spec.unk_token, str) or spec.unk_token not in spec.vocab:
        raise damaged(path, f"its unknown token, {quote(spec.unk_token)}, is not a piece")
    flags = {key: model.get(key, False) for key in ("byte_fallback", "fuse_unk")}
    flags["ignore_merges"] = kind == "BPE" and model.get("ignore_merges", False)
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise damaged(path, f"{key} must be true or false")
    return replace(spec, **flags)


def _read_unigram(vocab: list[Any], unknown: Any, path: Path) -> TokenizerSpec:
    """The pieces and their scores, by id, and the unknown token."""
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
    steps = {"normalizers": values.get("normalizer"), "pretokenizers": values.get("pre_tokenizer")}
    left = [(key, step) for key, step in steps.items() if step is not None]
    while left:
        if len(left) > _MOST_STEPS:
            raise damaged(path, f"it has more than {_MOST_STEPS} {left[0][0]}")
        key, step = left.pop(0)
        if not isinstance(step, dict):
            raise damaged(path, f"one of its {key} is {quote(step)}")
        kind = step.get("type")
        if kind == "Sequence":
            parts = step.get(key)
            left[:0] = [(key, part) for part in (parts if isinstance(parts, list) else [parts])]
        elif key == "pretokenizers":
            if kind != "Metaspace" or step.get("replacement") not in (SPACE, " "):
                raise RequestError(NOT_SENTENCEPIECE.format(path, f"its pre-tokenizer is {quote(kind)}"))
            if not isinstance(split := step.get("split", True), bool):
                raise damaged(path, "split must be true or false")
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            # If spaces are U+2581 already, a step that looks for plain spaces does not find any.
            splits |= split and not (replaces and step["replacement"] == " ")
            replaces = replaces or step["replacement"] == SPACE
            first_only = first_only or (scheme == "first" and not adds_space)
            adds_space = adds_space or scheme != "never"
        elif kind == "Prepend" and step.get("prepend") == SPACE:
            adds_space = True
        elif kind == "Replace" and step.get("pattern") in _SPACES and step.get("content") == SPACE:
            replaces = True
        elif step != _DOUBLED_SPACE:
            shown = {name: step[name] for name in ("type", "pattern", "content") if name in step}
            raise RequestError(REWRITES.format(f"the normalizer {quote(shown)} in {path}"))
    if not replaces:
        raise RequestError(REWRITES.format(path))
    return adds_space, first_only, splits


def read_added(folder: Path) -> tuple[dict[str, Any], list[Named]]:
    """`tokenizer_config.json`, with the tokens that `special_tokens_map.json` adds to it, and every token these files
    name.

    Raises:
        RequestError: a damaged file.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path, missing_ok=True)
    named: list[Named] = []
    if config.get("added_tokens_decoder") is not None:  # transformers then reads no other file
        named = _read_decoder(config["added_tokens_decoder"], f"added_tokens_decoder in {path}")
    elif any((folder / name).exists() for name in _OLD_FILES):
        named = _read_old_files(folder, config)
    named.sort(key=lambda entry: entry.token.id)
    # The usual special tokens, a model's own (`eot_token`), and the extra ones; older files give each with its flags.
    own = [key for key in config if key.endswith("_token") and key not in _NAMED]
    extra = config.get("extra_special_tokens") or config.get(_OLD_EXTRA) or []
    extra = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    special = {}
    for value in [*(config.get(key) for key in (*_NAMED, *own)), *extra]:
        details = value if isinstance(value, dict) else {"content": value}
        if isinstance(content := details.get("content"), str) and content:
            special[content] = details
    for index, entry in enumerate(named):
        if special.pop(entry.token.content, None) is not None:
            named[index] = replace(entry, token=replace(entry.token, special=True, normalized=False))
    if len({entry.token.content for entry in named}) != len(named):
        raise RequestError(f"{named[0].where} is damaged: it adds a token twice.")
    where = f"a special token in {folder}"
    for content, details in special.items():
        named.append(Named(_parse({**details, "content": content, "special": True, "id": 0}, where), where))
    return config, named


def _read_decoder(decoder: Any, where: str) -> list[Named]:
    """The tokens of `added_tokens_decoder`, an object with ids as keys."""
    named = []
    for key, value in _object(decoder, where).items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key
        token = _parse({**_object(value, where), "id": token_id}, where)
        named.append(Named(token, where, token.id))
    return named


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object.")
    return value


def _read_old_files(folder: Path, config: dict[str, Any]) -> list[Named]:
    """The tokens of `added_tokens.json`; what `special_tokens_map.json` names is put into `config`."""
    older = read_json(folder / "special_tokens_map.json", missing_ok=True)
    # Only flags for tokens that have an id: transformers 5 does not add these.
    extra = older.pop(_OLD_EXTRA, None)
    extra = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    texts = [value.get("content") if isinstance(value, dict) else value for value in extra]
    special = {text for text in texts if isinstance(text, str)}
    config |= older
    path = folder / "added_tokens.json"
    named = []
    for text, value in read_json(path, missing_ok=True).items():
        token = {"content": text, "id": value, "special": text in special, "normalized": text not in special}
        named.append(Named(_parse(token, str(path)), str(path), value))
    return named


def _parse(value: Any, where: str) -> AddedToken:
    """A token from a file, with its id; `where` names the file in messages.

    Raises:
        RequestError: not an object, an id outside 0 to `MAX_TOKENS` - 1, a bad text or flag.
    """
    if not isinstance(value, dict):
        raise RequestError(f"{where} is damaged: {quote(value)} is not an added token.")
    content, token_id = value.get("content"), value.get("id")
    if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
        raise RequestError(f"{where} is damaged: {quote(token_id)} is not a token id (0 to {MAX_TOKENS - 1}).")
    flags = {flag: value.get(flag, False) for flag in (*FLAGS, "special")}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise RequestError(f"{where} is damaged: the flags of {quote(content)} must be true or false.")
    if not isinstance(content, str) or not 0 < len(content) <= MAX_LENGTH or _SURROGATE.search(content):
        raise RequestError(f"{where} is damaged: {quote(content)} is not a token of 1 to {MAX_LENGTH} characters.")
    return AddedToken(content, token_id, **flags)


def resolve(
    named: Iterable[Named], token_to_id: Callable[[str], int | None], size: int, rows: int | None = None
) -> list[AddedToken]:
    """The tokens with their ids: pieces keep theirs, others are numbered from `size` (the number of tokens so far).

    Tokens named without an id (a `pad_token` for training in batches) are left out, with a warning, if the model's
    `rows` are used up.

    Raises:
        RequestError: a file gives a token another id, so it belongs to another tokenizer.
    """
    tokens: list[AddedToken] = []
    left_out: list[str] = []
    for entry in named:
        content, token_id = entry.token.content, token_to_id(entry.token.content)
        if token_id is None and entry.id is None and rows is not None and size >= rows:
            left_out.append(content)
            continue
        if token_id is None:
            token_id, size = size, size + 1
        if entry.id is not None and entry.id != token_id:
            raise RequestError(
                f"{entry.where} gives {quote(content)} the id {entry.id}, but in this tokenizer it has the id "
                f"{token_id}: the file belongs to another tokenizer, so remove or correct it."
            )
        tokens.append(replace(entry.token, id=token_id))
    if left_out:
        tokens_text = quote(left_out if len(left_out) > 1 else left_out[0])
        warnings.warn(
            f"The model has no row for {tokens_text}, named as special without an id: left out.", stacklevel=3
        )
    if size > MAX_TOKENS:
        raise RequestError(f"The tokenizer has {size} tokens, more than the limit of {MAX_TOKENS}.")
    return tokens
