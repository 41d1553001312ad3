"""Prompts to complete: what is read of a record, its tokens, and the columns that rewards are computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RequestError, name_options
from ...text.tokenizer import Tokenizer
from ...wording import counted, subject
from .conversations import check_texts, conversation, read_turns, system_of, with_system
from .examples import OWN_TEMPLATE, Progress
from .kinds import BESIDE_TURNS, OF_TEMPLATES, TYPES, Kind, Record, recognize

_PROGRESS_EVERY = 256
_SHOWN = 2000  # characters of a prompt


def _fault(values: dict[str, Any]) -> str | None:
    prompt = values["prompt"]
    if isinstance(prompt, str):
        return None if prompt else "'prompt' is empty"
    if not isinstance(prompt, list):
        return f"'prompt' is {TYPES.get(type(prompt), type(prompt).__name__)}, not text or messages"
    try:
        conversation(with_system(system_of(values), read_turns(prompt)), values.get("tools"))
    except RequestError as error:
        return str(error)
    return None


PROMPTS = Kind("prompts", ("prompt",), BESIDE_TURNS, OF_TEMPLATES, fault=_fault, keeps_others=True)


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete.

    Args:
        tokens: its ids, BOS first.
        content: as it is in the file: a text, or messages.
        columns: the record's other values.
    """

    tokens: list[int]
    content: str | list[Any]
    columns: dict[str, Any]
    source: str
    num_targets: int = 1

    @property
    def num_positions(self) -> int:
        """The tokens of the prompt; see `batches.Item`."""
        return len(self.tokens)

    @property
    def num_read(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PromptsReport:
    """Statistics of prompts, to show before training; `sample` is the text of the first.

    Args:
        num_dropped: prompts left out because they leave no room for a completion.
    """

    kind: str
    chat_template: str | None
    num_examples: int
    num_tokens: int
    longest: int
    num_dropped: int
    sample: str

    sample_title = "A prompt:"

    def sample_text(self) -> str:
        """The sample."""
        return self.sample

    def lines(self, split: str, max_seq_length: int) -> Iterator[str]:
        """Lines about the prompts of a split: their number and size, and how many were left out."""
        template = "" if self.chat_template is None else f", chat template: {self.chat_template}"
        yield (
            f"{split}: {counted(self.num_examples, 'prompt')}{template}, {self.num_tokens:,} tokens; the longest has "
            f"{self.longest:,}"
        )
        if self.num_dropped:
            were = subject(self.num_dropped, "prompt", "was", "were")
            yield name_options(
                f"{split}: {were} left out, longer than --max-seq-length {max_seq_length} less --max-completion-length"
            )


@dataclass(frozen=True)
class Prompts:
    """The prompts of a split, in the order of their records, and their statistics."""

    examples: list[Prompt]
    report: PromptsReport

    def fingerprint(self) -> str:
        """A hash of all tokens, and of the columns that rewards depend on."""
        content = hashlib.sha256()
        for prompt in self.examples:
            content.update(json.dumps([prompt.tokens, prompt.columns], sort_keys=True, default=str).encode())
        return content.hexdigest()


def tokenize_prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    max_completion_length: int,
    chat_template: str | Path | None = None,
    refuse_long: bool = False,
    progress: Progress | None = None,
) -> Prompts:
    """Turn records into prompts: through the chat template if the model has one, and texts otherwise as they are.

    Args:
        max_seq_length: the tokens of a prompt with its completion.
        max_completion_length: those of a completion; a prompt that leaves less room is left out.
        chat_template: as in `examples.tokenize`.
        refuse_long: refuse such prompts.

    Raises:
        RequestError: bad records, a template that fails, or no prompt that leaves room.
    """
    recognize(records, (PROMPTS,))
    own = None if tokenizer.chat_template is None else OWN_TEMPLATE
    template = chat_template or own
    if any(isinstance(record.values["prompt"], list) for record in records):
        template = template or "corenet"  # without a template the roles would be lost
    elif template == "plain":
        template = None
    room = max_seq_length - max_completion_length
    found: list[Prompt] = []
    longest = 0
    for done, record in enumerate(records):
        if progress is not None and done % _PROGRESS_EVERY == 0:
            progress(done, len(records))
        prompt = _prompt(record, tokenizer, template)
        longest = max(longest, len(prompt.tokens))
        if len(prompt.tokens) <= room:
            found.append(prompt)
        elif refuse_long:
            raise RequestError(
                f"{record.source}: takes {len(prompt.tokens)} tokens, and --max-seq-length {max_seq_length} less "
                f"--max-completion-length {max_completion_length} leaves {room}; raise one, lower the other, or leave "
                "out --long-examples refuse."
            )
    if progress is not None:
        progress(len(records), len(records))
    if not found:
        raise RequestError(
            f"No prompt leaves room for --max-completion-length {max_completion_length} in --max-seq-length "
            f"{max_seq_length}; lower the one or raise the other."
        )
    report = PromptsReport(
        kind=PROMPTS.name,
        chat_template=None if template is None else str(template),
        num_examples=len(found),
        num_tokens=sum(len(prompt.tokens) for prompt in found),
        longest=longest,
        num_dropped=len(records) - len(found),
        sample=shown(found[0], tokenizer),
    )
    return Prompts(found, report)


def shown(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """A prompt as the model reads it, BOS and EOS written out; the middle of a long one is left out."""
    visible = {tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.eos_token_ids}
    decoder = tokenizer.streaming_decoder()
    text = "".join(
        decoder.add(token) + (tokenizer.id_to_token(token) if token in visible else "") for token in prompt.tokens
    )
    text += decoder.finish()
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"


def _prompt(record: Record, tokenizer: Tokenizer, template: str | Path | None) -> Prompt:
    values = dict(record.values)
    content = values.pop("prompt")
    try:
        if template is None:
            check_texts(values)
            tokens = tokenizer.encode(content)
        else:
            turns = content if isinstance(content, list) else [{"role": "user", "content": content}]
            chat = conversation(with_system(system_of(values), read_turns(turns)), values.get("tools"))
            name = None if template == OWN_TEMPLATE else template
            tokens = tokenizer.apply_chat_template(chat.messages, name, tools=chat.tools)
    except RequestError as error:
        raise RequestError(f"{record.source}: {error}") from None
    return Prompt(tokens, content, values, record.source)
