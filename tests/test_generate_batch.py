"""`mlx-openelm generate --batch`: many prompts at once, a line of JSON for each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load, stream_generate
from mlx_openelm.cli.flags import memory_size
from mlx_openelm.cli.main import main

import pytest
from processes import environment

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = str(FIXTURES / "shakespeare-hf")
LINES: list[dict[str, Any]] = [
    {"prompt": "ROMEO.", "max_tokens": 5},
    {"prompt": "JULIET. O", "temp": 0.8, "seed": 7, "top_logprobs": 2, "logit_bias": {"260": 1.5}},
    {"prompt": "To be", "adapter_path": str(FIXTURES / "peft-lora")},
    {"prompt": "Enter", "kv_bits": 8, "kv_group_size": 32, "stop": ["e"]},
]


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of `generate --model FOLDER` with these flags."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command line replaces
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", FOLDER, *args])
    output, messages = capsys.readouterr()
    return int(stop.value.code or 0), output, messages


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_lines_have_options_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "prompts.jsonl", LINES)
    code, output, messages = call(capsys, monkeypatch, "--batch", file, "--max-tokens", "7", "--logprobs")
    assert code == 0
    found = [json.loads(line) for line in output.splitlines()]
    assert [one["prompt"] for one in found] == [line["prompt"] for line in LINES]
    for one, line in zip(found, LINES, strict=True):
        options = {"max_tokens": 7} | line
        prompt, adapter = options.pop("prompt"), options.pop("adapter_path", None)
        if "logit_bias" in options:
            options["logit_bias"] = {260: 1.5}
        model, tokenizer = load(FOLDER, adapter)
        ids = tokenizer.encode(prompt, as_message=True)
        pieces = list(stream_generate(model, tokenizer, ids, **options))
        assert one["text"] == "".join(piece.text for piece in pieces)
        assert one["tokens"] == [piece.token for piece in pieces]
        assert one["logprobs"] == pytest.approx([piece.logprob for piece in pieces], abs=1e-4)
        assert one["finish_reason"] == pieces[-1].finish_reason
        assert (one["prompt_tokens"], one["generation_tokens"]) == (len(ids), len(pieces))
        assert one.get("seed") == line.get("seed")
        assert ("top_logprobs" in one) == ("top_logprobs" in line)
    assert len(found[1]["top_logprobs"][0]) == 2
    assert "Texts: 4 of 4" in messages and "Peak memory: " in messages and "expected: " in messages


def test_texts_of_a_plain_file_are_those_of_lone_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the chat template of the flags; blank lines are left out, and other line breaks are understood."""
    prompts = ["Who are you?", "ROMEO. Ü", "To be"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffWho are you?\r\n\n  \nROMEO. Ü\nTo be".encode())
    flags = ("--system-prompt", "Be kind.", "--chat-template", "corenet", "--max-tokens", "4", "--no-verbose")
    code, output, messages = call(capsys, monkeypatch, "--batch", str(file), "--max-rows", "2", *flags)
    assert (code, messages) == (0, "")
    for line, prompt in zip(output.splitlines(), prompts, strict=True):
        alone = json.loads(call(capsys, monkeypatch, "--prompt", prompt, "--json", *flags)[1])
        assert (json.loads(line)["prompt"], json.loads(line)["text"]) == (prompt, alone["text"])


def test_sampled_texts_say_their_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "prompts.txt", ["ROMEO.", "ROMEO."])
    _, output, _ = call(capsys, monkeypatch, "--batch", file, "--max-tokens", "6", "--temp", "1.5")
    first, second = map(json.loads, output.splitlines())
    assert first["seed"] != second["seed"] and first["text"] != second["text"]
    flags = ("--max-tokens", "6", "--temp", "1.5", "--seed", str(second["seed"]), "--json")
    assert json.loads(call(capsys, monkeypatch, "--prompt", "ROMEO.", *flags)[1])["text"] == second["text"]


@pytest.mark.parametrize(
    ("name", "lines", "flags", "message"),
    [
        ("a.jsonl", [{"prompt": "a"}, {"prompt": "b", "max_token": 3}], [], "a.jsonl:2 has an unknown key"),
        ("a.jsonl", [{"prompt": "a"}, "", {"prompt": "b", "temp": -1}], [], "a.jsonl:3: temp must be between"),
        ("a.jsonl", [{"prompt": "a"}], ["--temp", "-1"], "a.jsonl:1: --temp must be between"),
        ("a.jsonl", [{"prompt": "a\ud800"}], [], "a.jsonl:1: prompt has half of a surrogate pair"),
        ("a.jsonl", [{"prompt": "a"}, "{"], [], "a.jsonl:2 is not JSON"),
        ("a.jsonl", [["a"]], [], "a.jsonl:1 must be a JSON object, not a list."),
        ("a.jsonl", [{"text": "a"}], [], "a.jsonl:1 has an unknown key, 'text'"),
        ("a.jsonl", [{"prompt": ""}], [], "a.jsonl:1 needs a text as its prompt."),
        ("a.jsonl", [{"prompt": "a", "adapter_path": "nowhere/at/all"}], [], "a.jsonl:1: "),
        ("a.txt", ["", " "], [], "a.txt has no prompts; write one on each line."),
        ("a.txt", ["a", "b"], ["--memory-limit", "1kB"], "a.txt:1: The text needs up to"),
        ("a.txt", ["a"], ["--max-rows", "0"], "--max-rows must be a whole number, 1 or above, got 0."),
        ("a.txt", ["a"], ["--memory-limit", "much"], "--memory-limit must be a size such as 4GB or 512MB, got 'much'"),
        ("a.txt", ["a"], ["--prompt", "b"], "Give the prompts once: with --batch,"),
    ],
)  # fmt: skip
def test_bad_lines_and_flags_are_named(
    name: str,
    lines: list[Any],
    flags: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / name, lines)
    monkeypatch.chdir(tmp_path)
    code, output, messages = call(capsys, monkeypatch, "--batch", name, *flags)
    assert (code, output) == (2, "")
    assert message in messages and messages.count("\n") == 1


