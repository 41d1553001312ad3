"""Training a SentencePiece model as Llama 2's was: BPE, byte fallback, identity normalization, single digits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import OpenELMError, RequestError
from .sentencepiece_trainer import END

# Unknown, BOS and EOS, and the bytes that characters outside the vocabulary are written with.
NUM_SPECIAL = 3 + 256
_MAX_BYTES = 4192  # longer lines would be dropped
# As in the trainer_spec and normalizer_spec of Llama 2's tokenizer.model. Text is fed line by line, so a line break is
# always a byte.
_SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "shuffle_input_sentence": False,
    "max_sentence_length": _MAX_BYTES,
}
# Line breaks, and the characters that sentencepiece itself uses, for which it would drop the line.
_BREAKS = re.compile("[\n\r\0\u2585]+")
# "Merged: freq=74 merges=200 piece=ard", in older versions "Added: freq=74 size=200 all=1500 active=750 piece=ard".
_LEARNED = re.compile(rb"(?:Merged|Added): freq=\d+ (?:merges|size)=(\d+) ")
_TOO_FEW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")
_TOO_MANY = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text as the trainer takes them: long ones are cut, at spaces where there are any."""
    for line in _BREAKS.split(text):
        # A character has at most 4 bytes in UTF-8.
        while len(line) > _MAX_BYTES // 4 and len(line.encode("utf-8", "replace")) > _MAX_BYTES:
            cut = line.rfind(" ", 1, _MAX_BYTES // 4)
            cut = cut if cut > 0 else _MAX_BYTES // 4
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line


def train_model(
    lines: Iterable[str],
    vocab_size: int,
    *,
    character_coverage: float,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> bytes:
    """The bytes of a `tokenizer.model`, the same for the same lines and settings.

    Args:
        lines: as `lines_of` gives them.
        vocab_size: the number of tokens, with the `NUM_SPECIAL` that every tokenizer has.
        character_coverage: the share of the text's characters that get a token of their own; rarer ones become bytes.
        progress: called with the merges learned so far, and the most there can be.

    Raises:
        RequestError: there is no text, or `vocab_size` is too small or too large for it.
        OpenELMError: the training failed.
    """
    settings = {**_SETTINGS, "vocab_size": vocab_size, "character_coverage": character_coverage}
    script = Path(__file__).with_name("sentencepiece_trainer.py")
    arguments = json.dumps([[str(folder) for folder in sys.path], settings])
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", str(script), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C must reach only the parent
        )
    except OSError as error:
        raise OpenELMError(f"No process to train the tokenizer could be started: {error.strerror}.") from None
    log: list[bytes] = []
    reader = threading.Thread(
        target=_read_log, args=(process, log, lambda done: progress(done, max(done, vocab_size - NUM_SPECIAL)))
    )
    reader.start()
    try:
        is_empty = _feed(process, lines)
        assert process.stdout is not None
        model = process.stdout.read()
        process.wait()
    finally:
        process.kill()
        process.wait()
        reader.join()
    if is_empty:
        raise RequestError("The data holds no text to train a tokenizer on.")
    if process.returncode:
        raise _error(vocab_size, b"".join(log).decode(errors="replace"), process.returncode)
    return model


def _feed(process: subprocess.Popen[bytes], lines: Iterable[str]) -> bool:
    """Send all lines; returns whether there were none."""
    assert process.stdin is not None
    is_empty = True
    try:
        for line in lines:
            process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            is_empty = False
        process.stdin.write(END)
        process.stdin.close()
    except BrokenPipeError:  # it has failed, and its log says why
        pass
    return is_empty


def _read_log(process: subprocess.Popen[bytes], log: list[bytes], learned: Callable[[int], None]) -> None:
    """Report the merges learned, and keep the last lines of the log."""
    assert process.stderr is not None
    for line in process.stderr:
        if match := _LEARNED.search(line):
            learned(int(match[1]))
        else:
            log.append(line)
            del log[:-20]


def _error(vocab_size: int, log: str, code: int) -> OpenELMError:
    if match := _TOO_FEW.search(log):
        return RequestError(
            f"--vocab-size {vocab_size} is too small: the text's characters need {match[1]}. Give at least that, or "
            "lower --character-coverage, so that rare characters become bytes."
        )
    if match := _TOO_MANY.search(log):
        return RequestError(
            f"--vocab-size {vocab_size} is too large for this text, which has only {match[1]} different pieces; give "
            "at most that, or more text."
        )
    last = log.strip().splitlines()[-1:] or [f"its process ended with status {code}"]
    return OpenELMError(f"Training the tokenizer failed: {last[0].strip()}.")
