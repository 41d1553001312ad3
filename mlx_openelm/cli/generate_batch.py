"""`mlx-openelm generate --batch FILE`: many prompts at once, and a line of JSON for each on standard output."""

from __future__ import annotations

import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Iterator
from contextlib import nullcontext, redirect_stdout
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, TextIO

import mlx.core as mx

from .. import backend, console
from ..adapters.pool import AdapterPool
from ..errors import OpenELMError, RequestError, quote
from ..generation.drafting import DraftCounts
from ..generation.engine import MAX_ROWS, Engine
from ..generation.options import GenerationOptions
from ..generation.row import Row
from ..generation.sampling import random_seed
from ..hub import catalog
from ..inputs import check_characters, kind_of, read_stream, read_text_source, split_lines, to_path
from ..loading import load
from ..text.tokenizer import Tokenizer
from ..wording import counted, did_you_mean, flag, size
from . import flags
from .chat_prompts import check_no_chat, encode_prompt
from .drafts import as_json, as_text, load_draft_model
from .terminal import show

_OPTIONS = tuple(field.name for field in fields(GenerationOptions))
_KEYS = ("prompt", "adapter_path", *_OPTIONS)


@dataclass
class _Line:
    """A prompt of the file: where it is, its text, and the options of its own."""

    place: str
    prompt: str
    options: dict[str, Any]


def run_batch(args: Namespace) -> int:
    """Print a JSON object a line for each prompt of `--batch`, in their order, as soon as it is there."""
    _check_flags(args)
    lines = _read_lines(args.batch)
    defaults = flags.given(args, GenerationOptions)
    cached = None
    if args.prompt_cache_file is not None:
        from .cached_prompt import open_cached

        cached = open_cached(args)
        _check_adapters(lines, args.prompt_cache_file)
    # The keys and values of a file are those of one adapter, which then all texts have.
    shared, adapter = (None, args.adapter_path) if cached is None else (args.adapter_path, None)
    args.model = args.model or catalog.TINY
    model, tokenizer = load(
        args.model,
        shared,
        args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        revision=args.revision,
        expand=args.expand,
        exact_activations=args.exact_activations,
    )
    draft_model = None
    if args.draft_model is not None:
        draft_model = load_draft_model(args, model, tokenizer)
    for token in args.extra_eos_token or ():
        tokenizer.add_eos_token(token)
    if cached is not None:
        cached.check(model, args)
    named = adapter is not None or any(line.options.get("adapter_path") is not None for line in lines)
    engine = Engine(
        model,
        tokenizer,
        max_rows=MAX_ROWS if args.max_rows is None else args.max_rows,
        max_bytes=args.memory_limit,
        draft_model=draft_model,
        adapters=AdapterPool(model) if named else None,
        prompts_first=True,
    )
    rows, seeds = [], []
    for line in lines:
        options = defaults | {"adapter_path": adapter} | line.options
        chosen_adapter = options.pop("adapter_path")
        seed = options.get("seed")
        if seed is None and _samples(options):
            seed = options["seed"] = random_seed()
        try:
            if cached is None:
                ids, past = encode_prompt(tokenizer, line.prompt, args), {}
            else:
                ids, past = cached.continue_with(tokenizer, line.prompt, args), cached.arguments()
                past["prompt_cache"] = [copy(layer) for layer in cached.cache]
            rows.append(engine.submit(ids, adapter=chosen_adapter, **past, **options))
            rows[-1].warns = False  # `_generate` does, and names the line
        except OpenELMError as error:
            raise type(error)(f"{line.place}: {_naming_keys(str(error), line.options)}") from None
        seeds.append(seed if _samples(options) else None)
    return _generate(engine, lines, rows, seeds, args)


def _naming_keys(message: str, keys: Collection[str]) -> str:
    """A message that names these keys of a line as the file has them, not as flags."""
    for key in keys:
        message = re.sub(rf"{flag(key)}(?![\w-])", key, message)
    return message


def _check_adapters(lines: list[_Line], cache_file: str) -> None:
    """Raise a `RequestError` if a line names an adapter, which cannot go on from the keys and values in a file."""
    for line in lines:
        if "adapter_path" in line.options:
            raise RequestError(
                f"{line.place} has an adapter_path, and {cache_file} was made for one adapter, or none; leave it out."
            )


def _check_flags(args: Namespace) -> None:
    """Raise a `RequestError` if flags do not go together."""
    if args.words or args.prompt is not None or args.prompt_file is not None:
        raise RequestError("Give the prompts once: with --batch, or one as the argument, --prompt or --prompt-file.")
    if args.ignore_chat_template:
        check_no_chat(args)


def _samples(options: dict[str, Any]) -> bool:
    temp = options.get("temp", 0)
    return isinstance(temp, int | float) and temp > 0


