"""`/v1/completions`, `/v1/chat/completions` and `/v1/models`: each text is that of a lone run."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_openelm import generate, native, stream_generate
from mlx_openelm.generation.constraints import make_constraint
from mlx_openelm.generation.piece import Piece

import pytest
from serving_apps import Serving, expected_of, flat, serving, tiny

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "ROMEO."}]
WRONG = {"name": "a", "schema": {"type": "nope"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


def lone(prompt: Any, **options: Any) -> list[Piece]:
    return list(stream_generate(*tiny(), prompt, **{"max_tokens": 16, **options}))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def continuation(prompt: str, **options: Any) -> str:
    """The text of a lone run as it follows the prompt: with the space between them."""
    return text_of(lone(prompt, echo=True, **options)).removeprefix(prompt)


def test_a_completion_is_the_text_of_a_lone_run(server: Serving) -> None:
    answer = server.post(COMPLETIONS, {"model": "tiny", "prompt": "ROMEO.", "max_tokens": 8}).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": generate(*tiny(), "ROMEO.", max_tokens=8),
        "logprobs": None,
        "finish_reason": "length",
    }
    prompt = len(tiny()[1].encode("ROMEO."))
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 8,
        "total_tokens": prompt + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({"temperature": 0.8, "seed": 7}, {"temp": 0.8, "seed": 7}),
        ({"temperature": 1, "top_p": 0.9, "seed": -1}, {"temp": 1.0, "top_p": 0.9, "seed": 2**64 - 1}),
        ({"temperature": 1, "top_k": 5, "min_p": 0.1, "seed": 3}, {"temp": 1.0, "top_k": 5, "min_p": 0.1, "seed": 3}),
        ({"stop": "e"}, {"stop": "e"}),
        ({"stop": ["e", "Enter"]}, {"stop": ["e", "Enter"]}),
        ({"stop": []}, {}),
        ({"frequency_penalty": 1.5, "presence_penalty": -0.5}, {"frequency_penalty": 1.5, "presence_penalty": -0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"10": -100, "300": 5}}, {"logit_bias": {10: -100, 300: 5}}),
        ({"kv_bits": 8, "kv_group_size": 32}, {"kv_bits": 8, "kv_group_size": 32}),
        ({"max_kv_size": 16, "max_tokens": 20}, {"max_kv_size": 16, "max_tokens": 20}),
    ],
)
def test_keys_are_options_of_the_engine(server: Serving, keys: dict[str, Any], options: dict[str, Any]) -> None:
    expected = lone("JULIET. O", echo=True, **options)
    body = {"prompt": "JULIET. O", **keys}
    (choice,) = server.post(COMPLETIONS, body).json()["choices"]
    text = text_of(expected).removeprefix("JULIET. O")
    assert (choice["text"], choice["finish_reason"]) == (text, expected[-1].finish_reason)
    chunks = server.stream(COMPLETIONS, {**body, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == [
        expected[-1].finish_reason
    ]


def test_prompts_in_every_form(server: Serving) -> None:
    ids = tiny()[1].encode("JULIET. O")
    for prompt, count in (("JULIET. O", 1), (ids, 1), (["ROMEO.", "JULIET. O"], 2), ([[1, 5], ids], 2)):
        choices = server.post(COMPLETIONS, {"prompt": prompt}).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        assert choices[-1]["text"] == continuation("JULIET. O")


def test_several_texts_have_seeds_of_their_own(server: Serving) -> None:
    body = {"prompt": ["ROMEO.", "JULIET."], "n": 3, "temperature": 1, "seed": 5, "max_tokens": 6}
    expected = [continuation(prompt, temp=1.0, seed=5 + i, max_tokens=6) for prompt in body["prompt"] for i in range(3)]
    answer = server.post(COMPLETIONS, body).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == sum(len(tiny()[1].encode(prompt)) for prompt in body["prompt"])
    streamed = [""] * 6
    for chunk in server.stream(COMPLETIONS, {**body, "stream": True}):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == expected


def test_log_probabilities_whole_and_streamed(server: Serving) -> None:
    expected = lone("ROMEO.", top_logprobs=2)
    tokenizer = tiny()[1]
    body = {"prompt": "ROMEO.", "logprobs": 2}
    found = server.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    chunks = [chunk["choices"][0] for chunk in server.stream(COMPLETIONS, {**body, "stream": True})]
    streamed = {
        key: [one for chunk in chunks if chunk["logprobs"] for one in chunk["logprobs"][key]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    assert found == streamed
    assert found["token_logprobs"] == expected_of([piece.logprob for piece in expected])
    assert flat([list(top.values()) for top in found["top_logprobs"]]) == expected_of(
        [[logprob for _, logprob in piece.top_logprobs] for piece in expected]
    )
    text = continuation("ROMEO.")
    assert "".join(found["tokens"]) == text
    for token, start, end in zip(
        found["tokens"], found["text_offset"], [*found["text_offset"][1:], len(text)], strict=True
    ):
        assert text[start:end] == token
    assert tokenizer.decode([piece.token for piece in expected]) == text.removeprefix(" ")


def test_echo_with_log_probabilities_scores_the_prompt(server: Serving) -> None:
    """What evaluation harnesses ask for: the log-probability of each token of the prompt, and no text after it."""
    import mlx.core as mx

    model, tokenizer = tiny()
    ids = tokenizer.encode("ROMEO. But soft, what light through yonder window breaks? " * 6)
    assert len(ids) > 64  # more than a piece
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = [logprobs[place, token].item() for place, token in enumerate(ids[1:])]
    for extra in ({"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 0, "stream": True}):
        body = {"prompt": ids, "echo": True, "logprobs": 1, **extra}
        if "stream" in extra:
            (choice,) = (chunk["choices"][0] for chunk in server.stream(COMPLETIONS, body))
        else:
            (choice,) = server.post(COMPLETIONS, body).json()["choices"]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
        assert max(found["top_logprobs"][1].values()) == pytest.approx(logprobs[0].max().item(), abs=1e-4)
        assert len(found["tokens"]) == len(ids) + extra["max_tokens"]
        assert choice["text"].startswith(tokenizer.decode(ids))
    assert server.post(COMPLETIONS, {"prompt": "ROMEO.", "max_tokens": 0}).json()["choices"][0]["text"] == ""


def test_echo_begins_with_the_prompt(server: Serving) -> None:
    answer = server.post(COMPLETIONS, {"prompt": "JULIET. O", "echo": True}).json()
    assert answer["choices"][0]["text"] == text_of(lone("JULIET. O", echo=True))
    assert answer["choices"][0]["text"].startswith("JULIET. O")


def test_a_text_that_is_read_after_another_keeps_the_space_between_them(server: Serving) -> None:
    """Of a completion, and of a message that goes on; an answer of a chat begins with its first word."""
    assert generate(*tiny(), "I am", max_tokens=4)[0] != " "
    asked = {"prompt": "I am", "max_tokens": 4, "logprobs": 0}
    choice = server.post(COMPLETIONS, asked).json()["choices"][0]
    assert choice["text"].startswith(" ") and choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["text_offset"][:2] == [0, len(choice["logprobs"]["tokens"][0])]
    echoed = server.post(COMPLETIONS, {**asked, "echo": True}).json()["choices"][0]["text"]
    assert echoed == "I am" + choice["text"]
    streamed = server.stream(COMPLETIONS, {**asked, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]
    alone = server.post(COMPLETIONS, {"prompt": [tiny()[1].bos_token_id], "max_tokens": 4}).json()["choices"][0]
    assert alone["text"] == generate(*tiny(), [tiny()[1].bos_token_id], max_tokens=4)
    conversation = [*HELLO, {"role": "assistant", "content": "I am"}]
    body = {"messages": conversation, "continue_final_message": True, "max_tokens": 4, "logit_bias": {"2": -100}}
    assert server.post(CHAT, body).json()["choices"][0]["message"]["content"].startswith(" ")


def test_a_text_may_go_up_to_the_end_of_the_context(server: Serving) -> None:
    most = tiny()[0].config.rope_max_length
    body = {"prompt": [5] * (most - 20), "max_tokens": -1, "logit_bias": {"2": -100}}
    assert server.post(COMPLETIONS, body).json()["usage"]["total_tokens"] in (most, most + 1)


def test_a_chat_is_written_with_the_template_and_answered(server: Serving) -> None:
    ids = tiny()[1].apply_chat_template(HELLO, "plain")
    answer = server.post(CHAT, {"model": "tiny", "messages": HELLO}).json()
    expected = lone(ids)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text_of(expected), "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "ROM"}, {"type": "text", "text": "EO."}]}]
    assert server.post(CHAT, {"messages": parts}).json()["choices"][0]["message"]["content"] == text_of(expected)
    short = server.post(CHAT, {"messages": HELLO, "max_completion_tokens": 3}).json()
    assert short["usage"]["completion_tokens"] == 3


def test_a_chat_streams_its_parts(server: Serving) -> None:
    expected = lone(tiny()[1].apply_chat_template(HELLO, "plain"), top_logprobs=3)
    body = {
        **{"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 3},
        "stream_options": {"include_usage": True},
    }
    chunks = server.stream(CHAT, body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *parts, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
    assert all(chunk["usage"] is None for chunk in parts)
    deltas = [chunk["choices"][0]["delta"] for chunk in parts]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == text_of(expected)
    listed = [one for chunk in parts for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [one["logprob"] for one in listed] == expected_of([piece.logprob for piece in expected])
    assert flat([[top["logprob"] for top in one["top_logprobs"]] for one in listed]) == expected_of(
        [[logprob for _, logprob in piece.top_logprobs] for piece in expected]
    )
    assert b"".join(bytes(one["bytes"]) for one in listed).decode().strip() == text_of(expected).strip()
    whole = server.post(CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 3}).json()
    assert whole["choices"][0]["logprobs"]["content"] == listed


def test_the_end_of_a_text_is_not_among_its_log_probabilities() -> None:
    with serving({"chats": "tiny-instruct"}) as server:
        body = {"messages": [{"role": "user", "content": "Hello!"}], "logprobs": True, "max_tokens": 200}
        answer = server.post(CHAT, body).json()["choices"][0]
        assert answer["finish_reason"] == "stop"
        content = answer["logprobs"]["content"]
        assert b"".join(bytes(one["bytes"]) for one in content).decode().strip() == answer["message"]["content"]


def test_a_model_with_a_template_uses_it() -> None:
    from mlx_openelm import load

    model, tokenizer = load("tiny-instruct")
    assert tokenizer.chat_template is not None
    conversation = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Who are you?"},
    ]
    with serving({"chats": "tiny-instruct"}) as server:
        found = server.post(CHAT, {"messages": conversation}).json()
        ids = tokenizer.apply_chat_template(conversation)
        assert found["usage"]["prompt_tokens"] == len(ids)
        assert found["choices"][0]["message"]["content"] == generate(model, tokenizer, ids, max_tokens=16)
        continued = server.post(CHAT, {"messages": conversation[:2], "continue_final_message": True}).json()
        ids = tokenizer.apply_chat_template(conversation[:2], continue_final_message=True)
        assert continued["choices"][0]["message"]["content"] == generate(model, tokenizer, ids, max_tokens=16)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_response_format_is_kept(server: Serving, path: str) -> None:
    pytest.importorskip("llguidance")
    schema = {
        **{"type": "object", "properties": {"who": {"enum": ["ROMEO", "JULIET"]}, "old": {"type": "boolean"}}},
        **{"required": ["who", "old"], "additionalProperties": False},
    }
    asked = {"prompt": "ROMEO."} if path == COMPLETIONS else {"messages": HELLO}
    body = {**asked, "max_tokens": 60, "temperature": 1, "seed": 4}
    formats = [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        {"type": "json_object"},
        {"type": "text"},
    ]
    texts = []
    for chosen in formats:
        (choice,) = server.post(path, {**body, "response_format": chosen}).json()["choices"]
        texts.append(choice["text"] if path == COMPLETIONS else choice["message"]["content"])
    found = json.loads(texts[0])
    assert found["who"] in ("ROMEO", "JULIET") and isinstance(found["old"], bool)
    assert texts[1].startswith("{")
    assert not texts[2].startswith("{")


def test_constraints_beyond_openais(server: Serving) -> None:
    pytest.importorskip("llguidance")
    for extra in ({"regex": "[0-9]{3}"}, {"choice": ["123"]}, {"grammar": 'root ::= "123"'}):
        (choice,) = server.post(COMPLETIONS, {"prompt": "ROMEO.", **extra}).json()["choices"]
        assert len(choice["text"]) == 3 and choice["text"].isdigit() and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": WRONG}}, "response_format"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", **WRONG}}}, "text.format"),
        (CHAT, {"regex": "("}, "regex"),
        (CHAT, {"choice": ["a"], "regex": "a"}, "regex"),
        (COMPLETIONS, {"logit_bias": {"99999": 1}}, "logit_bias"),
        (COMPLETIONS, {"kv_bits": 7}, "kv_bits"),
        (COMPLETIONS, {"num_draft_tokens": 3}, "num_draft_tokens"),
    ],
)
def test_what_is_wrong_is_a_status_in_streams_too(server: Serving, path: str, body: dict[str, Any], param: str) -> None:
    pytest.importorskip("llguidance")
    asked = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "a"}}
    response = server.post(path, {"stream": True, **asked.get(path, {"input": "a"}), **body})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_a_grammar_is_compiled_once_while_others_go_on(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    compiled: list[Any] = []
    others_are_done = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert others_are_done.wait(30)
        compiled.append(make_constraint(*arguments))
        return compiled[-1]

    monkeypatch.setattr("mlx_openelm.serving.context.make_constraint", slow)
    with ThreadPoolExecutor(1) as pool:
        constrained = pool.submit(server.post, COMPLETIONS, {"prompt": "a", "choice": ["a", "b"], "n": 3})
        other = server.post(COMPLETIONS, {"prompt": "ROMEO.", "max_tokens": 4}).json()
        others_are_done.set()
        texts = [choice["text"] for choice in constrained.result().json()["choices"]]
    assert other["usage"]["completion_tokens"] == 4
    assert len(compiled) == 1 and len(texts) == 3 and set(texts) <= {"a", "b"}


def test_a_grammar_never_names_a_file(server: Serving) -> None:
    error = server.error(COMPLETIONS, {"prompt": "ROMEO.", "grammar": "/etc/passwd"})
    assert error["param"] == "grammar" and "file" not in error["message"]


def test_many_at_once_are_each_their_lone_run(server: Serving) -> None:
    def options(number: int) -> dict[str, Any]:
        return {"max_tokens": 4 + number % 9, "seed": number, "top_p": 0.9 if number % 3 else 1.0}

    def ask(number: int) -> str:
        temperature = {"temperature": number % 3 / 2}
        body = {"prompt": f"Enter KING {number}", **options(number), **temperature}
        if number % 2:
            return "".join(
                chunk["choices"][0]["text"] for chunk in server.stream(COMPLETIONS, {**body, "stream": True})
            )
        return str(server.post(COMPLETIONS, body).json()["choices"][0]["text"])

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
    for number, text in enumerate(found):
        assert text == continuation(f"Enter KING {number}", temp=number % 3 / 2, **options(number)), number


def shared_of(tokens: int) -> int:
    """The tokens of a prompt that need not be processed again: as many are left as are processed like a prompt."""
    return tokens - 12 if native.kernels is not None else (tokens - 12) // 128 * 128


def test_cached_tokens_are_counted_and_change_nothing(server: Serving) -> None:
    prompt = "HAMLET, PRINCE OF DENMARK. " * 20
    first, second = (server.post(COMPLETIONS, {"prompt": prompt}).json() for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == shared_of(first["usage"]["prompt_tokens"])
    assert second["choices"] == first["choices"]
    assert first["choices"][0]["text"] == continuation(prompt)


def test_several_texts_of_one_prompt_process_it_once(server: Serving) -> None:
    prompt = "OTHELLO, THE MOOR OF VENICE. " * 20
    before = server.metric("mlx_openelm_cached_prompt_tokens_total")
    answer = server.post(COMPLETIONS, {"prompt": prompt, "n": 4, "temperature": 1, "seed": 9, "max_tokens": 5}).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [continuation(prompt, max_tokens=5, temp=1.0, seed=9 + n) for n in range(4)]
    held = shared_of(answer["usage"]["prompt_tokens"])
    assert server.metric("mlx_openelm_cached_prompt_tokens_total") - before == 3 * held > 0


def test_models_are_listed(server: Serving) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model["id"] == "tiny" and model["object"] == "model" and isinstance(model["created"], int)
    assert server.get("/v1/models/tiny").json() == model
    missing = server.get("/v1/models/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_an_unknown_model_is_404(server: Serving) -> None:
    for path, asked in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HELLO})):
        error = server.error(path, {"model": "gpt-4", **asked}, 404)
        assert error["code"] == "model_not_found" and error["param"] == "model" and "gpt-4" in error["message"]


def test_metrics_count(server: Serving) -> None:
    before = server.metric("mlx_openelm_generated_tokens_total")
    server.post(COMPLETIONS, {"prompt": "ROMEO.", "max_tokens": 5})
    server.post(COMPLETIONS, {"prompt": "ROMEO.", "best_of": 5})
    server.stream(COMPLETIONS, {"prompt": "ROMEO.", "max_tokens": 5, "stream": True})
    assert server.metric("mlx_openelm_generated_tokens_total") == before + 10
    assert server.metric('mlx_openelm_requests_total{outcome="client_error",route="completions"}') >= 1
    text = server.get("/metrics").text
    for name in (
        *("time_to_first_token_seconds_bucket", "inter_token_seconds_sum", "texts_running", "texts_waiting"),
        *("prompt_cache_bytes", "prompts_total", "memory_active_bytes", "accepted_draft_tokens_total", "engine_up"),
    ):
        assert f"mlx_openelm_{name}" in text, name
    assert all(math.isfinite(float(line.rpartition(" ")[2])) for line in text.splitlines() if line[:1] != "#")
