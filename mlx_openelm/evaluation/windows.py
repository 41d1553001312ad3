"""Text to measure on: documents from files, cut into windows of tokens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import RequestError, command_or_call, name_options
from ..generation.options import check_number
from ..inputs import check_file, read_text_source, to_path
from ..json_values import NotJSON, read_unpacked, read_values
from ..messages import warn
from ..publishing.command_line import command_line
from ..text.tokenizer import Tokenizer
from ..wording import install, size, some

# The keys of the examples that `lora` reads, apart from plain text (see `training.data.kinds`).
EXAMPLE_KEYS = ("prompt", "completion", "messages", "instruction", "output", "conversations")

# A text of this many bytes takes about a second to tokenize.
_SLOW_BYTES = 2_000_000


@dataclass(frozen=True)
class Window:
    """BOS and ids to read, of which the last `scored` count, and the bytes and characters of those."""

    tokens: list[int]
    scored: int
    bytes: int
    characters: int


def window_length(length: int | None, config: ModelConfig) -> int:
    """The tokens in a window: the default, or the number given; warns beyond the context the model was trained on.

    Raises:
        RequestError: the model's positions do not reach that far.
    """
    if length is None:
        return min(512, config.max_context_length)
    most = config.rope_max_length
    check_number("--sequence-length", length, 1, most, f"from 1 to {most}", kind=Integral)
    if length > config.max_context_length:
        warning = (
            f"--sequence-length {length} is more than the {config.max_context_length} tokens "
            "the model was trained on; expect a higher perplexity."
        )
        warn(name_options(warning))
    return length


def load_documents(path: str | Path, loading: Mapping[str, Any] | None = None) -> list[str]:
    """The documents of a file of JSON lines, a JSON array or a table, with `text` in each record; or a text as one.

    Names that end in `.json`, `.jsonl` and `.parquet` are the former, any other is a text. JSON and texts may be
    gzipped. A pipe opened by the shell, as in `--data <(zcat play.txt.gz)`, is read as a text file.

    Raises:
        RequestError: the file is unreadable or empty, or a record (named by its line or item) is not such an object.
    """
    path = Path(path)
    if path.is_dir():
        examples = f"the perplexity of examples for fine-tuning is measured by: {_testing(path, loading or {})}"
        raise RequestError(f"{path} is a folder; give a file of it, or {examples}.")
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet_documents(path)
    if name.removesuffix(".gz").endswith((".json", ".jsonl")):
        check_file(path)
        documents = [_document(path, place, value, loading or {}) for value, place in read_values(path)]
    else:
        documents = [_text(path, name.endswith(".gz"))]
    if not any(documents):
        raise RequestError(f"{path} contains no text.")
    return documents


def _text(path: Path, is_packed: bool) -> str:
    if is_packed:
        check_file(path)
    content = read_unpacked(path) if is_packed else read_text_source(path)
    try:
        return re.sub("\r\n?", "\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RequestError(f"{path} cannot be read: not UTF-8 text.") from None


def _parquet_documents(path: Path) -> list[str]:
    """The column `text` of a parquet file."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise RequestError(f"Reading {path} needs pyarrow: {install('data')}.") from None
    check_file(path)
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise RequestError(f"{path} has no column 'text'; it has {some(file.schema_arrow.names)}.")
            values = file.read(["text"]).column("text").to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{path} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from None
    wrong = next((number for number, value in enumerate(values, 1) if not isinstance(value, str)), None)
    if wrong is not None:
        raise RequestError(f"{path}, row {wrong}: 'text' is no text.")
    if not any(values):
        raise RequestError(f"{path} contains no text.")
    return values


def _document(path: Path, place: str, value: Any, loading: Mapping[str, Any]) -> str:
    if isinstance(value, NotJSON):
        raise RequestError(f"{path.parent / place}: {value.reason}.")
    record = value if isinstance(value, dict) else {}
    text = record.get("text")
    if not isinstance(text, str):
        wrong = f"{path.parent / place}: expected a JSON object with the string 'text'"
        if keys := [key for key in EXAMPLE_KEYS if key in record]:
            wrong += f", but this is an example for fine-tuning ({', '.join(keys)})"
            wrong += f"; their perplexity is measured by: {_testing(path, loading)}"
        raise RequestError(f"{wrong}.")
    return text


