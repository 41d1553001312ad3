"""Generated texts beside lone runs over the same tokens, for tests of batches on a GPU.

A GPU sums in another order for another number of rows, so where two tokens are about equally likely a batch may choose
the other one, and from there on its text is another one. So each token is compared with what a lone run over the tokens
before it gives, on the GPU and, in float32, on the CPU.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

from mlx_openelm import GenerationResult, OpenELM, Tokenizer, load
from mlx_openelm.generation.decoding import Decoder, Request
from mlx_openelm.generation.row import Row
from mlx_openelm.generation.sampling import TextSampler

import mlx.core as mx
import numpy as np
import pytest
from decoding_models import make_model
from gpu_devices import SHAKESPEARE, computed, needs_real_gpu, on
from test_engine import PLAY

# The largest error of a log-probability, in nats; with packed weights MLX's kernels sum in bfloat16.
ERROR = {"float32": 0.1, "bfloat16": 0.2, "4 bits": 0.6}
# The least part of drawn tokens that are the same in spite of these errors; of unrelated draws few are.
SAME = 0.5
TOKENIZER = Tokenizer.from_folder(SHAKESPEARE, eos_token_ids=())  # without an end of texts: they have their full length


class Subject(NamedTuple):
    """A model, the same weights in float32 for the CPU, and the largest error of a log-probability."""

    model: OpenELM
    exact: OpenELM
    error: float

    def prompt(self, length: int, start: int = 0) -> list[int]:
        """Ids of a play, or as good as random ones if the model has fewer tokens."""
        ids = TOKENIZER.encode(PLAY * 9)[start : start + length]
        assert len(ids) == length
        return [token % self.model.config.vocab_size for token in ids]


def plays(dtype: str = "float32", adapter: Path | None = None) -> Subject:
    """Shakespeare's plays; the CPU's model alone gets the adapter."""
    with on("cpu"):
        exact, _ = load(SHAKESPEARE, adapter, dtype="float32")
    return Subject(load(SHAKESPEARE, dtype=dtype)[0], exact, ERROR[dtype])


def wide(dtype: mx.Dtype, packing: tuple[int, int] | None = None) -> Subject:
    """Random weights, of sizes for which MLX has a kernel for attention of one position, and we have one of a token."""
    model = make_model(dtype, [packing], 64)
    mx.eval(model.parameters())
    with on("cpu"):
        exact = copy.deepcopy(model)
        exact.set_dtype(mx.float32)
        mx.eval(exact.parameters())
    return Subject(model, exact, ERROR[str(dtype).removeprefix("mlx.core.") if packing is None else "4 bits"])


each_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_real_gpu)])
each_subject = pytest.mark.parametrize(
    "make",
    [
        pytest.param(plays, id="plays"),
        pytest.param(lambda: wide(mx.bfloat16), id="bfloat16", marks=needs_real_gpu),
        pytest.param(lambda: wide(mx.float32), id="float32", marks=needs_real_gpu),
        pytest.param(lambda: wide(mx.bfloat16, (4, 64)), id="4 bits", marks=needs_real_gpu),
    ],
)


def lone(model: OpenELM, request: Request, tokens: list[int]) -> mx.array:
    """The log-probabilities [n, vocab] from which a lone run chooses each of these tokens."""
    decoder = Decoder(model, options=request.options, logits_processors=request.decoder.logits_processors)
    parts = [decoder.prefill(mx.array([request.prompt]), request.options.prefill_step_size)]
    for token in tokens[:-1]:
        parts.append(decoder.step(mx.array([token])))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def check(text: Row | GenerationResult, subject: Subject, request: Request | None = None, draws: bool = True) -> None:
    """Compare a text's tokens and log-probabilities with lone runs.

    Args:
        request: of a result, which has none.
        draws: whether drawn tokens are compared: those after drafts that were drawn have other keys.
    """
    if isinstance(text, Row):
        assert text.error is None, text.error
        request = text.request
    assert request is not None
    assert len(text.tokens) == len(text.logprobs) == request.count and text.finish_reason == "length"
    models = {"gpu": subject.model, "cpu": subject.exact}
    if isinstance(text, Row) and text.adapter is not None:
        del models["gpu"]  # it has no adapter
    for device, model in models.items():
        expected = computed(device, lone, model, request, text.tokens)
        chosen = expected[np.arange(request.count), text.tokens]
        assert np.abs(text.logprobs - chosen).max() < subject.error
        for listed, row in zip(text.top_logprobs, expected, strict=False):
            best = np.sort(row)[::-1][: len(listed)]
            assert np.abs([logprob for _, logprob in listed] - best).max(initial=0) < subject.error
        sampler = request.sampler
        if not isinstance(sampler, TextSampler):
            assert (expected.max(axis=1) - chosen).max() < 2 * subject.error
        elif draws:
            drawn = computed(device, lambda rows=expected, one=sampler: one.tokens(mx.array(rows), 0))
            assert (drawn == text.tokens).mean() >= SAME