def _read_lines(name: str) -> list[_Line]:
    """The prompts of a file or of standard input; blank lines count only in the numbers of lines.

    Raises:
        RequestError: no prompts, not UTF-8, or a line that is not right.
    """
    is_stdin = name == "-"
    source = "Standard input" if is_stdin else name
    data = read_stream(sys.stdin.buffer, source) if is_stdin else read_text_source(to_path(name))
    try:
        texts = split_lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{source} is not UTF-8 text (byte {error.start}).") from None
    numbered = [(n, text) for n, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise RequestError(f"{source} has no prompts; write one on each line.")
    is_json = name.lower().endswith((".jsonl", ".ndjson")) or (is_stdin and numbered[0][1].startswith("{"))
    places = [f"{source}:{n}" for n, _ in numbered]
    if not is_json:
        return [_Line(place, text, {}) for place, (_, text) in zip(places, numbered, strict=True)]
    return [_parse(place, text) for place, (_, text) in zip(places, numbered, strict=True)]


def _parse(place: str, text: str) -> _Line:
    """A line of JSON."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise RequestError(f"{place} must be a JSON object, not {kind_of(values)}.")
    for key in values:
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS)
            raise RequestError(f"{place} has an unknown key, {quote(key)}{hint and f'; {hint}'}")
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt:
        raise RequestError(f"{place} needs a text as its prompt.")
    check_characters(f"{place}: prompt", prompt)
    biases = values.get("logit_bias")
    if isinstance(biases, dict):  # keys of JSON are texts
        values["logit_bias"] = {int(key) if key.isdecimal() else key: bias for key, bias in biases.items()}
    return _Line(place, prompt, values)


def _generate(engine: Engine, lines: list[_Line], rows: list[Row], seeds: list[int | None], args: Namespace) -> int:
    """Run the engine, and print each result once those before it are printed."""
    expected = engine.expected_memory
    mx.reset_peak_memory()
    started = time.perf_counter()
    stdout = sys.stdout
    # On a terminal the results themselves show how far it is.
    progress = None if stdout.isatty() else console.Progress("Generating", unit="texts")
    printed, interrupted = 0, False
    try:
        with progress or nullcontext(), backend.wired_limit():
            while engine.is_busy:
                engine.step()
                for row in _next(rows, printed):
                    _print(stdout, _result(engine.tokenizer, lines[printed].prompt, row, seeds[printed], args))
                    row.warn_if_cut(lines[printed].place)
                    printed += 1
                if progress is not None:
                    progress(sum(row.is_done for row in rows), len(rows))
    except KeyboardInterrupt:
        interrupted = True
    if args.verbose:
        _say_statistics(rows, time.perf_counter() - started, expected)
    failed = [(line, row) for line, row in zip(lines, rows, strict=True) if row.error is not None]
    for line, row in failed:
        show(f"error: {line.place}: {row.error}")
    return 130 if interrupted else int(bool(failed))


def _next(rows: list[Row], start: int) -> Iterator[Row]:
    """The rows from `start` on up to the first one that is not done."""
    for row in rows[start:]:
        if not row.is_done:
            return
        yield row


def _print(stdout: TextIO, values: dict[str, Any]) -> None:
    with redirect_stdout(stdout):  # a progress bar takes what is printed for its own terminal
        console.print_json(values)
        stdout.flush()


def _result(tokenizer: Tokenizer, prompt: str, row: Row, seed: int | None, args: Namespace) -> dict[str, Any]:
    """What is printed of a text."""
    values: dict[str, Any] = {"prompt": prompt, "text": row.text, "finish_reason": row.finish_reason}
    if row.error is not None:
        values["error"] = str(row.error)
    values |= {"prompt_tokens": len(row.request.prompt), "generation_tokens": len(row.tokens)}
    if seed is not None:
        values["seed"] = seed
    if row.drafts is not None:
        values["drafts"] = as_json(row.drafts)
    if args.logprobs or row.request.options.top_logprobs:
        values["tokens"] = row.tokens
        values["token_texts"] = [tokenizer.id_to_token(token) for token in row.tokens]
        values["logprobs"] = row.logprobs
    if row.request.options.top_logprobs:
        values["top_logprobs"] = [[list(pair) for pair in pairs] for pairs in row.top_logprobs]
    return values


def _say_statistics(rows: list[Row], seconds: float, expected: int) -> None:
    done = sum(row.finish_reason is not None for row in rows)
    tokens = sum(len(row.tokens) for row in rows)
    speed = tokens / max(seconds, 1e-9)
    console.say(f"Texts: {done:,} of {len(rows):,}, {counted(tokens, 'token')}, {speed:.1f} tokens/s")
    if drafts := [row.drafts for row in rows if row.drafts is not None]:
        console.say(f"Drafts: {as_text(DraftCounts.sum(drafts))}")
    console.say(f"Peak memory: {size(mx.get_peak_memory())}; expected: {size(expected)} at most")
