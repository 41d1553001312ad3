"""Scores of texts, embeddings and the server on a GPU, if there is one."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_openelm import OpenELM, Tokenizer, backend, generate, load
from mlx_openelm.evaluation.likelihoods import Request, log_likelihoods
from mlx_openelm.generation.scoring import embedding, prompt_logprobs

import mlx.core as mx
import numpy as np
import pytest
from gpu_devices import FIXTURES, SHAKESPEARE, TOLERANCE, assert_close, computed, needs_gpu, on
from lone_runs import ERROR, Subject, each_dtype, each_subject, plays
from test_likelihoods import drawn

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]

HELLO = [{"role": "user", "content": "ROMEO."}]


@each_dtype
def test_likelihoods_of_padded_texts(dtype, reference):
    """Contexts of many lengths, some with several continuations."""
    subject, requests = plays(dtype), drawn(12)
    for ids, following in list(zip(reference["ids"], reference["greedy"], strict=True))[:3]:
        requests += [Request(tuple(ids), tuple(following[:3])), Request(tuple(ids), (*following[:2], 700))]
    together = computed("gpu", log_likelihoods, subject.model, requests)
    for device, model in (("gpu", subject.model), ("cpu", subject.exact)):
        alone = computed(device, lambda one=model: log_likelihoods(one, requests, batch_size=1))
        for request, found, expected in zip(requests, together, alone, strict=True):
            assert abs(found.logprob - expected.logprob) < ERROR[dtype] * len(request.continuation)
    assert [found.is_greedy for found in together[-6:]] == [True, False] * 3


def results(subject: Subject, function: Any, *arguments: Any) -> list[Any]:
    """What a generator returns on the GPU and on the CPU, where each has three pieces to do."""

    def run(steps: Generator[None, None, Any]) -> Any:
        for _ in range(3):
            next(steps)
        with pytest.raises(StopIteration) as stop:
            next(steps)
        return stop.value.value

    models = (("gpu", subject.model), ("cpu", subject.exact))
    return [computed(device, lambda one=model: run(function(one, *arguments))) for device, model in models]


@each_subject
def test_scores_and_embeddings_of_a_text(make, monkeypatch):
    subject = make()
    monkeypatch.setattr(backend, "prefill_step_size", lambda *sizes: 100)
    ids = subject.prompt(250)
    found, expected = results(subject, prompt_logprobs, ids, 2)
    assert len(found) == 249
    for (one, listed), (other, best) in zip(found, expected, strict=True):
        assert abs(one - other) < subject.error
        assert [logprob for _, logprob in listed] == pytest.approx([logprob for _, logprob in best], abs=subject.error)
    found, expected = map(np.array, results(subject, embedding, ids))
    assert_close(found, expected, TOLERANCE["bfloat16"])


def test_the_server(reference):
    """Texts without near-ties: one alone, several at once, a streamed chat; scores and embeddings, with an adapter."""
    for package in ("httpx2", "h11", "prometheus_client", "starlette", "uvicorn"):
        pytest.importorskip(package)
    from serving_apps import serving

    def load_plays(path: str) -> tuple[OpenELM, Tokenizer, None]:
        return (*load(path, dtype="float32"), None)

    with on("cpu"):
        exact, tokenizer = load(SHAKESPEARE, FIXTURES / "peft-lora", dtype="float32")
        base, _ = load(SHAKESPEARE, dtype="float32")
    prompts = [*reference["ids"][:3], tokenizer.apply_chat_template(HELLO, "plain")]
    answer = computed("cpu", lambda: generate(base, tokenizer, prompts[3], max_tokens=8))
    echoed = computed("cpu", lambda: [generate(base, tokenizer, ids, max_tokens=8, echo=True) for ids in prompts])
    expected = [text.removeprefix(tokenizer.decode(ids)) for text, ids in zip(echoed, prompts, strict=True)]
    adapters = {"lora": str(FIXTURES / "peft-lora")}
    with serving({"plays": str(SHAKESPEARE)}, adapters, load=load_plays, max_tokens=8) as server:

        def text_after(ids: list[int]) -> str:
            return server.post("/v1/completions", {"prompt": ids}).json()["choices"][0]["text"]

        assert text_after(prompts[0]) == expected[0]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(text_after, prompts * 2)) == expected * 2
        chunks = server.stream("/v1/chat/completions", {"messages": HELLO, "stream": True})
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == answer
        body = {"model": "plays:lora", "prompt": prompts[3], "echo": True, "logprobs": 1, "max_tokens": 0}
        scores = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]
        vector = server.post("/v1/embeddings", {"model": "plays:lora", "input": prompts[3]}).json()["data"][0]
    ids = mx.array([prompts[3]])
    logprobs = computed("cpu", lambda: exact(ids)[0] - mx.logsumexp(exact(ids)[0], axis=-1, keepdims=True))
    own = logprobs[np.arange(len(prompts[3]) - 1), prompts[3][1:]]
    assert scores[0] is None and np.abs(scores[1:] - own).max() < ERROR["float32"]
    hidden = computed("cpu", lambda: exact.hidden_states(ids)[0].mean(axis=0))
    assert_close(np.array(vector["embedding"]), hidden, TOLERANCE["bfloat16"])
