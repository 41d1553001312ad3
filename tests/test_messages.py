"""Error messages are sentences: a capital or the name of a thing first, a full stop last."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mlx_openelm
from mlx_openelm.errors import OpenELMError, RequestError

import pytest

PACKAGE = Path(mlx_openelm.__file__).parent
# Names of things, rather than words: functions, arguments, keys and libraries.
NAMES = {
    *("apply_chat_template", "chat_template", "generate", "libnvrtc,", "model", "nvrtc:", "prompt_cache_tokens"),
    *("rms_norm_eps", "sampler", "tokenizer_config"),
}


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
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="RequestError" | "OpenELMError"), args=[message, *_]):
                    for text in beginnings(message):
                        yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def test_messages_begin_with_a_capital_or_a_name():
    found = list(messages())
    assert len(found) > 200
    assert [at for at, text in found if text[0].islower() and text.split()[0] not in NAMES] == []


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
