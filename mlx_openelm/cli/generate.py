"""`mlx-openelm generate`: text on standard output as it is generated, statistics on standard error."""

from __future__ import annotations

import shlex
import sys
from argparse import BooleanOptionalAction, Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .. import backend, console
from ..errors import RequestError
from ..generation.options import EMPTY_PROMPT, NOT_UTF8, GenerationOptions
from ..generation.piece import Piece
from ..generation.repetition import ends_in_loop
from ..generation.sampling import random_seed
from ..generation.stream import stream_generate
from ..hub import catalog
from ..inputs import read_stream, read_text_source, to_path
from ..loading import load
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from ..wording import counted
from . import flags
from .terminal import show, write

if TYPE_CHECKING:
    from .cached_prompt import CachedPrompt

MAIN_FLAGS = (
    *("--model", "--prompt", "--max-tokens", "--temp", "--top-p", "--seed", "--stop", "--system-prompt"),
    *("--chat-template", "--adapter-path"),
)
EXAMPLES = """\
  mlx-openelm generate "To be, or not to be"
  mlx-openelm generate "ROMEO." --temp 0.8 --top-p 0.95 --seed 7
  mlx-openelm generate --model 270m-instruct --prompt "Once upon a time" --repetition-penalty 1.2
  echo "Enter KING HENRY" | mlx-openelm generate --prompt - --kv-bits 8
  mlx-openelm generate --batch prompts.txt --max-tokens 64 > texts.jsonl"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `generate` to its parser."""
    common, chat, model, output = (parser.groups[title] for title in ("Common flags", "Prompt", "Model", "Output"))
    parser.usage = f"{parser.prog} [PROMPT] [flags]"
    parser.groups["Arguments"].add_argument(
        "words", nargs="*", metavar="PROMPT", help="Text to continue; the same as --prompt."
    )
    flags.add_shared(common, "--model")
    parser.set_defaults(model=None)  # a prompt cache names its model
    common.add_argument("--prompt", "-p", metavar="TEXT", help="Text to continue; - reads standard input.")
    chat.add_argument("--prompt-file", metavar="FILE", help="Read the prompt from this file.")
    chat.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="Go on from the prompt in this file of `cache-prompt` or mlx-lm. Without --model, the model, revision and "
        "adapter are those of the file.",
    )
    chat.add_argument(
        "--batch",
        metavar="FILE",
        help="Many prompts at once, one on each line of this file, and the results as lines of JSON. In a .jsonl file "
        "each line is an object with `prompt` and options of its own, such as `max_tokens`; - reads standard input.",
    )
    flags.add_fields(parser, GenerationOptions)
    chat.add_argument(
        "--chat-template",
        metavar=flags.CHAT_TEMPLATES,
        help="How to write prompt and system prompt as a chat.  [default: the model's own, else plain]",
    )
    chat.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="Instructions that come before the prompt, written with the chat template.",
    )
    chat.add_argument(
        "--prefill-response", metavar="TEXT", help="Beginning of the response; the output continues from there."
    )
    chat.add_argument(
        "--ignore-chat-template", **flags.SWITCH, help="Use the prompt as it is, without a chat template."
    )
    flags.add_shared(chat, "--extra-eos-token")
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")
    flags.add_shared(model, "--exact-activations")
    memory = parser.groups["Key-value cache"]
    memory.add_argument(
        "--max-rows", type=flags.integer, metavar="N", help="Texts of --batch that advance together.  [default: 32]"
    )
    memory.add_argument(
        "--memory-limit",
        type=flags.memory_size,
        metavar="SIZE",
        help="Memory that the texts of --batch may take besides the model, such as 4GB; others wait.  "
        "[default: half of what is free]",
    )
    flags.add_shared(parser.groups["Drafts"], "--draft-model")
    output.add_argument(
        "--verbose",
        action=BooleanOptionalAction,
        default=True,
        help="Print speed and memory on standard error.  [default: on]",
    )
    output.add_argument(
        "--logprobs", **flags.SWITCH, help="Show the log-probability of each token: after the text, or in the JSON."
    )
    flags.add_shared(output, "--json")


