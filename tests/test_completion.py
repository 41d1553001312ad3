"""Shell completion: the scripts, where they are written, and what bash completes with its script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from mlx_openelm.cli import completion
from mlx_openelm.cli.main import COMMANDS, SHELLS, command, main
from mlx_openelm.training.options import OPTIMIZERS

import pytest


def run(*args: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    return stop.value.code


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each shell's script, installed in a separate home folder."""
    home = tmp_path_factory.mktemp("home")
    paths = {
        "bash": ".local/share/bash-completion/completions/mlx-openelm",
        "zsh": ".zfunc/_mlx-openelm",
        "fish": ".config/fish/completions/mlx-openelm.fish",
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        for shell in SHELLS:
            assert run("--install-completion", shell) == 0
    return {shell: (home / path).read_text() for shell, path in paths.items()}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_its_flags_and_their_choices(shell: str, scripts: dict[str, str]) -> None:
    script = scripts[shell]
    for name in COMMANDS:
        assert name in script
        for flag in command(name)[0].flags:
            in_fish = f"-l {flag[2:]} " if flag.startswith("--") else f"-s {flag[1:]} "
            assert (in_fish if shell == "fish" else flag) in script
    assert " ".join(OPTIMIZERS) in script


def test_show_prints_what_install_writes(scripts: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SHELLS:
        assert run("--show-completion", shell) == 0
        assert capsys.readouterr().out == scripts[shell]


def test_the_shell_is_taken_from_the_environment(
    scripts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert run("--show-completion") == 0
    assert capsys.readouterr().out == scripts["fish"]
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert run("--show-completion") == 2
    assert "No completion for tcsh; choose bash, zsh or fish" in capsys.readouterr().err
    assert run("--show-completion", "tcsh") == 2
    assert "No completion for 'tcsh'; choose bash, zsh or fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_accepts_the_syntax_of_its_script(shell: str, scripts: dict[str, str], tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(scripts[shell])
    done = subprocess.run([program, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_lists_are_lists_in_every_shell(scripts: dict[str, str]) -> None:
    commands = {flag: name for name in COMMANDS for flag in command(name)[0].flags}
    assert commands.keys() >= completion._LISTS
    assert "compset -P '*,'; compadd -S '' -- awq gptq dwq" in scripts["zsh"]
    assert "-a '(__fish_append , awq gptq dwq)'" in scripts["fish"]
    assert "'__fish_seen_subcommand_from info' -a 'tiny tiny-draft tiny-instruct 270m " in scripts["fish"]
    assert '"info "*) compadd -- tiny tiny-draft tiny-instruct 270m ' in scripts["zsh"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["gen"], {"generate"}),
        ([""], {"help", *COMMANDS}),
        (["help", "lo"], {"lora"}),
        (["--ver"], {"--version"}),
        (["--debug", "per"], {"perplexity"}),
        (["generate", "--max-"], {"--max-tokens", "--max-kv-size", "--max-rows"}),
        (["generate", "--dtype", ""], {"float32", "float16", "bfloat16"}),
        (["generate", "--dtype", "b"], {"bfloat16"}),
        (["generate", "--dtype", "="], {"float32", "float16", "bfloat16"}),  # bash's words of --dtype=
        (["generate", "--dtype", "=", "b"], {"bfloat16"}),
        (["generate", "--model", "1.1"], {"1.1b", "1.1b-instruct"}),
        (["perplexity", "--reference-model", "t"], {"tiny", "tiny-draft", "tiny-instruct"}),
        (["generate", "--model", "my_fo"], set()),
        (["generate", "--prompt", "x", "--chat-template", "c"], {"corenet"}),
        (["lora", "--lr-schedule", "co"], {"constant", "cosine"}),
        (["lora", "--train", "--no-tr"], {"--no-train"}),
        (["--install-completion", ""], set(SHELLS)),
        (["info", "3"], {"3b", "3b-instruct"}),
        (["info", "--json", "3"], {"3b", "3b-instruct"}),
        (["info", "--revision", "3"], set()),
        (["average", "--overwrite", "270m", "1.1b-"], {"1.1b-instruct"}),
        (["generate", "3"], set()),  # a prompt
        (["quantize", "--method", "awq,g"], {"awq,gptq"}),
        (["quantize", "--method", "="], {"awq", "gptq", "dwq"}),
        (["quantize", "--method", "=", "awq,d"], {"awq,dwq"}),
        (["lora", "--target-modules", "qkv_proj,proj_1,proj_"], {"qkv_proj,proj_1,proj_1", "qkv_proj,proj_1,proj_2"}),
        (["generate", "--dtype", "float32,f"], set()),
        (["generate", "--tokenizer", ""], set()),  # bash then completes files
    ],
)
def test_bash_completes(line: list[str], expected: set[str], scripts: dict[str, str]) -> None:
    asks = (
        f"{scripts['bash']}\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mlx_openelm; printf "%s\\n" "${COMPREPLY[@]}"\n'
        "complete -p mlx-openelm"
    )
    done = subprocess.run(["bash", "-c", asks, "bash", "mlx-openelm", *line], capture_output=True, text=True)
    assert done.stderr == ""
    *words, registered = done.stdout.splitlines()
    assert set(filter(None, words)) == expected
    assert registered == "complete -o default -F _mlx_openelm mlx-openelm"
