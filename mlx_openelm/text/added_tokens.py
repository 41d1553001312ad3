"""Tokens that were added to a tokenizer, and the files beside it that list them.

transformers keeps them in `added_tokens_decoder` of `tokenizer_config.json`. Older versions kept them in
`added_tokens.json` and `special_tokens_map.json`, which are still read if the first is missing. A special token named
there without an id becomes a new token unless it is a piece. All of this follows transformers 5
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

# The largest vocabularies in use have about 300,000 tokens. Ids are bounded because tables are as long as the largest.
MAX_TOKENS = 1 << 20
# The longest token; SentencePiece's own pieces have at most 16 characters by default.
MAX_LENGTH = 1000
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_OLD_EXTRA = "additional_special_tokens"
_SURROGATE = re.compile("[\ud800-\udfff]")  # a lone surrogate, which no text has
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the tokenizer's model sees it.

    `single_word` matches whole words only, `lstrip` and `rstrip` also match the spaces beside it, `normalized` tokens
    are matched after the others. `special` tokens decode to no text.
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
    """A token that the file `where` names; without an id it takes its own piece's, or the next free one."""

    token: AddedToken
    where: str
    id: int | None = None


def parse(value: Any, where: str) -> AddedToken:
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


def read(folder: Path) -> tuple[dict[str, Any], list[Named]]:
    """`tokenizer_config.json`, with the tokens that `special_tokens_map.json` adds to it, and every token these files
    name.

    Raises:
        RequestError: a damaged file.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path, missing_ok=True)
    named: list[Named] = []
    flags: set[str] = set()
    if config.get("added_tokens_decoder") is not None:  # transformers then reads no other file
        where = f"added_tokens_decoder in {path}"
        for key, value in _object(config["added_tokens_decoder"], where).items():
            token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key
            token = parse({**_object(value, where), "id": token_id}, where)
            named.append(Named(token, where, token.id))
    else:
        older = read_json(folder / "special_tokens_map.json", missing_ok=True)
        # Only flags for tokens that have an id: transformers 5 does not add these.
        extra = older.pop(_OLD_EXTRA, None)
        flags.update(_special_tokens({"extra_special_tokens": extra}))
        config |= older
        path = folder / "added_tokens.json"
        for text, value in read_json(path, missing_ok=True).items():
            token = parse({"content": text, "id": value, "normalized": True}, str(path))
            named.append(Named(token, str(path), token.id))
    named.sort(key=lambda entry: entry.token.id)
    special = _special_tokens(config)
    flags.update(special)
    for index, entry in enumerate(named):
        if entry.token.content in flags:
            named[index] = replace(entry, token=replace(entry.token, special=True, normalized=False))
            special.pop(entry.token.content, None)
    if len({entry.token.content for entry in named}) != len(named):
        raise RequestError(f"{named[0].where} is damaged: it adds a token twice.")
    where = f"a special token in {folder}"
    for content, details in special.items():
        named.append(Named(parse({**details, "content": content, "special": True, "id": 0}, where), where))
    return config, named


def _special_tokens(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The special tokens that a config names, by text, with the flags that older files give them: the usual ones, a
    model's own (`eot_token`), and the list of extra ones, which older versions of transformers called differently."""
    own = [key for key in config if key.endswith("_token") and key not in _NAMED]
    extra = config.get("extra_special_tokens") or config.get(_OLD_EXTRA) or []
    extra = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
    found = {}
    for value in [*(config.get(key) for key in (*_NAMED, *own)), *extra]:
        details = value if isinstance(value, dict) else {"content": value}
        if isinstance(content := details.get("content"), str) and content:
            found[content] = details
    return found


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
            f"The model has no row for {tokens_text}, named as special without an id: left out.", stacklevel=4
        )
    if size > MAX_TOKENS:
        raise RequestError(f"The tokenizer has {size} tokens, more than the limit of {MAX_TOKENS}.")
    return tokens


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be a JSON object.")
    return value
