"""What `generate(..., verbose=True)` prints, in the form of mlx-lm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

_LINE = "=" * 10


def printed(pieces: Iterable[Any]) -> Iterator[Any]:
    """The pieces of `stream_generate`: prints their text as it comes, then the speeds and the peak memory."""
    print(_LINE)
    has_text = False
    for piece in pieces:
        print(piece.text, end="", flush=True)
        has_text = has_text or bool(piece.text)
        yield piece
    print(f"\n{_LINE}")
    if not has_text:
        print("No text generated for this prompt")
        return
    print(f"Prompt: {piece.prompt_tokens} tokens, {piece.prompt_tps:.3f} tokens-per-sec")
    print(f"Generation: {piece.generation_tokens} tokens, {piece.generation_tps:.3f} tokens-per-sec")
    print(f"Peak memory: {piece.peak_memory:.3f} GB")
