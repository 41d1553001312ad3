"""`mlx-openelm perplexity`: how well a model predicts a text, and how far it is from another model."""

from __future__ import annotations

import random
import warnings
from typing import Annotated, Any

import typer

from ..config import ModelConfig
from ..errors import RequestError
from ..evaluation.perplexity import kl_divergence, load_documents, make_windows, mean_nll
from ..hub import catalog
from ..inputs import to_path
from ..loading import load
from . import console, flags


def run(
    data: Annotated[str, typer.Option("--data", help="A text file, or a .jsonl file with `text` on every line.")],
    model: flags.Model = catalog.TINY,
    adapter_path: flags.AdapterPath = None,
    reference_model: Annotated[
        str | None, typer.Option(help="Also give the KL divergence from this model, in nats a token.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a window; by default 512, or the model's context if that is shorter.")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="How many windows, drawn at random; by default, and with -1, all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed draws the same windows.")] = 0,
    tokenizer: flags.Tokenizer = None,
    revision: flags.Revision = None,
    dtype: flags.Dtype = None,
    expand: flags.Expand = None,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> None:
    """Measure how well a model predicts a text.

    The text is cut into windows, each read from its beginning. The loss is the mean over tokens, in nats.
    """
    documents = load_documents(to_path(data))
    loaded, its_tokenizer = load(
        model,
        adapter_path or None,
        dtype,
        tokenizer=tokenizer,
        revision=revision,
        expand=expand,
        exact_activations=True,
    )
    length = _checked_length(sequence_length, loaded.config)
    windows = _sample(make_windows(its_tokenizer, documents, length), num_samples, seed)
    with console.Progress("Measuring", unit="windows") as progress:
        measured = mean_nll(loaded, windows, batch_size=batch_size, progress=progress)
    values: dict[str, Any] = {
        "model": model,
        "data": data,
        "sequence_length": length,
        "windows": len(windows),
        "tokens": measured.tokens,
        "nll": measured.nll,
        "standard_error": measured.standard_error,
        "perplexity": measured.perplexity,
    }
    if reference_model is not None:
        reference, _ = load(reference_model, dtype=dtype, tokenizer=tokenizer, expand=expand, exact_activations=True)
        with console.Progress("Comparing", unit="windows") as progress:
            divergence = kl_divergence(reference, loaded, windows, batch_size=batch_size, progress=progress)
        values |= {"reference_model": reference_model, "kl_divergence": divergence}
    if as_json:
        console.print_json(values)
        return
    print(f"Perplexity: {measured.perplexity:.4f}")
    print(f"Loss: {measured.nll:.4f} ± {measured.standard_error:.4f} nats a token")
    if reference_model is not None:
        print(f"KL divergence from {reference_model}: {values['kl_divergence']:.6f} nats a token")
    print(f"Measured on {measured.tokens:,} tokens: {len(windows):,} windows of {length}")


def _checked_length(length: int | None, config: ModelConfig) -> int:
    """The default, or what was asked for, if the model's positions reach that far."""
    if length is None:
        return min(512, config.max_context_length)
    if not 1 <= length <= config.rope_max_length:
        raise RequestError(f"--sequence-length must be from 1 to {config.rope_max_length}, got {length}.")
    if length > config.max_context_length:
        warnings.warn(
            f"--sequence-length {length} is more than the {config.max_context_length} tokens "
            "the model was trained on; expect a higher perplexity.",
            stacklevel=1,
        )
    return length


def _sample(windows: list[list[int]], count: int | None, seed: int) -> list[list[int]]:
    """`count` of the windows, in their order; None and -1 mean all."""
    if count is None or count == -1:
        return windows
    if count < 1:
        raise RequestError(f"--num-samples must be 1 or more, or -1 for all, got {count}.")
    chosen = random.Random(seed).sample(range(len(windows)), min(count, len(windows)))
    return [windows[index] for index in sorted(chosen)]
