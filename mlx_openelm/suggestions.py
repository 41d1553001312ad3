"""What to answer to commands, flags and arguments that are not there: the right name, "not offered yet", or why not.

People who come from mlx-lm, transformers or llama.cpp type the names of those programs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .errors import quote
from .wording import did_you_mean, flag, similar

# Planned commands, other names for them, and what can be done until then.
_LATER_COMMANDS = {
    "classify": "`mlx-openelm --help` lists what there is",
}
_RENAMED_COMMANDS = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "tune", "sft", "qlora", "dora"), "lora"),
    **dict.fromkeys(("complete", "completion", "run", "prompt"), "generate"),
    **{method: f"quantize --method {method}" for method in ("awq", "dwq", "gptq")},
    "dynamic-quant": "quantize --target-bpw",
    **{method: f"dpo --loss-type {method}" for method in ("orpo", "kto", "cpo", "simpo", "ipo")},
    "dapo": "grpo --loss-type dapo",
    "gspo": "grpo --importance-sampling-level sequence",
    "merge": "fuse",
    "gguf": "export --format gguf",
    "ppl": "perplexity",
    **dict.fromkeys(("eval", "lm-eval"), "evaluate"),
    "benchmark": "bench",
    "server": "serve",
    **dict.fromkeys(("embedding", "embeddings"), "embed"),
    "publish": "upload",
    "push": "upload",
    "show": "info",
    **dict.fromkeys(("tokenizer", "tokenize", "spm-train", "tok-train"), "train-tokenizer"),
    "version": "--version",
}
_REFUSED_COMMANDS = {
    "manage": "downloads are in the Hugging Face cache; use the command `hf cache`",
    "share": "copy the folder with scp or rsync",
    "download": "a model is downloaded when it is first used, for example by generate --model 270m",
}

# The names that other programs have for our flags; of several, the first that the command has is meant.
_RENAMED_FLAGS: dict[str, tuple[str, ...]] = {
    "--temperature": ("--temp",),
    "-t": ("--temp",),
    "-n": ("--max-tokens", "--iters", "--num-samples", "--repetitions"),
    **dict.fromkeys(
        ("--max-new-tokens", "--max-length", "--n-predict", "--num-predict", "--num-tokens"),
        ("--max-tokens", "--max-completion-length"),
    ),
    "--tokens": ("--max-tokens",),
    "--repeat-penalty": ("--repetition-penalty",),
    "--repeat-last-n": ("--repetition-context-size",),
    "--system": ("--system-prompt",),
    "--prefix": ("--prefill-response",),
    "--text": ("--prompt",),
    **dict.fromkeys(("--model-draft", "-md", "--assistant-model"), ("--draft-model",)),
    **dict.fromkeys(("--draft", "--draft-max", "--num-assistant-tokens"), ("--num-draft-tokens",)),
    "--prompt-lookup-num-tokens": ("--prompt-lookup",),
    "-f": ("--prompt-file",),
    "--file": ("--prompt-file", "--data"),
    "--eos-token": ("--extra-eos-token",),
    **dict.fromkeys(("--quiet", "--silent"), ("--no-verbose",)),
    "--ctx-size": ("--max-kv-size", "--max-seq-length", "--sequence-length"),
    **dict.fromkeys(("--cache-type-k", "--cache-type-v"), ("--kv-bits",)),
    **dict.fromkeys(
        ("--lora", "--adapter", "--adapters", "--adapter-file", "--peft-model", "--adapter-path", "--lora-modules"),
        ("--adapter-path", "--adapter"),
    ),
    **dict.fromkeys(("--decode-concurrency", "--max-num-seqs", "--parallel", "-np"), ("--max-rows",)),
    "--prompt-cache-size": ("--prompt-cache-bytes",),
    "--api-key": ("--api-key-file",),
    "--served-model-name": ("--model NAME=MODEL",),
    "--alias": ("--model NAME=MODEL",),
    **dict.fromkeys(("--hf-path", "--model-path", "--model-name", "--model-name-or-path", "-m"), ("--model",)),
    **dict.fromkeys(("--tokenizer-path", "--tokenizer-name"), ("--tokenizer",)),
    **dict.fromkeys(("--lr", "--step-size"), ("--learning-rate",)),
    **dict.fromkeys(("--steps", "--max-steps", "--num-iters", "--iterations"), ("--iters", "--repetitions")),
    **dict.fromkeys(("--num-epochs", "--num-train-epochs"), ("--epochs",)),
    **dict.fromkeys(("--lora-rank", "--lora-r", "-r"), ("--rank", "--repetitions")),
    "--num-trials": ("--repetitions",),
    **dict.fromkeys(("--n-prompt", "--input-len"), ("--prompt-tokens",)),
    **dict.fromkeys(("--n-gen", "--output-len"), ("--generation-tokens",)),
    "--lora-alpha": ("--alpha",),
    "--lora-scale": ("--scale",),
    "--lora-dropout": ("--dropout",),
    "--lora-layers": ("--num-layers",),
    "--use-dora": ("--fine-tune-type dora",),
    "--lora-target-modules": ("--target-modules",),
    **dict.fromkeys(("--warmup-steps", "--num-warmup-steps"), ("--warmup",)),
    "--lr-scheduler-type": ("--lr-schedule",),
    "--gradient-accumulation-steps": ("--grad-accumulation-steps",),
    "--gradient-checkpointing": ("--grad-checkpoint",),
    "--per-device-train-batch-size": ("--batch-size",),
    "-b": ("--batch-size",),
    "--save-steps": ("--save-every",),
    "--eval-steps": ("--steps-per-eval",),
    "--logging-steps": ("--steps-per-report",),
    "--wandb": ("--report-to wandb",),
    "--tensorboard": ("--report-to tensorboard",),
    "--bits": ("--q-bits",),
    "--group-size": ("--q-group-size", "--num-generations"),
    **dict.fromkeys(("--reward-functions", "--reward-function"), ("--reward-funcs",)),
    "--mode": ("--q-mode",),
    "--de-quantize": ("--dequantize",),
    "--report-ppl": ("--report",),
    "--data-path": ("--calibration", "--data"),
    "--dataset": ("--data", "--calibration"),
    "--input": ("--data",),
    "--model-prefix": ("--output",),
    "--vocabulary-size": ("--vocab-size",),
    "--max-seq-length": ("--sequence-length",),
    **dict.fromkeys(
        ("-o", "--out", "--output", "--outfile", "--output-dir", "--output-path", "--save-path", "--mlx-path"),
        ("--output", "--mlx-path", "--save-path", "--adapter-path"),
    ),
    "--outtype": ("--gguf-type",),
    "--branch": ("--revision",),
    "--repo-id": ("--upload-repo",),
    **dict.fromkeys(("--shots", "--n-shot", "--fewshot"), ("--num-fewshot",)),
    "--force": ("--overwrite",),
    "-c": ("--config", "--config-yaml"),
    "-v": ("--version", "--verbose"),
}
# Flags that people expect in another command, which has them; asked for after the names above.
_ELSEWHERE = {
    **dict.fromkeys(("--quantize", "-q", "--q-bits", "--q-group-size", "--q-mode", "--dequantize"), "convert"),
    **dict.fromkeys(("--train", "--test", "--iters", "--learning-rate", "--batch-size", "--num-layers"), "lora"),
    **dict.fromkeys(("--mask-prompt", "--fine-tune-type", "--rank", "--grad-checkpoint", "--resume", "--data"), "lora"),
    **dict.fromkeys(("--prompt", "--max-tokens", "--temp", "--top-p", "--top-k", "--min-p", "--stop"), "generate"),
    **dict.fromkeys(("--system-prompt", "--chat-template", "--repetition-penalty"), "generate"),
    **dict.fromkeys(("--num-draft-tokens", "--prompt-lookup"), "generate"),
    "--draft-model": "generate",
    **dict.fromkeys(("--host", "--port", "--allowed-origins", "--prompt-cache-bytes"), "serve"),
    **dict.fromkeys(("--tasks", "--suite", "--num-fewshot", "--num-shots"), "evaluate"),
    "--method": "quantize",
    "--target-bpw": "quantize",
    "--format": "export",
    "--upload-repo": "upload",
    "--vocab-size": "train-tokenizer",
}
_ONE_MACHINE = "a model runs on one machine"
_BITS = "--recipe and --target-bpw choose the bits and groups of single matrices"
_LLAMA = "a tokenizer is trained as Llama's: bpe, byte fallback, single digits, identity normalization"
_DWQ = "--method dwq chooses it itself"
_REFUSED_FLAGS = {
    **dict.fromkeys(("--model-type", "--byte-fallback", "--split-digits", "--normalization-rule-name"), _LLAMA),
    "--do-sample": "text is sampled if --temp is above 0",
    "--image": "OpenELM reads text only",
    "--use-default-chat-template": "--chat-template names the template to use: plain, corenet or a file",
    "--chat-template-config": "write the settings into a template file, for --chat-template",
    "--chat-template-args": "write the settings into a template file, for --chat-template",
    "--quantize-activations": "on a CPU activations are rounded where that is faster, unless --exact-activations is on",
    "-qa": "on a CPU activations are rounded where that is faster, unless --exact-activations is on",
    "--prompt-concurrency": "prompts are processed one after the other, in pieces between the steps of texts",
    "--pipeline": _ONE_MACHINE,
    "--hostfile": _ONE_MACHINE,
    "--device": "MLX takes the GPU if there is one",
    "--num-beams": "text is decoded greedily or sampled, without beams",
    "--clear-cache-threshold": "in Python, call mx.set_cache_limit before finetune",
    "--use-cache": "answers are kept beside --output",
    "--confirm-run-unsafe-code": "tasks that run what a model writes are not offered",
    "--export-gguf": "run `mlx-openelm export --format gguf` on the fused folder",
    "--gguf-path": "run `mlx-openelm export --format gguf` on the fused folder",
    "--quantized-model": "--method dwq starts from --model and quantizes it itself",
    "--target-dir": "dwq's targets are computed while it learns",
    "--targets-only": "dwq's targets are computed while it learns",
    **dict.fromkeys(("--embed-bits", "--embed-group-size", "--fallback-bits", "--fallback-group-size"), _BITS),
    **dict.fromkeys(("--low-bits", "--low-group-size", "--high-bits", "--high-group-size"), _BITS),
    "--n-grid": "awq's grid is fixed",
    "--accumulation-dtype": "the precision of the measurement is fixed",
}
# These belong to `lora`, but mlx-lm's dwq has them too.
_REFUSED_BY_CACHE_PROMPT = {"--eos-token": "no text is generated; give --extra-eos-token to generate"}
_REFUSED_BY_QUANTIZE = dict.fromkeys(("--learning-rate", "--batch-size", "--grad-checkpoint"), _DWQ)

_NOT_NEEDED = {
    "--trust-remote-code": "no repository code is run",
    "--stream": "text is printed as it is generated",
}

# Arguments of mlx-lm's functions that are no flags there.
_REFUSED_KEYWORDS = {
    "lazy": "load reads the weights at once",
    "do_sample": "a temp above 0 samples",
    "stream": "stream_generate yields the text as it is generated",
    "model_config": "the configuration is the model's own",
    "return_config": "the configuration is model.config",
    "quant_predicate": 'recipe="mixed_3_6" and its like give some matrices more bits; a function is not taken',
    "input_embeddings": "a prompt is text or token ids",
    "verbose": "callback and progress report what is done",
    "sampler": "temp, top_p and their like choose tokens; Engine.submit takes a sampler for each text",
    "logits_processors": "logit_bias and penalties change logits; Engine.submit takes processors for each text",
    **dict.fromkeys(
        ("prompt_caches", "return_prompt_caches"), "Engine.submit takes a prompt_cache for each text, and extends it"
    ),
    **dict.fromkeys(("return_token_ids", "return_logprobs"), "each result has its tokens and logprobs"),
    "prefill_batch_size": "prompts are processed one after the other, in pieces",
}
# Those whose values false, null and empty ask for nothing: calls that spell out mlx-lm's defaults work.
_WITH_DEFAULTS = {
    *("lazy", "model_config", "return_config", "input_embeddings", "verbose", "sampler", "logits_processors"),
    *("prompt_caches", "return_prompt_caches", "return_token_ids", "return_logprobs", "trust_remote_code"),
}
_RENAMED_KEYWORDS = {
    "path_or_hf_repo": "model",
    "prompt_progress_callback": "progress",
    "completion_batch_size": "max_rows",
    "stop_tokens": "stop",
}


def asks_for_nothing(keyword: str, value: Any) -> bool:
    """Whether an argument that a function does not have is one of mlx-lm's, with a value that changes nothing here."""
    is_default = value is None or value is False or (isinstance(value, dict) and not value)
    return keyword in _WITH_DEFAULTS and is_default


