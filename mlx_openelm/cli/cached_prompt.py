"""The flag `--prompt-cache-file` of `generate`: a file with a prompt's keys and values, and what goes on from there."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..generation.cache_files import TOKENS, load_prompt_cache
from ..generation.cache_origin import Origin
from ..generation.prompt_cache import cache_offset, check_sizes
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .chat_prompts import chat_rest

# A text after a line break is encoded as in the middle of a text, without the space that begins one.
_BREAK = "\n"


@dataclass
class CachedPrompt:
    """What a file holds: caches, the ids they have seen, if it lists them, and what they were computed with."""

    file: str
    cache: list[Any]
    ids: list[int] | None
    origin: Origin
    tokens: int  # how many the caches have seen

    def check(self, model: OpenELM, args: Namespace) -> None:
        """Raise a `RequestError` if another model, adapter or type than the loaded one filled the caches."""
        cache_offset(self.cache, len(model.layers))
        check_sizes(model.config, self.cache)
        self.origin.check(Origin.of(model, args.model, args.revision, args.adapter_path or ()), self.file)

    def continue_with(self, tokenizer: Tokenizer, prompt: str, args: Namespace) -> list[int]:
        """The ids of a prompt that goes on where the cached one ends."""
        template = args.chat_template or tokenizer.default_template
        if not args.ignore_chat_template and (args.prefill_response is not None or template != "plain"):
            return chat_rest(tokenizer, prompt, args.prefill_response, args.chat_template)
        before = tokenizer.encode(_BREAK, as_message=True)
        ids = tokenizer.encode(_BREAK + prompt, as_message=True)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return tokenizer.encode(prompt, add_bos=False, as_message=True)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `stream_generate`."""
        return {"prompt_cache": self.cache, "prompt_cache_tokens": self.ids}


def open_cached(args: Namespace) -> CachedPrompt:
    """The cache of `--prompt-cache-file`; without `--model`, sets model, revision and adapter to those of the file."""
    if args.system_prompt is not None:
        raise RequestError("--system-prompt comes before the cached prompt; give it to `mlx-openelm cache-prompt`.")
    cache, metadata = load_prompt_cache(args.prompt_cache_file, return_metadata=True)
    seen = cache_offset(cache, len(cache))
    cached = CachedPrompt(args.prompt_cache_file, cache, metadata.get(TOKENS), Origin.from_notes(metadata), seen)
    if args.model is None and cached.origin.model is not None:
        args.model = cached.origin.model
        args.revision = args.revision or cached.origin.revision
        args.adapter_path = args.adapter_path or list(cached.origin.adapter) or None
    return cached
