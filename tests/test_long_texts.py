"""Encoding long texts: the same ids, while other threads go on."""

from __future__ import annotations

import threading

from mlx_openelm.text import tokenizers_engine
from mlx_openelm.text.tokenizer import Tokenizer

import pytest
from serving_apps import tiny


def test_a_long_text_has_the_ids_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny()[1]
    text = "Enter KING HENRY, with  his\n\tfriends; \U0001f600 é. " * 900
    assert len(text) > tokenizers_engine._LONG_TEXT
    ids = tokenizer.encode(text)
    monkeypatch.setattr(tokenizers_engine, "_LONG_TEXT", len(text) + 1)
    assert ids == tokenizer.encode(text) and tokenizer.decode(ids) == text


def test_other_threads_go_on_meanwhile() -> None:
    tokenizer: Tokenizer = tiny()[1]
    wakes, done = 0, threading.Event()

    def watch() -> None:
        nonlocal wakes
        while not done.wait(0.001):
            wakes += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokenizer.encode("hello word " * 100_000)
    done.set()
    watcher.join()
    assert wakes > 20
