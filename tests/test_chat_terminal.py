"""`mlx-openelm chat` as its users see it: on a terminal, and with messages from a pipe."""

from __future__ import annotations

import io
import json
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

from mlx_openelm import generate, load
from mlx_openelm.cli.chat_input import PipedInput
from mlx_openelm.cli.main import main

import pytest
from processes import environment
from pseudo_terminal import PseudoTerminal

BEGIN_PASTE, END_PASTE = "\x1b[200~", "\x1b[201~"
FIRST = "Good morrow!"
SECOND = "Who art thou?"


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """The answers to the two messages, from `generate`."""
    model, tokenizer = load("tiny-instruct")
    messages, texts = [], []
    for text in (FIRST, SECOND):
        messages.append({"role": "user", "content": text})
        texts.append(generate(model, tokenizer, tokenizer.apply_chat_template(messages)))
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def piped(text: str | bytes, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    data = text.encode() if isinstance(text, str) else text
    command = [sys.executable, "-m", "mlx_openelm", "chat", *map(str, words)]
    done = subprocess.run(command, input=data, capture_output=True, cwd=cwd, env=environment(), timeout=120)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_piped_messages_are_answered_line_by_line(tmp_path: Path, answers: list[str]) -> None:
    done = piped(f"{FIRST}\n{SECOND}\n", cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("\n".join([*answers, ""]), "", 0)
    assert not list(tmp_path.iterdir())  # no history of what was not typed


def test_piped_blocks_are_one_message_and_errors_end_nothing(tmp_path: Path) -> None:
    lines = ['"""', "one", "two", '"""', "three\\", "four", "/nope", b"\xff\xfe", "/usr/bin", "//save is a word", ""]
    text = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    done = piped(text + b"\n/save talk\n/load missing\n/save talk\n", "--max-tokens", 2, cwd=tmp_path)
    said = [message["content"] for message in json.loads((tmp_path / "talk.json").read_text())["messages"][::2]]
    assert said == ["one\ntwo", "three\nfour", "/usr/bin", "/save is a word"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split(".")[0] for error in errors] == [
        "error: There is no command /nope; /help lists them",
        "error: This line is not UTF-8 text; give messages in UTF-8",
        "error: missing",
    ]
    assert done.returncode == 1  # so that a script notices


def test_statistics_after_every_answer_with_a_draft_model(tmp_path: Path, answers: list[str]) -> None:
    done = piped(f"{FIRST}\n{SECOND}\n", "--draft-model", "tiny-draft", "--verbose", cwd=tmp_path)
    assert done.stdout == "\n".join([*answers, ""]) and done.returncode == 0
    assert done.stderr.count("Drafts: ") == 2 == done.stderr.count(" in the cache, ")


def test_piped_lines_end_as_in_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LF, CR or both, also between quotes and after backslashes."""
    data = 'ROMEO.\rJULIET.\r\n\nA\u2028B\n"""one\rtwo\r\nthree"""\rfour\\\rfive'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    messages = list(iter(PipedInput().read, None))
    assert messages == ["ROMEO.", "JULIET.", "", "A\u2028B", "one\ntwo\nthree", "four\nfive"]


def test_a_long_conversation_says_what_the_model_no_longer_sees(tmp_path: Path) -> None:
    done = piped("\n".join(["to be or not " * 12] * 8), "--max-tokens", 8, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 8
    line = "note: the conversation is longer than the model's context; from now on the model does not see its first "
    assert line in done.stderr and re.search(r"first \d+ messages\.", done.stderr)


def test_bad_flags_and_models_are_refused_before_the_chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for words, line in (
        (["--temp", "-1"], "--temp must be between 0 and 1000, got -1.0."),
        (["--model", "tiny", "--chat-template", "own"], "The model has no chat template of its own"),
        (["--chat-template", "nothing.jinja"], "Cannot read the chat template: nothing.jinja does not exist"),
        (["--adapter-path", "nothing"], "There is no adapter 'nothing'"),
        (["--num-draft-tokens", "2"], "--num-draft-tokens needs --draft-model or --prompt-lookup."),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["chat", *words])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {line}"), words


def test_a_chat_on_a_terminal(tmp_path: Path, answers: list[str]) -> None:
    with PseudoTerminal("chat", "--temp", "0", cwd=tmp_path) as terminal:
        terminal.expect("tiny-instruct, 4 million parameters, chat template: own. /help lists the commands.\n> ")
        terminal.type(f"{FIRST}\r")
        terminal.expect(f"{FIRST}\n{answers[0]}\n\n> ")
        terminal.type(f"{SECOND}\r")
        terminal.expect(f"{SECOND}\n{answers[1]}\n\n> ")
        terminal.type("/stats\r")
        shown = terminal.expect("template: own\n> ")
        new, cached = map(int, re.findall(r"Prompt: (\d+) new tokens after (\d+) in the cache", shown)[0])
        tokenizer = load("tiny-instruct")[1]
        assert 0 < new < len(tokenizer.encode(f"<|user|>\n{SECOND}\n<|assistant|>\n")) + 8 and cached > 30
        terminal.type("/sav\r")
        terminal.expect("error: There is no command /sav; did you mean /save? A message may begin with //.\n> ")
        terminal.type("/u\t\r")  # completed
        terminal.expect("Took back the last exchange; 2 messages left.\n> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


def test_pasted_lines_are_one_message(tmp_path: Path) -> None:
    with PseudoTerminal("chat", "--max-tokens", 2, cwd=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type(f"{BEGIN_PASTE}one\n/reset\nthree{END_PASTE}")
        terminal.type(" and more\r")
        terminal.expect("> ")
        terminal.type("four\x1b\rfive\r")  # Alt-Enter
        terminal.expect("> ")
        terminal.type('"""six\r')
        terminal.expect("... ")
        terminal.type('seven"""\r')
        terminal.expect("> ")
        terminal.type("/save talk\r")
        terminal.expect("Saved 6 messages to talk.json.")
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
    said = [message["content"] for message in json.loads((tmp_path / "talk.json").read_text())["messages"][::2]]
    assert said == ["one\n/reset\nthree and more", "four\nfive", "six\nseven"]


def test_what_was_typed_is_there_in_the_next_session(tmp_path: Path) -> None:
    up = "\x1b[A"
    with PseudoTerminal("chat", "--max-tokens", 2, cwd=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type(f"{BEGIN_PASTE}one\ntwo{END_PASTE}\r")
        terminal.expect("> ")
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
    file = tmp_path / "mlx-openelm" / "chat-history.jsonl"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["one\ntwo", "/exit"]
    with PseudoTerminal("chat", "--max-tokens", 2, "--no-history", cwd=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type("secret\r")
        terminal.expect("> ")
        terminal.type(f"{up}{up}")  # there is nothing before this session
        terminal.expect("secret")
        terminal.interrupt("leave.\n> ")
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
    assert "secret" not in file.read_text()
    with PseudoTerminal("chat", "--max-tokens", 2, cwd=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type(f"{up}{up} again\r")
        terminal.expect("> ")
        terminal.type("/save talk\r")
        terminal.expect("Saved 2 messages")
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
    assert json.loads((tmp_path / "talk.json").read_text())["messages"][0]["content"] == "one\ntwo again"


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    ban = "--logit-bias=2=-inf"  # the answer has no end
    with PseudoTerminal("chat", "--max-tokens", -1, ban, "--temp", 1, "--seed", 1, cwd=tmp_path) as terminal:
        terminal.expect("> ")
        terminal.type(f"{FIRST}\r")
        terminal.expect(f"{FIRST}\n")
        terminal.expect(" ")  # the first words
        terminal.type("\x03")
        terminal.expect("Stopped; the conversation goes on from here.\n\n> ")
        terminal.type("typed")
        terminal.expect("typed")
        terminal.interrupt("Press Ctrl-D or type /exit to leave.\n> ")
        terminal.type("/stats\r")
        assert "stopped" in terminal.expect("Conversation: 2 messages")
        terminal.type("/set max-tokens 3\r")
        terminal.expect("max-tokens: 3\n> ")
        terminal.type(f"{SECOND}\r")
        terminal.expect("note: the answer was cut off after 3 tokens; see /set max-tokens.\n\n> ")
        terminal.type("/stats\r")
        shown = terminal.expect("Conversation: 4 messages")
        new, cached = map(int, re.findall(r"Prompt: (\d+) new tokens after (\d+) in the cache", shown)[0])
        assert new < 40 and cached > 26
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0


def test_ctrl_c_ends_a_program_whose_input_is_piped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlx_openelm", "chat", "--max-tokens", "-1", "--logit-bias=2=-inf"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, env=environment()
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{FIRST}\n".encode())
        process.stdin.flush()
        assert process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130


def test_answers_go_to_a_file_without_the_prompts(tmp_path: Path, answers: list[str]) -> None:
    with (
        (tmp_path / "out.txt").open("wb") as out,
        PseudoTerminal("chat", cwd=tmp_path, stdout=out.fileno()) as terminal,
    ):
        terminal.expect("> ")
        terminal.type(f"{FIRST}\r")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    assert (tmp_path / "out.txt").read_text().strip() == answers[0]


def test_a_second_ctrl_c_takes_the_message_back(tmp_path: Path) -> None:
    """At once, in the middle of a step, which has no end here."""
    endless = (
        "import signal, socket, mlx_openelm\n"
        "from mlx_openelm.model import OpenELM\n"
        "whole = OpenELM.hidden_states\n"
        "ours, theirs = socket.socketpair()\n"
        "theirs.setblocking(False)\n"
        "signal.set_wakeup_fd(theirs.fileno())\n"
        "def wait(self, tokens, cache=None, **named):\n"
        "    if tokens.size > 1:\n"
        "        return whole(self, tokens, cache, **named)\n"
        "    print('[a step]', flush=True)\n"
        "    while ours.recv(1):\n"
        "        print('[a signal]', flush=True)\n"
        "OpenELM.hidden_states = wait\n"
        "from mlx_openelm.cli.main import main\n"
        "main(['chat', '--no-history'])\n"
    )
    with PseudoTerminal("-c", endless, cwd=tmp_path, module=False) as terminal:
        terminal.expect("> ")
        terminal.type(f"{FIRST}\r")
        terminal.expect("[a step]\n")
        terminal.type("\x03")
        terminal.expect("[a signal]\n")
        terminal.type("\x03")
        terminal.expect("Stopped; the message was taken back.\n> ")
        terminal.type("/undo\r")
        terminal.expect("error: There is no message to take back.\n> ")
        terminal.type("/exit\r")
        assert terminal.exit_code() == 0
