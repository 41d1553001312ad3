"""Flags that more than one command has, and flags made from a dataclass, whose names and defaults they take."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, get_type_hints

import typer

_debug = False


def debugging() -> bool:
    """Whether `--debug` was given, before or after the command's name."""
    return _debug


def _set_debug(wanted: bool) -> None:
    global _debug
    _debug = _debug or wanted


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True)
]
Model = Annotated[
    str,
    typer.Option(
        "--model", help="A name (270m, 1.1b-instruct, tiny), a hub repository, a folder, a .pt or .gguf file."
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="A tokenizer file or folder, in place of the model's own.")
]
ConfigYaml = Annotated[
    str | None,
    typer.Option(
        "--config-yaml", help="The training configuration of a CoreNet checkpoint; published sizes need none."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is to be written if it exists.")]
Revision = Annotated[str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Compute in float32, float16 or bfloat16, not in what suits the device."),
]
Expand = Annotated[
    bool | None,
    typer.Option(
        "--expand/--no-expand",
        help="Unpack quantized weights at load, or keep them packed; by default unpacked only on a CPU, "
        "while memory allows.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# The help of every field of GenerationOptions, in the order `--help` shows them.
GENERATION = {
    "max_tokens": "How many tokens at most; -1 goes on to the end of the context.",
    "temp": "Sampling temperature; 0 takes the most likely token.",
    "top_p": "Sample from the most likely tokens that hold this much probability; 0 or 1 is off.",
    "top_k": "Sample from this many of the most likely tokens; 0 is off.",
    "min_p": "Sample from tokens at least this likely relative to the most likely one; 0 is off.",
    "min_tokens_to_keep": "The fewest tokens --min-p leaves.",
    "xtc_probability": "How often to drop the most likely tokens (XTC).",
    "xtc_threshold": "How likely a token must be for XTC to drop it.",
    "repetition_penalty": "Make tokens of the context less likely; Apple suggests 1.2.",
    "repetition_context_size": "How many of the last tokens that looks at; by default all.",
    "presence_penalty": "Lower the logits of tokens in the context by this, once each.",
    "presence_context_size": "How many of the last tokens that looks at; by default all.",
    "frequency_penalty": "Lower the logits of tokens in the context by this, each time they occur.",
    "frequency_context_size": "How many of the last tokens that looks at; by default all.",
    "logit_bias": "Add to a token's logit: ID=VALUE, repeatable, or a JSON object. -inf bans the token.",
    "seed": "The same seed gives the same text; without one, one is drawn.",
    "stop": "End before this text; repeatable.",
    "prefill_step_size": "Prompt tokens processed at a time; by default what suits the device.",
    "max_kv_size": "Remember at most this many tokens, the first 4 and the latest.",
    "kv_bits": "Keep keys and values in 2, 3, 4, 5, 6 or 8 bits.",
    "kv_group_size": "How many of them share a scale.",
    "quantized_kv_start": "Keep them in fewer bits from this token on.",
}
# The help of every field of UploadOptions.
UPLOAD = {
    "upload_repo": "The hub repository to upload to, as owner/name; made if it does not exist.",
    "private": "Make the repository private.",
    "upload_revision": "The branch to upload to; made if it does not exist.  [default: main]",
    "commit_message": "The commit's message.",
    "dry_run": "Show what would be uploaded; send nothing, ask nobody.",
}
# The help of every field of QuantizeOptions.
QUANTIZE = {
    "q_bits": "Bits per weight; affine: 4 unless told.",
    "q_group_size": "Weights that share a scale; affine: 64 unless told.",
    "q_mode": "affine, mxfp4, nvfp4 or mxfp8.",
    "recipe": "More bits where they matter: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.",
    "target_bpw": "At most this many bits per weight, given to the matrices that need them most.",
    "method": "Learn from text how to round: awq, gptq, dwq, or several with commas.",
    "calibration": "That text: a text file, or .jsonl with `text` on every line; by default one is bundled.",
    "num_samples": "Windows of that text.",
    "sequence_length": "Tokens a window.",
    "sensitivities": "What matrices cost, as an earlier --target-bpw saved it, in place of measuring.",
    "seed": "The same seed picks the same windows, and gives the same model.",
    "report": "Compare with other bits, modes and recipes on text that is kept for it.",
    "report_data": "Compare on this text file or .jsonl instead.",
}
_SHORT = {"max_tokens": ("-m",)}
# `--quant-predicate` is mlx-lm's name.
_ALSO = {"recipe": ("--quant-predicate",)}
_REPEATABLE = ("stop", "logit_bias", "method")


def of_dataclass(options: type, help: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**options` one flag a field, with the field's name, type and default."""
    hints = get_type_hints(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}

    def parameter(name: str) -> inspect.Parameter:
        declaration = typer.Option(
            f"--{name.replace('_', '-')}", *_SHORT.get(name, ()), *_ALSO.get(name, ()), help=help[name]
        )
        kind, default = (list[str] | None, None) if name in _REPEATABLE else (hints[name], defaults[name])
        annotation = Annotated[kind, declaration]  # type: ignore[valid-type]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*keywords, *map(parameter, help)]
        )
        return command

    return decorate
