"""The commands, code and settings in the guides on serving, against servers."""

from __future__ import annotations

import configparser
import json
import plistlib
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_openelm.cli.main import parse
from mlx_openelm.serving.protocol import ABOUT

import httpx2
import pytest
import yaml
from in_process import run_here
from serve_processes import process
from serving_apps import Serving, serving

ROOT = Path(__file__).parent.parent
SERVING, CLIENTS = ROOT / "docs" / "serving.md", ROOT / "docs" / "clients.md"
ADDRESS = "http://127.0.0.1:8080"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


def lines(document: Path, start: str) -> list[str]:
    return [line for block in blocks(document, "bash") for line in block.splitlines() if line.startswith(start)]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving({"tiny": "tiny", "chats": "tiny-instruct"}) as running:
        yield running


def test_every_curl_works(server: Serving) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    pytest.importorskip("llguidance")
    commands = lines(SERVING, "curl ")
    assert len(commands) >= 10
    for command in commands:
        words = shlex.split(command.replace(ADDRESS, server.url))
        done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout, (command, done.stdout, done.stderr)


def able(command: str) -> bool:
    """Whether a server can be started here: no download, no file of the reader's."""
    models = [word.partition("=")[2] or word for word in re.findall(r"--model (\S+)", command)]
    return all(model.startswith("tiny") for model in models) and not re.search(r"my_|auto", command)


@pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_server_starts_and_ends(tmp_path: Path, at_once: bool) -> None:
    """One with the flags of all commands, or one for each of them."""
    commands = [command for command in lines(SERVING, "mlx-openelm serve") if able(command)]
    assert len(commands) >= 4
    given = [[word.replace("held", str(tmp_path / "held")) for word in shlex.split(one)[2:]] for one in commands]
    for flags in [[*chain(*given)]] if at_once else given:
        with process(*flags) as started:
            assert httpx2.get(started.url + "/health").status_code == 200
            assert started.end(signal.SIGTERM)[0] == 0


def test_the_load_generator_runs(server: Serving) -> None:
    commands = lines(SERVING, "mlx-openelm bench")
    assert len(commands) == 2
    for command in commands:
        assert " --seconds 2" in command
        words = shlex.split(command.replace(ADDRESS, server.url).replace(" --seconds 2", " --seconds 0.5"))[1:]
        done = run_here(*words)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["errors"] == {} if "--json" in words else re.search("Errors +none", done.stdout)


def test_keys_that_change_nothing_are_listed() -> None:
    (line,) = (line for line in SERVING.read_text().splitlines() if line.endswith(" change nothing."))
    assert re.findall("`(.+?)`", line) == list(ABOUT)


def test_the_lines_of_a_warm_file_are_right(server: Serving, tmp_path: Path) -> None:
    from mlx_openelm.serving.warming import read_warm

    file = tmp_path / "prompts.jsonl"
    (block,) = (block for block in blocks(SERVING, "json") if '"prompt"' in block)
    file.write_text(block)
    assert [one.entry.name for one in read_warm(server.context, str(file))] == ["tiny", "chats"]


def test_the_python_runs_as_written(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")
    script = "\n".join(blocks(CLIENTS, "python")).replace(ADDRESS, server.url)
    exec(compile(script, "clients.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert "name='" in shown and shown.splitlines()[-1] == "2 64"


def test_the_systemd_unit() -> None:
    (unit,) = blocks(SERVING, "ini")
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit)
    program, *flags = shlex.split(parser["Service"]["ExecStart"])
    assert program.endswith("bin/mlx-openelm") and parse(flags)[1].model == ["1.1b-instruct"]
    if shutil.which("systemd-analyze"):
        assert parser["Service"]["Restart"] == "on-failure"


def test_the_launchd_plist() -> None:
    (plist,) = blocks(SERVING, "xml")
    values = plistlib.loads(plist.encode())
    program, *flags = values["ProgramArguments"]
    assert program.endswith("bin/mlx-openelm") and parse(flags)[1].model == ["1.1b-instruct"]
    assert values["KeepAlive"] is True


def test_the_settings_of_editors_fit(server: Serving) -> None:
    """Their addresses and models are the server's, and what these programs send is answered."""
    (continue_,) = (yaml.safe_load(block) for block in blocks(CLIENTS, "yaml"))
    (zed,) = (json.loads(block) for block in blocks(CLIENTS, "json"))
    model = continue_["models"][0]
    provider = zed["language_models"]["openai_compatible"]["OpenELM"]
    names = [one["id"] for one in server.get("/v1/models").json()["data"]]
    for address, name in (
        (model["apiBase"], model["model"]),
        (provider["api_url"], provider["available_models"][0]["name"]),
        (re.findall(r"OPENAI_API_BASE_URL=(\S+)", CLIENTS.read_text())[0], "tiny"),
    ):
        assert address == f"{ADDRESS}/v1" and name in names


BODIES: dict[str, dict[str, Any]] = {
    "Open WebUI": {
        **{"stream": True, "model": "tiny", "messages": [{"role": "user", "content": "ROMEO."}]},
        **{"stream_options": {"include_usage": True}, "metadata": {}, "tools": [], "user": None},
    },
    "Continue": {
        **{"messages": [{"role": "user", "content": [{"type": "text", "text": "ROMEO."}]}], "model": "tiny"},
        **{"max_tokens": 8, "stream": True, "temperature": 0.2, "stop": ["```"], "n": 1, "presence_penalty": 0},
        **{"stream_options": {"include_usage": True}, "frequency_penalty": 0},
    },
    "Zed": {
        **{"model": "tiny", "messages": [{"role": "user", "content": "ROMEO."}], "stream": True, "tools": []},
        **{"max_completion_tokens": 8, "stop": [], "temperature": 1.0, "tool_choice": None, "prompt_cache_key": "a"},
        **{"parallel_tool_calls": False},
    },
}


@pytest.mark.parametrize("name", BODIES)
def test_what_programs_send_is_answered(server: Serving, name: str) -> None:
    chunks = server.stream("/v1/chat/completions", BODIES[name])
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"])
