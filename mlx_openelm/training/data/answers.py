"""From preferences to tokens: the completions of each prompt, truncated as in TRL, and statistics of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import RequestError, name_options
from ...text.tokenizer import Tokenizer
from ...wording import counted, subject
from .conversations import check_texts, conversation, with_system
from .examples import OWN_TEMPLATE, Example, Progress, marked, show
from .kinds import Record
from .preferences import Preference, read_preferences
from .rendering import common_prefix, render_chat

_PROGRESS_EVERY = 256


@dataclass(frozen=True)
class Answer(Example):
    """A prompt with a completion; `start` is the first token of the completion, which goes to the end."""

    start: int = 1

    @property
    def num_completed(self) -> int:
        """The tokens of the completion."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Answers:
    """What a preference loss takes together; it counts as one, whatever its tokens.

    Args:
        answers: the chosen and the rejected answer; or an answer with a label, and the same prompt with the completion
            of another one, with which KTO estimates how far the model is from its reference.
        label: whether the first answer is desirable; None for a pair.
        side_by_side: whether the answers share a row, in packing.
    """

    answers: tuple[Answer, Answer]
    source: str
    label: bool | None = None
    side_by_side: bool = False
    num_targets: int = 1

    @property
    def num_positions(self) -> int:
        """The length of a row that holds them."""
        lengths = [answer.num_positions for answer in self.answers]
        return sum(lengths) if self.side_by_side else max(lengths)

    @property
    def num_read(self) -> int:
        """The tokens that the model reads."""
        return sum(answer.num_positions for answer in self.answers)


@dataclass(frozen=True)
class AnswersReport:
    """Statistics of preferences, to show before training; `sample` is the text of the first, a line an answer.

    Args:
        num_prompts_cut: prompts that lost their beginning, to `--max-prompt-length`.
        num_truncated: answers that lost their end, to `--max-seq-length`.
        num_dropped: preferences left out because their prompt leaves no room for a completion.
        num_equal: pairs whose answers are the same.
    """

    kind: str
    chat_template: str | None
    num_examples: int
    num_tokens: int
    num_targets: int
    longest: int
    num_desirable: int
    num_prompts_cut: int
    num_truncated: int
    num_dropped: int
    num_equal: int
    sample: tuple[str, ...]

    sample_title = "A prompt with its completions, which count between ⟦ and ⟧:"

    def sample_text(self) -> str:
        """The sample."""
        return "\n".join(self.sample)

    def lines(self, split: str, max_seq_length: int) -> Iterator[str]:
        """Lines about the preferences of a split: kind and size, and how many were cut or left out."""
        template = "" if self.chat_template is None else f", chat template: {self.chat_template}"
        desirable = f", {self.num_desirable:,} of them desirable" if self.num_desirable else ""
        items = counted(self.num_examples, self.kind.removesuffix("s"))
        yield (
            f"{split}: {items}{desirable}{template}, {self.num_tokens:,} tokens, "
            f"{self.num_targets:,} of them in completions; the longest has {self.longest:,}"
        )
        if self.num_prompts_cut:
            were = subject(self.num_prompts_cut, "prompt", "was", "were")
            yield name_options(f"{split}: {were} cut to --max-prompt-length")
        if self.num_truncated:
            were = subject(self.num_truncated, "completion", "was", "were")
            yield name_options(f"{split}: {were} cut to --max-seq-length {max_seq_length}")
        if self.num_dropped:
            were = subject(self.num_dropped, "preference", "was", "were")
            yield name_options(f"{split}: {were} left out: the prompt alone fills --max-seq-length {max_seq_length}")
        if self.num_equal:
            have = subject(self.num_equal, "pair", "has", "have")
            yield f"{split}: {have} the same answer twice, from which no preference is learned"


