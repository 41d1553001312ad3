"""What is said to the names that people know from elsewhere: the right one, or why there is none."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from mlx_openelm import errors, suggestions
from mlx_openelm.cli.main import COMMANDS, command, main
from mlx_openelm.errors import RequestError

import pytest

# The commands of mlx-lm that have a counterpart, by module.
COUNTERPARTS = {
    "generate": "generate",
    "chat": "chat",
    "convert": "convert",
    "lora": "lora",
    "fuse": "fuse",
    "cache_prompt": "cache-prompt",
    "perplexity": "perplexity",
    "upload": "upload",
    "benchmark": "bench",
    "server": "serve",
    **{f"quant.{name}": "quantize" for name in ("awq", "dwq", "gptq", "dynamic_quant")},
}


@pytest.fixture(autouse=True)
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "names_flags", True)


def refusal(*words: str) -> str:
    """The error of a command line."""
    with pytest.raises(RequestError) as caught:
        command(words[0])[0].parse(words[1:])
    return str(caught.value)


def flags_of(module: str) -> list[str]:
    """Every flag of a command of mlx-lm, read from its source."""
    package = importlib.util.find_spec("mlx_lm")
    if package is None or package.origin is None:
        pytest.skip("mlx-lm is not installed")
    tree = ast.parse((Path(package.origin).parent / f"{module.replace('.', '/')}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    added = [call for call in calls if getattr(call.func, "attr", None) == "add_argument"]
    words = [arg.value for call in added for arg in call.args if isinstance(arg, ast.Constant)]
    return [word for word in words if word.startswith("-")]


@pytest.mark.parametrize(("module", "name"), COUNTERPARTS.items())
def test_every_flag_of_mlx_lm_works_or_is_answered(module: str, name: str) -> None:
    known = command(name)[0].flags
    flags = flags_of(module)
    assert "--upload-repo" in flags or "--model" in flags
    for flag in flags:
        if flag in known or suggestions.not_needed(flag):
            continue
        message = suggestions.unknown_flag(f"mlx-openelm {name}", flag, known)
        assert "did you mean" in message or "is not offered" in message, message


def test_every_command_of_mlx_lm_works_or_is_answered() -> None:
    flags_of("cli")
    from mlx_lm import cli

    names = next(value for value in cli.main.__code__.co_consts if isinstance(value, tuple))
    assert "generate" in names and len(names) > 15
    for name in names:
        if name not in COMMANDS:
            message = suggestions.unknown_command("mlx-openelm", name, list(COMMANDS))
            assert "did you mean" in message or "is not offered" in message, message


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generate", "--temperature", "1"], "--temp"),
        (["generate", "-t", "1"], "--temp"),
        (["generate", "-n", "5"], "--max-tokens"),
        (["generate", "--max-new-tokens", "5"], "--max-tokens"),
        (["generate", "--max_tokens", "5"], "--max-tokens"),
        (["generate", "-temp", "1"], "--temp"),
        (["generate", "--lora", "x"], "--adapter-path"),
        (["generate", "--temprature", "1"], "--temp"),  # a typo of another program's name
        (["generate", "--max-new-token", "1"], "--max-tokens"),
        (["generate", "--max-tok", "5"], "--max-tokens"),
        (["generate", "--tmep", "1"], "--temp"),
        (["generate", "--quantize"], "mlx-openelm convert --quantize"),
        (["generate", "--lr", "1e-4"], "mlx-openelm lora --learning-rate"),
        (["generate", "--iters", "5"], "mlx-openelm lora --iters"),
        (["generate", "--data", "x"], "mlx-openelm lora --data"),
        (["generate", "--format", "gguf"], "mlx-openelm export --format"),
        (["lora", "--temperature", "1"], "mlx-openelm generate --temp"),
        (["lora", "--lr", "1e-4"], "--learning-rate"),
        (["lora", "-n", "5"], "--iters"),
        (["lora", "--lora-layers", "5"], "--num-layers"),
        (["lora", "--wandb", "x"], "--report-to wandb"),
        (["convert", "--bits", "4"], "--q-bits"),
        (["quantize", "--bits", "4"], "--q-bits"),
        (["quantize", "--data-path", "x"], "--calibration"),
        (["perplexity", "--data-path", "x"], "--data"),
        (["fuse", "--de-quantize"], "--dequantize"),
        (["export", "-o", "x"], "--output"),
        (["convert", "-o", "x"], "--mlx-path"),
        (["bench", "--num-trials", "3"], "--repetitions"),
        (["bench", "-r", "3"], "--repetitions"),
        (["bench", "--n-gen", "64"], "--generation-tokens"),
        (["bench", "--input-len", "64"], "--prompt-tokens"),
    ],
)
def test_other_names_of_our_flags(words: list[str], hint: str) -> None:
    assert f"(did you mean {hint}?)" in refusal(*words)


def test_a_flag_of_another_command_exists_there() -> None:
    for flag, name in suggestions._ELSEWHERE.items():
        assert flag in command(name)[0].flags, flag


def test_sampling_and_streaming_need_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal("generate", "--do-sample") == "--do-sample is not offered: text is sampled if --temp is above 0."
    command("generate")[0].parse(["hi", "--stream"])
    assert capsys.readouterr().err == "warning: --stream is not needed: text is printed as it is generated.\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["convert", "tiny"], " (did you mean --model tiny?)"),
        (["perplexity", "my text.txt"], " (did you mean --data 'my text.txt'?)"),
        (["export", "gguf"], " (did you mean --format gguf?)"),
        (["convert", "--model", "my", "folder"], ""),
        (["convert", "-q", "4"], ""),
        (["doctor", "tiny"], ""),
    ],
)
def test_an_argument_that_lacks_its_flag(words: list[str], hint: str) -> None:
    assert refusal(*words) == f"Unexpected argument {words[-1]!r}{hint}; see mlx-openelm {words[0]} --help."


def test_a_renamed_flag_exists_in_some_command() -> None:
    parsers = [command(name)[0] for name in COMMANDS]
    for names in suggestions._RENAMED_FLAGS.values():
        for name in names:
            assert name == "--version" or any(name.split()[0] in parser.flags for parser in parsers), name


@pytest.mark.parametrize("name", ["classify"])
def test_planned_commands_are_not_offered_yet(name: str) -> None:
    with pytest.raises(RequestError, match=f"^mlx-openelm {name} is not offered yet; ") as caught:
        command(name)
    named = re.findall(r"mlx-openelm ([a-z]+)((?: --[a-z-]+)?)", str(caught.value))[1:]
    for other, flag in named:  # what can be done until then
        assert flag.strip() in ("", *command(other)[0].flags)
    assert named or "mlx-openelm --help" in str(caught.value)
    assert name not in COMMANDS


@pytest.mark.parametrize(
    ("name", "hint"),
    [("train", "lora"), ("finetune", "lora"), ("fine_tune", "lora"), ("awq", "quantize --method awq"),
     ("quantise", "quantize"), ("Generate", "generate"), ("conv", "convert")],
)  # fmt: skip
def test_other_names_of_our_commands(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match=f"has no command '{name}'; did you mean {hint}\\?$"):
        command(name)


@pytest.mark.parametrize("flag", ["--prompt-foo", "--modelling", "--quant", "-z", "--x"])
def test_no_wrong_neighbour_is_suggested(flag: str) -> None:
    assert (
        refusal("generate", flag, "x") == f"mlx-openelm generate has no flag {flag}; see mlx-openelm generate --help."
    )


def test_trust_remote_code_is_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm's scripts pass it. They go on, since what it is for happens without it."""
    for words in (["--trust-remote-code", "info"], ["info", "--trust-remote-code"], ["info", "--trust_remote_code"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--json"])
        assert stop.value.code == 0
        shown = capsys.readouterr()
        assert shown.out.startswith("{")
        assert shown.err.endswith("is not needed: no repository code is run.\n") and shown.err.count("\n") == 1


def test_a_flag_before_the_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--prompt", "hi"])
    assert "the flags of a command follow its name: mlx-openelm generate --prompt" in capsys.readouterr().err
