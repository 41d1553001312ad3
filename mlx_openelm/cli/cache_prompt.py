"""`mlx-openelm cache-prompt`: processes a prompt once and writes its keys and values to a file."""

from __future__ import annotations

import time
from argparse import Namespace

import mlx.core as mx

from .. import console
from ..errors import RequestError
from ..finite import not_finite
from ..generation.cache_files import check_new, origin_metadata, save_prompt_cache
from ..generation.cache_origin import Origin
from ..generation.decoding import make_decoder
from ..generation.options import CacheOptions
from ..generation.prompt_cache import cache_is_finite
from ..loading import load
from ..wording import counted, size
from . import flags
from .chat_prompts import chat_opening
from .generate import read_prompt

MAIN_FLAGS = ("--model", "--prompt", "--prompt-cache-file", "--system-prompt", "--chat-template", "--overwrite")
EXAMPLES = """\
  mlx-openelm cache-prompt "To be, or not to be" --prompt-cache-file hamlet
  mlx-openelm cache-prompt --model 270m --prompt-file my_text.txt --prompt-cache-file my_text --kv-bits 8"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `cache-prompt` to its parser."""
    common, chat, model, output = (parser.groups[title] for title in ("Common flags", "Prompt", "Model", "Output"))
    parser.usage = f"{parser.prog} [PROMPT] [flags]"
    parser.groups["Arguments"].add_argument(
        "words", nargs="*", metavar="PROMPT", help="Text to process; the same as --prompt."
    )
    flags.add_shared(common, "--model")
    common.add_argument("--prompt", "-p", metavar="TEXT", help="Text to process; - reads standard input.")
    common.add_argument(
        "--prompt-cache-file",
        required=True,
        metavar="FILE",
        help="File to write; .safetensors is put at its end if it is not there.",
    )
    chat.add_argument("--prompt-file", metavar="FILE", help="Read the prompt from this file.")
    chat.add_argument(
        "--chat-template",
        metavar=flags.CHAT_TEMPLATES,
        help="How to write a chat. The prompt is then the beginning of the user's message, which "
        "`generate --prompt-cache-file` goes on with.  [default: the model's own, else plain]",
    )
    chat.add_argument(
        "--system-prompt", metavar="TEXT", help="Instructions that come first, written with the chat template."
    )
    flags.add_fields(parser, CacheOptions)
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")
    flags.add_shared(model, "--exact-activations")
    flags.add_shared(output, "--overwrite", "--json")


def run(args: Namespace) -> int:
    """Process a prompt once and keep it in a file, to go on from.

    `generate --prompt-cache-file FILE` goes on where the prompt ends, without processing it again. The text that
    follows is joined to it as it is, without a space in between. mlx-lm reads the file too, and we read its files.
    """
    path = check_new(args.prompt_cache_file, args.overwrite)
    options = CacheOptions(**flags.given(args, CacheOptions))
    options.validate()
    nothing_given = not args.words and args.prompt is None and args.prompt_file is None
    only_system = args.system_prompt is not None and nothing_given
    prompt = "" if only_system else read_prompt(args, "cache-prompt")
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
    options.validate(head_dim=model.config.head_dim)
    is_chat = args.system_prompt is not None or (args.chat_template or tokenizer.default_template) != "plain"
    if is_chat:
        ids = chat_opening(tokenizer, prompt, args.system_prompt, args.chat_template)
    else:
        ids = tokenizer.encode(prompt, as_message=True)
    decoder, ids, room = make_decoder(model, ids, -1, options)
    if room <= 1:  # the text after the prompt needs a position
        raise RequestError(f"The prompt fills the model's {model.config.rope_max_length} positions; shorten it.")
    started = time.perf_counter()
    with console.Progress("Reading the prompt", unit="tokens", lines=False) as progress:
        decoder.prefill(mx.array([ids]), progress=progress)
        mx.eval([layer.state[:2] for layer in decoder.cache])
    if not cache_is_finite(decoder.cache):
        raise not_finite("The keys and values of the prompt are", model)
    speed = len(ids) / max(time.perf_counter() - started, 1e-9)
    origin = Origin.of(model, args.model, args.revision, args.adapter_path or ())
    save_prompt_cache(path, decoder.cache, origin_metadata(origin, ids), overwrite=args.overwrite)
    nbytes, peak = path.stat().st_size, mx.get_peak_memory() / 1e9
    if args.json:
        values = {"model": args.model, "prompt": prompt, "prompt_cache_file": str(path), "prompt_tokens": len(ids)}
        kind = type(decoder.cache[0]).__name__
        console.print_json(values | {"kind": kind, "bytes": nbytes, "prompt_tps": speed, "peak_memory": peak})
        return 0
    console.print_line(f"{path}: {counted(len(ids), 'token')}, {size(nbytes)}")
    console.say(f"Prompt: {counted(len(ids), 'token')}, {speed:.1f} tokens/s")
    console.say(f"Peak memory: {peak:.3f} GB")
    return 0