def unknown_command(program: str, name: str, commands: Sequence[str]) -> str:
    """The message for a command that is not there."""
    plain, listed = name.lower().replace("_", "-"), ", ".join(commands)
    if plain in _LATER_COMMANDS:
        return f"{program} {plain} is not offered yet; {_LATER_COMMANDS[plain]}."
    if plain in _REFUSED_COMMANDS:
        return f"{program} {plain} is not offered: {_REFUSED_COMMANDS[plain]}."
    renamed = _RENAMED_COMMANDS.get(plain)
    hint = f"did you mean {renamed}?" if renamed else _did_you_mean(plain, {name: name for name in commands})
    return f"{program} has no command {quote(name)}; {hint or f'there are {listed}.'}"


def unknown_flag(program: str, flag: str, known: Collection[str]) -> str:
    """The message for a flag that is not there.

    Args:
        program: the program and the command, as typed.
        known: every spelling of the flags that there are.
    """
    plain = flag.replace("_", "-").lower()
    if plain not in known:
        refused = _REFUSED_FLAGS | (_REFUSED_BY_QUANTIZE if program.endswith(" quantize") else {})
        refused |= _REFUSED_BY_CACHE_PROMPT if program.endswith(" cache-prompt") else {}
        if plain in refused:
            return f"{plain} is not offered: {refused[plain]}."
    hint = _flag_hint(program, plain, known)
    if " " not in program and not hint:
        hint = f"the flags of a command follow its name: {program} generate --prompt ..."
    return f"{program} has no flag {flag}{hint and f' ({hint})'}; see {program} --help."


