"""Texts that are hard to tokenize: many spaces, code, emoji, CJK, control and combining characters."""

from __future__ import annotations

import random

_PARTS = [
    *["the", "Hello", " world", "I'm", "hahaha", "http://x.y/z", "1234567890", "naïve", "ﬁ½", "\ufeff", "\u00a0\u3000"],
    *["def f(x):\n    return x", "if x == 0:\n\tpass", "// ##", "{}[]<>", "<p>", "\r\n", "\t\t", "0x0A"],
    *[
        "日本語",
        "中文",
        "한국어",
        "👩\u200d👩\u200d👧",
        "🇧🇷",
        "😀",
        "e\u0301\u0302",
        "\u0301",
        "\u200b",
        "\U0010ffff",
        "\ud7ff",
    ],
    *["\x00", "a\x00b", "\x01", "\x7f", "\x1b[0m", "</", "s>", "<", "0", ">", "▁", "▁▁"],
]
# Other programs do not treat these as text.
_TYPED = ["</s>", "<s>", "<unk>", "a</s>b", "<0x0A>", "<0x41>"]


def random_texts(count: int, *, seed: int = 0, typed: bool = True) -> list[str]:
    """`typed`: also special tokens and byte pieces, written out."""
    rng = random.Random(seed)
    parts = [*_PARTS, *_TYPED] if typed else _PARTS
    texts = ["".join(_part(rng, parts) for _ in range(rng.randint(1, 12))) for _ in range(count)]
    return texts if typed else [text for text in texts if not any(token in text for token in _TYPED)]


def _part(rng: random.Random, parts: list[str]) -> str:
    kind = rng.random()
    if kind < 0.35:
        return " " * rng.randint(1, 40)
    if kind < 0.75:
        return rng.choice(parts)
    if kind < 0.85:
        return rng.choice("=-.#*aA0_\n\t") * rng.randint(1, 40)
    if kind < 0.95:
        first, last = rng.choice([(1, 0x2FF), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)])
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))
    return "".join(rng.choice("abcdehilnorst ") for _ in range(rng.randint(1, 20)))
