"""The options of pretraining's data: the fields are the command's flags, the YAML keys and the Python arguments."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Annotated

from ...errors import RequestError, quote
from ...options import Option, Options, paths_as_text
from ...wording import flag, one_of
from .source import Source
from .values import check_range, conform, field_types

PACKED, CORENET = "packed", "corenet"
MODES = (PACKED, CORENET)
# The filters of CoreNet's configurations.
_MIN_CHARACTERS, _MIN_TOKENS = 200, 256
# Tokenizing half a million tokens a second, a process feeds a fast GPU; more than these are never idle for long.
_MOST_WORKERS = 4
# The options that each mode is alone in using.
_OF_MODES = {
    PACKED: ("shuffle_buffer",),
    CORENET: ("min_characters", "min_tokens", "corenet_processes", "piece_words"),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class DataOptions(Options):
    """The options of the text that a model is pretrained on.

    Args:
        data, valid: sources, each a path or a mapping of `path`, `weight` and `text_key`. Without `valid`, the
            validation files in the folders and data sets of `data` are used, if there are any.
        ftfy: None means with `mode="corenet"` only.
        min_characters, min_tokens, corenet_processes: for `mode="corenet"`; None is CoreNet's default.

    Raises (by `check_data`):
        RequestError: an invalid value; the message names its flag.
    """

    data: Annotated[
        tuple[Source, ...],
        Option("Text: a file, a folder, a pattern, or a data set on the hub; repeatable.", metavar="PATH", default=""),
    ] = ()
    valid: Annotated[
        tuple[Source, ...],
        Option(
            "Text to validate on, as --data.",
            group="Validation and test",
            metavar="PATH",
            default="the validation files beside the data",
        ),
    ] = ()
    mode: Annotated[
        str,
        Option(
            "How text becomes rows: packed fills every position, corenet is as in CoreNet.",
            group="Data",
            metavar="|".join(MODES),
        ),
    ] = PACKED
    text_key: Annotated[str, Option("Key, or column, that holds the text of a document.", group="Data")] = "text"
    shuffle_buffer: Annotated[
        int, Option("Documents to shuffle at a time, for --mode packed; 0 keeps their order.", group="Data")
    ] = 2048
    num_workers: Annotated[
        int | None,
        Option(
            "Processes that read and tokenize; 0 is none but the training's own.",
            group="Data",
            default="by the number of cores",
        ),
    ] = None
    token_cache: Annotated[
        str | None, Option("Folder to keep the tokens of files in, for later epochs and runs.", metavar="FOLDER")
    ] = None
    ftfy: Annotated[
        bool | None,
        Option("Repair the text with ftfy, and normalize it to NFC.", group="Data", default="with --mode corenet"),
    ] = None
    skip_damaged: Annotated[
        bool, Option("Leave out and count documents that cannot be read, instead of stopping.", group="Data")
    ] = False
    piece_words: Annotated[int, Option("Words of a piece of a document, for --mode corenet.", group="Data")] = 2048
    min_characters: Annotated[
        int | None,
        Option("Skip pieces with fewer characters, for --mode corenet.", group="Data", default=str(_MIN_CHARACTERS)),
    ] = None
    min_tokens: Annotated[
        int | None,
        Option("Skip pieces with fewer tokens, for --mode corenet.", group="Data", default=str(_MIN_TOKENS)),
    ] = None
    corenet_processes: Annotated[
        int | None,
        Option(
            "Processes of the CoreNet run to follow, for --mode corenet; each has four streams of files.",
            group="Data",
            default="those of this run",
        ),
    ] = None

    @property
    def repairs_text(self) -> bool:
        """Whether text goes through ftfy."""
        return self.mode == CORENET if self.ftfy is None else self.ftfy

    @property
    def filters(self) -> tuple[int, int]:
        """The fewest characters and tokens of a piece in `corenet` mode."""
        return (
            _MIN_CHARACTERS if self.min_characters is None else self.min_characters,
            _MIN_TOKENS if self.min_tokens is None else self.min_tokens,
        )

    @property
    def workers(self) -> int:
        """The number of worker processes."""
        if self.num_workers is not None:
            return self.num_workers
        return max(1, min(_MOST_WORKERS, (os.cpu_count() or 2) - 1))

    def __post_init__(self) -> None:
        paths_as_text(self)
        for field, kind in field_types(type(self)).items():
            with contextlib.suppress(ValueError):  # `check_data` reports it
                object.__setattr__(self, field, conform(kind, getattr(self, field)))

    def check_data(self) -> None:
        """Check the values of these fields, before any work.

        Raises:
            RequestError: an invalid value; the message names its flag.
        """
        for field, kind in field_types(DataOptions).items():
            value = getattr(self, field)
            try:
                conform(kind, value)
            except ValueError as expected:
                raise RequestError(f"{flag(field)} must be {expected}, got {quote(value)}.") from None
            if value is not None:
                check_range(field, value)
        if self.mode not in MODES:
            raise RequestError(f"--mode must be {one_of(MODES)}, got {quote(self.mode)}.")
        if not self.data:
            raise RequestError("--data is needed: a file, a folder, a pattern, or the name of a data set.")
        for source in (*self.data, *self.valid):
            if not source.path.strip():
                raise RequestError("The path of a source is empty; name a file, a folder or a data set.")
        if any(source.weight != 1.0 for source in self.valid):
            raise RequestError("--valid has a weight, which is for --data; validation reads every source once.")
        if self.token_cache is not None and not self.token_cache.strip():
            raise RequestError("--token-cache must name a folder.")
        self._check_mode()

    def _check_mode(self) -> None:
        if self.mode == CORENET and any(source.weight != 1.0 for source in self.data):
            raise RequestError("--mode corenet reads every file as often as any other; weights need --mode packed.")
        for mode, only in _OF_MODES.items():
            changed = [field for field in only if getattr(self, field) != getattr(DataOptions, field)]
            if changed and mode != self.mode:
                raise RequestError(f"{flag(changed[0])} is for --mode {mode}; leave it out.")