def unknown_keyword(function: str, name: str, places: Mapping[str, Collection[str]]) -> str:
    """The message for a keyword argument that is not there.

    Args:
        function: the name of the function or the class.
        places: its own arguments, by the name ""; and the fields of the options that it takes, by their class.
    """
    typed = f"-{name}" if len(name) == 1 else flag(name)
    wrong = f"{function} has no option {name}"
    renamed = [_RENAMED_KEYWORDS.get(name, name), *map(_keyword, _RENAMED_FLAGS.get(typed, ()))]
    for place, known in places.items():
        if found := [new for new in renamed if new.partition("=")[0] in known]:
            return f"{wrong}; did you mean {found[0]}{_of(place)}?"
    if name not in _REFUSED_KEYWORDS and (reason := not_needed(typed)):
        return f"{name} is not needed: {reason}."
    if reason := _REFUSED_KEYWORDS.get(name) or _REFUSED_FLAGS.get(typed):
        return f"{name} is not offered: {reason}."
    for place, known in places.items():
        if hint := did_you_mean(name, sorted(known)):
            return f"{wrong}; {hint[:-1]}{_of(place)}?"
    return f"{wrong}; help({function}) lists the options."


def _of(place: str) -> str:
    return place and f" of {place}"


def _keyword(flag: str) -> str:
    """The argument that a flag is, with its value if it has one: `fine_tune_type="dora"`."""
    name, _, value = flag.lstrip("-").replace("-", "_").partition(" ")
    return f'{name}="{value}"' if value else name


