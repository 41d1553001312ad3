"""Preparing a run: which chat template the examples of instruction-tuned releases get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.training.options import FineTuneOptions
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.preparing import Loading, prepare
from mlx_openelm.training.run.samples import prompt_tokens

import pytest
import sentencepiece
from fake_hub import FakeHub
from quantization_models import write_tiny

COMPLETION = {"prompt": "Who is there?", "completion": "A friend."}
CHAT = {"messages": [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "A friend."}]}
NOTE = "has no chat template, so it was given CoreNet's"


class Notes(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def served(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the hub serves as Apple's instruct model, its base, and a third-party copy; none has a template."""
    folder = write_tiny(tmp_path / "served")
    for name in ("apple/OpenELM-270M-Instruct", "apple/OpenELM-270M", "me/OpenELM-270M-Instruct"):
        hub.add(name, folder)
    monkeypatch.chdir(tmp_path)
    return folder


def prepared(name: str, example: dict[str, Any], **loading: Any) -> tuple[Any, str]:
    """The prepared run for a file with one example twice, and the lines it printed."""
    Path("data").mkdir(exist_ok=True)
    Path("data", "train.jsonl").write_text(2 * (json.dumps(example) + "\n"))
    notes = Notes()
    options = FineTuneOptions(train=True, data="data", mask_prompt="text" not in example, valid_fraction=0.0)
    return prepare(name, options, Loading(**loading), notes), "\n".join(notes.lines)


def in_corenets_words(served: Path) -> tuple[list[int], list[int]]:
    """The ids of the example's prompt and answer in CoreNet's format, encoded by SentencePiece."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(served / "tokenizer.model"))
    prompt = [1, *pieces.encode("<|user|>\nWho is there?"), 2, *pieces.encode("\n<|assistant|>\n")]
    whole = [*prompt[: prompt.index(2) + 1], *pieces.encode("\n<|assistant|>\nA friend."), 2]
    return prompt, whole


@pytest.mark.parametrize("example", [COMPLETION, CHAT])
def test_an_instruct_release_has_corenets_template(served: Path, example: dict[str, Any]) -> None:
    prompt, whole = in_corenets_words(served)
    prepared_run, printed = prepared("270m-instruct", example)
    (first, second) = prepared_run.examples["train"].examples
    assert list(first.tokens) == list(second.tokens) == whole
    # The learned span is the assistant's turn, including the token that closes it.
    assert first.learned[0][1] == len(whole) and first.learned[0][0] in (len(prompt) - 1, len(prompt))
    assert printed.count(NOTE) == 1 and "chat_template corenet" in printed
    # Samples are prompted the same way.
    assert prompt_tokens("Who is there?", prepared_run.tokenizer, prepared_run.main_examples.report, None) == prompt


def test_examples_that_are_not_conversations_are_unchanged(served: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(served / "tokenizer.model"))
    prepared_run, printed = prepared("270m-instruct", {"text": "Who is there?"})
    assert list(prepared_run.examples["train"].examples[0].tokens) == [1, *pieces.encode("Who is there?"), 2]
    assert NOTE not in printed
    prepared_run, printed = prepared("270m-instruct", COMPLETION, chat_template="plain")
    assert list(prepared_run.examples["train"].examples[0].tokens) == [1, *pieces.encode("Who is there?A friend."), 2]
    assert NOTE not in printed


@pytest.mark.parametrize("name", ["270m", "me/OpenELM-270M-Instruct"])
def test_other_models_have_no_template(served: Path, name: str) -> None:
    """Base models were not tuned for chats, and nothing is known about third-party copies."""
    prepared_run, printed = prepared(name, COMPLETION)
    assert prepared_run.tokenizer.chat_template is None and prepared_run.main_examples.report.chat_template is None
    assert NOTE not in printed


def test_an_existing_template_is_kept(served: Path) -> None:
    (served / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    )
    prepared_run, printed = prepared("270m-instruct", CHAT)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(served / "tokenizer.model"))
    whole = [1, *pieces.encode("Who is there?"), 2, *pieces.encode("A friend."), 2]
    assert list(prepared_run.examples["train"].examples[0].tokens) == whole
    assert NOTE not in printed


def test_splits_with_and_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    for split, example in (("train", CHAT), ("valid", {"text": "Who is there?"})):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(example) + "\n")
    options = FineTuneOptions(train=True, data=str(tmp_path))
    with pytest.raises(RequestError, match=r"chat template and others without \(train with corenet, valid with none\)"):
        prepare("tiny", options, Loading(), Notes())
