"""Models with NaN or infinite values: what computes with them, or would hide them, ends with a one-line error."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm import load, stream_generate
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.perplexity import kl_divergence, mean_nll
from mlx_openelm.finite import is_finite
from mlx_openelm.generation.cache_files import make_prompt_cache, save_prompt_cache
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.sampling import SamplingParams, make_logits_processors, make_sampler
from mlx_openelm.jobs.quantize import quantize
from mlx_openelm.model import OpenELM
from mlx_openelm.quantization.options import QuantizeOptions
from mlx_openelm.training.run.metrics import read
from mlx_openelm.training.run.state import Checkpoints
from mlx_openelm.training.step.loss import cross_entropy
from mlx_openelm.training.step.strategy import CHUNK

import mlx.core as mx
import pytest
import training_runs
from in_process import run_here
from mlx.utils import tree_flatten, tree_unflatten
from quantization_models import FIXTURES, SHAKESPEARE, random_windows, tiny_model, write_tiny
from serving_apps import Serving, serving
from test_trainer import Counting
from test_trainer import run as run_updates

EMBEDDING, NORM, MATRIX = (f"transformer.{name}.weight" for name in ("token_embeddings", "norm", "layers.1.ffn.proj_2"))
WEIGHTS = "model.safetensors"
PROMPT = [1, 5, 9, 33]
WINDOWS = random_windows(3, 17, vocabulary=150)
ROW = 200  # of a token that occurs in no prompt and no window
SAMPLING: list[dict[str, Any]] = [
    {"temp": 0.0},
    {"temp": 1.0},
    {"temp": 1.0, "top_k": 5},
    {"temp": 0.7, "top_p": 0.9},
    {"temp": 1.0, "min_p": 0.1},
    {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.01},
    {"temp": 0.0, "repetition_penalty": 1.3, "logit_bias": {7: -math.inf, ROW: -math.inf}},
]  # fmt: skip


def damaged(model: OpenELM, name: str, value: float) -> OpenELM:
    """The model with `value` in one row of a matrix, or in one entry of a norm."""
    weight = dict(tree_flatten(model.parameters()))[name]  # type: ignore[arg-type]
    weight[ROW % weight.shape[0] if weight.ndim == 2 else 3] = value
    model.update(tree_unflatten([(name, weight)]))
    return model


def damage(folder: Path, name: str, value: float, row: int = ROW) -> Path:
    """The same for a model folder."""
    weights: dict[str, mx.array] = mx.load(str(folder / WEIGHTS))  # type: ignore[assignment]
    weights[name][row % weights[name].shape[0] if weights[name].ndim == 2 else 3] = value
    mx.eval(weights)
    mx.save_safetensors(str(folder / WEIGHTS), weights, {"format": "pt"})
    return folder


def copy_shakespeare(folder: Path) -> Path:
    """A copy of the small trained model, which the adapters among the fixtures are for."""
    return Path(shutil.copytree(SHAKESPEARE, folder / "model"))


def steps(model: OpenELM, params: dict[str, Any], count: int = 3) -> list[tuple[int, float]]:
    chosen = SamplingParams(**params)
    sampler, processors = make_sampler(chosen, key=mx.random.key(0)), make_logits_processors(chosen)
    return list(generate_step(model, PROMPT, max_tokens=count, sampler=sampler, logits_processors=processors))


# Generation.


@pytest.mark.covering(2)
@pytest.mark.parametrize("params", SAMPLING, ids=str)
@pytest.mark.parametrize(
    ("name", "value"),
    [(EMBEDDING, math.nan), (EMBEDDING, math.inf), (NORM, math.nan), (MATRIX, math.nan), (MATRIX, -math.inf)],
    ids=str,
)
def test_generation_ends_at_the_first_logits(either_way: None, name: str, value: float, params: dict[str, Any]) -> None:
    """Damage in the embedding makes one logit of 256 not finite."""
    with pytest.raises(OpenELMError) as caught:
        steps(damaged(tiny_model(), name, value), params)
    assert str(caught.value) == (
        f"The logits for token 1 are not finite: {name} holds NaN or infinity, so its file is damaged; "
        "download the model, or convert the original, again."
    )
    assert caught.value.exit_code == 1


@pytest.mark.covering
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("token", [0, 100, 255])
@pytest.mark.parametrize("params", SAMPLING[:2], ids=str)
def test_one_logit_is_enough_to_end_sampling(
    either_way: None, params: dict[str, Any], token: int, value: float
) -> None:
    """Whether its token is the most likely, may be drawn, or is banned."""
    sampler = make_sampler(SamplingParams(**params), key=mx.random.key(0))

    def add(_: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, token].add(value)

    with pytest.raises(OpenELMError, match="logits for token 1 are not finite"):
        list(generate_step(tiny_model(), PROMPT, max_tokens=3, sampler=sampler, logits_processors=[add]))


@pytest.mark.parametrize("params", SAMPLING, ids=str)
def test_tokens_ruled_out_by_sampling_are_not_an_error(either_way: None, params: dict[str, Any]) -> None:
    """A bias of -inf is allowed, and so is one larger than any logit."""
    biased = params | {"logit_bias": {n: -math.inf for n in range(255)} | {255: -1e30}}
    assert [token for token, _ in steps(tiny_model(), biased)] == [255] * 3
    assert len(steps(tiny_model(), params)) == 3


@pytest.mark.parametrize("ruled_out", [slice(None), 5])
def test_processors_that_rule_out_the_chosen_token_are_named(ruled_out: Any) -> None:
    """The weights are not blamed for what a caller did to the logits."""

    def process(_: mx.array, logits: mx.array) -> mx.array:
        logits[:, ruled_out] = -math.inf
        return logits

    tokens = generate_step(tiny_model(), PROMPT, logits_processors=[process], sampler=lambda _: mx.array([5]))
    with pytest.raises(OpenELMError, match="logits for token 1 are not finite: the logits processors ruled out"):
        next(tokens)


def test_tokens_before_the_error_are_delivered(either_way: None) -> None:
    """With untied embeddings, a damaged row only matters once its token is read."""
    model = tiny_model(share_input_output_layers=False)
    expected = [token for token, _ in steps(model, {"temp": 0.0}, 8)]
    third = expected[2]
    assert third not in (*PROMPT, *expected[:2])
    model.transformer.token_embeddings["weight"][third, 0] = math.nan
    found = []
    with pytest.raises(OpenELMError, match="The logits for token 4 are not finite"):
        for token, _ in generate_step(model, PROMPT, max_tokens=8):
            found.append(token)
    assert found == expected[:3]


def test_activations_too_large_for_float16_are_reported(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m")
    damage(folder, NORM, 60000.0)
    for tied in ("transformer.layers.0.attn_norm.weight", "transformer.layers.0.ffn_norm.weight"):
        damage(folder, tied, 60000.0)
    model, tokenizer = load(folder, dtype="float16")
    with pytest.raises(OpenELMError, match="not finite: float16 cannot hold what this model computes; use dtype bf"):
        list(stream_generate(model, tokenizer, "To be", max_tokens=4))
    model, tokenizer = load(folder, dtype="float32")
    assert len(list(stream_generate(model, tokenizer, "To be", max_tokens=4))) > 0


def test_finite_but_huge_weights_are_reported_as_damage() -> None:
    model = tiny_model()
    for name in (NORM, MATRIX, "transformer.layers.1.ffn_norm.weight"):
        damaged(model, name, 3e38)
    with pytest.raises(OpenELMError, match="not finite: its weights are far too large, as in a damaged file"):
        steps(model, {"temp": 0.0})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a NaN weight."""
    return damage(write_tiny(tmp_path_factory.mktemp("finite") / "broken"), EMBEDDING, math.nan)


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "--prompt", "To be"),
        ("generate", "--prompt", "To be", "--temp", "0.8", "--json"),
        ("perplexity", "--data", FIXTURES / "valid.jsonl", "--sequence-length", 32, "--num-samples", 2),
    ],
    ids=str,
)
def test_commands_end_with_a_one_line_error(broken: Path, args: tuple[object, ...]) -> None:
    done = run_here(*args, "--model", broken)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert "not finite" in last and f"{EMBEDDING} holds NaN or infinity" in last
    assert "Traceback" not in done.stderr


