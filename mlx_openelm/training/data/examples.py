"""From records to examples: token ids, and which of them are learned."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RequestError, name_options, quote
from ...text.instructions import instruction_prompt
from ...text.tokenizer import Tokenizer
from ...wording import counted, subject
from .conversations import check_texts
from .kinds import CHAT, COMPLETION, SHAREGPT, TEXT, TURNS, Kind, Record, conversation_of, recognize
from .rendering import Spans, render_chat, render_text

# Called with the number of records done, and of all records.
Progress = Callable[[int, int], None]
_PROGRESS_EVERY = 256

LONG_EXAMPLES = ("truncate", "refuse")


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are learned.

    Args:
        tokens: BOS first. The model reads all but the last of them and predicts all but the first.
        learned: spans [start, end) of the tokens whose prediction counts, in order; none starts at 0.
        source: where the example is from: `train.jsonl, line 12`.
    """

    tokens: array[int]
    learned: Spans
    source: str

    @property
    def num_positions(self) -> int:
        """The number of tokens that the model reads."""
        return len(self.tokens) - 1

    @property
    def num_read(self) -> int:
        """The same; see `batches.Item`."""
        return self.num_positions

    @property
    def num_targets(self) -> int:
        """The number of tokens that are learned."""
        return sum(end - start for start, end in self.learned)


