"""`/v1/embeddings`, `/tokenize` and `/detokenize`: what needs no generated text."""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from collections.abc import Generator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..generation.scoring import embedding
from ..model import OpenELM
from .chat import messages, render
from .checks import Check, boolean, choice, integer, short_text, text
from .completions import read_prompts
from .context import Context, answer, as_ids, encode
from .failures import APIError
from .protocol import ABOUT
from .texts import while_here
from .work import Task

MAX_INPUTS = 2048

_EMBEDDINGS: dict[str, Check] = {
    "model": short_text,
    "input": lambda name, value: value,
    "encoding_format": choice("float", "base64"),
    "dimensions": integer(1),
    **ABOUT,
}
_TOKENIZE: dict[str, Check] = {
    "model": short_text,
    "prompt": text,
    "content": text,
    "messages": messages,
    "add_special_tokens": boolean,
    "add_special": boolean,
    "with_pieces": boolean,
}
_DETOKENIZE: dict[str, Check] = {"model": short_text, "tokens": lambda name, value: value}


async def embeddings(context: Context, request: Request) -> Response:
    """`POST /v1/embeddings`: the mean of the last hidden states [model_dim] of each text."""
    given, entry, adapter = await context.take(request, _EMBEDDINGS, "input")
    inputs = await context.prepare(request, lambda: read_prompts(entry, given["input"], "input", MAX_INPUTS))
    size, wanted = entry.config.model_dim, given.get("dimensions", entry.config.model_dim)
    if wanted > size:
        raise APIError(f"dimensions must be at most {size}, the model's, got {wanted}.", param="dimensions")
    task = Task(entry, adapter, lambda model: _embed_all(model, inputs))
    context.worker.submit([task])
    try:
        vectors = await while_here(request, task.future)
    finally:
        context.worker.cancel([task])
    is_packed = given.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _pack(vector[:wanted]) if is_packed else vector[:wanted]}
        for index, vector in enumerate(vectors)
    ]
    count = sum(map(len, inputs))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return answer({"object": "list", "data": data, "model": given.get("model", entry.name), "usage": usage})


def _embed_all(model: OpenELM, inputs: Sequence[Sequence[int]]) -> Generator[None, None, list[list[float]]]:
    vectors = []
    for ids in inputs:
        vectors.append((yield from embedding(model, ids)))
    return vectors


def _pack(vector: Sequence[float]) -> str:
    """A vector as little-endian float32 in base64."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return b64encode(values.tobytes()).decode()


async def tokenize(context: Context, request: Request) -> Response:
    """`POST /tokenize`, in the forms of vLLM and llama.cpp."""
    given, entry, _ = await context.take(request, _TOKENIZE)
    sources = [key for key in ("prompt", "content", "messages") if key in given]
    if len(sources) != 1:
        raise APIError("Give one of prompt, content and messages.", param="prompt")
    (source,) = sources
    is_whole = given.get("add_special_tokens", given.get("add_special", True))

    def ids_of() -> list[int]:
        if source == "messages":
            return render(context, entry, given["messages"])
        ids = encode(entry, given[source])
        return ids if is_whole or ids[:1] != [entry.tokenizer.bos_token_id] else ids[1:]

    ids = await context.prepare(request, ids_of)
    tokens: list[Any] = ids
    if given.get("with_pieces"):
        tokens = [{"id": token, "piece": entry.tokenizer.id_to_token(token)} for token in ids]
    return answer({"tokens": tokens, "count": len(ids), "max_model_len": entry.config.rope_max_length})


async def detokenize(context: Context, request: Request) -> Response:
    """`POST /detokenize`."""
    given, entry, _ = await context.take(request, _DETOKENIZE, "tokens")
    ids = [] if given["tokens"] == [] else as_ids(entry, given["tokens"], "tokens")
    if ids is None:
        raise APIError("tokens must be a list of token ids.", param="tokens")
    decoded = await context.prepare(request, lambda: entry.tokenizer.decode(ids))
    return answer({"content": decoded, "prompt": decoded})
