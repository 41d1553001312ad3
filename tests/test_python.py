"""The package as Python code meets it: names, types, help, representations, errors and progress."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from mlx_openelm import generate, load, stream_generate
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.options import GenerationKeywords, GenerationOptions

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", dtype="float32")


def mypy(tmp_path, code: str) -> list[str]:
    """What `mlx_openelm`'s users read from `mypy --strict` about their code."""
    (tmp_path / "snippet.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary"]
    command += ["--config-file=", "--ignore-missing-imports", f"--cache-dir={ROOT / '.mypy_cache'}", "snippet.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"MYPYPATH": str(ROOT)})
    return (run.stdout + run.stderr).splitlines()


def test_mypy_sees_wrong_names_and_types(tmp_path):
    lines = mypy(
        tmp_path,
        """\
from mlx_openelm import generate, load, stream_generate

model, tokenizer = load("tiny")
text: str = generate(model, tokenizer, prompt="Once", max_tokens=5, temp=0.8, stop=["end"])
generate(model, tokenizer, "Once", max_token=5)
for piece in stream_generate(model, tokenizer, "Once", top_k="five"):
    number: str = piece.token
""",
    )
    assert [line.split(": ")[0] for line in lines if ": error: " in line] == [f"snippet.py:{n}" for n in (5, 6, 7)]
    wrong = "\n".join(lines)
    assert 'Unexpected keyword argument "max_token" for "generate"; did you mean "max_tokens"' in wrong
    assert '"top_k" to "stream_generate" has incompatible type "str"; expected "int"' in wrong


def test_the_typed_keywords_are_the_options():
    types = get_type_hints(GenerationOptions)  # without the help of the flags
    assert get_type_hints(GenerationKeywords) == {field.name: types[field.name] for field in fields(GenerationOptions)}


@pytest.mark.parametrize("function", [generate, stream_generate])
def test_the_signature_lists_the_options(function):
    shown = inspect.signature(function).parameters
    for field in fields(GenerationOptions):
        assert shown[field.name].default == field.default
    assert str(shown["kv_bits"]) == "kv_bits: 'int | None' = None"
    assert list(shown)[:3] == ["model", "tokenizer", "prompt"] and "options" not in shown


def test_a_wrong_name_gets_a_suggestion(tiny):
    with pytest.raises(RequestError, match="^generate has no option max_token; did you mean max_tokens"):
        generate(*tiny, "Once", max_token=5)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="^generate has no option volume; help.generate. lists the options"):
        next(stream_generate(*tiny, "Once", volume=5))  # type: ignore[call-arg]
