"""A worker process: it reads and tokenizes the chunks that it is asked for, in order, until its input ends.

Input: pickles of `Setup`, then of the number of a stream for each chunk to read. Output: pickles of the stream's number
with the chunk, or with the error that ended the work.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import NamedTuple

from ....errors import OpenELMError
from .reader import Chunk, Job, StreamReader


class Setup(NamedTuple):
    """A worker's job, and its share of each stream: chunks `offsets[stream] + n * stride`."""

    job: Job
    stride: int
    offsets: list[int]
    encoder_key: str
    names_flags: bool


def main() -> None:
    """Work until the input ends, which it does when the parent ends, too."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    try:
        setup: Setup = pickle.load(requests)
        _serve(setup, requests, answers)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


def _serve(setup: Setup, requests, answers) -> None:
    from .... import errors

    errors.names_flags = setup.names_flags
    readers: dict[int, StreamReader] = {}
    while True:
        number: int = pickle.load(requests)
        answer: object
        try:
            if number not in readers:
                readers[number] = StreamReader(
                    setup.job,
                    number,
                    stride=setup.stride,
                    offset=setup.offsets[number],
                    encoder_key=setup.encoder_key,
                )
            answer = readers[number].read()
        except OpenELMError as error:
            answer = (type(error).__name__, str(error))
        except (OSError, MemoryError) as error:
            answer = (OpenELMError.__name__, f"Reading the data failed: {error!r}.")
        answers.write(pickle.dumps((number, answer), pickle.HIGHEST_PROTOCOL))
        answers.flush()
        if not isinstance(answer, Chunk):
            return