def _testing(path: Path, loading: Mapping[str, Any]) -> str:
    """The command, or in Python the call, that measures the perplexity of examples for fine-tuning."""
    command = command_line("lora", {"test": True, **loading, "data": path}, whole_paths=True)
    call = f"`finetune(name, FineTuneOptions(test=True, data={json.dumps(str(path), ensure_ascii=False)}))`"
    return command_or_call(f"`{command}`", call)


def reading_note(path: str | Path) -> str | None:
    """A line to show before a file is read and tokenized, if that takes more than a second; else None."""
    file = to_path(path)
    count = os.path.getsize(file) if os.path.isfile(file) else 0
    return f"Reading {file.name}, {size(count)}" if count >= _SLOW_BYTES else None


def make_windows(tokenizer: Tokenizer, documents: Sequence[str], length: int) -> list[list[int]]:
    """Windows of BOS and `length` tokens, cut from the documents joined as BOS, ids, EOS; the remainder is dropped.

    Raises:
        RequestError: the text is shorter than one window.
    """
    ids = [token for document in documents for token in [*tokenizer.encode(document), tokenizer.eos_token_id]]
    return [[tokenizer.bos_token_id, *ids[start : start + length]] for start in _starts(len(ids), length)]


def cut(tokenizer: Tokenizer, documents: Sequence[str], length: int, stride: int | None = None) -> list[Window]:
    """Windows like those of `make_windows`, or with a `stride` overlapping ones that score every token once.

    With a stride each window begins so many tokens behind the one before it, and scores the tokens that that one did
    not reach: all but the first windows read `length - stride` tokens more than they score. Nothing is dropped.

    Raises:
        RequestError: the text is shorter than one window, or a bad stride.
    """
    if stride is not None:
        check_number("--stride", stride, 1, length, f"from 1 to the --sequence-length, {length}", kind=Integral)
    ids, sizes = _joined(tokenizer, documents)
    if stride is None:
        spans = [(start, start, start + length) for start in _starts(len(ids), length)]
    else:
        ends = [*range(min(length, len(ids)), len(ids), stride), len(ids)]
        spans = [(max(0, end - length), first, end) for first, end in zip([0, *ends], ends, strict=False)]
    return [
        Window(
            [tokenizer.bos_token_id, *ids[start:end]],
            end - first,
            sum(count for count, _ in sizes[first:end]),
            sum(count for _, count in sizes[first:end]),
        )
        for start, first, end in spans
    ]


def _starts(tokens: int, length: int) -> range:
    """Where windows begin that follow one another; RequestError if there is none."""
    starts = range(0, tokens - length + 1, length)
    if length < 1 or not starts:
        raise RequestError(
            f"The text has {tokens} tokens, fewer than a window of {length}; give a shorter --sequence-length."
        )
    return starts


def _joined(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """The documents joined, each as BOS, ids, EOS; and the bytes and characters that each token stands for."""
    joined: list[int] = []
    sizes: list[tuple[int, int]] = []
    known: dict[int, tuple[bytes, tuple[int, int]]] = {}  # by token: its text, with its bytes and characters
    for document in documents:
        ids = tokenizer.encode(document)
        for token in set(ids) - known.keys():
            text = tokenizer.token_bytes(token) or b""
            known[token] = text, (len(text), sum(byte & 0xC0 != 0x80 for byte in text))
        counted = [known[token][1] for token in ids]
        # The space that a tokenizer puts in front of a text is not in the text.
        first = next((place for place, (count, _) in enumerate(counted) if count), 0)
        is_longer = sum(count for count, _ in counted) > len(document.encode("utf-8", "surrogatepass"))
        if is_longer and known[ids[first]][0].startswith(b" "):
            counted[first] = counted[first][0] - 1, counted[first][1] - 1
        joined += [*ids, tokenizer.eos_token_id]
        sizes += [*counted, (0, 0)]
    return joined, sizes
