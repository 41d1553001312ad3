"""The whole benchmark: from a model's name to what was measured."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ... import backend
from ...errors import RequestError
from ...evaluation import bandwidth
from ...loading import check_dtype, draft_name
from ...sources import open_source
from .options import BenchOptions
from .processes import programs
from .prompts import random_prompts, text_prompts
from .turns import Measured, Progress, measure

if TYPE_CHECKING:  # most models are loaded without adapters
    from ...adapters.switching import AdapterPaths


def bench(
    model: str | Path,
    options: BenchOptions | None = None,
    *,
    adapter_path: AdapterPaths | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    expand: bool | None = None,
    exact_activations: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """Time a model, in a process for each program; the programs take turns.

    Ctrl-C ends the measurement; the result has what was measured by then, and says that it was interrupted.

    Args:
        adapter_path, dtype, tokenizer, config_yaml, revision, expand, exact_activations: as in `load`.
        progress: called with the runs done so far and in all.

    Raises:
        RequestError: a bad value, a model that cannot be loaded, more tokens than it has positions for, or mlx-lm is
            not installed.
        OpenELMError: a program failed.
        KeyboardInterrupt: Ctrl-C, before there was a result.
    """
    options = options or BenchOptions()
    options.validate()
    check_dtype(model, dtype)
    # Downloads what is missing.
    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    config, sizes = source.checkpoint.config, options.sizes()
    options.validate(config.vocab_size, config.head_dim)
    for size in sizes:
        positions = size.prompt + size.generated - 1
        if positions > config.rope_max_length:
            raise RequestError(
                f"A prompt of {size.prompt} tokens and {size.generated} new ones need {positions} positions; "
                f"the model has {config.rope_max_length}."
            )
    if (warning := backend.slow_cpu_warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    loading = {
        "adapter_path": adapter_path,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "config_yaml": config_yaml,
        "revision": revision,
        "expand": expand,
        "exact_activations": exact_activations,
    }
    draft = None if options.draft_model is None else open_source(draft_name(options.draft_model, model, config))
    if options.drafts:
        make_prompts = partial(text_prompts, tokenizer=source.tokenizer)
    else:
        make_prompts = partial(random_prompts, vocab_size=config.vocab_size)
    with programs(source, draft, options, loading) as started:
        measured = Measured(started, sizes, options.max_kv_size)
        try:
            measure(measured, options, make_prompts, copy=bandwidth.copier(), progress=progress)
        except KeyboardInterrupt:
            if not measured.complete:
                raise
            measured.interrupted = True
        return measured
