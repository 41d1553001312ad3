"""Encoding long texts: the same ids, while other threads go on."""

from __future__ import annotations

import os
import threading
import time
from itertools import pairwise

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
    times, done = [time.perf_counter()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            times.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    tokenizer.encode("hello word " * 100_000)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    assert max(later - earlier for earlier, later in pairwise(times)) < seconds / 2
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