def run(args: Namespace) -> int:
    """Print text that follows a prompt.

    The text goes to standard output, everything else to standard error. A prompt that is read from a file or
    from standard input loses the line break at its end.
    """
    if args.batch is not None:
        from .generate_batch import run_batch

        return run_batch(args)
    if args.max_rows is not None or args.memory_limit is not None:
        raise RequestError("--max-rows and --memory-limit are for many prompts at once; give them with --batch.")
    if args.ignore_chat_template:
        from .chat_prompts import check_no_chat

        check_no_chat(args)
    prompt = read_prompt(args)
    options = flags.given(args, GenerationOptions)
    if "seed" not in options and options.get("temp", 0) > 0:
        options["seed"] = random_seed()
    cached: CachedPrompt | None = None
    if args.prompt_cache_file is not None:
        from .cached_prompt import open_cached

        cached = open_cached(args)
    args.model = args.model or catalog.TINY
    model, tokenizer = load(
        args.model,
        args.adapter_path,
        args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        revision=args.revision,
        expand=args.expand,
        exact_activations=args.exact_activations,
    )
    drafts: dict[str, Any] = {}
    if args.draft_model is not None:
        from .drafts import load_draft_model

        drafts["draft_model"] = load_draft_model(args, model, tokenizer)
    for token in args.extra_eos_token or ():
        tokenizer.add_eos_token(token)
    chat = (args.system_prompt, args.prefill_response, args.chat_template)
    if cached is not None:
        cached.check(model, args)
        ids = cached.continue_with(tokenizer, prompt, args)
    elif tokenizer.chat_template is None and chat == (None, None, None) and not args.ignore_chat_template:
        ids = tokenizer.encode(prompt, as_message=True)  # what the template `plain` gives
    else:
        from .chat_prompts import encode_prompt

        ids = encode_prompt(tokenizer, prompt, args)

    # Show a bar only if the prompt takes several steps.
    is_long = backend.prefill_step_size(len(ids), options.get("prefill_step_size")) < len(ids)
    progress = console.Progress("Reading the prompt", unit="tokens", lines=False) if is_long else None
    pieces: list[Piece] = []
    chosen = GenerationOptions(**options)
    interrupted = False
    try:
        with progress or nullcontext():
            past = {} if cached is None else cached.arguments()
            for piece in stream_generate(model, tokenizer, ids, progress=progress, **drafts, **past, **options):
                pieces.append(piece)
                if not args.json:
                    # The line ends here, before a warning that the text was cut off.
                    write(piece.text if piece.finish_reason is None else f"{piece.text}\n")
    except KeyboardInterrupt:
        interrupted = True
    seed = options.get("seed")
    if args.json:
        held = None if cached is None else cached.tokens
        shown = tokenizer if args.logprobs or options.get("top_logprobs") else None
        _print_json(args.model, prompt, pieces, shown, seed, interrupted, held)
    else:
        if interrupted:
            write("\n")
        if args.logprobs or options.get("top_logprobs"):
            _say_logprobs(tokenizer, pieces)
        if args.verbose:
            _say_statistics(model, pieces, chosen, cached)
    if args.verbose and chosen.temp == 0 and not chosen.changes_logits:
        is_plain = tokenizer.chat_template is None and args.chat_template is None
        _say_if_repeating(pieces, is_plain and "instruct" in args.model.lower())
    return 130 if interrupted else 0


def read_prompt(args: Namespace, command: str = "generate") -> str:
    """The prompt from the argument, the flag, the file, or standard input."""
    words, prompt, prompt_file = args.words, args.prompt, args.prompt_file
    is_quoted = any(" " in text for text in (prompt or "", *words))
    goes_on = bool(words) and args.before_words in ("--prompt", "-p") and not is_quoted
    if goes_on or (prompt is None and len(words) > 1):
        text = " ".join([*([prompt] if prompt is not None else []), *words])
        raise RequestError(f"A prompt of several words needs quotes: mlx-openelm {command} {shlex.quote(text)}.")
    if len([text for text in (*words, prompt, prompt_file) if text is not None]) > 1:
        raise RequestError("Give the prompt once: as the argument, with --prompt or with --prompt-file.")
    prompt = words[0] if words else prompt
    if prompt_file is not None:
        text = _decode(read_text_source(to_path(prompt_file)), prompt_file)
    elif prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        text = _decode(read_stream(sys.stdin.buffer, "Standard input"), "Standard input")
    elif prompt is None:
        raise RequestError(
            f'There is no prompt; give one: mlx-openelm {command} "To be", --prompt-file FILE, or on standard input.'
        )
    else:
        text = prompt
        try:
            text.encode()
        except UnicodeEncodeError:  # Python keeps bytes that are not UTF-8 as halves of surrogate pairs
            raise RequestError(NOT_UTF8) from None
    if not text:
        raise RequestError(EMPTY_PROMPT)
    return text


