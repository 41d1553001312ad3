"""The text that a pretraining run is validated on, in windows, with its size in characters and bytes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ....errors import RequestError
from ....text.tokenizer import Tokenizer
from ...options.corpus import DataOptions
from ..batches import IGNORED, Batch, padded, to_mlx
from .documents import read_texts
from .files import OTHER_KEY, find_files, validation_sources


@dataclass(frozen=True)
class ValidationText:
    """Windows of documents, which together hold each of their tokens once, without BOS and EOS.

    Loss summed over `num_tokens`, divided by `num_characters` or by ln 2 x `num_bytes`, is nats per character and bits
    per byte.

    Args:
        windows: the tokens to predict, at most `max_seq_length`; the model reads BOS and all but the last of them.
        num_characters, num_bytes: of the documents' text, the bytes as UTF-8.
    """

    windows: list[array[int]]
    bos_token_id: int
    num_documents: int
    num_tokens: int
    num_characters: int
    num_bytes: int

    def batches(self, batch_size: int, *, world_size: int = 1, rank: int = 0) -> list[Batch]:
        """The batches that process `rank` measures, longest windows first.

        Args:
            batch_size: rows over all processes, of which process r has r, r + world_size, ...
        """
        order = sorted(range(len(self.windows)), key=lambda index: -len(self.windows[index]))
        chunks = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        return [self._batch(part) for chunk in chunks if (part := chunk[rank::world_size])]

    def _batch(self, indices: Sequence[int]) -> Batch:
        full = max(map(len, self.windows))
        width = min(padded(max(len(self.windows[index]) for index in indices)), full)
        inputs, targets = array("i"), array("i")
        for index in indices:
            window = self.windows[index]
            rest = width - len(window)
            inputs += array("i", [self.bos_token_id]) + window[:-1] + array("i", bytes(4 * rest))
            targets += window + array("i", [IGNORED]) * rest
        number = sum(len(self.windows[index]) for index in indices)
        shape = (len(indices), width)
        return Batch(to_mlx(inputs, shape), to_mlx(targets, shape), None, tuple(indices), number, number)


def read_validation(
    options: DataOptions, tokenizer: Tokenizer, *, max_seq_length: int, max_windows: int | None = None, seed: int = 0
) -> ValidationText | None:
    """The text of `options.valid`, or of the validation files beside the data; None if there is none.

    Args:
        max_windows: take whole documents, drawn with `seed`, until there are at least so many windows; None takes all.

    Raises:
        RequestError: no such files, a damaged document, or no text; the message names the file and line.
        OpenELMError: a download failed.
    """
    sources = options.valid or validation_sources(options.data)
    if not sources:
        return None
    files = [file for source in sources for file in find_files(source, "valid", options.text_key)]
    texts = list(read_texts(files, skip_damaged=options.skip_damaged))
    if not texts:
        names = ", ".join(source.path for source in sources)
        raise RequestError(f"There is no text to validate on in {names}; {OTHER_KEY}.")
    if max_windows is not None:
        random.Random(seed).shuffle(texts)
    return _make(texts, tokenizer, max_seq_length, max_windows)


def _make(texts: list[str], tokenizer: Tokenizer, max_seq_length: int, max_windows: int | None) -> ValidationText:
    windows: list[array[int]] = []
    documents = characters = size = 0
    for text in texts:
        if max_windows is not None and len(windows) >= max_windows:
            break
        windows += _cut(tokenizer.encode(text, add_bos=False), max_seq_length)
        documents, characters, size = documents + 1, characters + len(text), size + _num_bytes(text)
    num_tokens = sum(map(len, windows))
    return ValidationText(windows, tokenizer.bos_token_id, documents, num_tokens, characters, size)


def _cut(ids: list[int], length: int) -> Iterator[array[int]]:
    return (array("i", ids[start : start + length]) for start in range(0, len(ids), length))


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