def not_needed(flag: str) -> str | None:
    """Why a flag of other programs can be left out without a difference; None if it cannot."""
    return _NOT_NEEDED.get(flag.replace("_", "-").lower())


def _flag_hint(program: str, flag: str, known: Collection[str]) -> str:
    """`did you mean --temp?` or `did you mean mlx-openelm lora --iters?`; empty if nothing is likely meant."""
    if renamed := _renamed(flag, known):
        return f"did you mean {renamed}?"
    aliases = {alias: name for alias in _RENAMED_FLAGS if (name := _renamed(alias, known)) is not None}
    if close := _did_you_mean(flag, {name: name for name in known} | aliases):
        return close
    for name in (flag, *_RENAMED_FLAGS.get(flag, ())):
        if " " in program and name in _ELSEWHERE:
            return f"did you mean {program.split()[0]} {_ELSEWHERE[name]} {name}?"
    return ""


def _renamed(flag: str, known: Collection[str]) -> str | None:
    """Our name for a flag of another program; None if the command does not have it."""
    return next((name for name in _RENAMED_FLAGS.get(flag, ()) if name.split()[0] in known), None)


def _did_you_mean(word: str, known: Mapping[str, str]) -> str:
    """`did you mean --temp?` for `--tmep`; empty if nothing known is a likely slip of the fingers.

    Args:
        known: what people type, with what to suggest for it.
    """
    word = word.lstrip("-")
    names = {name.lstrip("-"): meant for name, meant in known.items()}
    if word in names:  # max_tokens, -temp
        return f"did you mean {names[word]}?"
    if len(word) < 3:
        return ""
    # A word without its end: `conv`, `--max` (but `--quantize` is no beginning of --quantized-kv-start).
    close = [name for name in names if name.startswith(f"{word}-") or (name.startswith(word) and "-" not in name)]
    close = close or similar(word, names)
    meant = list(dict.fromkeys(names[name] for name in close))[:2]
    return f"did you mean {' or '.join(meant)}?" if meant else ""
