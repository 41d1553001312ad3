"""A report: the quality of a model's quantizations on held-out text, and a chart of quality over size."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..config import LAYERS, ModelConfig
from ..errors import RequestError
from ..formats.mlx import Quantization
from ..formats.packing import bits_per_weight
from ..model import OpenELM
from ..modules import module_at
from ..ops.packed import MODES
from ..wording import install
from .calibration import Progress, Stream, Teacher
from .recipes import RECIPES, planner

_WIDTH, _HEIGHT = 64, 16  # of the chart, in characters; the height is a multiple of its decades, about this
_LABEL = 8  # characters of a number beside it
# A divergence below this is rounding noise, and is drawn at this height.
_NOISE_FLOOR = 1e-6
_PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Row:
    """One quantization: `size` in bytes, `kl_divergence` from the full model in nats per token."""

    name: str
    bits_per_weight: float
    size: int
    perplexity: float
    kl_divergence: float


class Evaluator:
    """Compares models with the full model on held-out windows."""

    def __init__(
        self, model: OpenELM, windows: Sequence[Sequence[int]], batch_size: int = 4, progress: Progress | None = None
    ):
        """Read the windows with the full model, which may change afterwards.

        Args:
            windows: BOS and tokens, all of one length.
            progress: called with the batches read so far and in all.
        """
        arrays = [mx.array([list(w) for w in windows[i : i + batch_size]]) for i in range(0, len(windows), batch_size)]
        self._inputs = [array[:, :-1] for array in arrays]
        self._targets = [array[:, 1:].reshape(-1) for array in arrays]
        self._teacher = Teacher(model, self._inputs, progress)
        self.tokens = self._teacher.tokens

    def measure(self, model: OpenELM) -> tuple[float, float]:
        """The perplexity of a model, and the mean over tokens of KL(full model || model) in nats."""
        outputs = Stream(model, self._inputs).through(model.layers)
        divergence, loss = self._teacher.compare(model, outputs, self._targets)
        return (math.exp(loss) if loss < 700 else math.inf), divergence


def plain_choices(config: ModelConfig) -> dict[str, dict[str, Quantization]]:
    """The quantizations in every report, by name: each mode and bit width at its default group size; each recipe."""
    choices = {}
    for mode, (bits, _) in MODES.items():
        for width in sorted(bits):
            choices[f"affine {width}-bit" if mode == "affine" else mode] = planner(mode, width)(config)[0]
    for name in RECIPES:
        choices[name] = planner(recipe=name)(config)[0]
    return choices


def estimate(config: ModelConfig, reading_seconds: float) -> tuple[int, float]:
    """The rows of `compare` without the full model's, and the seconds that all rows will take.

    Args:
        reading_seconds: what `Evaluator` took. It multiplies with each matrix of the layers once; a row does so too,
            and twice with the output layer.
    """
    sizes = {path: math.prod(shape) for path, shape in config.matrix_shapes().items()}
    layers = sum(size for path, size in sizes.items() if path.startswith(LAYERS))
    output = config.vocab_size * config.model_dim
    count = len(plain_choices(config))
    return count, (count + 1) * reading_seconds * (1 + 2 * output / layers)


def compare(
    model: OpenELM, evaluator: Evaluator, dtype: mx.Dtype, *, progress: Progress | None = None
) -> Iterator[Row]:
    """A row for the full model, then one for each of `plain_choices`; the model is unchanged afterwards.

    Args:
        dtype: the stored type of tensors that are not quantized.
    """
    choices: dict[str, dict[str, Quantization]] = {"not quantized": {}, **plain_choices(model.config)}
    for done, (name, choice) in enumerate(choices.items(), 1):
        yield row_of(name, model, choice, evaluator, dtype)
        if progress is not None:
            progress(done, len(choices))


def row_of(
    name: str, model: OpenELM, choices: Mapping[str, Quantization], evaluator: Evaluator, dtype: mx.Dtype
) -> Row:
    """A row for a full model rounded as `convert` does; the model is unchanged afterwards."""
    full = {path: module_at(model, path)["weight"] for path in choices}
    try:
        for path, choice in choices.items():
            rounded = choice.unpack(choice.pack(full[path].astype(dtype)), full[path].dtype)
            module_at(model, path)["weight"] = rounded
            mx.eval(rounded)
        return make_row(name, model.config, choices, dtype, *evaluator.measure(model))
    finally:
        for path, weight in full.items():
            module_at(model, path)["weight"] = weight


def make_row(
    name: str,
    config: ModelConfig,
    choices: Mapping[str, Quantization],
    dtype: mx.Dtype,
    perplexity: float,
    kl_divergence: float,
) -> Row:
    """A row whose size follows from the shapes and `choices`."""
    bits = bits_per_weight(config, choices, dtype.size)
    return Row(name, bits, round(bits * config.num_parameters / 8), perplexity, kl_divergence)


def chart(rows: Sequence[Row], columns: int | None = None) -> list[str]:
    """Lines of text that plot KL divergence (logarithmic) over bits per weight; the best place is below on the left.

    Each point has the letter of its row; the full model is left out.

    Args:
        columns: the width to fit into, if the chart's own is larger.
    """
    points = [(letter(index), row) for index, row in enumerate(rows) if 0 < row.kl_divergence < math.inf]
    if not points:
        return []
    decades = [math.log10(max(row.kl_divergence, _NOISE_FLOOR)) for _, row in points]
    bits = [row.bits_per_weight for _, row in points]
    low, left = math.floor(min(decades)), math.floor(min(bits))
    high, right = max(math.ceil(max(decades)), low + 1), max(math.ceil(max(bits)), left + 1)
    width = _WIDTH if columns is None else max(16, min(_WIDTH, columns - _LABEL - 2))
    across, down = (width - 1) / (right - left), max(1, round((_HEIGHT - 1) / (high - low)))
    canvas = [[" "] * width for _ in range((high - low) * down + 1)]
    for (mark, _), decade, bit in zip(points, decades, bits, strict=True):
        line = canvas[round((high - decade) * down)]
        line[_free(line, round((bit - left) * across))] = mark
    labels = {index * down: f"{10.0 ** (high - index):.{max(0, index - high)}f}" for index in range(high - low + 1)}
    lines = [f"{labels.get(index, ''):>{_LABEL}} |{''.join(cells).rstrip()}" for index, cells in enumerate(canvas)]
    axis, numbers = ["-"] * width, [" "] * width
    step = math.ceil(4 / across)  # bits between two numbers, so that these do not touch
    for number in range(left, right + 1, step):
        column = round((number - left) * across)
        axis[column] = "+"
        start = min(column, width - len(str(number)))
        numbers[start : start + len(str(number))] = str(number)
    below = (axis, numbers, "bits per weight".center(width))
    return [
        *lines,
        *(f"{'':{_LABEL}} {corner}{''.join(text).rstrip()}" for corner, text in zip("+  ", below, strict=True)),
    ]


def _free(line: Sequence[str], column: int) -> int:
    """The place nearest to a column where a letter touches no other; if there is none, the nearest without a letter."""
    free = [index for index, cell in enumerate(line) if cell == " "]
    apart = [index for index in free if set(line[max(0, index - 1) : index + 2]) == {" "}]
    return min(apart or free, key=lambda index: abs(index - column))


def letter(index: int) -> str:
    """The letter of a row: a to z, then A to Z."""
    return "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[index % 52]


def check_picture(path: Path) -> None:
    """Refuse a path that `report_plot.draw` cannot write to; call it before long work.

    Raises:
        RequestError: matplotlib is missing, the suffix is not supported, the file exists or its folder does not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"Drawing a picture needs matplotlib: {install('plots')}.")
    if path.suffix.lower() not in _PICTURE_SUFFIXES:
        raise RequestError(f"{path} must end in {', '.join(_PICTURE_SUFFIXES)}.")
    if path.exists():
        raise RequestError(f"{path} exists; choose another file for the chart.")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"The folder of {path} does not exist.")
