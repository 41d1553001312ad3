"""The command line, in separate processes where that matters: the effect of every flag, the line of every error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any, get_type_hints

from mlx_openelm import blas, console, load, native, stream_generate
from mlx_openelm.cli import doctor, info
from mlx_openelm.cli.main import COMMANDS, parse
from mlx_openelm.generation.options import GenerationOptions
from mlx_openelm.hub import corenet

import mlx.core as mx
import pytest
from fake_hub import FakeHub
from in_process import run_here
from processes import environment
from test_sources import Server

ROOT = Path(__file__).parent.parent
SHAKESPEARE = ROOT / "tests" / "fixtures" / "shakespeare-hf"
VALID = ROOT / "tests" / "fixtures" / "valid.jsonl"
PROMPT = "ROMEO. But soft, what light"


def run(
    *args: object, stdin: str | bytes = b"", env: dict[str, str] | None = None, start: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, offline unless `env` names a hub."""
    command = [*(start or (sys.executable, "-m", "mlx_openelm")), *map(str, args)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    if "COLUMNS" not in (env or {}):
        environment.pop("COLUMNS", None)  # pytest-xdist sets it
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(command, input=data, capture_output=True, env=environment, timeout=60)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def quick(*args: object, stdin: str | bytes = b"", **more: Any) -> subprocess.CompletedProcess[str]:
    """As `run`, but in this process, unless it is to be started in another way.

    Without `offline`, the command uses the hub that the fixture `hub` set up.
    """
    return run(*args, stdin=stdin, **more) if more.keys() - {"offline"} else run_here(*args, stdin=stdin, **more)


def result(*args: object, **more: Any) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    done = quick(*args, "--json", **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def generated(*args: object, prompt: str = PROMPT, tokens: int = 24, **more: Any) -> str:
    return result("generate", "--prompt", prompt, "--max-tokens", tokens, *args, **more)["text"]


def refused(*args: object, code: int = 2, **more: Any) -> str:
    """The one-line error of a command that must fail."""
    done = quick(*args, **more)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module", autouse=True)
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes share compiled bytecode, as for an installed package; if Python may write none, elsewhere."""
    if not sys.dont_write_bytecode:
        yield
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load("tiny")


@pytest.fixture(scope="module")
def greedy(tiny: Any) -> list[Any]:
    """The pieces Python gives for PROMPT."""
    return list(stream_generate(*tiny, PROMPT, max_tokens=24))


@pytest.fixture(scope="module")
def greedy_text(greedy: list[Any]) -> str:
    return "".join(piece.text for piece in greedy)


# The group.


def test_help_lists_every_command_without_importing_mlx() -> None:
    code = (
        "import sys\nfrom mlx_openelm.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: print([m for m in sys.modules if m.split('.')[0] == 'mlx'])"
    )
    done = run(start=(sys.executable, "-c", code))
    assert done.stdout.endswith("[]\n")
    for name, line in COMMANDS.items():
        assert f"\n  {name} " in done.stdout
        assert line.split()[0] in done.stdout
    assert quick().stdout + "[]\n" == done.stdout.replace("python -c", "mlx-openelm")


def test_every_command_has_help() -> None:
    for name in COMMANDS:
        done = quick(name, "--help")
        text = done.stdout
        assert (done.returncode, done.stderr) == (0, "")
        assert text.startswith(f"Usage: mlx-openelm {name}")
        assert "--debug" in text
        assert re.search("\nCommon flags:\n  (-., )?--", text)
        examples = text.partition("\nExamples:\n")[2].splitlines()
        assert examples and all(f"mlx-openelm {name}" in line for line in examples if not line.startswith("      "))


def test_every_way_to_start_the_command_gives_the_same_text(greedy_text: str, tmp_path: Path) -> None:
    from mlx_openelm import __version__

    script = Path(sys.executable).parent / "mlx-openelm"
    assert run("--version", start=(str(script),)).stdout == f"mlx-openelm {__version__}\n"
    door = run("--prompt", PROMPT, "-m", 24, start=(sys.executable, str(ROOT / "generate.py")))
    assert door.stdout == greedy_text + "\n"
    door = run("--mlx-path", tmp_path / "out", "-d", start=(sys.executable, str(ROOT / "convert.py")))
    assert door.returncode == 0, door.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.covering
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("args", [["generate", "x", "-m", "2"], ["generate", "x", "-m", "2", "--json"], ["--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_named(args: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mlx_openelm", *args]
        variables = environment(PYTHONUNBUFFERED=unbuffered)
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=variables)
    assert done.returncode == 1
    assert "error: Standard output cannot be written to: No space left on device.\n" in done.stderr


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from mlx_openelm.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "convert", "--mlx-path", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "gone", env=environment())
    assert done.stderr == "error: The current folder does not exist any more; change to another.\n"


@pytest.mark.parametrize("flags", [["-m5"], ["--max-tokens=5"], ["--trust-remote-code"]])
def test_a_prompt_may_follow_any_flag(flags: list[str]) -> None:
    _, values = parse(["generate", *flags, "To be"])
    assert values.words == ["To be"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["genrate"], "mlx-openelm has no command 'genrate'; did you mean generate?"),
        (["dance"], "no command 'dance'; there are generate, chat"),
        (["--verson"], "mlx-openelm has no flag --verson (did you mean --version?); see mlx-openelm --help."),
        (["generate", "--max-tokns", "3"], "generate has no flag --max-tokns (did you mean --max-tokens?)"),
        (["generate", "--prompt"], "--prompt"),
        (["generate", "-m", "x"], "--max-tokens must be a whole number, got 'x'."),
        (["generate", "--temp", "warm"], "--temp must be a number, got 'warm'."),
        (["generate", "--verbose=maybe"], "--verbose must be True or False, got 'maybe'."),
        (["generate", "--prompt", "two", "words"], "needs quotes: mlx-openelm generate 'two words'."),
        (["generate", "To be", "--prompt", "not"], "Give the prompt once: as the argument, with --prompt or with"),
        (["generate", "--prompt", "To be", "or"], "Give the prompt once: as the argument, with --prompt or with"),
        (["generate", "two", "--", "words"], "needs quotes: mlx-openelm generate 'two words'."),
        (["generate", "a", "--prompt", "b"], "Give the prompt once: as the argument, with --prompt or with"),
        (["generate", "--prompt", "a", "--temp", "0", "b"], "Give the prompt once: as the argument, with --prompt or"),
        (
            ["generate", "--prompt", "a", "--extra-eos-token", ",", "."],
            "--extra-eos-token takes one value at a time; repeat it: --extra-eos-token , --extra-eos-token ..",
        ),
        (["generate", "--stop", "a", "b", "c"], "--stop takes one value at a time; repeat it: --stop a --stop b."),
        (["lora", "--sample-prompt", "a", "b"], "repeat it: --sample-prompt a --sample-prompt b."),
        (["generate", "caf\udce9"], "The prompt is not UTF-8 text; give the prompt in UTF-8."),
        (["generate", "--prompt", "caf\udce9"], "The prompt is not UTF-8 text; give the prompt in UTF-8."),
        (["cache-prompt", "caf\udce9", "--prompt-cache-file", "surely-new"], "The prompt is not UTF-8 text; give"),
        (
            ["generate", "x", "--system-prompt", "caf\udce9"],
            "--system-prompt has half of a surrogate pair, which is not a character: 'caf\\udce9'.",
        ),
        (["convert", "two", "--", "words"], "Unexpected argument 'two' (did you mean --model two?); see"),
        (["generate", "-z"], "mlx-openelm generate has no flag -z;"),
        (["generate", "--max_tokens", "3"], "has no flag --max_tokens (did you mean --max-tokens?)"),
        (["generate", "--max", "3"], "generate has no flag --max (did you mean --max-kv-size or --max-tokens?)"),
        (["generate", "--json=maybe"], "--json must be True or False, got 'maybe'."),
        (["generate", "--temperature", "1"], "no flag --temperature (did you mean --temp?)"),
        (["info", "--no-json=yes"], "--no-json takes no value"),
        (["generate", "--no-verbose=no"], "--no-verbose takes no value"),
        (["generate", "--prompt", "x", "--max-tokens"], "--max-tokens needs a value"),
        (["average"], "MODEL is missing"),
        (["info", "tiny", "--model", "tiny"], "Give the model once"),
        (["perplexity"], "--data is missing"),
    ],
)
def test_usage_errors_are_one_line(args: list[str], line: str) -> None:
    assert line in refused(*args)


def test_debug_shows_the_traceback_before_and_after_the_command() -> None:
    for args in (["--debug", "info", "nothing"], ["info", "nothing", "--debug"]):
        done = quick(*args)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: There is no model named 'nothing'")


def test_unexpected_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr(info, "summarize", broken)
    line = refused("info", code=1)
    assert "KeyError" in line
    assert "run again with --debug for the traceback" in line
    done = quick("info", "--debug")
    assert (done.returncode, "Traceback" in done.stderr) == (1, True)


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    full = ("sh", "-c", f'"{sys.executable}" -m mlx_openelm "$@" >/dev/full', "sh")
    for args in ([], ["--help"], ["--version"], ["info", "--help"], ["info", "--json"]):
        assert "No space left on device" in refused(*args, start=full, code=1)


def test_ctrl_c_during_the_imports_is_quiet() -> None:
    code = (
        "import _thread, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the parent may ignore it
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mlx_openelm.cli.flags': _thread.interrupt_main()\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from mlx_openelm.cli.main import main\nmain(['generate', '-p', 'x'])"
    )
    done = run(start=(sys.executable, "-c", code))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_every_switch_has_a_negative_form() -> None:
    assert quick("info", "--json", "--no-json", "tiny").stdout == quick("info", "tiny").stdout
    assert json.loads(quick("info", "--json", "tiny").stdout)["name"] == "tiny"
    assert quick("info", "--no-json", "--model", "tiny").stdout.startswith("layer")
    assert "already quantized" in refused("convert", "-q", "--dequantize", "--no-dequantize")


def test_closed_streams_do_not_crash() -> None:
    closed = ("sh", "-c", f'"{sys.executable}" -m mlx_openelm "$@" <&- >&-', "sh")
    done = run("generate", "-p", PROMPT, "-m", 2, "--verbose", "False", start=closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "The prompt is empty" in refused("generate", start=closed)


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "mlx_openelm", "generate", "-p", PROMPT, "-m", "-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def has_gpu() -> bool:
    """Whether a command, unlike these tests, runs on a GPU."""
    return mx.metal.is_available() or mx.cuda.is_available()


# generate: sources of prompts, destinations of text.


def test_text_goes_to_stdout_and_statistics_to_stderr(greedy_text: str) -> None:
    done = run("generate", "--prompt", PROMPT, "--max-tokens", 24)
    assert (done.returncode, done.stdout) == (0, greedy_text + "\n")
    lines = done.stderr.splitlines()
    if not has_gpu() and native.kernels is None:
        assert lines.pop(0).startswith("Weights: 8 bits, expanded at load")
    assert lines[0].startswith("Prompt: 9 tokens, ")
    assert lines[1].startswith("Generation: 24 tokens, ")
    assert lines[2].startswith("Peak memory: 0.0")
    assert len(lines) == 3  # greedy decoding draws no seed


@pytest.mark.parametrize("quiet", [["--verbose", "False"], ["--verbose=F"], ["--no-verbose"]])
def test_quiet(quiet: list[str]) -> None:
    done = quick("generate", "--prompt", PROMPT, "-m", 3, *quiet)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["upload", "folder", "--upload-repo", "me/x"], "Unexpected argument 'folder' (did you mean --path folder?)"),
        (["export", "gguf"], "Unexpected argument 'gguf' (did you mean --format gguf?)"),
        (["perplexity", "-x"], "has no flag -x"),
        (["convert", "-q4"], "--quantize takes no value"),
    ],
)
def test_invalid_flags_are_reported_before_a_missing_prompt(words: list[str], reason: str) -> None:
    assert reason in refused(*words)


def test_help_has_a_short_flag() -> None:
    done = quick("generate", "-h")
    assert done.returncode == 0 and done.stdout.startswith("Usage: mlx-openelm generate")


def test_a_flag_is_a_value_only_if_joined_with_equals() -> None:
    """After a flag that needs a value, another flag means that the value was forgotten."""
    line = refused("generate", "--prompt", "--json")
    assert "--prompt needs a value, and --json is a flag; if it is the value, write --prompt=--json;" in line
    assert "--prompt needs a value, and --temp=1 is a flag" in refused("generate", "--prompt", "--temp=1")
    assert "--stop needs a value, and -m is a flag" in refused("generate", "-p", "x", "--stop", "-m", 3)
    values = result("generate", "-m", 3, "--prompt=--verbose", "--verbose", "true")
    assert values["prompt"] == "--verbose"


def test_a_switch_does_not_take_the_prompt_as_its_value() -> None:
    assert result("generate", "-m", 1, "--verbose", "False", "yes")["prompt"] == "yes"
    assert result("generate", "--verbose", "yes", "-m", 1)["prompt"] == "yes"


def test_a_value_may_begin_with_a_dash() -> None:
    for args in (["--prompt", "-x"], ["--prompt=-x"], ["-p", "-x"], ["-p-x"], ["--prompt", "--", "-p", "-x"]):
        assert result("generate", "-m", 1, *args)["prompt"] == "-x"
    assert result("generate", "-p", "x", "-m", 2, "--stop=--json", "--presence-penalty", "-1e-2")["text"]


def test_prompts_from_every_source(greedy_text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\r\n")
    for args, stdin in (
        (["--prompt-file", path], "ignored"),
        (["--prompt", "-"], PROMPT + "\n"),
        ([], PROMPT),
        (["-p", PROMPT], "ignored"),
    ):
        assert quick("generate", *args, "-m", 24, stdin=stdin).stdout == greedy_text + "\n"
    assert result("generate", "-m", 2, stdin="line\n\n")["prompt"] == "line\n"


def test_no_prompt_on_a_terminal() -> None:
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "mlx_openelm", "generate"]
    done = subprocess.run(command, stdin=child, capture_output=True, timeout=60)
    os.close(child)
    os.close(parent)
    assert done.returncode == 2
    assert done.stderr.startswith(b'error: There is no prompt; give one: mlx-openelm generate "To be"')


def test_bad_prompts(tmp_path: Path) -> None:
    assert "The prompt is empty" in refused("generate", "--prompt", "")
    assert "The prompt is empty" in refused("generate", stdin="\n")
    assert "not UTF-8" in refused("generate", stdin=b"\xff\xfe\xfa")
    assert "missing.txt does not exist" in refused("generate", "--prompt-file", tmp_path / "missing.txt")
    assert "Give the prompt once" in refused("generate", "--prompt", "x", "--prompt-file", "y")
    assert "too long" in refused("generate", stdin="word " * 5000)


def test_a_prompt_beyond_the_context_is_one_warning() -> None:
    done = quick("generate", "-m", 2, "--verbose", "False", stdin="and the king " * 200)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: The prompt has ")
    assert done.stderr.count("\n") == 1


def test_json(greedy: list[Any], greedy_text: str) -> None:
    done = quick("generate", "--prompt", PROMPT, "-m", 24, "--json", "--logprobs")
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)
    values = json.loads(done.stdout)
    assert (values["model"], values["prompt"], values["text"]) == ("tiny", PROMPT, greedy_text)
    assert (values["finish_reason"], values["prompt_tokens"], values["generation_tokens"]) == ("length", 9, 24)
    assert values["tokens"] == [piece.token for piece in greedy]
    assert values["logprobs"] == pytest.approx([piece.logprob for piece in greedy], abs=1e-4)
    assert len(values["token_texts"]) == 24
    assert min(values[key] for key in ("prompt_tps", "generation_tps", "peak_memory")) > 0
    assert values["seed"] is None


def test_logprobs_without_json(greedy: list[Any], greedy_text: str) -> None:
    done = quick("generate", "--prompt", PROMPT, "-m", 24, "--logprobs", "--verbose", "False")
    assert done.stdout == greedy_text + "\n"
    rows = [line.split() for line in done.stderr.splitlines()[1:]]
    assert [int(row[0]) for row in rows] == [piece.token for piece in greedy]
    assert [float(row[1]) for row in rows] == pytest.approx([piece.logprob for piece in greedy], abs=1e-3)


ENDLESS = """
import sys, time
from mlx_openelm.cli import generate
from mlx_openelm.cli.main import main
whole = generate.stream_generate
def pieces(*arguments, **options):
    for number, piece in enumerate(whole(*arguments, **options)):
        yield piece
        if number == 2:
            print("[three tokens]", file=sys.stderr, flush=True)
            time.sleep(60)
generate.stream_generate = pieces
main()
"""


def test_ctrl_c_ends_with_the_statistics() -> None:
    for flag, out in (("--verbose", "text"), ("--json", "json")):
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", ENDLESS, "generate", "-p", PROMPT, "-m", "-1", flag],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type]
        )
        assert process.stdout is not None and process.stderr is not None
        assert process.stderr.readline() == b"[three tokens]\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert b"Traceback" not in stderr
        if out == "text":
            assert stdout.strip() and stdout.endswith(b"\n")
            assert b"Generation: " in stderr and b"Peak memory" in stderr
        else:
            assert json.loads(stdout)["finish_reason"] == "interrupted"


# generate: effects of flags.


def test_every_option_has_a_flag() -> None:
    text = " ".join(quick("generate", "--help").stdout.split())
    for name, annotation in get_type_hints(GenerationOptions, include_extras=True).items():
        assert f"--{name.replace('_', '-')}" in text
        assert annotation.__metadata__[0].help in text
    assert "[default: 256]" in text


def test_a_seed_gives_the_same_text_and_a_random_seed_is_printed(greedy_text: str) -> None:
    first = generated("--temp", 1, "--seed", 7)
    assert first == generated("--temp", 1, "--seed", 7) != greedy_text
    assert generated("--temp", 1, "--seed", 8) != first
    done = quick("generate", "-p", PROMPT, "-m", 24, "--temp", 1)
    seed = done.stderr.splitlines()[-1].removeprefix("Seed: ")
    assert generated("--temp", 1, "--seed", seed) + "\n" == done.stdout


@pytest.mark.parametrize("args", [["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]])
def test_filters_that_leave_one_token(greedy_text: str, args: list[Any]) -> None:
    assert generated("--temp", 1, "--seed", 7, *args) == greedy_text


@pytest.mark.parametrize(
    "args",
    [
        ["--min-p", 1, "--min-tokens-to-keep", 20, "--temp", 1, "--seed", 7],
        ["--xtc-probability", 1, "--xtc-threshold", 0.01, "--temp", 0.01, "--seed", 7],
        ["--repetition-penalty", 1.5],
        ["--presence-penalty", 2],
        ["--frequency-penalty", 2],
        ["--kv-bits", 2],
    ],
)
def test_flags_that_change_the_text(greedy_text: str, args: list[Any]) -> None:
    assert generated(*args) != greedy_text


def test_context_sizes_limit_the_penalties_to_recent_tokens() -> None:
    for name, penalty in (("repetition", 1.5), ("presence", 2), ("frequency", 2)):
        flag, size = f"--{name}-penalty", f"--{name}-context-size"
        everything, last, wide = (generated(flag, penalty, *more) for more in ([], [size, 1], [size, 1000]))
        assert last != everything == wide


def test_logit_bias_in_both_spellings(greedy: list[Any]) -> None:
    token = greedy[0].token
    pairs = result("generate", "-p", PROMPT, "-m", 4, "--logit-bias", f"{token}=-inf", "--logprobs")
    assert pairs["tokens"][0] != token
    both = result("generate", "-p", PROMPT, "-m", 4, "--logprobs", "--logit-bias", '{"5": 100}', "--logit-bias", "9=90")
    assert both["tokens"] == [5, 5, 5, 5]
    for bad in ("5", "x=1", "[1]", '{"1": "much"}', '{"1": [2]}', "{", '{"1": ' + "[" * 5000, f'{{"1": 1{"0" * 400}}}'):
        assert "--logit-bias must be ID=VALUE" in refused("generate", "-p", "x", "--logit-bias", bad)


def test_stop_strings(greedy_text: str) -> None:
    assert "Enter" in greedy_text
    values = result("generate", "-p", PROMPT, "--stop", "nowhere", "--stop", "Enter")
    assert values["text"] == greedy_text[: greedy_text.index("Enter")]
    assert values["finish_reason"] == "stop"


def test_extra_eos_tokens(greedy: list[Any], tiny: Any) -> None:
    by_id = result("generate", "-p", PROMPT, "--extra-eos-token", greedy[2].token, "--extra-eos-token", "<0x0A>")
    by_name = result("generate", "-p", PROMPT, "--extra-eos-token", tiny[1].id_to_token(greedy[2].token))
    assert (by_id["finish_reason"], by_id["generation_tokens"]) == ("stop", 3)
    assert by_name["generation_tokens"] == 3
    assert "not a token of this tokenizer" in refused("generate", "-p", "x", "--extra-eos-token", "nothing such")


def test_chat_templates(tiny: Any, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")

    def prompt_tokens(*args: object) -> int:
        return result("generate", "-p", "Speak", "-m", 1, *args)["prompt_tokens"]

    def encoded(messages: list[dict[str, str]], template: object, continued: bool = False) -> int:
        return len(tiny[1].apply_chat_template(messages, template, continue_final_message=continued))

    user = {"role": "user", "content": "Speak"}
    system = {"role": "system", "content": "You are a king."}
    start = {"role": "assistant", "content": "My lord,"}
    bare = len(tiny[1].encode("Speak"))
    assert prompt_tokens() == prompt_tokens("--ignore-chat-template") == bare
    for text in ("Speak", " two  spaces\n", "<s>not BOS</s>", "▁"):
        assert tiny[1].encode(text, as_message=True) == tiny[1].apply_chat_template([user | {"content": text}], "plain")
    assert prompt_tokens("--chat-template", "corenet") == encoded([user], "corenet") > bare
    assert prompt_tokens("--chat-template", template) == encoded([user], str(template))
    assert prompt_tokens("--system-prompt", system["content"]) == encoded([system, user], "plain")
    args = ("--chat-template", "corenet", "--prefill-response", start["content"])
    assert prompt_tokens(*args) == encoded([user, start], "corenet", continued=True)
    assert "Cannot read the chat template" in refused("generate", "-p", "x", "--chat-template", "nothing.jinja")


@pytest.mark.parametrize("args", [["--system-prompt", "x"], ["--chat-template", "plain"], ["--prefill-response", "x"]])
def test_no_template_takes_no_messages(args: list[str]) -> None:
    line = refused("generate", "-p", "x", "--ignore-chat-template", *args)
    assert "--ignore-chat-template cannot be combined" in line


def test_the_text_continues_a_prefilled_turn() -> None:
    whole = generated("--ignore-chat-template", prompt="ROMEO\nI am")
    assert generated("--prefill-response", "I am", prompt="ROMEO") == whole


def test_flags_that_do_not_change_the_text(greedy_text: str) -> None:
    assert generated("--prefill-step-size", 2) == greedy_text
    assert generated("--max-kv-size", 64) == greedy_text
    assert generated("--kv-bits", 2, "--quantized-kv-start", 500) == greedy_text
    assert generated("--kv-bits", 8, "--kv-group-size", 32)
    assert generated("--expand") == greedy_text


def test_a_small_cache_changes_the_text(greedy_text: str) -> None:
    assert generated("--max-kv-size", 8) != greedy_text


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--max-tokens", 0], "--max-tokens"),
        (["--temp", -1], "--temp must be between"),
        (["--top-p", 2], "--top-p"),
        (["--seed", -1], "--seed"),
        (["--stop", ""], "--stop"),
        (["--prefill-step-size", 0], "--prefill-step-size"),
        (["--kv-group-size", 32], "--kv-group-size needs --kv-bits"),
        (["--kv-bits", 7], "--kv-bits must be"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--tokenizer", "nowhere"], "No tokenizer at nowhere"),
        (["--revision", "main"], "revision"),
        (["--model", "4b"], "no model named '4b'"),
        (["--model", "./nowhere"], "does not exist"),
        (["--quantized-kv-start", -1], "--quantized-kv-start"),
    ],
)
def test_invalid_values_are_refused(args: list[Any], line: str) -> None:
    assert line in refused("generate", "--prompt", "x", *args)


def test_packed_weights_are_not_reported_as_expanded() -> None:
    done = quick("generate", "-p", PROMPT, "-m", 2, "--no-expand")
    assert done.returncode == 0
    assert "expanded" not in done.stderr


def test_model_tokenizer_and_dtype(greedy_text: str) -> None:
    model = ("--model", SHAKESPEARE)
    text = generated(*model)
    assert generated(*model, "--tokenizer", SHAKESPEARE / "tokenizer.model", "--dtype", "float32") == text
    assert generated(*model, "--dtype", "bfloat16", "--no-verbose")


# What `generate --model tiny` costs before its first token.


def test_generate_imports_nothing_heavy() -> None:
    heavy = [
        "transformers",
        "mlx_lm",
        "torch",
        "numpy",
        "huggingface_hub",
        "rich",
        "pydantic",
        "jinja2",
        "mlx_openelm.jobs.summary",
    ]
    code = (
        "import sys\nfrom mlx_openelm.cli.main import main\n"
        "try: main(['generate', '--model', 'tiny', '--prompt', 'x', '--max-tokens', '2'])\n"
        f"except SystemExit: print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = run(start=(sys.executable, "-c", code))
    assert done.stdout.splitlines()[-1] == "[]"


def test_cold_start() -> None:
    """In seconds of a processor, which hardly depend on what else the machine does."""

    def used() -> float:
        times = os.times()
        return times.children_user + times.children_system

    def seconds() -> float:
        before = used()
        run("generate", "--prompt", "x", "--max-tokens", 1)
        return used() - before

    assert any(seconds() < 1.5 for _ in range(3))  # about 0.25


# convert, info, doctor, perplexity.


def test_convert_prints_what_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quick("convert", "--model", SHAKESPEARE, "--mlx-path", out, "-q", "--q-group-size", 128)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Wrote {out}: 4.")
    assert "bits per weight, 1.5 MB" in lines[0]
    assert "  transformer.layers.0.attn.out_proj: group size 32, since 128 does not divide 96" in lines
    assert generated("--model", out)
    assert "exists; choose another" in refused("convert", "--mlx-path", out)
    assert quick("convert", "--mlx-path", out, "--overwrite", "--dequantize", "--dtype", "float32").returncode == 0
    assert result("info", out)["bits_per_weight"] == 32


def test_convert_json(tmp_path: Path) -> None:
    out = tmp_path / "out"
    values = result(
        "convert", "--hf-path", SHAKESPEARE, "--mlx-path", out, "--quantize", "--q-mode", "mxfp8", "--dtype", "float16"
    )
    assert values["mlx_path"] == str(out)
    assert values["size"] == sum(path.stat().st_size for path in out.iterdir())
    assert values["exceptions"] == {}
    assert values["bits_per_weight"] == pytest.approx(8.25, abs=0.05)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "mxfp8"}
    assert config["torch_dtype"] == "float16"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--q-bits", 4], "--q-bits needs -q"),
        (["-q", "-d"], "either -q or --dequantize"),
        (["-q", "--q-bits", 7], "--q-bits must be"),
        (["-q", "--q-mode", "int4"], "--q-mode must be one of"),
        (["-q"], "already quantized"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--tokenizer", "nowhere"], "No tokenizer at nowhere"),
        (["--revision", "main"], "revision"),
    ],
)
def test_convert_refuses(tmp_path: Path, args: list[Any], line: str) -> None:
    assert line in refused("convert", "--mlx-path", tmp_path / "out", *args)
    assert list(tmp_path.iterdir()) == []


def test_info_shows_layer_wise_scaling() -> None:
    done = quick("info", "tiny")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "query", "heads", "kv", "heads", "inner", "size", "parameters", "share"]
    assert lines[1].split()[:6] == ["0", "4", "1", "128", "180,800", "4.4%"]
    bars = [line.count("█") for line in lines[1:7]]
    assert bars == sorted(bars) and bars[0] < bars[-1]
    for text in ("4,083,328", "8.51 bits per weight", "8 bits, group size 64, mode affine", "Memory at 512 tokens"):
        assert text in done.stdout


def test_info_json() -> None:
    values = result("info", "--model", "tiny")
    assert (values["parameters"], len(values["layers"]), values["source"]) == (4_083_328, 6, "files")
    assert values["layers"][0]["kv_heads"] == 1
    assert values["memory"]["total"] == values["memory"]["weights"] + values["memory"]["kv_cache"]
    assert values["config"]["model_type"] == "openelm"


def test_info_of_a_model_that_is_not_downloaded(hub: FakeHub) -> None:
    done = quick("info", "3b", offline=False)
    assert done.returncode == 0, done.stderr
    assert "3,036,647,424" in done.stdout
    assert done.stdout.endswith("these are the published sizes; no file was read.\n")
    assert hub.requests == []
    hub.add("someone/model", SHAKESPEARE)
    assert "2,485,056" in quick("info", "someone/model", "--revision", "main", offline=False).stdout
    assert "has no revision" in refused("info", "someone/model", "--revision", "v9", offline=False)


def test_adapters_published_by_apple(tmp_path: Path) -> None:
    """`corenet:SIZE/lora` is an adapter, downloaded once, and no model."""
    torch = pytest.importorskip("torch")
    loaded, _ = load(SHAKESPEARE, dtype="float32")
    qkv = "layers.0.attn.qkv_proj"
    rows, columns = loaded.transformer.layers[0].attn.qkv_proj.weight.shape
    draw = torch.Generator().manual_seed(0)
    torch.save(
        {
            f"{qkv}.base_layer.weight": torch.zeros(rows, columns),
            f"{qkv}.lora_A.lora.weight": torch.randn(4, columns, generator=draw),
            f"{qkv}.lora_B.lora.weight": torch.randn(rows, 4, generator=draw),
        },
        tmp_path / "mine.pt",
    )
    server = Server()
    try:
        server.files["peft/openelm_lora_270M.pt"] = (tmp_path / "mine.pt").read_bytes()
        env = {
            corenet.URL_VARIABLE: server.url,
            corenet.CACHE_VARIABLE: str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        name = "corenet:270M/lora"
        texts = [
            generated("--model", SHAKESPEARE, *more, env=env)
            for more in ([], ["--adapter-path", tmp_path / "mine.pt"], ["--adapter-path", name])
        ]
        assert texts[0] != texts[1] == texts[2]
        assert "give it with --adapter-path" in refused("generate", "--model", name, "-p", PROMPT, env=env)
        assert [path for path, _ in server.requests] == ["peft/openelm_lora_270M.pt"]
    finally:
        server.close()


def test_a_failure_while_working_exits_with_1(hub: FakeHub) -> None:
    hub.status = 500
    assert "has a server error" in refused("generate", "--model", "a/b", "-p", "x", offline=False, code=1)


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    values = result("doctor")
    assert values["ok"] is True
    found = {finding["name"]: finding for finding in values["findings"]}
    assert {"mlx-openelm", "Python", "MLX", "Device", "Memory", "Packages", "Hub token"} <= set(found)
    assert found["Hub token"]["value"] == "present"
    assert found["In the package"]["value"] == "tiny, tiny-draft, tiny-instruct"
    assert found["In the package"]["advice"] is None
    done = quick("doctor")
    assert done.returncode == 0
    assert "hf_secret" not in done.stdout + json.dumps(values)


def test_doctor_names_the_extra_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that extra of pyproject.toml brings it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def not_installed(package: str) -> Distribution:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(Distribution, "from_name", not_installed)
    missing = {finding.name: finding.value for finding in doctor.examine() if "pip install" in finding.value}
    assert {"gguf", "matplotlib", "pyarrow", "tensorboardX", "wandb"} <= set(missing)
    for package, text in missing.items():
        named = re.search(r"not installed \(.+: pip install '\.\[(\w+)\]'\)", text)
        assert named is not None, text
        assert package in [re.split("[<>=]", needed)[0] for needed in extras[named[1]]]


@pytest.mark.skipif(blas.state == "unneeded", reason="only MLX's wheel for CPUs on Linux needs another BLAS")
def test_doctor_has_advice_about_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each state of `blas`; test_backend.py tests when it has which."""
    for state, library, value, advice in (
        ("off", "", "because MLX_OPENELM_BLAS is set", "unset"), ("missing", "none.so", "slow", "none.so")
    ):  # fmt: skip
        monkeypatch.setattr(blas, "state", state)
        monkeypatch.setattr(blas, "library", library)
        found = next(finding for finding in result("doctor")["findings"] if finding["name"] == "BLAS")
        assert value in found["value"] and advice in found["advice"]
    code = "import mlx.core\nfrom mlx_openelm.cli.main import main\nmain(['doctor'])"
    done = run(start=(sys.executable, "-c", code))
    assert done.returncode == 0
    assert "import mlx_openelm before mlx.core" in done.stdout


def helps_without_mlx(*lines: list[str]) -> list[str]:
    """What several command lines print, from one process: starting one for each takes most of the time."""
    code = (
        "import sys\nimport mlx_openelm\nsys.modules['mlx'] = None\nfrom mlx_openelm.cli.main import main\n"
        "sys.argv = ['mlx-openelm']\n"
        f"for line in {lines!r}:\n"
        "    try: main(line)\n"
        "    except SystemExit as stop: print(end=f'\\0{stop.code or 0}\\0')\n"
    )
    done = run(start=(sys.executable, "-c", code))
    assert (done.returncode, done.stderr) == (0, "")
    texts = done.stdout.split("\0")
    assert texts[1::2] == ["0"] * len(lines)
    return texts[:-1:2]


def test_help_and_completion_do_not_need_mlx() -> None:
    lines = [["help", name] for name in COMMANDS]
    *texts, completion = helps_without_mlx(*lines, ["--show-completion", "bash"])
    for name, text in zip(COMMANDS, texts, strict=True):
        assert text.startswith(f"Usage: mlx-openelm {name}")
    assert texts[-1] == quick(name, "-h").stdout
    assert completion == quick("--show-completion", "bash").stdout


def test_without_mlx_doctor_runs_and_other_commands_name_the_extra() -> None:
    code = (
        "import sys\nimport mlx_openelm\nsys.modules['mlx'] = None\n"
        "from mlx_openelm.cli.main import main\nmain(sys.argv[1:])"
    )
    start = (sys.executable, "-c", code)
    done = run("doctor", start=start)
    assert done.returncode == 1
    assert "pip install '.[cpu]'" in done.stdout and "Packages" in done.stdout
    assert "pip install '.[cpu]'" in refused("generate", "-p", "x", start=start, code=1)


def test_perplexity(tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    assert quick("convert", "--model", SHAKESPEARE, "-q", "--q-bits", 8, "--mlx-path", packed).returncode == 0
    args = ("perplexity", "--model", packed, "--data", VALID, "--sequence-length", 64, "--num-samples", 4)
    values = result(*args, "--reference-model", SHAKESPEARE)
    assert (values["windows"], values["tokens"], values["sequence_length"]) == (4, 256, 64)
    assert 0 < values["kl_divergence"] < 0.01
    assert 20 < values["perplexity"] < 80
    assert values["standard_error"] > 0
    one_by_one = result(*args, "--batch-size", 1, "--no-expand")
    assert one_by_one["nll"] == pytest.approx(values["nll"], abs=1e-3)
    assert result(*args, "--seed", 1)["nll"] != values["nll"]
    done = quick(*args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Perplexity: {values['perplexity']:.4f}\n")


@pytest.mark.slow
def test_perplexity_equals_the_reference() -> None:
    expected = json.loads((ROOT / "tests" / "fixtures" / "shakespeare-reference.json").read_text())["valid"]
    length = expected["window_tokens"]
    values = result("perplexity", "--model", SHAKESPEARE, "--data", VALID, "--sequence-length", length)
    assert values["windows"] == expected["windows"]
    assert values["nll"] == pytest.approx(expected["mean_nll"], abs=1e-4)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--data", VALID, "--sequence-length", 5000], "--sequence-length must be from 1 to 1024"),
        (["--data", VALID, "--num-samples", 0], "--num-samples must be 1 or more"),
        (["--data", VALID, "--batch-size", 0], "--batch-size must be 1 or more"),
    ],
)
def test_perplexity_refuses(args: list[Any], line: str) -> None:
    assert line in refused("perplexity", *args)


# The helpers.


def test_sizes() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_600: "1.0 MB", 3_100_000: "3.1 MB", 12_146_589_696: "12.1 GB"}
    assert {count: console.size(count) for count in sizes} == sizes


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": float("nan"), "b": [float("-inf"), 1.5], "é": ()})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "é": []}\n'


def test_json_keeps_every_character_in_any_encoding() -> None:
    for encoding, shown in (("ascii", r"\u00e9"), ("latin-1", "é"), ("utf-8", "é")):
        code = "from mlx_openelm import console; console.print_json({'a': 'é'})"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
        )
        assert done.stdout.decode(encoding) == f'{{"a": "{shown}"}}\n'


class FakeTime:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_progress_is_lines_when_piped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    monkeypatch.setattr(console, "time", clock)
    with console.Progress("Writing", unit="bytes") as progress:
        for done in range(0, 13_000_000, 1_000_000):
            progress(done, 12_000_000)
            clock.now += 1
    assert capsys.readouterr().err == "Writing: 5.0 MB of 12.0 MB\nWriting: 10.0 MB of 12.0 MB\n"


def test_progress_is_a_bar_on_a_terminal_when_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime()
    monkeypatch.setattr(console, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with console.Progress("Reading", unit="tokens", lines=False) as quick:
        quick(0, 100)
        clock.now += 0.05
        quick(50, 100)
        quick(100, 100)
    assert capsys.readouterr().err == ""
    with console.Progress("Reading", unit="tokens", lines=False) as slow:
        slow(0, 100)
        clock.now += 0.4
        slow(20, 100)
        assert "Reading" in capsys.readouterr().err
        slow(40, 100)
        slow(100, 100)
        capsys.readouterr()  # the last line of the bar, and its removal
    assert capsys.readouterr().err == ""
