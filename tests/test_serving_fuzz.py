"""Requests of random keys and values: each is answered or refused by name, and the server lives on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from mlx_openelm.serving import chat, completions, embeddings, responses
from mlx_openelm.serving.app import page_policy

import httpx2
import pytest
from serving_apps import Serving, serving

MESSAGE = {"role": "user", "content": "ROMEO."}
ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "/v1/completions": (completions.FIELDS, {"prompt": "ROMEO."}),
    "/v1/chat/completions": (chat.FIELDS, {"messages": [MESSAGE]}),
    "/v1/responses": (responses.FIELDS, {"input": "ROMEO."}),
    "/v1/embeddings": (embeddings._EMBEDDINGS, {"input": "ROMEO."}),
    "/tokenize": (embeddings._TOKENIZE, {}),
    "/detokenize": (embeddings._DETOKENIZE, {}),
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 0.5, 1.5, -0.0, 1e308, -1e308, 5e-324, 10**18, -(10**40), 2**63, 2**64 - 1),
    *(
        "",
        "a",
        "plain",
        "text",
        "\u0000",
        "\ud800",
        "é" * 50,
        "/etc/passwd",
        "tiny",
        "</s><s>",
        "{" * 50,
        "auto",
        "low",
    ),
    *([], [1], [1, 2], ["a"], [None], [[]], [[1]], [True], [1e9], [-1], ["a", 1], [{}], [MESSAGE], ["\ud800"]),
    *({}, {"a": 1}, {"type": "text"}, {"type": "json_object"}, {"1": 1}, {"1": "a"}, {"-1": 5}, {"type": None}),
    *({"format": {}}, {"format": {"type": "text"}}, {"include_usage": True}, {"include_usage": 3}),
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"pattern": "("}}}}},
    [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
    [{"role": "tool", "content": []}, {"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(max_tokens=2) as running:
        yield running


@pytest.mark.parametrize("path", ROUTES)
def test_every_key_takes_every_value(server: Serving, path: str) -> None:
    fields, asked = ROUTES[path]
    chance = random.Random(path)
    statuses: set[int] = set()
    with httpx2.Client(timeout=60) as client:
        for key in [*fields, "unknown"]:
            for value in chance.sample(VALUES, 5):
                body = {**asked, key: value}
                content = json.dumps(body).encode()
                response = client.post(server.url + path, content=content)
                statuses.add(response.status_code)
                assert response.status_code in (200, 400, 404), (body, response.text)
                if response.status_code != 200:
                    error = response.json()["error"]
                    assert error["message"].endswith((".", "?")), error
                    assert "--" not in error["message"].replace("the server's --", ""), error
                    assert "root:" not in response.text and "Error" not in error["message"], error
    assert statuses >= {400} and server.get("/health").status_code == 200
    assert not server.worker.in_flight and server.worker.running == 0


def test_every_key_takes_null_and_every_message_key(server: Serving) -> None:
    chance = random.Random(3)
    for key in chat._MESSAGE:
        for value in chance.sample(VALUES, 3):
            response = httpx2.post(
                server.url + "/v1/chat/completions",
                content=json.dumps({"messages": [{**MESSAGE, key: value}]}).encode(),
                timeout=60,
            )
            assert response.status_code in (200, 400), (key, value, response.text)


def test_the_policy_of_the_page_names_its_script_and_style_only() -> None:
    """The digests are those that browsers compute: of the bytes between the tags."""
    page = b"<html><style>\nb{}\n</style><script>alert(1)</script><p>"
    policy = dict(rule.split(" ", 1) for rule in page_policy(page).split("; "))
    # printf 'alert(1)' | openssl dgst -sha256 -binary | base64
    assert policy["script-src"] == "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='"
    assert policy["style-src"].startswith("'sha256-") and policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in str(policy) and page_policy(b"").count("'none'") == 6
