"""The texts to calibrate quantization on and to measure it on."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError
from ..evaluation.windows import load_documents, make_windows
from ..hub.catalog import ASSETS
from ..inputs import to_path
from ..text.tokenizer import Tokenizer
from .options import NUM_SAMPLES, SEQUENCE_LENGTH, QuantizeOptions

BUNDLED = ASSETS / "calibration.jsonl"
_BUNDLED_NAME = "the bundled text"

# Every N-th window of the calibration text is held out for the report, with or without one.
_HELD_OUT = 8
_REPORT_WINDOWS = 32
_BATCH = 4


@dataclass(frozen=True)
class CalibrationText:
    """Windows to calibrate on, and held-out windows to measure on. Each is BOS and the same number of tokens."""

    name: str
    windows: list[list[int]]
    held_out: list[list[int]]
    held_out_name: str

    def batches(self, count: int | None = None) -> list[mx.array]:
        """Tokens [batch, length] of the first `count` windows."""
        windows = self.windows[:count]
        return [mx.array(windows[i : i + _BATCH]) for i in range(0, len(windows), _BATCH)]

    def __str__(self) -> str:
        return f"{len(self.windows)} windows of {len(self.windows[0]) - 1} tokens of {self.name}"


def read_text(tokenizer: Tokenizer, config: ModelConfig, options: QuantizeOptions) -> CalibrationText:
    """Windows of the calibration text, shuffled by the seed; every eighth is always held out to measure on.

    Raises:
        RequestError: unreadable text, less than one window of it, or no window left to measure on.
    """
    length = options.sequence_length or min(SEQUENCE_LENGTH, config.max_context_length)
    if length > config.max_context_length:
        raise RequestError(f"--sequence-length must be at most {config.max_context_length}, the model's context.")
    path = BUNDLED if options.calibration is None else to_path(options.calibration)
    name = _BUNDLED_NAME if options.calibration is None else path.name
    windows = _shuffled(tokenizer, path, length, options)
    held_out, held_out_name = windows[::_HELD_OUT], f"a held-out part of {name}"
    if len(windows) > 1:
        windows = [window for index, window in enumerate(windows) if index % _HELD_OUT]
    elif options.report and options.report_data is None:
        raise RequestError(f"{name} is one window long, so none is left to measure on; give --report-data.")
    if options.report_data is not None:
        data = to_path(options.report_data)
        held_out, held_out_name = _shuffled(tokenizer, data, length, options), data.name
    count = options.num_samples or NUM_SAMPLES
    if options.num_samples is not None and count > len(windows):
        warnings.warn(f"{name} has {len(windows)} windows to learn from, not {count}; all are used.", stacklevel=2)
    return CalibrationText(name, windows[:count], held_out[:_REPORT_WINDOWS], held_out_name)


def _shuffled(tokenizer: Tokenizer, path: Path, length: int, options: QuantizeOptions) -> list[list[int]]:
    windows = make_windows(tokenizer, load_documents(path), length)
    random.Random(options.seed or 0).shuffle(windows)
    return windows
