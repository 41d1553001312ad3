"""Text to token ids and back, from a `tokenizer.json` or a SentencePiece `tokenizer.model`.

Both give SentencePiece's ids. The tokenizers or the sentencepiece package encodes, whichever reads the file. We decode
ourselves, so that streaming and decoding all at once cannot differ.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
from ..inputs import read_json
from . import added_tokens
from . import chat_template as chat
from .chat_messages import Message, check_messages, for_built_in
from .tokenizer_engines import ENGINES, Engine, open_engine
from .tokenizer_json import SPACE, TokenizerSpec, write_spec
from .tokenizers_engine import LITERAL, TokenizersEngine

UNKNOWN_TEXT = " \u2047 ".encode()  # SentencePiece's text for the unknown token
ONE_PER_BYTE = "mlx_openelm.one_per_byte"
# SentencePiece's rule for bytes that are not UTF-8: one replacement character for each byte.
codecs.register_error(ONE_PER_BYTE, lambda error: ("\ufffd", getattr(error, "start", 0) + 1))


class Tokenizer:
    """A SentencePiece-style tokenizer: spaces are part of the pieces, and unknown characters become bytes.

    Create one with `from_folder` or `from_file`. `bos_token_id` and `eos_token_id` are the tokenizer's own,
    `eos_token_ids` are all tokens that end a generation, `vocab_size` is the number of tokens including special ones,
    `chat_template` is the folder's own template (jinja source).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
        eos_token_ids: Iterable[int] | None = None,
        chat_template: str | None = None,
    ):
        """`config` is a `tokenizer_config.json`, `model_config` the ids in the model's configs.

        Raises `RequestError` if BOS or EOS is missing, and for ids that the tokenizer does not have.
        """
        self._engine = engine
        self.vocab_size = engine.vocab_size
        self._config = config or {}
        self._pieces: dict[int, bytes | None] = {}
        self.chat_template = chat_template
        model_config = model_config or {}
        self.bos_token_id = self._special_id("bos", engine.bos_token_id, model_config)
        self.eos_token_id = self._special_id("eos", engine.eos_token_id, model_config)
        if isinstance(engine, TokenizersEngine):  # a SentencePiece model knows its special tokens
            engine.build((self.bos_token_id, self.eos_token_id))
        if eos_token_ids is None:
            eos_token_ids = [self.eos_token_id, *_ids(model_config, "eos_token_id")]
        self.eos_token_ids = set(eos_token_ids)
        for token_id in self.eos_token_ids:
            if engine.id_to_token(token_id) is None:
                raise self._foreign_id("eos_token_id", token_id)

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
                f"no tokenizer.json or tokenizer.model in {folder}: put one there, or give one with --tokenizer"
            )
        config, named = added_tokens.read(folder)
        model_config = read_json(folder / "config.json", missing_ok=True)
        generation_config = read_json(folder / "generation_config.json", missing_ok=True)
        model_config.update((key, value) for key, value in generation_config.items() if value is not None)
        return cls(
            open_engine(path, config, named, rows=rows, beside=True),
            config=config,
            model_config=model_config,
            eos_token_ids=eos_token_ids,
            chat_template=_own_template(folder, config),
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
        if not path.is_file():
            raise RequestError(f"no tokenizer at {path}: give a tokenizer.json, a tokenizer.model or a folder with one")
        if path.suffix not in (".json", ".model"):
            raise RequestError(f"{path} is not a tokenizer; give a tokenizer.json or a tokenizer.model")
        config, named = added_tokens.read(path.parent)
        return cls(open_engine(path, config, named, rows=rows), config=config, eos_token_ids=eos_token_ids)

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

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """The ids of `text`, BOS first; a lone surrogate becomes U+FFFD.

        The model's own control tokens (`<s>`, `</s>`) in a text are encoded as text. Added tokens (`<|im_start|>`,
        special or not) and user-defined pieces become their ids, as in transformers.
        """
        ids = self._encode(text)
        return [self.bos_token_id, *ids] if add_bos else ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a user's message in the `plain` template: BOS, and the text with special tokens as text."""
        if self._engine.special_beyond:
            return self.apply_chat_template([{"role": "user", "content": text}], "plain")
        return [self.bos_token_id, *self._encode(text, start=False)]

    def _encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of a text without BOS; `start` is false for one that follows a token."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._engine.encode(text, start=start)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as SentencePiece decodes it.

        BOS, EOS, other control tokens and unknown ids have no text; the unknown token becomes " \u2047 "; the space
        that encoding put in front is removed; a byte that is not UTF-8 becomes U+FFFD.
        """
        decoder = self.streaming_decoder()
        return "".join([*map(decoder.add, ids), decoder.finish()])

    def streaming_decoder(self, after: Iterable[int] = ()) -> StreamingDecoder:
        """A decoder for one token at a time. With `after`, it continues the text of those ids, including the space
        between two words."""
        return StreamingDecoder(self, after)

    def id_to_token(self, token_id: int) -> str:
        """The piece of an id, with spaces as U+2581; `RequestError` if there is no such token."""
        token = self._engine.id_to_token(token_id)
        if token is None:
            raise RequestError(f"there is no token {token_id}: this tokenizer has {self.vocab_size} tokens")
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece, in the form `id_to_token` gives; None if there is no such piece."""
        return self._engine.token_to_id(token)

    def add_eos_token(self, token: str) -> None:
        """Let a further token, or an id given as text, end a generation; `RequestError` if there is no such token."""
        token_id = int(token) if token.isascii() and token.isdigit() and len(token) < 10 else self.token_to_id(token)
        if token_id is None or self._engine.id_to_token(token_id) is None:
            raise RequestError(f"{quote(token)} is not a token of this tokenizer: give a token such as </s>, or an id")
        self.eos_token_ids.add(token_id)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        template: str | Path | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of a conversation, BOS first: `messages` is a list of `{"role": ..., "content": ...}`.

        `template` is `plain`, `corenet` or the path of a jinja file; by default the folder's own, else `corenet`.
        Special tokens in messages, including added ones, are encoded as text: only the template writes them. Other
        added tokens become their ids anywhere, as in transformers. `add_generation_prompt` opens the assistant's turn;
        `continue_final_message` leaves the last message, the assistant's, open instead. `tools` are JSON schemas of
        functions, for templates that render them.
        Raises `RequestError` for bad messages and templates.
        """
        source = self.chat_template
        if template is not None:
            source = chat.NAMED_TEMPLATES.get(str(template)) or chat.find_template(template)
        if source == chat.PLAIN_TEMPLATE:
            check_messages(messages, continue_final_message)
            text = "\n".join(message["content"] for message in for_built_in(messages, tools))
            runs: list[str | int] = [self.bos_token_id, text] if text else [self.bos_token_id]
        else:
            runs = chat.render(
                messages,
                source or chat.CORENET_TEMPLATE,
                {**self._engine.special_beyond, **self._engine.control_tokens, **self._bos_and_eos()},
                named={**chat.named_tokens(self._config), **self._named_tokens()},
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        if self._engine.special_beyond:
            runs = self._with_added_tokens(runs)
        ids: list[int] = []
        for position, run in enumerate(runs):
            ids += [run] if isinstance(run, int) else self._encode(run, start=position == 0)
        # OpenELM needs BOS even if a template forgets it.
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def save(self, folder: Path, *, chat_template: str | None = None) -> None:
        """Write the tokenizer so that transformers and mlx-lm read it to the same ids.

        `tokenizer.json` and `tokenizer_config.json` always, `tokenizer.model` if there is one, and
        `chat_template.jinja` with `chat_template` (jinja source), by default the folder's own.
        Raises `RequestError` as `check_writable`.
        """
        folder, spec = Path(folder), self.spec
        tokens = self._named_tokens()
        kept = {k: self._config[k] for k in ("pad_token", "model_max_length") if self._config.get(k) is not None}
        if self._named_id("pad") is None:  # left out when the model had no row for it; a reader would add it again
            kept.pop("pad_token", None)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # LlamaTokenizer ignores the file's own normalizer
            **tokens,
            **kept,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if spec.parsed:  # programs that read tokenizer.model look for added tokens here
            added = {str(token.id): token.to_dict() for token in spec.added}
            config["added_tokens_decoder"] = {
                key: {k: v for k, v in t.items() if k != "id"} for key, t in added.items()
            }
            config["legacy"] = not spec.first_only
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "tokenizer.json", json.dumps(write_spec(spec, self.bos_token_id), ensure_ascii=False, indent=1))
        _write(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        if chat_template or self.chat_template:
            _write(folder / "chat_template.jinja", chat_template or self.chat_template or "")
        model_file, target = self._engine.model_file, folder / "tokenizer.model"
        if model_file is not None and not (target.exists() and target.samefile(model_file)):
            shutil.copyfile(model_file, target)

    def _bos_and_eos(self) -> dict[str, int]:
        """The ids of BOS and EOS by their texts."""
        return {self.id_to_token(token_id): token_id for token_id in (self.bos_token_id, self.eos_token_id)}

    def _named_tokens(self) -> dict[str, str]:
        """The texts of BOS, EOS and the unknown token by the names that files and templates use."""
        ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id, "unk_token": self._engine.unk_token_id}
        return {name: self.id_to_token(token_id) for name, token_id in ids.items() if token_id is not None}

    def _with_added_tokens(self, runs: Iterable[str | int]) -> list[str | int]:
        """The runs of a rendered template with added special tokens as text, so that they affect the text around them
        as in any text; quoted in a message, they are marked to be encoded as text."""
        tokens = self._engine.special_beyond
        texts = {token_id: token for token, token_id in tokens.items()}
        starts = f"(?={'|'.join(map(re.escape, tokens))})."  # one may begin within another
        joined: list[str | int] = []
        for run in runs:
            if isinstance(run, str):
                run = re.sub(starts, lambda found: found[0] + LITERAL, run, flags=re.DOTALL)
            else:
                run = texts.get(run, run)
            if isinstance(run, str) and joined and isinstance(joined[-1], str):
                joined[-1] += run
            else:
                joined.append(run)
        return joined

    def _piece(self, token_id: int) -> bytes | None:
        """The bytes that a token adds to the text; None for tokens without text."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._make_piece(token_id)
            return piece

    def _make_piece(self, token_id: int) -> bytes | None:
        engine = self._engine
        token = engine.id_to_token(token_id)
        if token is None or engine.is_control(token_id):
            return None
        if token_id == engine.unk_token_id:
            return UNKNOWN_TEXT
        if engine.is_byte(token_id):
            return bytes([int(token[3:5], 16)])  # "<0x0A>"
        return token.replace(SPACE, " ").encode()

    def _special_id(self, name: str, engine_id: int | None, model_config: dict[str, Any]) -> int:
        """The id of BOS or EOS: from the tokenizer config, else the tokenizer itself, else the model config."""
        token_id = self._named_id(name)
        if token_id is None:
            token_id = engine_id
        if token_id is None:
            token_id = next(iter(_ids(model_config, f"{name}_token_id")), None)
        if token_id is None:
            raise RequestError(f"the tokenizer has no {name} token: name it as {name}_token in tokenizer_config.json")
        if self._engine.id_to_token(token_id) is None:
            raise self._foreign_id(f"{name}_token_id", token_id)
        return token_id

    def _named_id(self, name: str) -> int | None:
        """The id of the token that the tokenizer config names for a role (`bos`, `pad`)."""
        token = self._config.get(f"{name}_token")
        if isinstance(token, dict):  # older files give a token with its flags
            token = token.get("content")
        return self._engine.token_to_id(token) if isinstance(token, str) else None

    def _foreign_id(self, key: str, token_id: int) -> RequestError:
        return RequestError(
            f"{key} is {token_id}, but the tokenizer has {self.vocab_size} tokens: it belongs to another model"
        )


class StreamingDecoder:
    """Decodes token by token; the texts of all `add` and of `finish` together equal `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(ONE_PER_BYTE)
        self._strip_space = tokenizer._engine.adds_space
        for token_id in after:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        """The whole characters that this token completes; empty while a character's bytes are still coming."""
        piece = self._tokenizer._piece(token_id)
        if piece is None:
            return self.finish()  # a character cannot continue after a control token
        if self._strip_space:
            self._strip_space = False
            if self._tokenizer.id_to_token(token_id).startswith(SPACE):
                piece = piece[1:]
        return self._characters.decode(piece)

    def finish(self) -> str:
        """The rest at the end: U+FFFD for each byte of an unfinished character."""
        return self._characters.decode(b"", True)


def _ids(config: dict[str, Any], key: str) -> list[int]:
    """An id, a list of ids or null, as a list."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in values):
        raise RequestError(f"{key} must be a token id or a list of them, not {quote(value)}")
    return values


def _own_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template in `chat_template.jinja`, else in `tokenizer_config.json` (of several, the one named "default")."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return chat.find_template(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise RequestError(f"chat_template in {folder / 'tokenizer_config.json'} must be text")
    return template


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