@dataclass(frozen=True)
class Report:
    """Statistics of the examples, to show before training.

    Args:
        kind: the name of one of `kinds.KINDS`, such as `text` or `chat messages`.
        chat_template: the template they were rendered with: `corenet`, a file or `the tokenizer's own`; None without.
        num_examples: the number of examples; none is dropped.
        num_tokens: the tokens of all examples, after truncation.
        num_targets: the tokens that are learned.
        longest: the tokens of the longest example, before truncation.
        num_truncated: the examples that were truncated.
        num_emptied: truncated examples that have nothing left to learn.
        num_unlearned: all examples that have nothing to learn; they have no loss.
        num_empty: examples without text, of which only the end is learned.
        sample: the first example with something to learn, as pieces of text with whether they are learned.
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
    num_empty: int
    sample: tuple[tuple[str, bool], ...]

    sample_title = "An example, with what is learned between ⟦ and ⟧:"

    def sample_text(self, marks: tuple[str, str] = ("⟦", "⟧"), limit: int = 2000) -> str:
        """The sample, with learned text between `marks`; the middle of a long piece is left out."""
        return marked(self.sample, marks, limit)

    def lines(self, split: str, max_seq_length: int) -> Iterator[str]:
        """Lines about the examples of a split: kind and size, how many were cut, how many have nothing to learn."""
        template = "" if self.chat_template is None else f", chat template: {self.chat_template}"
        yield (
            f"{split}: {counted(self.num_examples, 'example')} ({self.kind}{template}), {self.num_tokens:,} tokens, "
            f"{self.num_targets:,} of them learned; the longest has {self.longest:,}"
        )
        if self.num_truncated:
            emptied = f", {self.num_emptied:,} of them before anything that is learned" if self.num_emptied else ""
            were = subject(self.num_truncated, "example", "was", "were")
            yield name_options(f"{split}: {were} cut to --max-seq-length {max_seq_length}{emptied}")
        if self.num_unlearned > self.num_emptied:
            have = subject(self.num_unlearned - self.num_emptied, "example", "has", "have")
            yield f"{split}: {have} nothing to learn"
        if self.num_empty:
            have = subject(self.num_empty, "example", "has", "have")
            yield f"{split}: {have} no text; only the end of a text is learned from it"


def marked(sample: Sequence[tuple[str, bool]], marks: tuple[str, str] = ("⟦", "⟧"), limit: int = 2000) -> str:
    """Pieces of text, those that are learned between `marks`; the middle of a long piece is left out."""
    room = max(limit // max(len(sample), 1), 20)
    pieces = []
    for text, learned in sample:
        if len(text) > room:
            text = f"{text[: room // 2]} [...] {text[-(room // 2) :]}"
        pieces.append(f"{marks[0]}{text}{marks[1]}" if learned else text)
    return "".join(pieces)


@dataclass(frozen=True)
class Examples:
    """The examples of a split, in the order of their records, and their statistics."""

    examples: list[Example]
    report: Report

    def fingerprint(self) -> str:
        """A hash of all tokens and learned spans: a run can only be continued with the same data."""
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
    """Turn records into examples.

    Text becomes BOS, its ids, EOS. An instruction is put into CoreNet's template and then treated as text. A prompt
    with its completion becomes a user's and an assistant's turn if there is a chat template; otherwise the two are
    joined and treated as text. Messages go through the chat template, and get EOS if an assistant's last turn does not
    end with it. Messages with weight 0 are not learned.

    Args:
        max_seq_length: the tokens that the model reads at once. An example may have one more, which is only predicted
            (as in CoreNet's data; mlx-lm counts that one too).
        mask_prompt: learn only completions (with their EOS) and assistants' turns (with the token that ends them). A
            token that spans the end of the prompt and the start of the completion belongs to the completion.
        chat_template: `corenet`, `plain` or a jinja file, instead of the tokenizer's own. The default for messages, if
            the tokenizer has none, is `corenet`. If given, it also renders instructions, as a user's and an assistant's
            turn; `plain` joins a prompt and its completion.
        long_examples: `truncate` cuts longer examples at the end, `refuse` raises.

    Raises:
        RequestError: records that are not examples of one kind; text with `mask_prompt` or a chat template; no example
            with anything to learn; examples that are too long; a template that does not let turns be told apart.
    """
    if long_examples not in LONG_EXAMPLES:
        raise RequestError(f"--long-examples must be one of {', '.join(LONG_EXAMPLES)}, got {quote(long_examples)}.")
    if max_seq_length < 1:
        raise RequestError(f"--max-seq-length must be 1 or more, got {max_seq_length}.")
    kind = recognize(records)
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
        tokens, learned = _render(record, kind, tokenizer, template, mask_prompt, max_seq_length + 1)
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
        num_empty=sum(bool(example.learned) and length <= 2 for example, length in zip(examples, lengths, strict=True)),
        sample=tuple(show(sample, tokenizer)),
    )
    return Examples(examples, report)


OWN_TEMPLATE = "the tokenizer's own"


def _template_for(kind: Kind, tokenizer: Tokenizer, asked: str | Path | None) -> str | Path | None:
    """The chat template that records of a kind are rendered with; None if they are treated as text."""
    own = None if tokenizer.chat_template is None else OWN_TEMPLATE
    if kind in (CHAT, SHAREGPT, TURNS):
        return asked or own or "corenet"  # without a template the roles would be lost
    if kind is COMPLETION:
        return None if asked == "plain" else asked or own
    return asked


def _render(
    record: Record, kind: Kind, tokenizer: Tokenizer, template: str | Path | None, mask_prompt: bool, limit: int
) -> tuple[list[int], Spans]:
    """The tokens of a record before truncation to `limit`, and the spans of them that are learned."""
    values = record.values
    if template is not None:
        name = None if template == OWN_TEMPLATE else template
        try:
            return render_chat(conversation_of(values, kind), tokenizer, name, mask_prompt=mask_prompt, limit=limit)
        except RequestError as error:
            raise RequestError(f"{record.source}: {error}") from None
    if kind is TEXT:  # it is rendered already, including any tools
        return render_text("", values["text"], tokenizer, mask_prompt=False)
    try:
        check_texts(values)
    except RequestError as error:
        raise RequestError(f"{record.source}: {error}") from None
    if kind is COMPLETION:
        return render_text(values["prompt"], values["completion"], tokenizer, mask_prompt=mask_prompt)
    prompt = instruction_prompt(values["instruction"], values.get("input") or "")
    return render_text(prompt, values["output"], tokenizer, mask_prompt=mask_prompt)


def _cut(spans: Spans, length: int) -> Spans:
    """The parts of `spans` within the first `length` tokens."""
    return tuple((start, min(end, length)) for start, end in spans if start < length)


def _refuse(examples: list[Example], lengths: list[int], max_seq_length: int, number: int) -> None:
    first = next(index for index, length in enumerate(lengths) if length > max_seq_length + 1)
    others = f"; {number - 1} more are too long (the longest takes {max(lengths) - 1})" if number > 1 else ""
    raise RequestError(
        f"{examples[first].source}: takes {lengths[first] - 1} positions, and --max-seq-length is {max_seq_length}"
        f"{others}; raise the limit, shorten the example, or use --long-examples truncate."
    )


def _nothing_to_learn(num_emptied: int, max_seq_length: int) -> str:
    if num_emptied:
        return (
            f"Nothing is left to learn: the prompts alone fill --max-seq-length {max_seq_length}; raise it, or train "
            "on prompts too, without --mask-prompt."
        )
    return "There is nothing to learn: with --mask-prompt the messages need an assistant's turn whose weight is not 0."


def show(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of an example as pieces, with whether each is learned; BOS and EOS are written out."""
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