# Measuring and quantization.


@pytest.mark.parametrize(("name", "value"), [(EMBEDDING, math.nan), (EMBEDDING, math.inf), (NORM, math.nan)])
def test_perplexity_and_divergence_are_refused(either_way: None, name: str, value: float) -> None:
    whole, model = tiny_model(), damaged(tiny_model(), name, value)
    for measure in (
        lambda: mean_nll(model, WINDOWS),
        lambda: kl_divergence(whole, model, WINDOWS),
        lambda: kl_divergence(model, whole, WINDOWS),
    ):
        with pytest.raises(OpenELMError, match=f"logits are not finite: {name} holds NaN or infinity"):
            measure()


@pytest.mark.parametrize(
    "options",
    [
        {"report": True},
        {"report": True, "q_bits": 4},
        *({"num_samples": 2, "method": (method,)} for method in ("gptq", "awq", "dwq")),
        {"num_samples": 2, "target_bpw": 4.5},
    ],
    ids=str,
)
def test_calibrated_quantization_is_refused(broken: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"calibration": str(FIXTURES / "valid.jsonl"), "sequence_length": 32} | options
    with pytest.raises(OpenELMError, match=f"full model computes is not finite: {EMBEDDING} holds NaN or infinity"):
        quantize(broken, tmp_path / "out", QuantizeOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_rows_unused_by_the_calibration_text_are_checked_too(tmp_path: Path) -> None:
    """An untied embedding is NaN for a token that the text does not contain."""
    folder = write_tiny(tmp_path / "m", share_input_output_layers=False)
    damage(folder, EMBEDDING, math.nan, row=0)  # the unknown token
    options = QuantizeOptions(
        calibration=str(FIXTURES / "valid.jsonl"), num_samples=2, sequence_length=32, method=("gptq",)
    )
    with pytest.raises(OpenELMError, match="The weights of transformer.token_embeddings are not finite"):
        quantize(folder, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_no_sensitivities_of_damaged_weights_are_kept(tmp_path: Path) -> None:
    """They are saved if a later step fails, and NaN costs could not be read again."""
    folder = write_tiny(tmp_path / "m", share_input_output_layers=False)
    damage(folder, EMBEDDING, math.nan, row=0)
    options = QuantizeOptions(
        calibration=str(FIXTURES / "valid.jsonl"), num_samples=2, sequence_length=32, target_bpw=5
    )
    with pytest.raises(OpenELMError, match=f"^{EMBEDDING} holds NaN or infinity and cannot be quantized"):
        quantize(folder, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_large_values_are_finite(dtype: mx.Dtype) -> None:
    """Their sum is not, nor is that of infinities of both signs."""
    large = mx.full((4, 64), mx.finfo(dtype).max, dtype)
    assert not mx.isfinite(large.sum()).item() and is_finite(large) and is_finite(large[:0])
    for value in (math.nan, math.inf, -math.inf):
        for spots in ([5], [5, 70]):
            flat = mx.zeros(256, dtype)
            flat[mx.array(spots)] = value
            assert not is_finite(flat) and not is_finite(flat.reshape(4, 64))
    assert not is_finite(mx.array([math.inf, -math.inf], dtype))


# Writing.

ATTENTION = "transformer.layers.1.attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("name", "value", "args", "done"),
    [
        (MATRIX, math.nan, ("convert", "-q", "--mlx-path", "out"), "quantized"),
        (MATRIX, math.nan, ("convert", "-q", "--q-mode", "mxfp4", "--mlx-path", "out"), "quantized"),
        (EMBEDDING, math.inf, ("convert", "-q", "--mlx-path", "out"), "quantized"),
        (MATRIX, -math.inf, ("quantize", "--mlx-path", "out"), "quantized"),
        (MATRIX, math.nan, ("export", "--format", "gguf", "--gguf-type", "q8_0", "--output", "out.gguf"), "quantized"),
        (MATRIX, math.inf, ("export", "--format", "gguf", "--gguf-type", "q4_0", "--output", "out.gguf"), "quantized"),
        (MATRIX, math.nan, ("fuse", "--adapter-path", FIXTURES / "peft-lora", "--save-path", "out"), "fused"),
        (ATTENTION, math.inf, ("fuse", "--adapter-path", FIXTURES / "peft-dora", "--save-path", "out"), "fused"),
        (
            MATRIX,
            math.nan,
            ("fuse", "--adapter-path", FIXTURES / "peft-rslora-attention", "-q", "--save-path", "out"),
            "quantized",
        ),
        (MATRIX, math.nan, ("average", SHAKESPEARE, "model", "--mlx-path", "out"), "averaged"),
    ],
    ids=str,
)
def test_damaged_weights_are_not_packed_or_changed(
    tmp_path: Path, name: str, value: float, args: tuple[object, ...], done: str
) -> None:
    """A quantizer drops NaN, and the copy would look healthy."""
    damage(copy_shakespeare(tmp_path), name, value)
    found = run_here(*args, *(() if args[0] == "average" else ("--model", "model")), folder=tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    of = " of model" if done == "averaged" else ""
    assert found.stderr.splitlines()[-1] == (
        f"error: {name}{of} holds NaN or infinity and cannot be {done}: its file is damaged; "
        "download the model, or convert the original, again."
    )
    assert "invalid value" not in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_weights_too_large_for_a_gguf_type_are_named(tmp_path: Path, kind: str) -> None:
    """The scale of a block has 16 bits. Tiny weights become zeros, without a warning."""
    damage(copy_shakespeare(tmp_path), MATRIX, 1e-42)
    export = ("export", "--model", "model", "--format", "gguf", "--gguf-type", kind, "--output")
    assert run_here(*export, "tiny.gguf", folder=tmp_path).stderr == ""
    damage(tmp_path / "model", MATRIX, 1e9)
    done = run_here(*export, "large.gguf", folder=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "large.gguf").exists()
    assert done.stderr.splitlines()[-1] == (
        f"error: {MATRIX} is too large for {kind}, as in a damaged file; use --gguf-type f32."
    )


@pytest.mark.parametrize("args", [("convert", "-q"), ("average", SHAKESPEARE, "model")], ids=str)
def test_weights_too_large_for_float16_are_not_called_damaged_alone(tmp_path: Path, args: tuple[object, ...]) -> None:
    damage(copy_shakespeare(tmp_path), MATRIX, 1e6)
    model = () if args[0] == "average" else ("--model", "model")
    done = run_here(*args, *model, "--dtype", "float16", "--mlx-path", "out", folder=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "float16 cannot hold it, or its file is damaged; use --dtype bfloat16, or" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("args", [(), ("--kv-bits", 8), ("--max-kv-size", 64)], ids=str)
def test_keys_and_values_that_are_not_finite_are_not_kept(tmp_path: Path, args: tuple[object, ...]) -> None:
    damage(copy_shakespeare(tmp_path), MATRIX, math.nan)
    done = run_here("cache-prompt", "To be", "--model", "model", "--prompt-cache-file", "c", *args, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"The keys and values of the prompt are not finite: {MATRIX} holds NaN" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cache_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = damaged(tiny_model(), "transformer.layers.0.ffn.proj_2.weight", math.nan)
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT]), cache)
    with pytest.raises(OpenELMError, match="^The prompt cache holds NaN or infinity"):
        save_prompt_cache(tmp_path / "c", cache)
    assert not list(tmp_path.iterdir())


# Texts that are given.


@pytest.fixture(scope="module")
def damaged_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = damage(copy_shakespeare(tmp_path_factory.mktemp("served")), NORM, math.inf)
    with serving({"model": str(folder)}) as running:
        yield running


def test_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    damage(copy_shakespeare(tmp_path), NORM, math.inf)
    done = run_here("embed", "To be", "--model", "model", "--normalize", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: The model's hidden states are not finite: {NORM} holds NaN or infinity, so its file is damaged; "
        "download the model, or convert the original, again."
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "To be"}),
        ("/v1/embeddings", {"input": ["To be"], "encoding_format": "base64"}),
        ("/v1/completions", {"prompt": "To be", "echo": True, "logprobs": 1, "max_tokens": 0}),
        ("/v1/completions", {"prompt": "To be"}),
    ],
    ids=str,
)
def test_the_server_names_the_damaged_tensor(damaged_server: Serving, path: str, body: dict[str, Any]) -> None:
    message = damaged_server.error(path, body, 500)["message"]
    assert f" not finite: {NORM} holds NaN or infinity, so its file is damaged" in message


