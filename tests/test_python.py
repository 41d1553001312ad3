"""The package as Python code meets it: names, types, help, representations, errors and progress."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import mlx_openelm
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


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script that has our package, and no network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


def test_the_guide_runs_as_written_and_prints_what_it_says(tmp_path):
    guide = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    done = python("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)  # (.+)", guide)
    assert len(promised) == 4
    for line in promised:
        assert line.removesuffix("...)") in done.stdout
    assert "Step 4 of 4: train loss" in done.stderr  # finetune's progress, in plain lines
    assert set(mlx_openelm.__all__) <= {*re.findall(r"\w+", guide), "__version__", "CacheOptions", "ModelConfig"}


def test_dir_lists_the_public_names(tmp_path):
    done = python("import mlx_openelm, sys; print(*dir(mlx_openelm)); print('mlx.core' in sys.modules)", tmp_path)
    names, loaded = done.stdout.splitlines()
    assert names.split() == mlx_openelm.__all__ == sorted(mlx_openelm.__all__) and loaded == "False"
    assert all(hasattr(mlx_openelm, name) for name in mlx_openelm.__all__)
    assert set(mlx_openelm._HOMES) == set(mlx_openelm.__all__) - {"__version__"}
    assert "Did you mean: 'generate'" in python("import mlx_openelm; mlx_openelm.generat", tmp_path).stderr


def test_mypy_knows_every_lazy_name(tmp_path):
    names = [name for name in mlx_openelm.__all__ if name != "__version__"]
    lines = mypy(tmp_path, "".join(f"from mlx_openelm import {n}\nreveal_type({n})\n" for n in names))
    shown = [line.partition("Revealed type is ")[2] for line in lines if "Revealed type" in line]
    assert len(shown) == len(names) and not any(text.strip('"') == "Any" for text in shown)
    assert not any(": error: " in line for line in lines)
    assert (ROOT / "mlx_openelm" / "py.typed").is_file()
