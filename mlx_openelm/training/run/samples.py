"""How a model continues sample prompts, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...generation.stream import generate
from ...model import OpenELM
from ...text.tokenizer import Tokenizer
from ..data.answers import AnswersReport
from ..data.examples import Report, instruction_prompt
from ..data.kinds import INSTRUCTION
from ..data.prompts import PromptsReport


@dataclass(frozen=True)
class Sample:
    """A prompt, and the model's greedy continuations before and after training."""

    prompt: str
    before: str
    after: str


def prompt_tokens(
    prompt: str, tokenizer: Tokenizer, report: Report | AnswersReport | PromptsReport, chat_template: str | Path | None
) -> list[int]:
    """A prompt in the form that training used: in the examples' chat or instruction template, or as plain text.

    Args:
        report: of the training examples.
        chat_template: the one that `tokenize` was given.
    """
    if report.chat_template is not None:
        own = report.chat_template == "the tokenizer's own"
        template = chat_template or (None if own else report.chat_template)
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], template)
    return tokenizer.encode(instruction_prompt(prompt) if report.kind == INSTRUCTION.name else prompt)


def continue_prompts(model: OpenELM, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
    """The most likely continuation of each prompt."""
    training = model.training
    model.eval()
    try:
        return [generate(model, tokenizer, tokens, max_tokens=max_tokens, temp=0.0) for tokens in prompts]
    finally:
        model.train(training)
