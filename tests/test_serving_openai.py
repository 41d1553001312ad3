"""The official `openai` client, and the curl commands of OpenAI's documentation, against a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from mlx_openelm import generate

import mlx.core as mx
import pytest
from serving_apps import Serving, serving, tiny

openai = pytest.importorskip("openai")

HELLO: Any = [{"role": "user", "content": "ROMEO."}]
SCHEMA = {
    **{"type": "object", "properties": {"who": {"enum": ["ROMEO", "JULIET"]}}},
    **{"required": ["who"], "additionalProperties": False},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(keys=["sk-test"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0, timeout=60)


def plain(text: str = "ROMEO.") -> list[int]:
    return tiny()[1].apply_chat_template([{"role": "user", "content": text}], "plain")


def hidden_mean(text: str) -> list[float]:
    """The mean of the last hidden states, from one call of the model."""
    model, tokenizer = tiny()
    hidden_states = model.hidden_states(mx.array([tokenizer.encode(text)]))
    return hidden_states[0].astype(mx.float32).mean(axis=0).tolist()  # type: ignore[return-value]


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mlx-openelm"


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=8)
    assert answer.choices[0].message.content == generate(*tiny(), plain(), max_tokens=8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    several = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, n=2, temperature=1.5, seed=1)
    assert [choice.message.content for choice in several.choices] == [
        generate(*tiny(), plain(), max_tokens=4, temp=1.5, seed=seed) for seed in (1, 2)
    ]


def test_chat_streams(client: Any) -> None:
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, stream=True, stream_options=options, logprobs=True, top_logprobs=2
    )
    text, usage, logprobs = "", None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            logprobs += choice.logprobs.content if choice.logprobs else []
    assert text == generate(*tiny(), plain(), max_tokens=8)
    assert usage.total_tokens == len(plain()) + 8
    assert len(logprobs) == 8 and all(len(one.top_logprobs) == 2 for one in logprobs)


def test_structured_output(client: Any) -> None:
    pytest.importorskip("llguidance")
    chosen: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=chosen, max_tokens=40)
    assert json.loads(answer.choices[0].message.content)["who"] in ("ROMEO", "JULIET")


def test_structured_output_of_a_class(client: Any) -> None:
    pytest.importorskip("llguidance")
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", old=(bool, ...))
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=person, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed.old, bool)
    answer = client.responses.parse(model="tiny", input="ROMEO.", text_format=person, max_output_tokens=60)
    assert isinstance(answer.output_parsed.old, bool)


def test_completions(client: Any) -> None:
    answer = client.completions.create(model="tiny", prompt="ROMEO.", max_tokens=8, logprobs=1)
    assert answer.choices[0].text == generate(*tiny(), "ROMEO.", max_tokens=8)
    assert len(answer.choices[0].logprobs.token_logprobs) == 8
    stream = client.completions.create(model="tiny", prompt="ROMEO.", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_responses(client: Any) -> None:
    answer = client.responses.create(
        model="tiny", input="ROMEO.", max_output_tokens=8, store=True, top_logprobs=1, metadata={"a": "b"},
        include=["message.output_text.logprobs"],
    )  # fmt: skip
    expected = generate(*tiny(), plain(), max_tokens=8)
    assert answer.output_text == expected
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 8 and answer.metadata == {"a": "b"}
    assert len(answer.output[0].content[0].logprobs) == 8
    conversation = [
        {"role": "user", "content": [{"type": "input_text", "text": "ROMEO."}]},
        *[item.model_dump() | {"status": "completed"} for item in answer.output],
        {"role": "user", "content": "JULIET."},
    ]
    again = client.responses.create(model="tiny", input=conversation, instructions="HAMLET.", max_output_tokens=4)
    messages = [
        {"role": "system", "content": "HAMLET."},
        *({"role": "user", "content": "ROMEO."}, {"role": "assistant", "content": expected}),
        {"role": "user", "content": "JULIET."},
    ]
    ids = tiny()[1].apply_chat_template(messages, "plain")
    assert again.output_text == generate(*tiny(), ids, max_tokens=4)


def test_responses_stream(client: Any) -> None:
    events = list(client.responses.create(model="tiny", input="ROMEO.", max_output_tokens=8, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    expected = generate(*tiny(), plain(), max_tokens=8)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].response.output_text == expected
    more = {"stop": ["Messenger"]}  # the client takes no other end than `response.completed`
    expected = generate(*tiny(), plain(), max_tokens=16, **more)
    with client.responses.stream(model="tiny", input="ROMEO.", max_output_tokens=16, extra_body=more) as stream:
        assert stream.get_final_response().output_text == expected


def test_embeddings(client: Any) -> None:
    texts = ["ROMEO.", "Enter a KING, with attendants. " * 20]
    answer = client.embeddings.create(model="tiny", input=texts)  # asks for base64
    for text, one in zip(texts, answer.data, strict=True):
        assert one.embedding == pytest.approx(hidden_mean(text), abs=1e-3)
    assert answer.usage.prompt_tokens == sum(len(tiny()[1].encode(text)) for text in texts)
    floats = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float", dimensions=5)
    assert floats.data[0].embedding == pytest.approx(hidden_mean(texts[0])[:5], abs=1e-3)
    ids = client.embeddings.create(model="tiny", input=[tiny()[1].encode(texts[0])], encoding_format="float")
    assert ids.data[0].embedding[:5] == floats.data[0].embedding


def test_errors(server: Serving, client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=5)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="tiny", prompt="a", best_of=3)
    assert unknown.value.param == "best_of"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-other", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/responses", {}, "input"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ("/v1/responses", {"input": "a", "background": True}, "background"),
        ("/v1/responses", {"input": "a", "include": ["file_search_call.results"]}, "include"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "text", "x": 1}}}, "text.format.x"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ("/v1/responses", {"input": [{"type": "function_call", "role": "user", "content": "a"}]}, "input[0].type"),
        ("/v1/responses", {"input": "a", "max_tokens": 5}, "max_tokens"),
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": ""}, "input"),
        ("/v1/embeddings", {"input": [""]}, "input"),
        ("/v1/embeddings", {"input": "a", "dimensions": 100_000}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/embeddings", {"input": [5] * 5000}, "input"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(server: Serving, path: str, body: dict[str, Any], param: str) -> None:
    assert server.error(path, body)["param"] == param


def test_tokens_and_back(server: Serving) -> None:
    ids = tiny()[1].encode("Enter a KING.")
    for body in ({"prompt": "Enter a KING."}, {"content": "Enter a KING.", "add_special": True}):
        found = server.post("/tokenize", body).json()
        assert found == {"tokens": ids, "count": len(ids), "max_model_len": tiny()[0].config.rope_max_length}
    assert (
        server.post("/tokenize", {"prompt": "Enter a KING.", "add_special_tokens": False}).json()["tokens"] == ids[1:]
    )
    assert server.post("/tokenize", {"messages": HELLO}).json()["tokens"] == plain()
    pieces = server.post("/tokenize", {"content": "Enter a KING.", "with_pieces": True}).json()["tokens"]
    assert [piece["id"] for piece in pieces] == ids and pieces[0]["piece"] == "<s>"
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == "Enter a KING."


CURLS = {
    "chat": ("/v1/chat/completions", '{"model": "tiny", "messages": [{"role": "user", "content": "ROMEO."}]}'),
    "stream": (
        "/v1/chat/completions",
        '{"model": "tiny", "messages": [{"role": "user", "content": "ROMEO."}], "stream": true}',
    ),
    "completions": ("/v1/completions", '{"model": "tiny", "prompt": "ROMEO.", "max_tokens": 7, "temperature": 0}'),
    "responses": ("/v1/responses", '{"model": "tiny", "input": "ROMEO."}'),
    "embeddings": ("/v1/embeddings", '{"input": "ROMEO.", "model": "tiny", "encoding_format": "float"}'),
}


@pytest.mark.parametrize("name", CURLS)
def test_curl(server: Serving, name: str) -> None:
    """As in OpenAI's documentation: the same flags, with another address and model."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    path, body = CURLS[name]
    command = [
        *("curl", "-sN", server.url + path, "-H", "Content-Type: application/json"),
        *("-H", "Authorization: Bearer sk-test", "-d", body),
    ]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    if name == "stream":
        assert output.startswith("data: {") and output.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(output)["model"] == "tiny"
