"""A chat with a model: its messages, its settings, and answers that process only what is new."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RequestError
from ..model import OpenELM
from ..text.chat_messages import Message, check_messages, plain_text
from ..text.tokenizer import Tokenizer
from .decoding import Progress
from .draft_model import DraftModel
from .kept_cache import KeptCache
from .options import CacheOptions, GenerationOptions
from .piece import Piece
from .sampling import random_seed
from .stream import stream_generate

# The part of the context that stays free for an answer, at most, and the part that a shortened chat may fill.
_ANSWER_SHARE = 0.25
_SHORTENED_SHARE = 0.5
_SYSTEM_ROLES = ("system", "developer")


class StopAnswerError(Exception):
    """Raised by a `progress` callback to stop an answer before its first token."""


class _Turn(NamedTuple):
    """The end of an answer.

    `ids` are those that were processed and generated up to there, `rendered` what the template makes of the same
    messages. They may differ, since there are several ways to split a text into tokens.
    """

    messages: int
    ids: list[int]
    rendered: list[int]


@dataclass(frozen=True)
class AnswerStats:
    """What an answer took.

    `prompt_tokens` is the length of the conversation before the answer, of which `cached_tokens` had been processed in
    earlier turns; `last` is the answer's last piece; `seed` is None if nothing was drawn.
    """

    prompt_tokens: int
    cached_tokens: int
    last: Piece
    stopped: bool
    seed: int | None


class Conversation:
    """A chat of one user with one model.

        chat = Conversation(model, tokenizer, system="Answer in one sentence.")
        for piece in chat.say("Who is there?"):
            print(piece.text, end="", flush=True)

    An answer may be stopped by closing its iterator: it stays in the conversation as far as it came. One that fails
    leaves the conversation as it was.

    When the messages no longer fit into the context that the model was trained with, the oldest exchanges are left out
    of what it sees, until half of the context is used; `left_out` counts their messages.

    Args:
        template: `own`, `plain`, `corenet` or the path of a jinja file; by default the folder's own, else `plain`.
        system: instructions that come before the first message.
        draft_model: proposes tokens, as in `stream_generate`.
        options: settings of the answers, which may be replaced between them. A seed is that of the first answer; later
            ones add 1 each, so that an answer can be tried again.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        *,
        template: str | Path | None = None,
        system: str | None = None,
        draft_model: OpenELM | None = None,
        options: GenerationOptions | None = None,
    ):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.template = template or tokenizer.default_template
        self.messages: list[Message] = []  # without the system prompt
        self.left_out = 0
        self.stats: AnswerStats | None = None  # of the last answer
        self._draft_model = None if draft_model is None else DraftModel(draft_model, keeps_text=True)
        self._options = GenerationOptions()
        self._kept = KeptCache(len(model.layers))
        self._turns: list[_Turn] = []
        self._answers = 0  # since the seed was set
        self.options = options or self._options
        self._render([{"role": "user", "content": "0"}])  # a template that does not work is refused here

    @property
    def options(self) -> GenerationOptions:
        """The settings of the next answer; setting them raises a `RequestError` if one is not valid."""
        return self._options

    @options.setter
    def options(self, options: GenerationOptions) -> None:
        options.validate(self.model.config.vocab_size, self.model.config.head_dim)
        options.check_drafts(self._draft_model is not None)
        if any(getattr(options, name) != getattr(self._options, name) for name in asdict(CacheOptions())):
            self._kept.forget()
        if options.seed != self._options.seed:
            self._answers = 0
        self._options = options

    @property
    def cache_bytes(self) -> int:
        """The memory of the keys and values that are kept."""
        return self._kept.nbytes

    @property
    def is_unanswered(self) -> bool:
        """Whether the last message waits for an answer."""
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"

    def say(self, text: str, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """The pieces of the answer to a message.

        Args:
            progress: as in `stream_generate`; it may raise `StopAnswerError`.

        Raises:
            RequestError: the message is empty or too long, or the template refuses it; while iterating.
            OpenELMError: as `stream_generate`.
        """
        if not text:
            raise RequestError("The message is empty; give some text.")
        with self._unless_unanswered():
            self.messages.append({"role": "user", "content": text})
            yield from self._answer(progress)

    def retry(self, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """The pieces of another answer to the last message, in place of the one that it has."""
        if not self.messages:
            raise RequestError("There is no message to answer again.")
        with self._unless_unanswered():
            if not self.is_unanswered:
                self.messages.pop()
                self._forget_turns()
            yield from self._answer(progress)

    def undo(self) -> None:
        """Take back the last message and its answer."""
        if not self.messages:
            raise RequestError("There is no message to take back.")
        while self.messages and self.messages.pop()["role"] != "user":
            pass
        self._forget_turns()

    def reset(self) -> None:
        """Begin again; the system prompt and the settings stay."""
        self.messages.clear()
        self._forget_turns()

    def load(self, messages: Sequence[Message]) -> None:
        """Go on from messages in OpenAI's form; system messages in front replace the system prompt.

        Raises:
            RequestError: they are not such messages, or the template refuses them; the conversation stays as it was.
        """
        check_messages(messages)
        has_system = messages[0]["role"] in _SYSTEM_ROLES
        self._render(messages)
        self.system = plain_text(messages[0]["content"]) if has_system else None
        self.messages = list(messages[1 if has_system else 0 :])
        self._forget_turns()

    def all_messages(self) -> list[Message]:
        """The system prompt and the messages, in OpenAI's form."""
        return [*self._opening(), *self.messages]

    def forget_caches(self) -> None:
        """Drop the keys and values, after a change of the model or its adapter."""
        self._kept.forget()
        if self._draft_model is not None:
            self._draft_model.last = None

    @contextmanager
    def _unless_unanswered(self) -> Iterator[None]:
        """Leave everything as it was if the last message has no answer at the end of the block."""
        before = list(self.messages), list(self._turns), self.left_out
        try:
            yield
        finally:
            if self.is_unanswered:
                self.messages, self._turns, self.left_out = before

    def _opening(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _answer(self, progress: Progress | None) -> Iterator[Piece]:
        """Generate an answer to the last message; it is added to the messages unless it fails or has no token."""
        ids = self._prompt()
        caches, held = self._kept.begin(ids, self.options)
        options = self._next_options()
        pieces: list[Piece] = []
        stream = None
        try:
            stream = stream_generate(
                self.model,
                self.tokenizer,
                ids[held:],
                prompt_cache=caches,
                prompt_cache_tokens=ids[:held],
                draft_model=self._draft_model,
                progress=progress,
                **vars(options),
            )
            for piece in stream:
                pieces.append(piece)
                if len(pieces) == 1:
                    self._kept.mark([*ids, piece.token])
                yield piece
        except (GeneratorExit, StopAnswerError):
            stream.close()  # type: ignore[union-attr]
            self._end(ids, pieces, held, options, stopped=True)
            raise
        except BaseException:
            self.forget_caches()  # it may have come in the middle of a step
            raise
        self._end(ids, pieces, held, options, stopped=False)

    def _next_options(self) -> GenerationOptions:
        """The settings of this answer, with its seed."""
        options = self.options
        if options.temp == 0:
            return options
        seed = random_seed() if options.seed is None else (options.seed + self._answers) % 2**64
        return replace(options, seed=seed)

    def _end(
        self, ids: list[int], pieces: list[Piece], held: int, options: GenerationOptions, *, stopped: bool
    ) -> None:
        """Note an answer, whole or in part."""
        tokens = [piece.token for piece in pieces]
        self._kept.end([*ids, *tokens])
        if not pieces:
            return
        self._answers += 1
        seed = options.seed if options.temp > 0 else None
        self.stats = AnswerStats(len(ids), held, pieces[-1], stopped, seed)
        text = "".join(piece.text for piece in pieces)
        self.messages.append({"role": "assistant", "content": text})
        try:
            rendered = self._render(self._visible(), continue_final_message=True)
        except RequestError:  # the template cannot leave a message open; the next turn renders everything
            return
        if tokens[-1] in self.tokenizer.eos_token_ids:
            tokens.pop()
        # A text that was cut, at a stop string or inside a character, is not that of its tokens.
        ids = [*ids, *tokens] if self.tokenizer.decode(tokens) == text else rendered
        self._turns.append(_Turn(len(self.messages), ids, rendered))

    def _visible(self) -> list[Message]:
        """What the model sees."""
        return [*self._opening(), *self.messages[self.left_out :]]

    def _prompt(self) -> list[int]:
        """The ids of the conversation up to the answer, without the oldest exchanges if it is too long."""
        ids = self._ids()
        context = self.model.config.max_context_length
        answer, share = self.options.max_tokens, int(_ANSWER_SHARE * context)
        if len(ids) <= context - (share if answer < 0 else min(answer, share)):
            return ids
        while len(ids) > _SHORTENED_SHARE * context and self._leave_out():
            ids = self._ids()
        return ids

    def _leave_out(self) -> bool:
        """Leave out the oldest exchange that the model sees; False if it is the last one."""
        starts = [n for n, message in enumerate(self.messages) if message["role"] == "user" and n > self.left_out]
        if not starts:
            return False
        self.left_out = starts[0]
        self._turns.clear()
        return True

    def _ids(self) -> list[int]:
        """The ids of what the model sees. What it wrote itself keeps the tokens that it wrote."""
        rendered = self._render(self._visible())
        if not self._turns or self._turns[-1].messages != len(self.messages) - 1:
            return rendered
        _, ids, before = self._turns[-1]
        return [*ids, *rendered[len(before) :]] if rendered[: len(before)] == before else rendered

    def _render(self, messages: Sequence[Message], **options: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, self.template, **options)

    def _forget_turns(self) -> None:
        """Forget turns that are no longer part of the conversation."""
        if self.left_out:
            self.left_out = 0
            self._turns.clear()
        self._turns = [turn for turn in self._turns if turn.messages <= len(self.messages)]
