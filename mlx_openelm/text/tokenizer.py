"""Text to token ids and back, from a `tokenizer.json` or a SentencePiece `tokenizer.model`.

Both give SentencePiece's ids. The tokenizers or the sentencepiece package encodes, whichever reads the file; decoding
is in `streaming`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

from ..errors import RequestError, quote
from ..inputs import read_json, refuse_device
from . import chat_template as chat
from .chat_messages import Message, check_messages, for_built_in
from .streaming import StreamingDecoder, TokenBytes
from .tokenizer_spec import TokenizerSpec
from .tokenizers_engine import ENGINES, Engine, TokenizersEngine, open_engine
from .transformers_interface import TransformersInterface, check_variables


class Tokenizer(TransformersInterface):
    """A SentencePiece-style tokenizer: spaces are part of the pieces, and unknown characters become bytes.

    Programs written for transformers' tokenizers, such as mlx-lm, can use it.

    Create one with `from_folder` or `from_file`. `bos_token_id` and `eos_token_id` are the tokenizer's own,
    `eos_token_ids` are all tokens that end a generation, `vocab_size` is the number of tokens including special ones,
    `chat_template` is the folder's own template (jinja source), `tool_template` its other one for conversations with
    tools, if there is one; setting the first removes the second.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
        eos_token_ids: Iterable[int] | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
    ):
        """`config` is a `tokenizer_config.json`, `model_config` the ids in the model's configs.

        Raises `RequestError` if BOS or EOS is missing, and for ids that the tokenizer does not have.
        """
        self._engine = engine
        self.vocab_size = engine.vocab_size
        self._config = config or {}
        self.chat_template = chat_template
        self._for_tools = chat_template, tool_template
        ids: dict[str, list[int]] = {}
        # BOS and EOS: from the tokenizer config, else the tokenizer itself, else the model config.
        for name, own_id in (("bos", engine.bos_token_id), ("eos", engine.eos_token_id)):
            token = self._config.get(f"{name}_token")
            if isinstance(token, dict):  # older files give a token with its flags
                token = token.get("content")
            token_id = engine.token_to_id(token) if isinstance(token, str) else None
            token_id = own_id if token_id is None else token_id
            ids[name] = [] if token_id is None else [token_id]
            if not ids[name] or (name == "eos" and eos_token_ids is None):
                value = (model_config or {}).get(f"{name}_token_id")
                listed = value if isinstance(value, list) else [] if value is None else [value]
                if not all(type(item) is int for item in listed):
                    raise RequestError(f"{name}_token_id must be a token id or a list of them, not {quote(value)}")
                ids[name] += listed
            if not ids[name]:
                raise RequestError(
                    f"The tokenizer has no {name} token: name it as {name}_token in tokenizer_config.json"
                )
        self.bos_token_id, self.eos_token_id = ids["bos"][0], ids["eos"][0]
        self.eos_token_ids = set(ids["eos"] if eos_token_ids is None else eos_token_ids)
        named = [("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id)]
        for key, token_id in [*named, *(("eos_token_id", token_id) for token_id in self.eos_token_ids)]:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{key} is {token_id}, but the tokenizer has {self.vocab_size} tokens: it belongs to another model"
                )
        if isinstance(engine, TokenizersEngine):  # a SentencePiece model knows its special tokens
            engine.build((self.bos_token_id, self.eos_token_id))

    @classmethod
    def from_folder(
        cls, folder: Path, *, eos_token_ids: Iterable[int] | None = None, rows: int | None = None
    ) -> Tokenizer:
        """The tokenizer of a model folder: its `tokenizer.json`, else its `tokenizer.model`.

        The special ids come from `tokenizer_config.json`, the tokenizer itself, `generation_config.json` and
        `config.json`. `eos_token_ids` replaces the set of ending tokens. `rows` is the number of tokens the model can
        take: special tokens named without an id that would not fit are left out, with a warning.
        Raises `RequestError` if there is no tokenizer, or a file is damaged.
        """
        folder = Path(folder)
        path = next((p for name in ENGINES if (p := folder / name).is_file()), None)
        if path is None:
            raise RequestError(
                f"No tokenizer.json or tokenizer.model in {folder}: put one there, or give one with --tokenizer"
            )
        engine, config = open_engine(path, rows=rows, beside=True)
        model_config = read_json(folder / "config.json", missing_ok=True)
        generation_config = read_json(folder / "generation_config.json", missing_ok=True)
        model_config.update((key, value) for key, value in generation_config.items() if value is not None)
        files = ("chat_template.jinja", "additional_chat_templates")
        has_templates = "chat_template" in config or any((folder / name).exists() for name in files)
        templates = chat.read_templates(folder, config) if has_templates else {}
        return cls(
            engine,
            config=config,
            model_config=model_config,
            eos_token_ids=eos_token_ids,
            chat_template=templates.get(chat.DEFAULT),
            tool_template=templates.get(chat.TOOL_USE),
        )

    @classmethod
    def from_file(cls, path: Path, *, eos_token_ids: Iterable[int] | None = None, rows: int | None = None) -> Tokenizer:
        """A tokenizer that a user named: a folder, or a `.json` or `.model` file under any name.

        Beside a file, only `tokenizer_config.json` and the added-token files are read: other files there may be
        another model's. `eos_token_ids` and `rows` as in `from_folder`.
        Raises `RequestError` if there is no tokenizer, or a file is damaged.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_folder(path, eos_token_ids=eos_token_ids, rows=rows)
        refuse_device(path)
        if not path.is_file():
            raise RequestError(f"No tokenizer at {path}: give a tokenizer.json, a tokenizer.model or a folder with one")
        if path.suffix not in (".json", ".model"):
            raise RequestError(f"{path} is not a tokenizer; give a tokenizer.json or a tokenizer.model")
        engine, config = open_engine(path, rows=rows)
        return cls(engine, config=config, eos_token_ids=eos_token_ids)

    def __repr__(self) -> str:
        ends = ", ".join(f"{self.id_to_token(token)} {token}" for token in sorted(self.eos_token_ids))
        template = "" if self.chat_template is None else ", chat template"
        start = f"begins with {self.id_to_token(self.bos_token_id)} {self.bos_token_id}, ends with {ends}"
        return f"Tokenizer({self.vocab_size:,} tokens, {start}{template})"

    @property
    def model_file(self) -> Path | None:
        """The `tokenizer.model` that the tokenizer was read from, or that is beside its `tokenizer.json`."""
        return self._engine.model_file

    @property
    def spec(self) -> TokenizerSpec:
        """How text is split into tokens, for export to other programs; errors as `check_writable`."""
        return self._engine.spec

    def check_writable(self) -> None:
        """Check that `save` can write this tokenizer, before long work whose result is saved with it.

        Raises `RequestError` for a SentencePiece model that a `tokenizer.json` cannot reproduce.
        """
        _ = self.spec

    def encode(
        self, text: str, add_bos: bool = True, *, as_message: bool = False, add_special_tokens: bool | None = None
    ) -> list[int]:
        """The ids of `text`, BOS first; a lone surrogate becomes U+FFFD.

        The model's own control tokens (`<s>`, `</s>`) in a text are encoded as text. Added tokens (`<|im_start|>`,
        special or not) and user-defined pieces become their ids, as in transformers. With `as_message`, special tokens
        among them are encoded as text too, as in the only message of the chat template `plain`.

        `add_special_tokens`, in place of the other two, is for mlx-lm and other programs that render a chat to text
        first: control tokens in the text become their ids, as in transformers. True puts BOS in front unless the text
        begins with it; False does not.
        Raises `RequestError` for anything but a text.
        """
        if not isinstance(text, str):
            raise RequestError(f"Text to encode must be a string, got {quote(text)}; encode several one by one")
        if add_special_tokens is not None:
            return self._encode_with_control_tokens(_replace_surrogates(text), add_special_tokens)
        if as_message and self._engine.special_beyond:
            return self._encode_runs([self.bos_token_id, text])[0 if add_bos else 1 :]
        try:
            text.encode()
        except UnicodeEncodeError:
            text = _replace_surrogates(text)
        ids = self._engine.encode(text, start=not as_message)
        return [self.bos_token_id, *ids] if add_bos else ids

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, as SentencePiece decodes it: one id, a sequence, or a one-dimensional array.

        BOS, EOS and other control tokens have no text unless `skip_special_tokens` is false, unknown ids have none; the
        unknown token becomes " \u2047 "; the space that encoding put in front is removed; a byte that is not UTF-8
        becomes U+FFFD.
        Raises `RequestError` for anything but whole numbers.
        """
        given = ids.tolist() if hasattr(ids, "tolist") else ids
        ids = [given] if isinstance(given, Integral) else list(given) if isinstance(given, Iterable) else [None]
        if not all(isinstance(token_id, Integral) for token_id in ids):
            raise RequestError(f"Ids to decode must be whole numbers in a flat list, got {quote(given)}")
        decoder, texts = self.streaming_decoder(), []
        for token_id in ids:
            texts.append(decoder.add(token_id))
            if not skip_special_tokens and self._engine.is_control(token_id):
                texts.append(self.id_to_token(token_id))
        return "".join([*texts, decoder.finish()])

    def streaming_decoder(self, after: Iterable[int] = (), *, keeps_space: bool = False) -> StreamingDecoder:
        """A decoder for one token at a time. With `after`, it continues the text of those ids, including the space
        between two words; with `keeps_space`, it keeps a space in front of the first word too."""
        return StreamingDecoder(self._token_bytes, after, keeps_space)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token adds to a text; None for control tokens, the unknown token and ids out of range."""
        return None if token_id == self._engine.unk_token_id else self._token_bytes[token_id]

    def encode_after(self, mark: str, text: str) -> list[int] | None:
        """The ids of `text` where it follows other text, without a space in front.

        `mark` is a character that only a byte token can write, and stands for the other text. None if the tokenizer
        has no byte token for it.
        """
        mark_id = self.token_to_id(f"<0x{ord(mark):02X}>")
        ids = self._engine.encode(_replace_surrogates(mark + text))
        return ids[ids.index(mark_id) + 1 :] if mark_id in ids else None

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._engine)

    def add_eos_token(self, token: str) -> None:
        """Add a stop token, by its text or its id as text; `RequestError` if there is no such token."""
        token_id = int(token) if token.isascii() and token.isdigit() and len(token) < 10 else self.token_to_id(token)
        if token_id is None or self._engine.id_to_token(token_id) is None:
            raise RequestError(f"{quote(token)} is not a token of this tokenizer: give a token such as </s>, or an id")
        self.eos_token_ids.add(token_id)

    def templates(self, other: str | None = None) -> dict[str, str]:
        """The templates by the names that files give them, `default` and `tool_use`; another one replaces both."""
        if other and other != self.chat_template:
            return {chat.DEFAULT: other}
        own = {chat.DEFAULT: self.chat_template, chat.TOOL_USE: self.tool_template}
        return {name: source for name, source in own.items() if source}

    @property
    def default_template(self) -> str:
        """The template of a chat where none is given: `own` if the folder has one, else `plain`."""
        return "plain" if self.chat_template is None else chat.OWN

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        template: str | Path | None = None,
        *,
        tokenize: Literal[True] = True,
        return_dict: Literal[False] = False,
        **options: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        template: str | Path | None = None,
        *,
        tokenize: bool = True,
        return_dict: bool = False,
        **options: Any,
    ) -> Any: ...
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        template: str | Path | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **variables: Any,
    ) -> Any:
        """The ids of a conversation, BOS first: `messages` is a list of `{"role": ..., "content": ...}`.

        `template` is `own` (the folder's), `plain`, `corenet` or the path of a jinja file; by default the folder's own,
        else `corenet`. With `tools`, the folder's own is the one it has for them, if there is one.
        Special tokens in messages, including added ones, are encoded as text: only the template writes them. Other
        added tokens become their ids anywhere, as in transformers. `add_generation_prompt` opens the assistant's turn,
        by default if the last message is not the assistant's; `continue_final_message` leaves the last message, the
        assistant's, open instead. `tools` are JSON schemas of functions, for templates that render them. Further
        arguments are variables of the template, as in transformers.

        With `tokenize=False`, the text; `encode(text, add_special_tokens=False)` gives its ids. With
        `return_dict=True`, a dictionary of `input_ids` and `attention_mask`.
        Raises `RequestError` for bad messages and templates.
        """
        check_variables(variables)
        source = self.chat_template if tools is None else self.tool_template or self.chat_template
        if template == chat.OWN and source is None:
            raise RequestError(
                "The model has no chat template of its own; give plain, corenet or a file with --chat-template"
            )
        is_own = template in (None, chat.OWN) and source is not None
        title = "The model's chat template" if is_own else f"The chat template {template or 'corenet'}"
        if template not in (None, chat.OWN):
            source = chat.NAMED_TEMPLATES.get(str(template)) or chat.find_template(template)
        if source == chat.PLAIN_TEMPLATE:
            check_messages(messages, continue_final_message)
            text = "\n".join(message["content"] for message in for_built_in(messages, tools, title))
            runs: list[str | int] = [self.bos_token_id, text] if text else [self.bos_token_id]
        else:
            runs = chat.render(
                messages,
                source or chat.CORENET_TEMPLATE,
                {
                    **self._engine.special_beyond,
                    **self._engine.control_tokens,
                    **{self.id_to_token(token_id): token_id for token_id in (self.bos_token_id, self.eos_token_id)},
                },
                named={**chat.named_tokens(self._config), **self._named_tokens()},
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
                title=title,
            )
        if not tokenize:
            runs = runs if runs[:1] == [self.bos_token_id] else [self.bos_token_id, *runs]
            return "".join(run if isinstance(run, str) else self.id_to_token(run) for run in runs)
        ids = self._encode_runs(runs)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} if return_dict else ids

    def _encode_runs(self, runs: list[str | int]) -> list[int]:
        """The ids of a rendered template's runs of text and special token ids, BOS first."""
        if self._engine.special_beyond:
            runs = chat.join_added_tokens(runs, self._engine.special_beyond)
        ids: list[int] = []
        for position, run in enumerate(runs):
            if isinstance(run, str):
                ids += self._engine.encode(_replace_surrogates(run), start=position == 0)
            else:
                ids.append(run)
        # OpenELM needs BOS even if a template forgets it.
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def save(self, folder: Path, *, chat_template: str | None = None) -> None:
        """Write the tokenizer so that transformers and mlx-lm read it to the same ids.

        `tokenizer.json` and `tokenizer_config.json` always, `tokenizer.model` if there is one, and
        `chat_template.jinja` with `chat_template` (jinja source), by default the folder's own. If there is another
        one for tools, both are in `tokenizer_config.json` instead.
        Raises `RequestError` as `check_writable`.
        """
        from . import saving

        saving.save(
            Path(folder),
            self.spec,
            self.bos_token_id,
            named=self._named_tokens(),
            config=self._config,
            model_file=self.model_file,
            templates=self.templates(chat_template),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """`save`, by the name that transformers gives it."""
        self.save(Path(folder))

    def _named_tokens(self) -> dict[str, str]:
        """The texts of BOS, EOS and the unknown token by the names that files and templates use."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "unk_token": self._engine.unk_token_id}
        return {name: self.id_to_token(token_id) for name, token_id in ids.items() if token_id is not None}


def _replace_surrogates(text: str) -> str:
    """A text with U+FFFD in place of lone surrogates, which cannot be written as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
