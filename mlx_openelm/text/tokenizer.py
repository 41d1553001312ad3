"""Text to token ids and back, from a `tokenizer.json` or a SentencePiece `tokenizer.model`.

Both give the ids SentencePiece gives. Encoding is the tokenizers or the sentencepiece package's, whichever reads the
file; decoding is ours, so that streaming and decoding all at once cannot differ.
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
from . import added_tokens
from . import chat_template as chat
from .tokenizer_engines import ENGINES, Engine, open_engine
from .tokenizer_json import SPACE, TokenizerSpec, write_spec
from .tokenizers_engine import LITERAL, TokenizersEngine

UNKNOWN_TEXT = " \u2047 ".encode()  # what SentencePiece shows for the unknown token
ONE_PER_BYTE = "mlx_openelm.one_per_byte"
# SentencePiece's rule for bytes that are no UTF-8: one replacement character for each of them.
codecs.register_error(ONE_PER_BYTE, lambda error: ("\ufffd", getattr(error, "start", 0) + 1))


class Tokenizer:
    """A SentencePiece-style tokenizer: spaces are part of the pieces, and unknown characters become bytes.

    Make one with `from_folder` or `from_file`. `bos_token_id` and `eos_token_id` are the tokenizer's own,
    `eos_token_ids` every token that ends a generation, `chat_template` the folder's own template (jinja source).
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
        """`config` is a `tokenizer_config.json`, `model_config` what the model's configs say about ids.

        Raises `RequestError` when no BOS or EOS is named, and for ids that are not the tokenizer's.
        """
        self._engine = engine
        self._config = config or {}
        self._pieces: dict[int, bytes | None] = {}
        self.chat_template = chat_template
        model_config = model_config or {}
        self.bos_token_id = self._special_id("bos", engine.bos_token_id, model_config)
        self.eos_token_id = self._special_id("eos", engine.eos_token_id, model_config)
        if isinstance(engine, TokenizersEngine):  # a SentencePiece model says itself which tokens are special
            engine.mark_special((self.bos_token_id, self.eos_token_id))
        if eos_token_ids is None:
            eos_token_ids = [self.eos_token_id, *_ids(model_config, "eos_token_id")]
        self.eos_token_ids = {self._checked(token_id, "eos_token_id") for token_id in eos_token_ids}

    @classmethod
    def from_folder(
        cls, folder: Path, *, eos_token_ids: Iterable[int] | None = None, rows: int | None = None
    ) -> Tokenizer:
        """The tokenizer of a model folder: its `tokenizer.json`, else its `tokenizer.model`.

        The special ids come from `tokenizer_config.json`, the tokenizer itself, `generation_config.json` and
        `config.json`. `eos_token_ids` replaces the set of ending tokens. `rows` says how many tokens the model can
        take: special tokens that are named without an id are left out, with a warning, where they would lie beyond.
        Raises `RequestError` when there is none, or when a file is damaged.
        """
        folder = Path(folder)
        path = next((p for name in ENGINES if (p := folder / name).is_file()), None)
        if path is None:
            raise RequestError(
                f"no tokenizer.json or tokenizer.model in {folder}: put one there, or name one with --tokenizer"
            )
        config, named = added_tokens.read(folder)
        model_config = added_tokens.read_if_there(folder / "config.json")
        generation_config = added_tokens.read_if_there(folder / "generation_config.json")
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
        """A tokenizer a person named: a folder, or a `.json` or `.model` file under any name.

        For a file only `tokenizer_config.json` and the added-token files are read beside it: other files there
        may be another model's. `eos_token_ids` and `rows` as in `from_folder`.
        Raises `RequestError` when there is none, or when a file is damaged.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_folder(path, eos_token_ids=eos_token_ids, rows=rows)
        if not path.is_file():
            raise RequestError(f"no tokenizer at {path}: name a tokenizer.json, a tokenizer.model or a folder with one")
        if path.suffix not in (".json", ".model"):
            raise RequestError(f"{path} is not a tokenizer: name a tokenizer.json or a tokenizer.model")
        config, named = added_tokens.read(path.parent)
        return cls(open_engine(path, config, named, rows=rows), config=config, eos_token_ids=eos_token_ids)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self._engine.vocab_size

    @property
    def model_file(self) -> Path | None:
        """The `tokenizer.model` that the tokenizer was read from, or that lies beside its `tokenizer.json`."""
        return self._engine.model_file

    @property
    def spec(self) -> TokenizerSpec:
        """How text is cut, for other programs to do alike; errors as `check_writable`."""
        return self._engine.spec

    def check_writable(self) -> None:
        """Ask whether `save` can write this tokenizer, before long work whose result it goes with.

        Raises `RequestError` for a SentencePiece model that no `tokenizer.json` can reproduce.
        """
        _ = self.spec

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """The ids of `text`, BOS first; a lone surrogate becomes U+FFFD.

        Control tokens of the tokenizer's own model (`<s>`, `</s>`) that are typed in a text are text. Tokens that were
        added to it (`<|im_start|>`, special or not) and user-defined pieces become their ids, as in transformers.
        """
        ids = self._encode(text)
        return [self.bos_token_id, *ids] if add_bos else ids

    def _encode(self, text: str, *, start: bool = True) -> list[int]:
        """The ids of a text without BOS; `start` is false for one that follows a token."""
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self._engine.encode(text, start=start)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as SentencePiece decodes it.

        BOS, EOS and other control tokens, and ids that are no token, have no text; the unknown token shows as
        " \u2047 "; the space that encoding put in front is removed; a byte that is no UTF-8 shows as U+FFFD.
        """
        decoder = self.streaming_decoder()
        return "".join([*map(decoder.add, ids), decoder.finish()])

    def streaming_decoder(self, after: Iterable[int] = ()) -> StreamingDecoder:
        """A decoder to be fed token by token. With `after`, it goes on where the text of those ids ended: its text
        is then what it adds to theirs, the space between two words included."""
        return StreamingDecoder(self, after)

    def id_to_token(self, token_id: int) -> str:
        """The piece of an id, spaces written as U+2581; `RequestError` when there is no such token."""
        token = self._token(token_id)
        if token is None:
            raise RequestError(f"there is no token {token_id}: this tokenizer has {self.vocab_size} tokens")
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece, written as `id_to_token` gives it; None when there is no such piece."""
        return self._engine.token_to_id(token)

    def add_eos_token(self, token: str) -> None:
        """Let a token, or an id given as text, end a generation too; `RequestError` when it is no token."""
        token_id = int(token) if token.isascii() and token.isdigit() and len(token) < 10 else self.token_to_id(token)
        if token_id is None or self._token(token_id) is None:
            raise RequestError(f"{quote(token)} is not a token of this tokenizer: give a token such as </s>, or an id")
        self.eos_token_ids.add(token_id)

    def apply_chat_template(
        self,
        messages: Sequence[chat.Message],
        template: str | Path | None = None,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The ids of a conversation, BOS first: `messages` is a list of `{"role": ..., "content": ...}`.

        `template` is `plain`, `corenet`, the path of a jinja file, or None for the folder's own, else `corenet`.
        Special tokens in messages are text, also added ones: only the template writes them. Other added tokens become
        their ids wherever they stand, as in transformers. `add_generation_prompt` opens the assistant's turn;
        `continue_final_message` leaves the last message, the assistant's, open instead. `tools` are JSON schemas of
        functions, for templates that show them.
        Raises `RequestError` for bad messages and templates.
        """
        if template is None:
            source = self.chat_template or chat.CORENET_TEMPLATE
        else:
            source = chat.find_template(template)
        own = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
        named = {name: self.id_to_token(token_id) for name, token_id in own.items()}
        if self._engine.unk_token_id is not None:
            named["unk_token"] = self.id_to_token(self._engine.unk_token_id)
        runs = chat.render(
            messages,
            source,
            {
                **self._engine.special_beyond,
                **self._engine.control_tokens,
                **{named[name]: token_id for name, token_id in own.items()},
            },
            named={**chat.named_tokens(self._config), **named},
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        ids: list[int] = []
        for start, run in enumerate(self._joined(runs)):
            ids += [run] if isinstance(run, int) else self._encode(run, start=start == 0)
        # OpenELM needs BOS, also where a template forgets it.
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def save(self, folder: Path, *, chat_template: str | None = None) -> None:
        """Write the tokenizer so that transformers and mlx-lm read it to the same ids.

        `tokenizer.json` and `tokenizer_config.json` always, `tokenizer.model` when there is one, and
        `chat_template.jinja` with `chat_template` (jinja source) or the folder's own.
        Raises `RequestError` as `check_writable`.
        """
        folder, spec = Path(folder), self.spec
        tokens = {"bos_token": self.id_to_token(self.bos_token_id), "eos_token": self.id_to_token(self.eos_token_id)}
        if self._engine.unk_token_id is not None:
            tokens["unk_token"] = self.id_to_token(self._engine.unk_token_id)
        kept = {k: self._config[k] for k in ("pad_token", "model_max_length") if self._config.get(k) is not None}
        if self._named_id("pad") is None:  # left out for want of a row; who reads its name would add it again
            kept.pop("pad_token", None)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # LlamaTokenizer ignores the file's own normalizer
            **tokens,
            **kept,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if spec.parsed:  # what reads tokenizer.model looks for them here
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

    def _joined(self, runs: Iterable[str | int]) -> list[str | int]:
        """Runs of a rendered template with added tokens written out again, so that they are found as in any text, and
        not found where a message quotes them."""
        tokens = self._engine.special_beyond
        written = {token_id: token for token, token_id in tokens.items()}
        joined: list[str | int] = []
        for run in runs:
            run = written.get(run, run) if isinstance(run, int) else _literal(run, tokens)
            if isinstance(run, str) and joined and isinstance(joined[-1], str):
                joined[-1] += run
            else:
                joined.append(run)
        return joined

    def _token(self, token_id: int) -> str | None:
        return self._engine.id_to_token(token_id)

    def _piece(self, token_id: int) -> bytes | None:
        """What a token adds to the text, in bytes; None for tokens without text."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._pieces[token_id] = self._make_piece(token_id)
            return piece

    def _make_piece(self, token_id: int) -> bytes | None:
        engine = self._engine
        token = self._token(token_id)
        if token is None or engine.is_control(token_id):
            return None
        if token_id == engine.unk_token_id:
            return UNKNOWN_TEXT
        if engine.is_byte(token_id):
            return bytes([int(token[3:5], 16)])  # "<0x0A>"
        return token.replace(SPACE, " ").encode()

    def _special_id(self, name: str, engine_id: int | None, model_config: dict[str, Any]) -> int:
        """The id of BOS or EOS: the tokenizer config's word first, then the tokenizer's, then the model config's."""
        token_id = self._named_id(name)
        if token_id is None:
            token_id = engine_id
        if token_id is None:
            token_id = next(iter(_ids(model_config, f"{name}_token_id")), None)
        if token_id is None:
            raise RequestError(f"the tokenizer has no {name} token: name it as {name}_token in tokenizer_config.json")
        return self._checked(token_id, f"{name}_token_id")

    def _named_id(self, name: str) -> int | None:
        """The id of the token that the tokenizer config names for a role."""
        token = self._config.get(f"{name}_token")
        if isinstance(token, dict):  # older files spell a token out with its flags
            token = token.get("content")
        return self._engine.token_to_id(token) if isinstance(token, str) else None

    def _checked(self, token_id: int, key: str) -> int:
        if self._token(token_id) is None:
            raise RequestError(
                f"{key} is {token_id}, but the tokenizer has {self.vocab_size} tokens: it belongs to another model"
            )
        return token_id


class StreamingDecoder:
    """Decodes token by token; the pieces joined, `finish()` included, are exactly `decode` of all tokens."""

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
            return self.finish()  # bytes on two sides of a control token are not one character
        if self._strip_space:
            self._strip_space = False
            if self._tokenizer.id_to_token(token_id).startswith(SPACE):
                piece = piece[1:]
        return self._characters.decode(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for each byte of an unfinished character."""
        return self._characters.decode(b"", True)


def _literal(text: str, tokens: Iterable[str]) -> str:
    """A text in which these tokens will be encoded as text."""
    if not tokens:
        return text
    starts = f"(?={'|'.join(map(re.escape, tokens))})."  # one may begin within another
    return re.sub(starts, lambda found: found[0] + LITERAL, text, flags=re.DOTALL)


def _ids(config: dict[str, Any], key: str) -> list[int]:
    """An id, a list of ids or null, as a list."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int for item in values):
        raise RequestError(f"{key} must be a token id or a list of them, not {quote(value)}")
    return values


def _own_template(folder: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else the one in `tokenizer_config.json` (of several named ones, "default")."""
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
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
