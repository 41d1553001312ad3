"""Training a tokenizer on files of text, and writing it for every program that reads Llama's."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import console
from ..errors import RequestError
from ..formats import atomic
from ..inputs import path_list, to_path
from ..text.sentencepiece_training import NUM_SPECIAL, lines_of, train_model
from ..text.tokenizer import Tokenizer
from .data.corpus.documents import read_texts
from .data.corpus.files import OTHER_KEY, TextFile, find_files
from .options.source import Source
from .options.tokenizer import TokenizerOptions

_MODEL = "tokenizer.model"


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was written.

    Args:
        path: its folder.
        vocab_size: its tokens, of which `pieces` were learned.
        documents, characters: the text it was given.
    """

    path: Path
    vocab_size: int
    pieces: int
    documents: int
    characters: int


def train_tokenizer(
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    progress: Callable[[str, int, int], None] | bool | None = True,
    **options: Any,
) -> TrainedTokenizer:
    """Train a Llama-style SentencePiece tokenizer: BPE, byte fallback, identity normalization, single digits.

    `output` gets `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`, which give the same ids. The same
    text and options give the same bytes.

    Args:
        data: one or several files, patterns, folders, or data sets on the hub, as for `pretrain`.
        output: the folder to write, which must be new; it appears complete or not at all.
        progress: called with the name of a stage, the amount done, and the total; by default a bar shows each stage,
            None or False shows none.
        options: the fields of `TokenizerOptions`: `vocab_size=4096`.

    Raises:
        RequestError: no text, a vocabulary that the text does not allow, or `output` exists; nothing was written.
        OpenELMError: a download, training or writing failed; nothing was left behind.
    """
    chosen = TokenizerOptions(**options)
    target = check_new(output)
    sources = [Source(os.fspath(path)) for path in path_list(data, "--data")]
    files = [file for source in sources for file in find_files(source, "train", chosen.text_key)]
    if not files:
        raise RequestError("--data is missing: name a file or a folder with text.")
    with console.stages(progress) as show:
        reading = _Reading(files, chosen.skip_damaged, show)
        model = train_model(
            _drawn(reading.lines(), chosen.input_sentence_size, chosen.seed),
            chosen.vocab_size,
            character_coverage=chosen.character_coverage,
            progress=lambda done, total: show("Learning merges", done, total),
        )
        with atomic.new_folder(target, flag="--output") as partial:
            (partial / _MODEL).write_bytes(model)
            tokenizer = Tokenizer.from_file(partial / _MODEL)
            tokenizer.save(partial)
    size = tokenizer.vocab_size
    return TrainedTokenizer(to_path(output), size, size - NUM_SPECIAL, reading.documents, reading.characters)


def check_new(output: str | Path) -> Path:
    """The path of a folder that does not exist yet.

    Raises:
        RequestError: it exists; a tokenizer that models were trained with is not replaced.
    """
    path = to_path(output)
    if path.exists():
        raise RequestError(f"{path} exists; choose another --output.")
    return atomic.check_target(path, flag="--output")


def _drawn(lines: Iterator[str], count: int, seed: int) -> Iterable[str]:
    """`count` of the lines, each as likely as any other (algorithm R); all for 0. sentencepiece's draw has no seed."""
    if not count:
        return lines
    draw = random.Random(seed)
    kept: list[str] = []
    for number, line in enumerate(lines):
        if number < count:
            kept.append(line)
        elif (place := draw.randrange(number + 1)) < count:
            kept[place] = line
    return kept


class _Reading:
    """The lines of all documents, counted and shown as they are read."""

    def __init__(self, files: Sequence[TextFile], skip_damaged: bool, show: Callable[[str, int, int], None]):
        self._files, self._skip_damaged, self._show = files, skip_damaged, show
        self.documents = self.characters = 0

    def lines(self) -> Iterator[str]:
        sizes = [Path(file.path).stat().st_size for file in self._files]
        before = 0
        for file, size in zip(self._files, sizes, strict=True):
            start = self.characters
            for text in read_texts([file], skip_damaged=self._skip_damaged):
                self.documents += 1
                self.characters += len(text)
                yield from lines_of(text)
                # Nearly the bytes read; a compressed file is shorter than its text.
                self._show("Reading the corpus", before + min(size - 1, self.characters - start), sum(sizes))
            before += size
        if not self.documents:
            raise RequestError(f"The data holds no text to train a tokenizer on; {OTHER_KEY}.")
        self._show("Reading the corpus", before, before)
