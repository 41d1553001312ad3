"""Logits and text on a GPU, where there is one: Metal's and CUDA's own kernels against the reference.

`test_gpu_*.py` do the same for caches, packed weights, batches, adapters, the server and training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from mlx_openelm import convert, generate, load
from mlx_openelm.cache import make_cache
from mlx_openelm.config import ModelConfig
from mlx_openelm.generation import sampling
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest
from gpu_devices import FIXTURES, SHAKESPEARE, STAND_IN, assert_close, computed, needs_gpu, needs_real_gpu
from processes import environment
from test_model import rule_weights

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]


# CUDA multiplies float32 in TF32, whose 10-bit mantissa is visible in logits around 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.05), ("float16", 0.1), ("bfloat16", 0.5)])
def test_logits_equal_the_reference(reference, dtype, tolerance):
    model, _ = load(SHAKESPEARE, dtype=dtype)
    for prompt in range(4):
        ids = mx.array([reference["ids"][prompt]])
        cache = make_cache(len(model.layers))
        for logits in (model(ids), mx.concatenate([model(ids[:, i : i + 1], cache) for i in range(ids.shape[1])], 1)):
            assert logits.dtype == getattr(mx, dtype)
            found = np.array(logits[0].astype(mx.float32))
            assert np.abs(found - reference[f"logits_{prompt}"]).max() < tolerance


@needs_real_gpu
@pytest.mark.parametrize("size", ["270M", "450M"])
def test_true_sizes(size):
    """Published shapes with generated weights; logits of random networks differ little between tokens."""
    reference, config = np.load(FIXTURES / f"true-size-OpenELM-{size}.npz"), ModelConfig.from_name(size)
    weights = list(rule_weights(config))
    ids = mx.array(reference["ids"])[None]
    for dtype, tolerance, agreeing in ((mx.float32, 0.02, 0.97), (mx.bfloat16, 0.1, 0.8)):
        model = OpenELM(config, initialize=False)
        model.load_weights([(name, weight.astype(dtype)) for name, weight in weights])
        cache = make_cache(len(model.layers))
        logits = model(ids, cache)[0]
        first = np.array(logits[:, :32].astype(mx.float32))
        assert_close(first, reference["first32"], tolerance)
        assert (np.array(logits.argmax(-1)) == reference["argmax"]).mean() >= agreeing
        for layer in cache:
            layer.trim(1)
        last = np.array(model(ids[:, -1:], cache)[0, -1].astype(mx.float32))
        assert_close(last, reference["last_logits"], tolerance)
        del model, cache, logits
        mx.clear_cache()


def test_quantized_weights_stay_packed_and_give_text(reference, tmp_path):
    convert(SHAKESPEARE, tmp_path / "packed", quantize=True, q_bits=8)
    model, tokenizer = load(tmp_path / "packed")
    assert not model.expanded
    count = 16 if STAND_IN else 48
    tokens = [token for token, _ in generate_step(model, reference["ids"][0], max_tokens=count)]
    agreeing = sum(a == b for a, b in zip(tokens, reference["greedy"][0][:count], strict=True))
    assert agreeing >= 8
    assert tokenizer.decode(tokens)


@pytest.mark.parametrize("options", [CacheOptions(kv_bits=8), CacheOptions(max_kv_size=64), CacheOptions()], ids=str)
def test_pieces_and_caches_do_not_change_the_first_tokens(reference, options):
    model, _ = load(SHAKESPEARE, dtype="float32")
    steps = generate_step(model, reference["ids"][2], max_tokens=8, options=options, prefill_step_size=5)
    assert [token for token, _ in steps] == reference["greedy"][2][:8]


# Sampling.

SAMPLERS: list[Any] = [
    {"temp": 1.0},
    {"temp": 0.8, "top_p": 0.9},
    pytest.param({"temp": 0.8, "top_k": 20}, marks=pytest.mark.slow),
    {"temp": 1.5, "min_p": 0.05, "min_tokens_to_keep": 2},
    {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temp": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temp": 1.0, "top_p": 0.95, "top_k": 50, "min_p": 0.02, "logit_bias": {5: 2.0, 7: float("-inf")}},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: " ".join(options))
def test_the_same_seed_gives_the_same_text(options):
    model, tokenizer = load(SHAKESPEARE, dtype="float32")
    texts = [generate(model, tokenizer, "To be", max_tokens=24, seed=seed, **options) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "keep",
    [
        lambda logprobs: sampling.apply_top_p(logprobs, 0.7),
        lambda logprobs: sampling.apply_top_k(logprobs, 20),
        lambda logprobs: sampling.apply_min_p(logprobs, 0.05, 3),
        lambda logprobs: sampling.apply_xtc(logprobs, 1.0, 0.05, (), mx.random.key(0)),
    ],
    ids=["top_p", "top_k", "min_p", "xtc"],
)
def test_filters_keep_the_same_tokens_as_on_a_cpu(keep):
    # Vocabularies around the sizes at which kernels switch sorting algorithms.
    for vocab in (60, 2048, 32000):
        logits = np.random.default_rng(vocab).normal(size=(2, vocab)).astype(np.float32) * 4
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found, expected = (computed(device, lambda x=logprobs: keep(mx.array(x))) for device in ("gpu", "cpu"))
        # Probabilities are summed in another order, so a token at the threshold may go either way.
        assert ((found > -np.inf) != (expected > -np.inf)).sum() <= 2
        assert (found > -np.inf).any(axis=-1).all()


def test_draws_follow_the_distribution():
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    sampler = sampling.make_sampler(sampling.SamplingParams(temp=1.0), key=mx.random.key(3))
    drawn = np.array(mx.concatenate([sampler(mx.repeat(logprobs, 500, axis=0)) for _ in range(4)]))
    assert np.abs(np.bincount(drawn, minlength=4) / 2000 - [0.5, 0.3, 0.15, 0.05]).max() < 0.04


# The command.


@pytest.mark.parametrize("flags", [(), ("--kv-bits", "8"), ("--max-kv-size", "16")], ids=str)
def test_the_generate_command(flags):
    command = [sys.executable, "-m", "mlx_openelm", "generate", "--prompt", "To be, or not to be", "--max-tokens", "24",
               "--temp", "0.8", "--seed", "7", "--json", *flags]  # fmt: skip
    texts = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(done.stdout)["text"])
    assert texts[0] == texts[1] and len(texts[0]) > 24