@dataclass(frozen=True)
class Preferences:
    """The preferences of a split, in the order of their records, and their statistics."""

    examples: list[Answers]
    report: AnswersReport

    def fingerprint(self) -> str:
        """A hash of all tokens, starts of completions and labels."""
        content = hashlib.sha256()
        for item in self.examples:
            for answer in item.answers:
                content.update(repr((len(answer.tokens), answer.start, answer.learned, item.label)).encode())
                content.update(answer.tokens)
        return content.hexdigest()


def tokenize_preferences(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    max_prompt_length: int | None = None,
    labeled: bool = False,
    learns_prompts: bool = False,
    chat_template: str | Path | None = None,
    refuse_long: bool = False,
    packing: bool = False,
    progress: Progress | None = None,
) -> Preferences:
    """Turn records into pairs of answers, or answers with labels.

    Texts are joined with their prompt and end with EOS, unless the model has a chat template and the prompt was given:
    then they become a user's and an assistant's turn, as in fine-tuning. The completion starts where the tokens of the
    prompt and of the whole part, for both answers at the same place.

    Args:
        max_seq_length: the tokens of an answer, with its prompt; the end of longer ones is cut off. Where the prompt
            alone has as many, the preference is left out.
        max_prompt_length: the tokens of a prompt, with BOS; the beginning of longer ones is cut off.
        labeled: for KTO.
        learns_prompts: whether the loss counts the prompt's tokens of the chosen answer too, as ORPO's does.
        chat_template: as in `examples.tokenize`.
        refuse_long: refuse answers that are too long.
        packing: whether two answers share a row.

    Raises:
        RequestError: bad records, a template that fails, or nothing left to learn.
    """
    kind, preferences = read_preferences(records, labeled=labeled)
    template = _template_for(preferences, tokenizer, chat_template)
    found: list[tuple[Preference, list[Answer]]] = []
    longest = num_prompts_cut = num_truncated = num_dropped = 0
    for done, preference in enumerate(preferences):
        if progress is not None and done % _PROGRESS_EVERY == 0:
            progress(done, len(preferences))
        tokens, start = _render(preference, tokenizer, template)
        longest = max(longest, *map(len, tokens))
        cut = 0 if max_prompt_length is None else max(0, start - max_prompt_length)
        num_prompts_cut += cut > 0
        tokens, start = [ids[:1] + ids[1 + cut :] for ids in tokens], start - cut
        too_long = sum(len(ids) > max_seq_length for ids in tokens)
        if too_long and refuse_long:
            raise RequestError(
                f"{preference.source}: takes {max(map(len, tokens))} tokens, and --max-seq-length is {max_seq_length}; "
                "raise the limit, shorten the texts, or use --long-examples truncate."
            )
        if start >= max_seq_length:
            num_dropped += 1
            continue
        num_truncated += too_long
        found.append((preference, [_answer(ids[:max_seq_length], start, preference.source) for ids in tokens]))
    if progress is not None:
        progress(len(preferences), len(preferences))
    if not found:
        raise RequestError(
            f"Nothing is left to learn: the prompts alone fill --max-seq-length {max_seq_length}; raise it, or give "
            "--max-prompt-length."
        )
    examples = (
        _with_others(found, max_seq_length) if labeled else [_pair(*item, learns_prompts, packing) for item in found]
    )
    answers = [answer for _, own in found for answer in own]
    report = AnswersReport(
        kind=kind.name if not (labeled and len(preferences) > len(records)) else "answers of preference pairs",
        chat_template=None if template is None else str(template),
        num_examples=len(examples),
        num_tokens=sum(len(answer.tokens) for answer in answers),
        num_targets=sum(answer.num_completed for answer in answers),
        longest=longest,
        num_desirable=sum(bool(item.label) for item in examples),
        num_prompts_cut=num_prompts_cut,
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_equal=0 if labeled else sum(item.answers[0].tokens == item.answers[1].tokens for item in examples),
        sample=tuple(_shown(examples[0], tokenizer)),
    )
    return Preferences(examples, report)


