"""The chats that `tiny` is tuned on: as described, made again to the byte, and speeches as they are in the plays."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.data.conversations import conversation, read_turns

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "lora" / "instruct"
PLAY = ROOT / "tests" / "fixtures" / "valid.jsonl"


def chats(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines()]


def answers(path: Path) -> list[str]:
    return [turn["content"] for chat in chats(path) for turn in chat if turn["role"] == "assistant"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the script makes from one play."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(FOLDER / "make.py", folder)
    subprocess.run([sys.executable, folder / "make.py", PLAY], check=True)
    return folder


@pytest.mark.parametrize(("name", "size"), [("train", 720), ("valid", 80)])
def test_every_chat_is_short_and_ends_with_an_answer(name: str, size: int) -> None:
    found = chats(FOLDER / f"{name}.jsonl")
    assert len(found) == size == len({json.dumps(chat) for chat in found})
    tokenizer = Tokenizer.from_folder(ROOT / "mlx_openelm" / "assets" / "tiny")
    for chat in found:
        assert conversation(read_turns(chat)).messages == chat
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2)
        assert len(tokenizer.apply_chat_template(chat, template="corenet")) < 400
        for turn in chat:
            assert turn["content"] == turn["content"].strip() and turn["content"][-1] in ".!?"
            assert len(turn["content"]) <= 180 and not re.search(r"[{}|\[\]]|  ", turn["content"])


def test_no_speech_is_in_both_files_or_twice() -> None:
    """Several lines, or a long one: only speeches are so long."""
    train, valid = (
        [answer for answer in answers(FOLDER / f"{name}.jsonl") if len(answer) > 75] for name in ("train", "valid")
    )
    assert len(train) > 150 and len(valid) > 10
    assert len({*train, *valid}) == len(train) + len(valid)


def test_the_script_makes_the_same_files_again(made: Path) -> None:
    before = [(made / f"{name}.jsonl").read_bytes() for name in ("train", "valid")]
    subprocess.run([sys.executable, made / "make.py", PLAY], check=True, env={"PYTHONHASHSEED": "1"})
    assert before == [(made / f"{name}.jsonl").read_bytes() for name in ("train", "valid")]
    assert [len(content.splitlines()) for content in before] == [720, 80]


def test_speeches_are_the_plays_own_and_on_the_topic(made: Path) -> None:
    play = " ".join(" ".join(json.loads(line)["text"].split()) for line in PLAY.read_text().splitlines())
    found = 0
    for chat in chats(made / "train.jsonl"):
        for request, answer in zip(chat[::2], chat[1::2], strict=True):
            match = re.match(
                r"(?:Speak of|Tell me of|What say you of|Say something about|A word on|What do you know of) "
                r"(?:the |a )?(\w+)",
                request["content"],
            )
            if match and match[1] not in ("well", "my"):
                found += 1
                assert " ".join(answer["content"].split()) in play
                assert re.search(rf"\b{match[1]}\b", answer["content"])
    assert found > 10
