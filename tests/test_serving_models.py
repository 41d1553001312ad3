"""Several models and adapters, drafts, and prompts that are held across restarts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load
from mlx_openelm.errors import RequestError
from mlx_openelm.serving.models import Models
from mlx_openelm.serving.warming import missed_prompts, read_warm, warm
from mlx_openelm.sources import open_source

import pytest
from serving_apps import FIXTURES, Serving, load_alone, serving, tiny

COMPLETIONS = "/v1/completions"
PLAYS = str(FIXTURES / "shakespeare-hf")
ADAPTERS = {name: str(FIXTURES / f"peft-{name}") for name in ("lora", "dora")}


@pytest.fixture(scope="module")
def two() -> Iterator[Serving]:
    """Two models, of which one has two adapters."""
    with serving({"tiny": "tiny", "plays": PLAYS}, ADAPTERS) as running:
        yield running


def text_of(server: Serving, **body: Any) -> str:
    return str(server.post(COMPLETIONS, {"prompt": "ROMEO.", **body}).json()["choices"][0]["text"])


def test_models_and_adapters_are_chosen_by_name(two: Serving) -> None:
    names = [model["id"] for model in two.get("/v1/models").json()["data"]]
    assert names == ["tiny", "plays", "plays:lora", "plays:dora"]
    expected = {"tiny": generate(*tiny(), "ROMEO.", max_tokens=16)}
    for name, path in (("plays", None), ("plays:lora", ADAPTERS["lora"]), ("plays:dora", ADAPTERS["dora"])):
        expected[name] = generate(*load(PLAYS, path), "ROMEO.", max_tokens=16)
    assert len(set(expected.values())) >= 3
    with ThreadPoolExecutor(8) as pool:  # all of them in the same steps
        asked = names * 2
        assert list(pool.map(lambda name: text_of(two, model=name), asked)) == [expected[name] for name in asked]
    assert text_of(two) == expected["tiny"]  # the first is the default
    assert two.post(COMPLETIONS, {"model": "plays:lora", "prompt": "a"}).json()["model"] == "plays:lora"
    for name in ("plays:other", "tiny:lora", ":lora", "plays:"):
        assert two.error(COMPLETIONS, {"model": name, "prompt": "a"}, 404)["code"] == "model_not_found"


def test_adapters_of_embeddings_and_scores(two: Serving) -> None:
    import mlx.core as mx

    model, tokenizer = load(PLAYS, ADAPTERS["lora"])
    ids = mx.array([tokenizer.encode("ROMEO.")])
    expected: Any = model.hidden_states(ids)[0].mean(axis=0).tolist()
    found = two.post("/v1/embeddings", {"model": "plays:lora", "input": "ROMEO."}).json()["data"][0]["embedding"]
    assert found == pytest.approx(expected, abs=1e-4)
    plain = two.post("/v1/embeddings", {"model": "plays", "input": "ROMEO."}).json()["data"][0]["embedding"]
    assert plain != pytest.approx(expected, abs=1e-4)


def test_an_adapter_that_fits_no_model_is_an_error_at_the_start() -> None:
    with pytest.raises(RequestError, match="lora"):
        Models({"tiny": "tiny"}, {"lora": ADAPTERS["lora"]}, open_source, load_alone)


def test_models_take_turns_in_memory() -> None:
    """A budget for one of them: requests for both, at the same time, are all answered, and right."""
    loaded: list[str] = []

    def loading(source: str) -> Any:
        loaded.append(source)
        return load_alone(source)

    expected = {"a": generate(*tiny(), "ROMEO.", max_tokens=16), "b": generate(*load(PLAYS), "ROMEO.", max_tokens=16)}
    with serving({"a": "tiny", "b": PLAYS}, load=loading, memory={"max_bytes": 1}) as server:
        assert loaded == ["tiny"] and len(server.worker.models.residents) == 1
        asked = ["a", "b"] * 3
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(lambda name: text_of(server, model=name), asked)) == [expected[name] for name in asked]
        assert len(server.worker.models.residents) == 1
        assert 2 <= len(loaded) <= 7  # two if all requests for the model that is there come before the others
        assert server.metric("mlx_openelm_models_resident") == 1
        assert text_of(server, model="b") == expected["b"]
        again = len(loaded)
        assert text_of(server, model="b") == expected["b"] and len(loaded) == again
        assert text_of(server, model="a") == expected["a"] and loaded[again:] == ["tiny"]


def test_what_waits_for_one_model_does_not_hold_up_another() -> None:
    """The second text of a prompt waits for the first one, which waits for a place."""
    long = {"model": "a", "prompt": "ROMEO.", "max_tokens": 400, "logit_bias": {2: -100}}
    with serving({"a": "tiny", "b": "tiny-draft"}, max_rows=1) as server, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.post, COMPLETIONS, long)]
        server.wait_until(lambda: server.worker.running == 1)
        answers.append(pool.submit(server.post, COMPLETIONS, {**long, "prompt": "JULIET.", "max_tokens": 1, "n": 2}))
        server.wait_until(lambda: server.worker.waiting == 2)
        assert server.post(COMPLETIONS, {"model": "b", "prompt": "a", "max_tokens": 1}).status_code == 200
        assert server.worker.running == 1 and not any(answer.done() for answer in answers)
        assert [len(answer.result().json()["choices"]) for answer in answers] == [1, 2]


def test_a_model_stays_in_memory_while_something_else_than_texts_needs_it() -> None:
    with serving({"a": "tiny", "b": "tiny-draft"}, memory={"max_bytes": 1}) as server:
        models = server.worker.models
        first, second = models.entries.values()
        assert server.worker.run(lambda: models.get(second, models.residents)).result() is None
        assert first.resident is not None
        assert server.worker.run(lambda: models.get(second)).result() is second.resident is not None


def test_a_model_that_cannot_be_loaded_again_is_an_error_of_its_requests(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "model"
    shutil.copytree(PLAYS, folder)
    with serving({"a": "tiny", "b": str(folder)}, memory={"max_bytes": 1}) as server:
        shutil.rmtree(folder)
        response = server.post(COMPLETIONS, {"model": "b", "prompt": "a"})
        assert response.status_code in (400, 500) and "secret" not in response.text
        assert text_of(server, model="a") == generate(*tiny(), "ROMEO.", max_tokens=16)


def test_drafts_change_nothing_but_the_speed() -> None:
    def loading(source: str) -> Any:
        return *load(source), load("tiny-draft")[0]

    with serving(load=loading, num_draft_tokens=3) as server:
        assert text_of(server) == generate(*tiny(), "ROMEO.", max_tokens=16)
        assert server.metric("mlx_openelm_drafted_tokens_total") > 0
        accepted = server.metric("mlx_openelm_accepted_draft_tokens_total")
        assert 0 < accepted <= server.metric("mlx_openelm_drafted_tokens_total")
        assert text_of(server, num_draft_tokens=0) == generate(*tiny(), "ROMEO.", max_tokens=16)


LONG = "HAMLET, PRINCE OF DENMARK. " * 20


def cached(server: Serving, prompt: str = LONG, **body: Any) -> int:
    usage = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 4, **body}).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_held_prompts_survive_a_restart(tmp_path: Path) -> None:
    memory = {"folder": tmp_path / "held"}
    with serving(memory=memory) as server:
        assert cached(server) == 0
        before = text_of(server, prompt=LONG)
    files = list((tmp_path / "held").iterdir())
    assert files
    with serving(memory=memory) as server:
        assert cached(server) >= 64
        assert text_of(server, prompt=LONG) == before
    for file in files:  # dropped, never wrong
        data = bytearray(file.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        file.write_bytes(data[:-7])
    with serving(memory=memory) as server:
        assert text_of(server, prompt=LONG) == before == generate(*tiny(), LONG, max_tokens=16)


def test_prompts_of_a_file_are_warm_at_the_start(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{LONG}\n\nJULIET.\u2028O.\x85\n")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text(f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{LONG}"}}]}}\n')
    for file, count in ((lines, 2), (objects, 1)):

        def prepare(context: Any, file: Path = file, count: int = count) -> None:
            prompts = read_warm(context, str(file))
            assert len(prompts) == count
            context.worker.run(lambda: warm(context, prompts)).result()

        with serving(prepare=prepare) as server:
            assert cached(server) >= 64
            assert text_of(server, prompt=LONG) == generate(*tiny(), LONG, max_tokens=16)


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"max_kv_size": 400}, {"kv_bits": 8, "prefill_step_size": 16}])
def test_prompts_are_warm_for_requests_that_give_no_options(tmp_path: Path, options: dict[str, int]) -> None:
    file, short = tmp_path / "warm.txt", "ROMEO. " * 15
    file.write_text(f"{LONG * 3}\n{short}\nO.\n")

    def prepare(context: Any) -> None:
        prompts = read_warm(context, str(file))
        missed = context.worker.run(lambda: warm(context, prompts)).result()
        assert [one.line for one in missed] == ([3] if "prefill_step_size" in options else [2, 3])
        message = missed_prompts(context, "warm.txt", missed[-1:])
        whole = options.get("prefill_step_size", 128) + 12
        assert message.startswith("1 prompt of warm.txt is not held, the first on line 3; make prompts longer")
        assert f"12 tokens are held, or {whole} where" in message

    with serving(prepare=prepare, **options) as server:
        assert cached(server, LONG * 3 + short) >= 128
        assert (cached(server, short * 4) > 0) == ("prefill_step_size" in options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "warm.jsonl:1: "),
        ("[]", "must be a JSON object"),
        ('{"prompt": "a", "messages": []}', "messages"),
        ("{}", "either prompt or messages"),
        ('{"prompt": "a", "model": "b"}', "does not exist"),
        ('{"prompt": "a", "max_tokens": 3}', "max_tokens is not known"),
        ("", "has no prompts"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, two: Serving, line: str, message: str) -> None:
    file = tmp_path / "warm.jsonl"
    file.write_text(f"{line}\n")
    with pytest.raises(RequestError, match="warm.jsonl") as caught:
        read_warm(two.context, str(file))
    assert message in str(caught.value)
