"""Error messages are sentences: a capital or the name of a thing first, a full stop last."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import mlx_openelm
from mlx_openelm.cli.main import COMMANDS
from mlx_openelm.errors import OpenELMError, RequestError

import pytest
from package_trees import tree_of

PACKAGE = Path(mlx_openelm.__file__).parent
# Names of things, rather than words: functions, arguments, keys and libraries.
NAMES = {
    *(
        "apply_chat_template",
        "chat_template",
        "generate",
        "max_bytes",
        "metadata",
        "libnvrtc,",
        "model",
        "nvrtc:",
        "options",
        "prompt_cache_tokens",
        "prompts",
        "data",
        "logits_processors",
        "models",
        "reward_funcs",
    ),
    *("rms_norm_eps", "sampler", "tokenizer_config"),
}


@pytest.fixture(autouse=True, scope="module")
def without_collections() -> Iterator[None]:
    """Garbage collections would take as long again as parsing the package."""
    gc.disable()
    yield
    gc.enable()


def beginnings(message: ast.expr) -> Iterator[str]:
    """The constant text that a message begins with, in all its forms; nothing if it begins with a value."""
    match message:
        case ast.IfExp():
            yield from beginnings(message.body)
            yield from beginnings(message.orelse)
        case ast.BinOp():
            yield from beginnings(message.left)
        case ast.JoinedStr(values=[first, *_]):
            yield from beginnings(first)
        case ast.Constant(value=str(text)):
            yield text


def messages() -> Iterator[tuple[str, str]]:
    """Where an error is made, and the beginning of its message."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if not re.search("(RequestError|OpenELMError)\\(", path.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.Call(func=ast.Name(id="RequestError" | "OpenELMError"), args=[message, *_]):
                    for text in beginnings(message):
                        yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def test_messages_begin_with_a_capital_or_a_name():
    found = list(messages())
    assert len(found) > 200
    assert [at for at, text in found if text[0].islower() and text.split()[0] not in NAMES] == []


def texts(path: Path) -> Iterator[str]:
    """The texts in a file, each f-string as one, with a star for a value; those of docstrings too."""
    tree = tree_of(path)
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    for node in joined:
        yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)  # type: ignore[misc]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


PROGRAMS = ("mlx-openelm", "hf", "git", "curl")


def bare_commands(text: str) -> list[str]:
    """Command lines outside backquotes, whose flags would become arguments in Python."""
    program = rf"mlx-openelm (?:{'|'.join(COMMANDS)})|hf (?:auth|cache|download)|git (?:lfs|clone)|curl -"
    return re.findall(rf"\b(?:{program})\b", re.sub(r"`[^`]*`", "", text))


def test_command_lines_stand_in_backquotes():
    assert bare_commands("run mlx-openelm convert -q, not `mlx-openelm convert`") == ["mlx-openelm convert"]
    # The command's own help and the text of model cards are not messages.
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "cli" and path.stem != "card_text"]
    files = [path for path in files if any(name in path.read_text(encoding="utf-8") for name in PROGRAMS)]
    found = {str(path.relative_to(PACKAGE)): [*map(bare_commands, texts(path))] for path in files}
    assert {path: lines for path, lines in found.items() if any(lines)} == {}


@pytest.mark.parametrize("kind", [OpenELMError, RequestError])
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("It is damaged", "It is damaged."),
        ("It is damaged.", "It is damaged."),
        (
            "There is no command 'genrate'; did you mean generate?",
            "There is no command 'genrate'; did you mean generate?",
        ),
        ("Run `hf auth login`", "Run `hf auth login`."),
        ("temp must be a number, got " + "9" * 500, f"temp must be a number, got {'9' * 100}…{'9' * 98}."),
    ],
)
def test_messages_end_with_a_full_stop(kind, message, expected):
    assert str(kind(message)) == expected
    assert str(kind(str(kind(message)))) == expected
