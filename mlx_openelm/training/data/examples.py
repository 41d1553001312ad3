"""From records to examples: token ids, and which of them are learned."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RequestError, quote
from ...text.tokenizer import Tokenizer
from .kinds import CHAT, COMPLETION, SHAREGPT, TEXT, TURNS, Kind, Record, conversation_of, recognise
from .rendering import Spans, render_chat, render_text

# Called with how many records are done and how many there are.
Progress = Callable[[int, int], None]
_PROGRESS_EVERY = 256

LONG_EXAMPLES = ("truncate", "refuse")

# CoreNet's template for CommonSense170k (corenet/data/datasets/language_modeling/commonsense_170k.py): the lines after
# the first are indented as they were in its source, and the two first lines end in two spaces and in one.
_INDENT = "\n" + 16 * " "
_INSTRUCTION_START = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
)
_INPUT_START = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n"
)


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are learned.

    Args:
        tokens: BOS first. The model reads all but the last of them and predicts all but the first.
        learned: spans [start, end) of the tokens whose prediction counts, in order; none starts at 0.
        source: where it was written: `train.jsonl, line 12`.
    """

    tokens: array[int]
    learned: Spans
    source: str

    @property
    def num_positions(self) -> int:
        """How many tokens the model reads."""
        return len(self.tokens) - 1

    @property
    def num_targets(self) -> int:
        """How many tokens are learned."""
        return sum(end - start for start, end in self.learned)