# Training.


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, CHUNK + 5])
def test_one_logit_that_is_not_finite_makes_the_loss_so(either_way: None, row: int, value: float) -> None:
    model = damaged(tiny_model(), EMBEDDING, value)
    hidden = mx.random.normal((CHUNK + 10, 64), key=mx.random.key(0))
    targets = mx.random.randint(0, 150, (CHUNK + 10,), key=mx.random.key(1))
    for differentiable in (True, False):
        losses = cross_entropy(model, hidden, targets, differentiable=differentiable)
        assert not any(math.isfinite(loss.item()) for loss in losses)  # type: ignore[arg-type]


def test_training_a_damaged_model_ends_before_anything_is_saved(tmp_path: Path) -> None:
    training_runs.write_run_folder(tmp_path)
    damage(tmp_path / "model", EMBEDDING, math.nan)
    for out, more in (("validated", ()), ("not", ("--val-batches", 0))):
        done = run_here(
            "lora", "--model", "model", "--train", "--data", "data", "--iters", 4, "--adapter-path", out,
            "--batch-size", 2, *more, folder=tmp_path,
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        last = done.stderr.splitlines()[-1]
        assert "loss is nan" in last and ("at step 1" in last or "after step 0" in last)
        assert "its weights are damaged, or --dtype float16 is too small for them" in last
        assert not list((tmp_path / out).glob("**/*.safetensors"))
        assert all(value is not None for row in read(tmp_path / out / "metrics.jsonl") for value in row.values())


@pytest.mark.parametrize("name", ["weights.w", "optimizer.m"])
def test_weights_broken_by_an_update_are_not_saved(tmp_path: Path, name: str) -> None:
    """Only the next step's loss would show it, when the previous checkpoint had already been removed."""

    class Breaking(Counting):
        def state(self) -> dict[str, mx.array]:
            state = super().state() | {"optimizer.m": mx.array(0.0)}
            return state | {name: mx.array(math.nan)} if len(self.rates) == 10 else state

    with pytest.raises(OpenELMError, match=f"^{name} is not finite after step 10.*step 5 is intact"):
        run_updates(tmp_path, Breaking(), 20)
    assert Checkpoints(tmp_path / "checkpoints", keep_last=1).steps() == [5]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(value is not None for row in rows for value in row.values())
