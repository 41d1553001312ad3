"""`mlx-openelm generate`: text to standard output as it comes, statistics to standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from ..errors import RequestError, quote
from ..generation.sampling import random_seed
from ..generation.stream import GenerationOptions, Piece, stream_generate
from ..hub import catalog
from ..inputs import read_stream, read_text_source, to_path
from ..loading import load
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from . import console, flags


@flags.of_dataclass(GenerationOptions, flags.GENERATION)
def run(
    model: flags.Model = catalog.TINY,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to go on from; - reads standard input.")
    ] = None,
    prompt_file: Annotated[str | None, typer.Option(help="Read the prompt from a file.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="A system message for the chat template.")] = None,
    prefill_response: Annotated[
        str | None, typer.Option(help="How the response begins; what is printed goes on from there.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="plain (the default), corenet, or a jinja file.", metavar="plain|corenet|FILE")
    ] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Use the prompt as it is, without a template.")
    ] = False,
    extra_eos_token: Annotated[
        list[str] | None, typer.Option(help="A token, or its id, that ends the text too; repeatable.")
    ] = None,
    adapter_path: flags.AdapterPath = None,
    tokenizer: flags.Tokenizer = None,
    revision: flags.Revision = None,
    dtype: flags.Dtype = None,
    expand: flags.Expand = None,
    exact_activations: flags.ExactActivations = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Show each token's log-probability after the text, or in the JSON.")
    ] = False,
    as_json: flags.Json = False,
    verbose: Annotated[bool, typer.Option(help="Print statistics to standard error after the text.")] = True,
    debug: flags.Debug = False,
    **options: Any,
) -> None:
    """Print text that follows a prompt.

    The text goes to standard output, everything else to standard error. A prompt that is read from a file or
    from standard input loses the line break at its end.
    """
    if ignore_chat_template and (system_prompt, prefill_response, chat_template) != (None, None, None):
        raise RequestError(
            "--ignore-chat-template cannot be combined with --system-prompt, --prefill-response or --chat-template."
        )
    text = _read_prompt(prompt, prompt_file)
    options |= {"stop": options["stop"] or (), "logit_bias": _parse_logit_bias(options["logit_bias"])}
    if options["seed"] is None and options["temp"] > 0:
        options["seed"] = random_seed()
    loaded, its_tokenizer = load(
        model,
        adapter_path or None,
        dtype,
        tokenizer=tokenizer,
        revision=revision,
        expand=expand,
        exact_activations=exact_activations,
    )
    for token in extra_eos_token or ():
        its_tokenizer.add_eos_token(token)
    ids = _encode(
        its_tokenizer, text, system_prompt, prefill_response, None if ignore_chat_template else chat_template or "plain"
    )

    pieces, interrupted = _generate(loaded, its_tokenizer, ids, options, show=not as_json)
    if as_json:
        _print_result(model, text, pieces, its_tokenizer if logprobs else None, options["seed"], interrupted)
    else:
        print()
        if logprobs:
            _say_logprobs(its_tokenizer, pieces)
        if verbose:
            _say_statistics(loaded, pieces, options["seed"])
    if interrupted:
        raise typer.Exit(130)


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from the argument, the file, or standard input."""
    if prompt is not None and prompt_file is not None:
        raise RequestError("Give either --prompt or --prompt-file.")
    if prompt_file is not None:
        text = _decode(read_text_source(to_path(prompt_file)), prompt_file)
    elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        text = _decode(read_stream(sys.stdin.buffer, "Standard input"), "Standard input")
    elif prompt is None:
        raise RequestError('There is no prompt; give one with --prompt "...", --prompt-file, or on standard input.')
    else:
        text = prompt
    if not text:
        raise RequestError("The prompt is empty; give some text with --prompt.")
    return text


def _decode(data: bytes, source: str) -> str:
    """UTF-8 text without the line break that editors and `echo` put at its end."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{source} is not UTF-8 text; give the prompt in UTF-8.") from None
    return text.removesuffix("\n").removesuffix("\r")


def _parse_logit_bias(given: list[str] | None) -> dict[int, float] | None:
    """`ID=VALUE`, several of them, or JSON objects, as one mapping."""
    biases: dict[int, float] = {}
    for text in given or ():
        try:
            pairs = json.loads(text).items() if text.lstrip().startswith("{") else [text.split("=", 1)]
            biases.update({int(token): float(value) for token, value in pairs})
        except (ValueError, TypeError, AttributeError):
            raise RequestError(
                f"--logit-bias must be ID=VALUE or a JSON object of token ids and numbers, got {quote(text)}."
            ) from None
    return biases or None


def _encode(
    tokenizer: Tokenizer, prompt: str, system_prompt: str | None, prefill: str | None, template: str | None
) -> list[int]:
    """The ids of the conversation in this template, or of the prompt alone without one; BOS comes first."""
    if template is None:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    return tokenizer.apply_chat_template(messages, template, continue_final_message=prefill is not None)


def _generate(
    model: OpenELM, tokenizer: Tokenizer, ids: list[int], options: dict[str, Any], *, show: bool
) -> tuple[list[Piece], bool]:
    """The pieces, their text printed as it comes, and whether Ctrl-C ended them."""
    pieces: list[Piece] = []
    with console.Progress("Reading the prompt", unit="tokens", lines=False) as progress:
        try:
            for piece in stream_generate(model, tokenizer, ids, progress=progress, **options):
                pieces.append(piece)
                if show:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            return pieces, True
    return pieces, False


def _print_result(
    model: str, prompt: str, pieces: list[Piece], tokenizer: Tokenizer | None, seed: int | None, interrupted: bool
) -> None:
    """The JSON object; with a tokenizer also tokens and log-probabilities."""
    values: dict[str, Any] = {"model": model, "prompt": prompt, "text": "".join(piece.text for piece in pieces)}
    if pieces:
        last = dataclasses.asdict(pieces[-1])
        names = ["prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "peak_memory"]
        values |= {"finish_reason": last["finish_reason"]} | {name: last[name] for name in names}
    if interrupted:
        values["finish_reason"] = "interrupted"
    values["seed"] = seed
    if tokenizer is not None:
        values["tokens"] = [piece.token for piece in pieces]
        values["token_texts"] = [tokenizer.id_to_token(piece.token) for piece in pieces]
        values["logprobs"] = [piece.logprob for piece in pieces]
    console.print_json(values)


def _say_logprobs(tokenizer: Tokenizer, pieces: list[Piece]) -> None:
    console.say("  token   logprob  text")
    for piece in pieces:
        console.say(f"{piece.token:7d}  {piece.logprob:8.4f}  {tokenizer.id_to_token(piece.token)!r}")


def _say_statistics(model: OpenELM, pieces: list[Piece], seed: int | None) -> None:
    if model.quantization and model.expanded:
        bits = sorted({choice.bits for choice in model.quantization.values()})
        console.say(
            f"Weights: {' and '.join(map(str, bits))} bits, expanded at load since that is faster on a CPU; "
            "--no-expand saves memory"
        )
    if pieces:
        last = pieces[-1]
        console.say(f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.1f} tokens/s")
        speed = f", {last.generation_tps:.1f} tokens/s" if last.generation_tokens > 1 else ""
        console.say(f"Generation: {last.generation_tokens} tokens{speed}")
        console.say(f"Peak memory: {last.peak_memory:.3f} GB")
    if seed is not None:
        console.say(f"Seed: {seed}")