def _template_for(
    preferences: Sequence[Preference], tokenizer: Tokenizer, asked: str | Path | None
) -> str | Path | None:
    """The chat template that preferences are rendered with; None if they are treated as text."""
    own = None if tokenizer.chat_template is None else OWN_TEMPLATE
    cut = next((preference for preference in preferences if preference.is_cut), None)
    whole = next((preference for preference in preferences if not preference.is_cut), None)
    if cut is not None and whole is not None:
        raise RequestError(
            f"{cut.source}: has texts without a prompt, and {whole.source} has a prompt; give all of them one, or none."
        )
    if any(isinstance(preference.prompt, list) for preference in preferences):
        return asked or own or "corenet"  # without a template the roles would be lost
    if cut is not None:
        if asked not in (None, "plain"):
            raise RequestError("--chat-template needs prompts, and these texts have none of their own: leave it out.")
        return None
    return None if asked == "plain" else asked or own


def _render(preference: Preference, tokenizer: Tokenizer, template: str | Path | None) -> tuple[list[list[int]], int]:
    """The tokens of the prompt with each completion, and where the completions start in all of them."""
    prompt, completions = preference.prompt, preference.completions
    try:
        if template is None:
            assert isinstance(prompt, str)
            check_texts({"system": preference.system, "tools": preference.tools})
            return _render_texts(prompt, [str(completion) for completion in completions], tokenizer)
        if isinstance(prompt, str):
            prompt = with_system(preference.system, [{"role": "user", "content": prompt}])
            completions = tuple([{"role": "assistant", "content": completion}] for completion in completions)
        name = None if template == OWN_TEMPLATE else template
        tokens, starts = [], []
        for completion in completions:
            chat = conversation([*prompt, *completion], preference.tools, len(prompt))
            ids, learned = render_chat(chat, tokenizer, name, mask_prompt=True)
            if not learned:
                raise RequestError("The completion has nothing to learn")
            tokens.append(ids)
            starts.append(learned[0][0])
        return tokens, min([*starts, *(common_prefix(tokens[0], ids) for ids in tokens[1:])])
    except RequestError as error:
        raise RequestError(f"{preference.source}: {error}") from None


def _render_texts(prompt: str, completions: Sequence[str], tokenizer: Tokenizer) -> tuple[list[list[int]], int]:
    own = tokenizer.encode(prompt)
    tokens, starts = [], []
    for completion in completions:
        ids = tokenizer.encode(prompt + completion)
        starts.append(common_prefix(own, ids))
        tokens.append(ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])
    return tokens, max(1, min(starts))


def _answer(tokens: list[int], start: int, source: str) -> Answer:
    return Answer(array("i", tokens), ((start, len(tokens)),), source, start)


def _pair(preference: Preference, answers: list[Answer], learns_prompts: bool, packing: bool) -> Answers:
    chosen, rejected = answers
    if learns_prompts:
        chosen = replace(chosen, learned=((1, len(chosen.tokens)),))
    return Answers((chosen, rejected), preference.source, side_by_side=packing)


def _with_others(found: Sequence[tuple[Preference, list[Answer]]], max_seq_length: int) -> list[Answers]:
    """Labeled answers, each beside its prompt with the completion of the answer before it, the first with the last's.

    TRL takes those of a batch, which is the same set where batches keep the order of the file. Here batches are
    shuffled, and a fixed partner lets the reference be computed once.
    """
    examples = []
    for index, (preference, (answer,)) in enumerate(found):
        other = found[index - 1][1][0]
        tokens = [*answer.tokens[: answer.start], *other.tokens[other.start :]][:max_seq_length]
        mismatched = _answer(tokens, answer.start, preference.source)
        examples.append(Answers((answer, mismatched), preference.source, preference.label))
    return examples


def _shown(item: Answers, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of a pair's answers, or of a labeled answer, with marks around the completions."""
    labels = ("chosen", "rejected") if item.label is None else ("desirable" if item.label else "undesirable",)
    for label, answer in zip(labels, item.answers, strict=False):
        pieces = show(replace(answer, learned=((answer.start, len(answer.tokens)),)), tokenizer)
        yield f"{label}: {marked(pieces)}"