@pytest.mark.parametrize("adapter", [None, str(FIXTURES / "peft-lora")])
def test_all_lines_go_on_from_a_prompt_cache_with_its_adapter(
    adapter: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [] if adapter is None else ["--adapter-path", adapter]
    with pytest.raises(SystemExit) as stop:
        main(["cache-prompt", "To be, or", "--model", FOLDER, *named, "--prompt-cache-file", "held"])
    assert not stop.value.code
    capsys.readouterr()
    lines: list[dict[str, Any]] = [{"prompt": " not to be", "max_tokens": 8}, {"prompt": " a king", "max_tokens": 4}]
    write(tmp_path / "a.jsonl", lines)
    code, output, messages = call(capsys, monkeypatch, *named, "--prompt-cache-file", "held", "--batch", "a.jsonl")
    assert code == 0, messages
    model, tokenizer = load(FOLDER, adapter)
    for found, line in zip(map(json.loads, output.splitlines()), lines, strict=True):
        whole = tokenizer.encode(f"To be, or{line['prompt']}")
        assert found["text"] == generate(model, tokenizer, whole, max_tokens=line["max_tokens"])

    for other in (str(FIXTURES / "peft-dora"), None):
        write(tmp_path / "a.jsonl", [lines[0], {"prompt": "a", "adapter_path": other}])
        code, output, messages = call(capsys, monkeypatch, *named, "--prompt-cache-file", "held", "--batch", "a.jsonl")
        assert (code, output) == (2, "")
        assert messages == (
            "error: a.jsonl:2 has an adapter_path, and held was made for one adapter, or none; leave it out.\n"
        )


def test_limits_need_a_batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, messages = call(capsys, monkeypatch, "--prompt", "a", "--max-rows", "3")
    assert code == 2 and "give them with --batch" in messages


INTERRUPTED = """
import os, signal
from mlx_openelm.cli.main import main
from mlx_openelm.generation.engine import Engine

step = Engine.step

def step_or_ctrl_c(self):
    if len(self.rows) == 9:  # the first text is done, and was printed after the last step
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)

Engine.step = step_or_ctrl_c
main()
"""


def test_ctrl_c_keeps_what_was_printed() -> None:
    command = [sys.executable, "-c", INTERRUPTED, "generate", "--batch", "-", "--max-tokens", "-1"]
    lines = [{"prompt": "ROMEO.", "max_tokens": 1}, *[{"prompt": "To be", "logit_bias": {"2": -1e9}}] * 9]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 130
    assert [json.loads(line)["generation_tokens"] for line in done.stdout.splitlines()] == [1]
    assert "Texts: 1 of 10" in done.stderr and "Traceback" not in done.stderr


def test_a_draft_model_drafts_for_all_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "prompts.jsonl", [*LINES[:1], LINES[2], {"prompt": "To be", "num_draft_tokens": 0}])
    plain = call(capsys, monkeypatch, "--batch", file, "--max-tokens", "9", "--no-verbose")[1].splitlines()
    flags = ("--draft-model", FOLDER, "--num-draft-tokens", "3", "--max-tokens", "9")
    code, output, messages = call(capsys, monkeypatch, "--batch", file, *flags)
    assert code == 0 and re.search(r"^Drafts: \d+ of \d+ tokens accepted", messages, re.MULTILINE)
    drafts = []
    for line, expected in zip(output.splitlines(), plain, strict=True):
        found = json.loads(line)
        drafts.append(found.pop("drafts", None))
        assert found == json.loads(expected)
    assert (
        drafts[0]["accepted"] == drafts[0]["drafted"] > 0 < drafts[1]["drafted"]
    )  # the model's own, then an adapter's
    assert drafts[2] is None


def test_a_text_that_is_cut_off_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    cut = {"prompt": "a", "regex": "[a-z]{40}", "max_tokens": 3}
    file = write(tmp_path / "prompts.jsonl", [cut, {"prompt": "b"}, cut])
    code, output, messages = call(capsys, monkeypatch, "--batch", file, "--max-tokens", "2", "--no-verbose")
    assert (code, [json.loads(line)["finish_reason"] for line in output.splitlines()]) == (0, ["length"] * 3)
    rest = "The text was cut off after 3 tokens, at --max-tokens; it may be incomplete."
    assert messages.splitlines() == [f"warning: {file}:{n}: {rest}" for n in (1, 3)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512 MB", 512 * 10**6),
        ("1.5g", 1_500_000_000),
        ("2GiB", 2 << 30),
        ("1000", 1000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_size(text) == size
