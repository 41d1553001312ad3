"""Tokens that a person added to a tokenizer, and the files beside it that tell of them.

transformers keeps them in `added_tokens_decoder` of `tokenizer_config.json`; older versions kept them in
`added_tokens.json` and `special_tokens_map.json`, which it still reads where the first is missing. A special token that
is named there without an id, and is no piece, becomes a token as well. All of it is read here as transformers 5 does
(`PreTrainedTokenizerBase._from_pretrained`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
from ..inputs import read_json

# The largest vocabularies in use have some 300,000 tokens. Tables are as long as the largest id, so that is bounded.
MAX_TOKENS = 1 << 20
# The longest token; SentencePiece's own pieces have 16 characters unless told.
MAX_LENGTH = 1000
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_OLD_EXTRA = "additional_special_tokens"
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no text can hold
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before the tokenizer's model sees it.

    `single_word` matches whole words only, `lstrip` and `rstrip` swallow the spaces beside it, `normalized` is matched
    after those that are not. `special` tokens have no text when they are decoded.
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


@dataclass(frozen=True)
class Named:
    """A token whose id may follow from the others': what a file says of it, and where."""

    token: AddedToken
    where: str
    id: int | None = None


def parse(value: Any, where: str) -> AddedToken:
    """One entry of `added_tokens` in a `tokenizer.json`; `RequestError` for what is none."""
    if not isinstance(value, dict):
        raise RequestError(f"{where} is damaged: {quote(value)} is not an added token.")
    return _token(value, check_id(value.get("id"), where), where)


def check_id(value: Any, where: str) -> int:
    """An id from a file, or `RequestError`; bounded, since tables are made as long as the largest."""
    if type(value) is not int or not 0 <= value < MAX_TOKENS:
        raise RequestError(f"{where} is damaged: {quote(value)} is not a token id (0 to {MAX_TOKENS - 1}).")
    return value


def check_content(value: Any, where: str) -> str:
    """The text of a token from a file, or `RequestError`."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_LENGTH or _SURROGATE.search(value):
        raise RequestError(f"{where} is damaged: {quote(value)} is not a token of 1 to {MAX_LENGTH} characters.")
    return value


def read(folder: Path) -> tuple[dict[str, Any], list[Named]]:
    """`tokenizer_config.json` with what `special_tokens_map.json` adds, and every token that the files name.

    Raises:
        RequestError: a damaged file.
    """
    path = folder / "tokenizer_config.json"
    config, named, flagged = read_if_there(path), [], []
    if config.get("added_tokens_decoder") is not None:  # then transformers reads no other file
        where = f"added_tokens_decoder in {path}"
        for key, value in _object(config["added_tokens_decoder"], where).items():
            token_id = check_id(int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key, where)
            named.append(Named(_token(_object(value, where), token_id, where), where, token_id))
    else:
        older = read_if_there(folder / "special_tokens_map.json")
        # These are flags of tokens that have an id: transformers 5 makes no new ones of them.
        flagged = _list(older.pop(_OLD_EXTRA, None))
        config |= older
        path = folder / "added_tokens.json"
        for text, value in read_if_there(path).items():
            token = AddedToken(check_content(text, str(path)), check_id(value, str(path)), normalized=True)
            named.append(Named(token, str(path), token.id))
    named.sort(key=lambda entry: entry.token.id)
    special = {content: value for value in _special(config) if (content := _content(value))}
    flags = special.keys() | {*map(_content, flagged)}
    for index, entry in enumerate(named):
        if entry.token.content in flags:
            named[index] = replace(entry, token=replace(entry.token, special=True, normalized=False))
            special.pop(entry.token.content, None)
    if len({entry.token.content for entry in named}) != len(named):
        raise RequestError(f"{named[0].where} is damaged: it adds a token twice.")
    where = f"a special token in {folder}"
    for content, value in special.items():
        details = value if isinstance(value, dict) else {}
        named.append(Named(_token({**details, "content": content, "special": True}, 0, where), where))
    return config, named


def resolve(
    named: Iterable[Named], token_to_id: Callable[[str], int | None], size: int, rows: int | None = None
) -> list[AddedToken]:
    """The tokens with their ids: a piece keeps its own, others follow the `size` tokens there are, in order.

    Those named without an id (a `pad_token` for training in batches) are left out, with a warning, where the model has
    no row for them among its `rows`.

    Raises:
        RequestError: a file gives a token another id, as it would have in a tokenizer it does not belong to.
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
        shown = quote(left_out if len(left_out) > 1 else left_out[0])
        warnings.warn(f"The model has no row for {shown}, named as special without an id: left out.", stacklevel=4)
    if size > MAX_TOKENS:
        raise RequestError(f"The tokenizer has {size} tokens, more than the {MAX_TOKENS} one may have.")
    return tokens


def _token(value: dict[str, Any], token_id: int, where: str) -> AddedToken:
    flags = {flag: value.get(flag, False) for flag in (*FLAGS, "special")}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise RequestError(f"{where} is damaged: the flags of {quote(value.get('content'))} must be true or false.")
    return AddedToken(check_content(value.get("content"), where), token_id, **flags)


def _special(config: dict[str, Any]) -> list[Any]:
    """The special tokens that a config names: the usual ones, a model's own (`eot_token`), and a list of further ones,
    which transformers 5 and older versions call differently."""
    own = [key for key in config if key.endswith("_token") and key not in _NAMED]
    extra = config.get("extra_special_tokens") or config.get(_OLD_EXTRA)
    return [*(config.get(key) for key in (*_NAMED, *own)), *_list(extra)]


def _list(value: Any) -> list[Any]:
    """A list as it is, an object's values, nothing of what else a file may hold."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _content(value: Any) -> str | None:
    """The text of a special token, which older files spell out with its flags."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object.")
    return value


def read_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file that need not be there; `RequestError` for a damaged one."""
    return read_json(path) if path.exists() else {}
