"""What mlx-lm and other programs call on a tokenizer of transformers: its names, on top of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, overload

from ..errors import RequestError, quote
from .chat_template import named_tokens
from .tokenizers_engine import Engine

# What `load` can override of a tokenizer; the last needs no answer, since no code of a repository is ever run.
_CONFIG_KEYS = ("bos_token", "eos_token", "pad_token", "chat_template", "trust_remote_code")
# Arguments of transformers' `apply_chat_template` that would otherwise be taken for variables of the template.
_NOT_VARIABLES = (
    "chat_template",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_tensors",
    "tokenizer_kwargs",
    "truncation",
)


class TransformersInterface:
    """The vocabulary and the special tokens, with our names and those of transformers; `Tokenizer` inherits them."""

    _engine: Engine
    _config: dict[str, Any]
    bos_token_id: int
    eos_token_id: int
    eos_token_ids: set[int]
    chat_template: str | None
    vocab_size: int
    _for_tools: tuple[str | None, str | None]  # a template for tools, after the `chat_template` that it belongs to

    @property
    def tool_template(self) -> str | None:
        """The template for conversations with tools, if there is another one; none once `chat_template` was set."""
        own, template = self._for_tools
        return template if self.chat_template == own else None

    def id_to_token(self, token_id: int) -> str:
        """The piece of an id, with spaces as U+2581; `RequestError` if there is no such token."""
        token = self._engine.id_to_token(token_id)
        if token is None:
            raise RequestError(f"There is no token {token_id}: this tokenizer has {self.vocab_size} tokens")
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece, in the form `id_to_token` gives; None if there is no such piece."""
        return self._engine.token_to_id(token)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def bos_token(self) -> str:
        return self.id_to_token(self.bos_token_id)

    @property
    def eos_token(self) -> str:
        return self.id_to_token(self.eos_token_id)

    @property
    def unk_token_id(self) -> int | None:
        return self._engine.unk_token_id

    @property
    def unk_token(self) -> str | None:
        return None if self.unk_token_id is None else self.id_to_token(self.unk_token_id)

    @property
    def pad_token(self) -> str | None:
        """The padding token that `tokenizer_config.json` names, if there is one."""
        return named_tokens(self._config).get("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        return None if self.pad_token is None else self.token_to_id(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of all special tokens, in ascending order."""
        return sorted({*self._engine.control_tokens.values(), *self._engine.special_beyond.values()})

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of all special tokens, in the order of their ids."""
        return self.convert_ids_to_tokens(self.all_special_ids)

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, special and added ones included."""
        return {self.id_to_token(token_id): token_id for token_id in range(self.vocab_size)}

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str] | tuple[str, ...]) -> int | list[int | None] | None:
        """The id of a token, or a list of those of several; None where there is no such token."""
        if isinstance(tokens, str):
            return self.token_to_id(tokens)
        return list(map(self.token_to_id, tokens))

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """The text of a token, or a list of those of several, with spaces as U+2581.

        Raises `RequestError` for an id that is out of range.
        """
        return self.id_to_token(ids) if isinstance(ids, int) else list(map(self.id_to_token, ids))

    def with_config(self, given: Mapping[str, Any]) -> Self:
        """This tokenizer with other special tokens or another chat template, as mlx-lm's `tokenizer_config` sets them.

        `given` can have `bos_token`, `eos_token` (one more token that ends a generation), `pad_token` and
        `chat_template` (jinja source). `trust_remote_code` changes nothing, since no code of a repository is run.
        Raises `RequestError` for other keys and for tokens that are not in the vocabulary.
        """
        check_config(given, self._engine)
        make: Callable[..., Self] = type(self)  # Tokenizer
        changed = make(
            self._engine,
            config={**self._config, **given},
            model_config={"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id},
            eos_token_ids=self.eos_token_ids,
            chat_template=given.get("chat_template", self.chat_template),
            tool_template=None if "chat_template" in given else self.tool_template,
        )
        changed.eos_token_ids.add(changed.eos_token_id)
        return changed

    def _encode_with_control_tokens(self, text: str, add_bos: bool) -> list[int]:
        """The ids of `text`, with control tokens in it (`<s>`, `</s>`) as their ids, and with `add_bos` BOS once."""
        tokens = self._engine.control_tokens
        choices = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
        parts = re.split(f"({choices})", text)  # text, token, text, token, ..., text
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(tokens[part])
            elif part:
                ids += self._engine.encode(part, start=index == 0)
        return [self.bos_token_id, *ids] if add_bos and ids[:1] != [self.bos_token_id] else ids


def check_config(given: Mapping[str, Any], engine: Engine) -> None:
    """Refuse what a `tokenizer_config` cannot override, and tokens that the tokenizer does not have.

    Raises:
        RequestError: an unknown key, a value that is not text, or a token that is not in the vocabulary.
    """
    for key, value in given.items():
        if key not in _CONFIG_KEYS:
            raise RequestError(f"tokenizer_config has {quote(key)}; it can have {', '.join(_CONFIG_KEYS)}.")
        if key == "trust_remote_code":
            continue
        if not isinstance(value, str):
            raise RequestError(f"{key} in tokenizer_config must be text, got {quote(value)}.")
        if key != "chat_template" and engine.token_to_id(value) is None:
            raise RequestError(f"{key} in tokenizer_config is {quote(value)}, which is not a token of this tokenizer.")


def check_variables(variables: Iterable[str]) -> None:
    """Raise `RequestError` for arguments of transformers' `apply_chat_template` that ours does not have."""
    unknown = [name for name in _NOT_VARIABLES if name in variables]
    if unknown:
        raise RequestError(f"apply_chat_template has no option {', '.join(unknown)}.")
