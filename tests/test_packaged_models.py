"""The models inside the package: what they can do, that they fit together, and that their recipes make them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx_openelm
from mlx_openelm import Tokenizer, generate, load
from mlx_openelm.config import ModelConfig
from mlx_openelm.hub import catalog
from mlx_openelm.model import OpenELM
from mlx_openelm.training.recipes import find_recipe
from mlx_openelm.training.run.metrics import read
from mlx_openelm.training.run.preparing import Loading
from mlx_openelm.training.run.starting import start

import mlx.core as mx
import pytest
import yaml
from training_runs import environment, metrics

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "shakespeare"
RUNS = ROOT / "docs" / "runs"
MEGABYTES = {"tiny": 6, "tiny-draft": 1.5, "tiny-instruct": 6}
TARGET = 1.351  # nats per character
FIXTURE = ROOT / "tests" / "fixtures" / "valid.jsonl"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the plays are not here")


@cache
def loaded(name: str) -> tuple[OpenELM, Tokenizer]:
    return load(name, dtype="float32")


def test_these_are_the_models() -> None:
    assert set(catalog.PACKAGED) == set(MEGABYTES)
    assert {path.name for path in catalog.ASSETS.glob("tiny*")} == set(MEGABYTES)


@pytest.mark.parametrize("name", MEGABYTES)
def test_a_model_is_small_and_has_a_card(name: str) -> None:
    folder = catalog.ASSETS / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < MEGABYTES[name] * 1e6
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and f"# {name}\n" in card
    for what in ("public domain", "8 bits", "per character", "Limits"):
        assert what in card, what


@pytest.mark.parametrize("name", MEGABYTES)
def test_mlx_swift_would_make_the_same_shapes(name: str) -> None:
    """It reads only these fields of `config.json`, and assumes the multipliers and groups of the published models."""
    stored = json.loads((catalog.ASSETS / name / "config.json").read_text())
    config = ModelConfig.from_file(catalog.ASSETS / name)
    same = {key: stored[key] for key in ("num_transformer_layers", "model_dim", "head_dim", "vocab_size")}
    assumed = ModelConfig.from_dict(
        same | {"num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0],
                "ffn_dim_divisor": stored["ffn_dim_divisor"], "normalize_qk_projections": True,
                "share_input_output_layers": True}
    )  # fmt: skip
    assert config.tensor_shapes() == assumed.tensor_shapes()
    for queries, keys in zip(config.num_query_heads, config.num_kv_heads, strict=True):
        assert queries == 4 * keys
    for name, shape in config.tensor_shapes().items():
        assert len(shape) == 1 or shape[1] % 64 == 0, name  # groups of 64


def test_the_draft_model_has_the_same_tokenizer_and_is_a_quarter_of_the_size() -> None:
    sizes = {name: ModelConfig.from_file(catalog.ASSETS / name).num_parameters for name in MEGABYTES}
    assert sizes["tiny"] == sizes["tiny-instruct"] and 3.8 < sizes["tiny"] / sizes["tiny-draft"] < 4.2
    for file in ("tokenizer.model", "tokenizer.json"):
        assert len({(catalog.ASSETS / name / file).read_bytes() for name in MEGABYTES}) == 1


def words_of(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Za-z]+", text)}


@needs_data
def test_tiny_writes_speeches_in_words_that_exist() -> None:
    known = words_of((DATA / "train.jsonl").read_text().replace("\\n", "\n"))
    text = generate(*loaded("tiny"), "Enter ROMEO", max_tokens=400, temp=0.8, top_p=0.95, seed=1)
    found = re.findall(r"[A-Za-z]+", text)
    assert len(found) > 120 and sum(word.lower() in known for word in found) > 0.93 * len(found)
    assert len(re.findall(r"^[A-Z][A-Z' ]+[A-Z] ", text, re.MULTILINE)) >= 2  # names of speakers
    lines = [line.strip() for line in text.splitlines() if line.startswith(" ") and line.strip()]
    assert len(lines) >= 4 and sum(15 <= len(line) <= 65 for line in lines) > 0.8 * len(lines)


@pytest.mark.parametrize("prompt", ["Good morrow.", "Who are you?", "Speak to me as Hamlet.", "Tell me of love.",
                                    "Insult me!", "What is a computer?"])  # fmt: skip
def test_tiny_instruct_answers_and_stops(prompt: str) -> None:
    model, tokenizer = loaded("tiny-instruct")
    answers = []
    for seed in range(4):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        response = list(mlx_openelm.stream_generate(model, tokenizer, ids, max_tokens=160, temp=0.7, seed=seed))
        assert response[-1].finish_reason == "stop"
        answers.append("".join(piece.text for piece in response))
    assert all(answer.strip() and "<|" not in answer for answer in answers)
    assert len(set(answers)) > 1  # not one phrase for all


def test_tiny_instruct_has_its_template() -> None:
    _, tokenizer = loaded("tiny-instruct")
    chat = [{"role": "user", "content": "Good morrow."}]
    assert tokenizer.apply_chat_template(chat) == tokenizer.apply_chat_template(chat, template="corenet")


def loss_per_character(name: str, data: Path) -> float:
    """Each document without BOS or EOS, in windows of 256 tokens that follow BOS."""
    model, tokenizer = loaded(name)
    total, characters = 0.0, 0
    for line in data.read_text().splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text, add_bos=False)
        characters += len(text)
        for first in range(0, len(ids), 256):
            window = ids[first : first + 256]
            logits = model(mx.array([[tokenizer.bos_token_id, *window[:-1]]]))[0]
            chosen = mx.take_along_axis(logits, mx.array(window)[:, None], -1)[:, 0]
            total += mx.sum(mx.logsumexp(logits, -1) - chosen).item()
    return total / characters


@pytest.mark.slow
@needs_data
def test_tiny_predicts_an_unseen_play() -> None:
    loss = loss_per_character("tiny", DATA / "valid.jsonl")
    assert loss <= TARGET
    draft = loss_per_character("tiny-draft", DATA / "valid.jsonl")
    assert loss < draft < 1.6
    for name, found in (("tiny", loss), ("tiny-draft", draft)):
        assert f"{found:.3f} nats per character" in (catalog.ASSETS / name / "README.md").read_text()


# The recipes.


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_a_recipe_starts_from_the_shape_and_tokenizer_of_its_model(name: str) -> None:
    values = yaml.safe_load(find_recipe(name).read_text())
    started = start(values["model"], Loading(tokenizer=values["tokenizer"]), seed=0, max_seq_length=256)
    assert started.model.config == ModelConfig.from_file(catalog.ASSETS / name)
    assert started.tokenizer.encode("ROMEO. Speak!") == loaded(name)[1].encode("ROMEO. Speak!")


def pretrain(recipe: str, folder: Path, *words: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "mlx_openelm", "pretrain", "--config", recipe, "--output", str(folder)]
    command += ["--data", str(DATA / "train.jsonl"), "--valid", str(DATA / "valid.jsonl"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return metrics(folder)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_a_recipe_gives_the_same_bytes_again(name: str, tmp_path: Path) -> None:
    words = ("--iters", 3, "--warmup", 1, "--val-batches", 1)
    one, two = (pretrain(name, tmp_path / run, *words) for run in ("one", "two"))
    assert one == two
    for model in ("model", "model-ema"):
        files = {path.name: path.read_bytes() for path in (tmp_path / "one" / model).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / "two" / model).iterdir()}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_a_recipe_follows_the_log_of_the_run(name: str, tmp_path: Path) -> None:
    """The first steps, in which the learning rate rises as in the whole run."""
    found = pretrain(name, tmp_path / "run", "--iters", 51, "--val-batches", 0)
    logged = {entry["step"]: entry for entry in read(RUNS / name / "metrics.jsonl") if "train_loss" in entry}
    steps = [entry for entry in found if "train_loss" in entry and entry["step"] <= 50]
    assert len(steps) == 5
    for entry in steps:
        for key in ("train_loss", "learning_rate", "grad_norm", "trained_tokens"):
            assert entry[key] == pytest.approx(logged[entry["step"]][key], rel=0.02), (entry["step"], key)


def test_the_logs_are_of_whole_runs() -> None:
    for name in MEGABYTES:
        assert (RUNS / name / "losses.png").read_bytes().startswith(b"\x89PNG")
        entries = read(RUNS / name / "metrics.jsonl")
        steps = [entry["step"] for entry in entries]
        assert steps == sorted(steps) and any("val_loss" in entry for entry in entries if entry["step"] == steps[-1])