@dataclass(frozen=True)
class Report:
    """What to tell before training.

    Args:
        kind: what the records are, such as `text` or `chat messages`: the name of one of `kinds.KINDS`.
        chat_template: the template they were rendered with: `corenet`, a file, `the tokenizer's own`; None without.
        num_examples: how many there are; every one is kept.
        num_tokens: how many tokens they have in all, as they are trained on.
        num_targets: how many of those are learned.
        longest: the tokens of the longest one, before it was cut.
        num_truncated: how many were cut.
        num_emptied: how many of those have nothing left to learn.
        num_unlearned: how many have nothing to learn, those included; they carry no loss.
        sample: the first example with something to learn, in pieces, each with whether it is learned.
    """

    kind: str
    chat_template: str | None
    num_examples: int
    num_tokens: int
    num_targets: int
    longest: int
    num_truncated: int
    num_emptied: int
    num_unlearned: int
    sample: tuple[tuple[str, bool], ...]

    def sample_text(self, marks: tuple[str, str] = ("⟦", "⟧"), limit: int = 2000) -> str:
        """The sample with what is learned between `marks`; of a long piece the middle is left out."""
        room = max(limit // max(len(self.sample), 1), 20)
        pieces = []
        for text, learned in self.sample:
            if len(text) > room:
                text = f"{text[: room // 2]} [...] {text[-(room // 2) :]}"
            pieces.append(f"{marks[0]}{text}{marks[1]}" if learned else text)
        return "".join(pieces)


@dataclass(frozen=True)
class Examples:
    """The examples of a split, in the order of their records, and what to tell about them."""

    examples: list[Example]
    report: Report

    def fingerprint(self) -> str:
        """A hash of every token and of what is learned: a run continues on the same data only."""
        content = hashlib.sha256()
        for example in self.examples:
            content.update(repr((len(example.tokens), example.learned)).encode())
            content.update(example.tokens)
        return content.hexdigest()


def tokenize(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    mask_prompt: bool = False,
    chat_template: str | Path | None = None,
    long_examples: str = "truncate",
    progress: Progress | None = None,
) -> Examples:
    """The examples that `records` describe.

    Text is BOS, its ids, EOS. An instruction is written into CoreNet's template, then as text. A prompt with its
    completion is a user's and an assistant's turn where there is a chat template, else the two joined, then as text.
    Messages go through the chat template, and end with EOS where an assistant's last turn is not closed by it. What has
    the weight 0 among them is not learned.

    Args:
        max_seq_length: how many tokens the model reads at once. An example may have one more, which is predicted only
            (as in CoreNet's data; mlx-lm counts that one too).
        mask_prompt: learn completions (with their EOS) and assistants' turns (with what closes them) alone. A token
            that holds the end of the prompt and the beginning of the completion belongs to the completion.
        chat_template: `corenet`, `plain` or a jinja file, in place of the tokenizer's own. Without any, messages are
            rendered by `corenet`. Given, it also renders instructions, as a user's and an assistant's turn; `plain`
            joins a prompt and its completion.
        long_examples: `truncate` cuts what is longer at the end, `refuse` raises.

    Raises:
        RequestError: records that are no examples of one kind; text with `mask_prompt` or with a chat template; nothing
            to learn in any example; examples that are too long; a template that cannot tell the turns apart.
    """
    if long_examples not in LONG_EXAMPLES:
        raise RequestError(f"--long-examples must be one of {', '.join(LONG_EXAMPLES)}, got {quote(long_examples)}.")
    if max_seq_length < 1:
        raise RequestError(f"--max-seq-length must be 1 or more, got {max_seq_length}.")
    kind = recognise(records)
    if kind is TEXT and mask_prompt:
        raise RequestError(
            "--mask-prompt needs prompts, and text has none: give prompt and completion, or leave it out."
        )
    if kind is TEXT and chat_template is not None:
        raise RequestError("--chat-template needs turns, and text has none: leave it out, or give messages.")
    template = _template_for(kind, tokenizer, chat_template)
    examples, lengths = [], []
    num_emptied = 0
    for done, record in enumerate(records):
        if progress is not None and done % _PROGRESS_EVERY == 0:
            progress(done, len(records))
        tokens, learned = _render(record, kind, tokenizer, template, mask_prompt)
        lengths.append(len(tokens))
        cut = _cut(learned, max_seq_length + 1)
        num_emptied += bool(learned) and not cut
        examples.append(Example(array("i", tokens[: max_seq_length + 1]), cut, record.source))
    if progress is not None:
        progress(len(records), len(records))
    num_truncated = sum(length > max_seq_length + 1 for length in lengths)
    if num_truncated and long_examples == "refuse":
        _refuse(examples, lengths, max_seq_length, num_truncated)
    sample = next((example for example in examples if example.learned), None)
    if sample is None:
        raise RequestError(_nothing_to_learn(num_emptied, max_seq_length))
    report = Report(
        kind=kind.name,
        chat_template=None if template is None else str(template),
        num_examples=len(examples),
        num_tokens=sum(len(example.tokens) for example in examples),
        num_targets=sum(example.num_targets for example in examples),
        longest=max(lengths),
        num_truncated=num_truncated,
        num_emptied=num_emptied,
        num_unlearned=sum(not example.learned for example in examples),
        sample=tuple(_show(sample, tokenizer)),
    )
    return Examples(examples, report)


_OWN_TEMPLATE = "the tokenizer's own"


def _template_for(kind: Kind, tokenizer: Tokenizer, asked: str | Path | None) -> str | Path | None:
    """The chat template that records of a kind are rendered with, None where they are text."""
    own = None if tokenizer.chat_template is None else _OWN_TEMPLATE
    if kind in (CHAT, SHAREGPT, TURNS):
        return asked or own or "corenet"  # without markers nobody could tell who speaks
    if kind is COMPLETION:
        return None if asked == "plain" else asked or own
    return asked


def _render(
    record: Record, kind: Kind, tokenizer: Tokenizer, template: str | Path | None, mask_prompt: bool
) -> tuple[list[int], Spans]:
    """The tokens of a record, uncut, and what of them is learned."""
    values = record.values
    if template is not None:
        name = None if template == _OWN_TEMPLATE else template
        try:
            return render_chat(conversation_of(values, kind), tokenizer, name, mask_prompt=mask_prompt)
        except RequestError as error:
            raise RequestError(f"{record.source}: {error}") from None
    if kind is TEXT:  # rendered already, with any tools
        return render_text("", values["text"], tokenizer, mask_prompt=False)
    if values.get("tools"):
        raise RequestError(f"{record.source}: 'tools' needs a chat template that shows them: give --chat-template FILE")
    if kind is COMPLETION:
        return render_text(values["prompt"], values["completion"], tokenizer, mask_prompt=mask_prompt)
    prompt = instruction_prompt(values["instruction"], values.get("input") or "")
    return render_text(prompt, values["output"], tokenizer, mask_prompt=mask_prompt)


def instruction_prompt(instruction: str, input: str = "") -> str:
    """CoreNet's template up to where the response begins; nothing is stripped."""
    text = (_INPUT_START if input else _INSTRUCTION_START) + f"{_INDENT}### Instruction:{_INDENT}{instruction}{_INDENT}"
    if input:
        text += f"{_INDENT}### Input:{_INDENT}{input}{_INDENT}"
    return f"{text}{_INDENT}### Response:{_INDENT}"


def _cut(spans: Spans, length: int) -> Spans:
    """What of `spans` lies in the first `length` tokens."""
    return tuple((start, min(end, length)) for start, end in spans if start < length)


def _refuse(examples: list[Example], lengths: list[int], max_seq_length: int, number: int) -> None:
    first = next(index for index, length in enumerate(lengths) if length > max_seq_length + 1)
    others = f"; {number - 1} more are too long (the longest takes {max(lengths) - 1})" if number > 1 else ""
    raise RequestError(
        f"{examples[first].source}: takes {lengths[first] - 1} positions, and --max-seq-length is {max_seq_length}"
        f"{others}; raise it, shorten what is too long, or let it be cut with --long-examples truncate."
    )


def _nothing_to_learn(num_emptied: int, max_seq_length: int) -> str:
    if num_emptied:
        return (
            f"Nothing is left to learn: the prompts alone fill --max-seq-length {max_seq_length}; raise it, or train "
            "on prompts too, without --mask-prompt."
        )
    return "There is nothing to learn: with --mask-prompt the messages need an assistant's turn whose weight is not 0."


def _show(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example in pieces that are learned or not, BOS and EOS spelled out."""
    learned = bytearray(len(example.tokens))
    for start, end in example.learned:
        learned[start:end] = bytes([1]) * (end - start)
    visible = {tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.eos_token_ids}
    decoder = tokenizer.streaming_decoder()
    pieces: list[tuple[str, bool]] = []
    for index, token in enumerate(example.tokens):
        text = decoder.add(token) + (tokenizer.id_to_token(token) if token in visible else "")
        if index == len(example.tokens) - 1:
            text += decoder.finish()
        is_learned = bool(learned[index])
        if pieces and pieces[-1][1] == is_learned:
            pieces[-1] = (pieces[-1][0] + text, is_learned)
        elif text:
            pieces.append((text, is_learned))
    return pieces
