"""What `generate(..., verbose=True)` prints, in the form of mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator

from .decoding import Piece

_LINE = "=" * 10


def printed(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same pieces; prints each one's text as it comes, and after the last the speeds and the peak memory."""
    print(_LINE)
    last, is_empty = None, True
    for last in pieces:
        print(last.text, end="", flush=True)
        is_empty = is_empty and not last.text
        yield last
    print(f"\n{_LINE}")
    if is_empty or last is None:
        print("No text generated for this prompt")
        return
    print(f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec")
    print(f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec")
    print(f"Peak memory: {last.peak_memory:.3f} GB")