def _decode(data: bytes, source: str) -> str:
    """UTF-8 text without the line break that editors and `echo` put at its end."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{source} is not UTF-8 text; give the prompt in UTF-8.") from None
    return text.removesuffix("\n").removesuffix("\r")


def _print_json(
    model: str,
    prompt: str,
    pieces: list[Piece],
    tokenizer: Tokenizer | None,
    seed: int | None,
    interrupted: bool,
    cached: int | None,
) -> None:
    """Print the result as a JSON object; with a tokenizer, also tokens and their log-probabilities."""
    values: dict[str, Any] = {"model": model, "prompt": prompt, "text": "".join(piece.text for piece in pieces)}
    if pieces:
        last = pieces[-1]
        names = ["finish_reason", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "peak_memory"]
        values |= {name: getattr(last, name) for name in names}
    if pieces and pieces[-1].drafts is not None:
        from .drafts import as_json

        values["drafts"] = as_json(pieces[-1].drafts)
    if cached is not None:
        values["prompt_cache_tokens"] = cached
    if interrupted:
        values["finish_reason"] = "interrupted"
    values["seed"] = seed
    if tokenizer is not None:
        values["tokens"] = [piece.token for piece in pieces]
        values["token_texts"] = [tokenizer.id_to_token(piece.token) for piece in pieces]
        values["logprobs"] = [piece.logprob for piece in pieces]
        if any(piece.top_logprobs for piece in pieces):
            values["top_logprobs"] = [[list(pair) for pair in piece.top_logprobs] for piece in pieces]
    console.print_json(values)


def _say_logprobs(tokenizer: Tokenizer, pieces: list[Piece]) -> None:
    console.say("  token   logprob  text")
    for piece in pieces:
        console.say(f"{piece.token:7d}  {piece.logprob:8.4f}  {tokenizer.id_to_token(piece.token)!r}")
        for token, logprob in piece.top_logprobs:
            console.say(f"{token:11d}  {logprob:8.4f}  {tokenizer.id_to_token(token)!r}")


def _say_if_repeating(pieces: list[Piece], may_want_template: bool) -> None:
    if ends_in_loop([piece.token for piece in pieces]):
        template = " or --chat-template corenet" if may_want_template else ""
        show(
            "note: the text repeats itself, as greedy decoding without a penalty often does; "
            f"try --repetition-penalty 1.2{',' if template else ' or'} --temp 0.7{template}"
        )


def _say_statistics(
    model: OpenELM, pieces: list[Piece], options: GenerationOptions, cached: CachedPrompt | None
) -> None:
    if model.quantization and model.expanded:
        bits = sorted({choice.bits for choice in model.quantization.values()})
        show(
            f"Weights: {' and '.join(map(str, bits))} bits, expanded at load because that is faster on a CPU; "
            "--no-expand saves memory"
        )
    if cached is not None:
        console.say(f"Model: {cached.origin}")
    if pieces:
        last = pieces[-1]
        after = "" if cached is None else f" after {cached.tokens} in the cache"
        console.say(f"Prompt: {counted(last.prompt_tokens, 'token')}{after}, {last.prompt_tps:.1f} tokens/s")
        speed = f", {last.generation_tps:.1f} tokens/s" if last.generation_tokens > 1 else ""
        end = f", finish reason: {last.finish_reason}" if last.finish_reason else ""
        if last.finish_reason == "length" and last.generation_tokens != options.max_tokens:
            end += " (the model's last position)"
        console.say(f"Generation: {counted(last.generation_tokens, 'token')}{speed}{end}")
        if last.drafts is not None:
            from .drafts import as_text

            console.say(f"Drafts: {as_text(last.drafts)}")
        console.say(f"Peak memory: {last.peak_memory:.3f} GB")
    if options.seed is not None:
        console.say(f"Seed: {options.seed}")
