"""The same parity on a GPU, where there is one: Metal's and CUDA's own kernels against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_openelm import load
from mlx_openelm.generation.decoding import CacheOptions, generate_step

import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.skipif(
    not (mx.metal.is_available() or mx.cuda.is_available()), reason="this machine has no GPU that MLX can use"
)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(mx.cpu)


# CUDA multiplies float32 in TF32, whose 10 bits of mantissa show in logits around 10.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.05), ("bfloat16", 0.5)])
@pytest.mark.parametrize("prompt", range(4))
def test_logits_are_the_references(reference, prompt, dtype, tolerance):
    model, _ = load(FIXTURES / "shakespeare-hf", dtype=dtype)
    logits = model(mx.array([reference["ids"][prompt]]))[0].astype(mx.float32)
    assert np.abs(np.array(logits) - reference[f"logits_{prompt}"]).max() < tolerance


def test_quantized_weights_stay_packed_and_give_text(reference):
    model, tokenizer = load("tiny")
    assert not model.expanded
    tokens = [token for token, _ in generate_step(model, reference["ids"][0], max_tokens=48)]
    agreeing = sum(a == b for a, b in zip(tokens, reference["greedy"][0], strict=True))
    assert agreeing >= 8
    assert tokenizer.decode(tokens)


@pytest.mark.parametrize("options", [CacheOptions(kv_bits=8), CacheOptions(max_kv_size=64), CacheOptions()])
def test_pieces_and_caches_do_not_change_the_first_tokens(reference, options):
    model, _ = load(FIXTURES / "shakespeare-hf", dtype="float32")
    steps = generate_step(model, reference["ids"][2], max_tokens=8, options=options, prefill_step_size=5)
    assert [token for token, _ in steps] == reference["greedy"][2][:8]
