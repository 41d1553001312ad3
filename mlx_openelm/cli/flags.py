"""Flags that more than one command has, and flags made from a dataclass, whose names and defaults they take."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, get_type_hints

import typer

from .. import wording

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
AdapterPath = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter-path",
        help="An adapter: a folder, a file, a hub repository, or corenet:270M/lora; repeatable, and with PATH=WEIGHT, "
        "to mix LoRA adapters.",
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
        help="Unpack quantized weights at load, or keep them packed; by default unpacked only on a CPU without our "
        "kernels, while memory allows.",
    ),
]
ExactActivations = Annotated[
    bool,
    typer.Option(
        "--exact-activations",
        help="On a CPU, multiply quantized weights with activations as they are; by default those are rounded to 8 "
        "bits where weights have 6 or less.",
    ),
]
# How a command that packs on the side is told to; `quantize` has these and more as fields of QuantizeOptions.
QBits = Annotated[int | None, typer.Option(help="Bits per weight; affine: 4 unless told.")]
QGroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale; affine: 64 unless told.")]
QMode = Annotated[str, typer.Option(help="affine, mxfp4, nvfp4 or mxfp8.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "--quant-predicate",
        help="With -q, more bits where they matter: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.",
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
# The help of every field of FineTuneOptions, in the order `--help` shows them.
FINE_TUNE = {
    "data": "A folder with train, valid and test files (.jsonl, .json, .parquet), one file, or a data set on the hub.",
    "train": "Train.",
    "test": "Measure the perplexity on the test examples, after training or of the adapter in --adapter-path.",
    "adapter_path": "The folder for the adapter and all that belongs to the run.",
    "fine_tune_type": "lora, dora or full.",
    "num_layers": "Train the last so many layers; -1 is all.",
    "target_modules": "What gets an adapter, or with full is trained: token_embeddings, qkv_proj, out_proj, proj_1, "
    "proj_2; repeatable, or with commas; by default the last four, with full everything.",
    "rank": "The rank of an adapter's matrices.",
    "alpha": "Multiply an adapter's change by alpha / rank.",
    "scale": "Multiply it by this instead; 20 unless told, as in mlx-lm.",
    "use_rslora": "Divide --alpha by the root of the rank (rsLoRA).",
    "dropout": "The share of its input that an adapter does not see, in training.",
    "iters": "How many updates of the weights.",
    "epochs": "Train so many times over the data, in place of --iters.",
    "batch_size": "Examples a batch.",
    "grad_accumulation_steps": "Batches an update.",
    "max_seq_length": "Positions an example takes; what is longer is cut.",
    "long_examples": "truncate what is longer, or refuse it.",
    "packing": "Fill rows with several examples, which do not see one another.",
    "mask_prompt": "Learn completions and assistants' turns alone, not prompts.",
    "valid_fraction": "How much is held out for validation where there is no valid file; 0 is nothing.",
    "optimizer": "adam, adamw, sgd, lion, adafactor or muon.",
    "learning_rate": "The learning rate, after the warm-up.",
    "lr_schedule": "constant, cosine or linear.",
    "min_learning_rate": "Where cosine and linear schedules end.",
    "decay_steps": "How many steps they take to get there; by default all that are left.",
    "warmup": "Raise the learning rate over so many steps at first.",
    "warmup_init": "From this learning rate.",
    "weight_decay": "Weight decay, of matrices alone.",
    "beta1": "The optimizer's first momentum.",
    "beta2": "Its second.",
    "eps": "What keeps it from dividing by zero.",
    "momentum": "Momentum of sgd and muon.",
    "bias_correction": "Let Adam make up for its momenta's start at zero.",
    "max_grad_norm": "Scale gradients down to this norm.",
    "z_loss": "Keep logits small: this times the squared log of their sum; CoreNet takes 1e-4.",
    "label_smoothing": "Give other tokens this share of the probability that is learned.",
    "recompute": "What the backward pass computes again, for less memory and more time: nothing, parts (what takes "
    "little time), layers; auto is parts, and on an NVIDIA GPU what the free memory allows.",
    "grad_checkpoint": "The same as --recompute layers, under mlx-lm's name.",
    "seed": "The same seed gives the same adapter.",
    "steps_per_report": "Report the loss every so many steps.",
    "steps_per_eval": "Validate every so many steps.",
    "val_batches": "On so many batches; -1 is all, 0 no validation.",
    "test_batches": "Test on so many batches; -1 is all.",
    "early_stop": "Stop after so many validations without a new best, which is what is kept.",
    "sample_prompts": "Show how the model goes on from this, before and after; repeatable.",
    "sample_tokens": "With so many tokens.",
    "save_every": "Save a checkpoint every so many steps.",
    "keep_last": "Keep so many of the last checkpoints, and the best.",
    "keep_every": "Keep those of every so many steps too.",
    "resume": "Go on with the run in --adapter-path, exactly; other flags need not be repeated.",
    "resume_adapter_file": "Start from the weights of this adapter.",
    "adapter_format": "mlx, for mlx-lm and here, or peft.",
    "report_to": "Show the numbers in tensorboard, wandb, or both with a comma.",
    "project_name": "The project at Weights & Biases.",
}
_SHORT = {"max_tokens": ("-m",)}
# `--quant-predicate` is mlx-lm's name.
_ALSO = {"recipe": ("--quant-predicate",), "sample_prompts": ("--sample-prompt",)}
_REPEATABLE = ("stop", "logit_bias", "method", "target_modules", "sample_prompts")


def of_dataclass(
    options: type, help: Mapping[str, str], *, may_be_absent: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `**options` one flag a field, with the field's name, type and default.

    Args:
        may_be_absent: the command is given None for a flag that was not typed, so that a configuration file can speak
            first; what is on by default, or in that file, has a `--no-` form.
    """
    hints = get_type_hints(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}

    def parameter(name: str) -> inspect.Parameter:
        kind, default, text = hints[name], defaults[name], help[name]
        flag = wording.flag(name)
        if name in _REPEATABLE:
            kind, default = list[str] | None, None
        elif may_be_absent:
            if kind is bool:
                flag, text = f"{flag}/--no-{flag[2:]}", f"{text}  [default: on]" if default else text
            elif default is not None:
                text = f"{text}  [default: {default}]"
            kind, default = kind | None, None
        declaration = typer.Option(flag, *_SHORT.get(name, ()), *_ALSO.get(name, ()), help=text)
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
