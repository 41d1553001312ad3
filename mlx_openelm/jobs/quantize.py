"""Quantize a model knowing what it costs: budgets, learned methods, and a report on held-out text."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backend
from ..config import ModelConfig
from ..errors import RequestError
from ..formats import atomic
from ..formats.mlx import Checkpoint
from ..formats.packing import Quantization, bits_per_weight, scale_dtype
from ..formats.weights import Weights
from ..inputs import to_path
from ..loading import build_model, check_dtype, dtype_for
from ..model import OpenELM
from ..publishing import card as model_card
from ..publishing.card_text import Quality
from ..quantization import learned, report, sensitivity
from ..quantization.learned import Progress
from ..quantization.options import QuantizeOptions
from ..quantization.report import Row, Yardstick
from ..quantization.sensitivity import Sensitivities
from ..quantization.text import CalibrationText, read_text
from ..sources import open_source
from ..wording import flag
from .convert import requantize, write_source

SENSITIVITIES = "sensitivities.json"
# Windows that sensitivities are measured on.
_SENSITIVITY_WINDOWS = 8
# Bytes a parameter that calibrating in float32 takes: the model, and the matrices a report puts in their place.
_BYTES_NEEDED = 9


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did: the folder (None where only a report was asked for), the choices, the report's rows.

    `costs` is the measured cost of each choice by module path, where bits were chosen by it; `calibrated_on` says
    which text was learned from.
    """

    path: Path | None = None
    bits_per_weight: float | None = None
    choices: dict[str, Quantization] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    calibrated_on: str | None = None
    report: list[Row] = field(default_factory=list)


def quantize(
    model: str | Path,
    mlx_path: str | Path = "mlx_model",
    options: QuantizeOptions | None = None,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Write a quantized model as an MLX folder, report what it costs, or both.

    Args:
        model: as in `convert`.
        dtype: the type of what is not quantized; bfloat16 unless told.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        RequestError: a request that cannot be right; nothing was written.
        OpenELMError: a download, a method or writing failed; nothing was left behind.
    """
    options = options or QuantizeOptions()
    if (warning := backend.slow_training_warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    check_dtype(model, dtype)
    target = Path(mlx_path)
    if options.writes:
        target = atomic.check_target(target, overwrite=overwrite)
    places: dict[str, Any] = {"tokenizer": tokenizer, "config_yaml": config_yaml, "revision": revision}
    source = open_source(model, **places)
    config, stored = source.checkpoint.config, dtype_for(dtype, source.checkpoint.config) or mx.bfloat16
    if (rounding := source.checkpoint.rounding) is not None:
        raise RequestError(
            f"{model} is already quantized to {rounding}; quantize the original, or unpack it into a folder first: "
            f"mlx-openelm convert --model {model}{' --dequantize' if source.checkpoint.quantization else ''}."
        )
    if options.writes:
        atomic.keep_apart(target, source.path, "the model to quantize")
        source.tokenizer.check_writable()
    if options.target_bpw is not None:
        sensitivity.check_target(options.target_bpw, config, stored)

    run = _Run(options, config, stored, progress or (lambda *_: None))
    if options.is_learned or options.report:
        if options.sensitivities is not None:
            run.known = sensitivity.read(to_path(options.sensitivities), config)
        run.text = read_text(source.tokenizer, config, options)
        run.show("Loading", 0, 1)
        with source.reading():
            full = build_model(source.checkpoint, dtype=run.compute)
        run.show("Loading", 1, 1)
        run.compare(full)
        if not options.writes:
            return Quantized(report=run.rows)
        if options.is_learned:
            with _keeping(run, target):
                source.checkpoint = run.learn(full)
        else:
            run.add_row(lambda: report.row_of(run.name, full, options.packing().plan(config)[0], run.yardstick, stored))
            source = open_source(model, **places)
    if not options.is_learned:
        run.exceptions = requantize(source.checkpoint, options.packing(dtype))
    choices = source.checkpoint.quantization
    making = {"model": str(model), "mlx_path": target, **options.making(), "dtype": dtype, "revision": revision}
    making |= {name: None if path is None else Path(path) for name, path in places.items() if name != "revision"}
    with _keeping(run, target):
        write_source(
            source,
            target,
            command=model_card.command_line("quantize", making),
            overwrite=overwrite,
            progress=lambda done, total: run.show("Writing", done, total),
            card={"method": _method_name(options), "recipe": options.recipe, "quality": run.quality()},
            extra=None if run.known is None else lambda folder: run.known.save(folder / SENSITIVITIES),  # type: ignore[union-attr]
        )
    costs = {} if run.known is None else {path: run.known.costs[path][choice] for path, choice in choices.items()}
    bits = bits_per_weight(config, choices, stored.size)
    calibrated_on = str(run.text) if options.is_learned else None
    return Quantized(target, bits, choices, run.exceptions, costs, calibrated_on, run.rows)


class _Run:
    """What the steps of one `quantize` hand on."""

    text: CalibrationText
    yardstick: Yardstick

    def __init__(self, options: QuantizeOptions, config: ModelConfig, stored: mx.Dtype, show: Progress):
        self.options, self.config, self.stored, self.show = options, config, stored, show
        self.known: Sensitivities | None = None
        self.rows: list[Row] = []
        self.exceptions: dict[str, str] = {}
        flags = options.making().items()
        self.name = "this: " + " ".join(f"{flag(name)} {v}" for name, v in flags if not isinstance(v, Path))
        # Small divergences drown in the rounding of half precision, so float32 where memory allows, and on a CPU.
        available = backend.available_memory()
        fits = available is None or config.num_parameters * _BYTES_NEEDED < available
        self.compute = "float32" if fits or not backend.on_gpu() else None

    def stage(self, name: str) -> Callable[[int, int], None]:
        """Progress of one stage."""
        return lambda done, total: self.show(name, done, total)

    def compare(self, full: OpenELM) -> None:
        """Begin the report, if there is to be one: the full model, and plain choices."""
        if self.options.report:
            self.yardstick = Yardstick(full, self.text.held_out, progress=self.stage("Reading the held-out text"))
            self.rows += report.compare(full, self.yardstick, self.stored, progress=self.stage("Comparing"))

    def add_row(self, measure: Callable[[], Row]) -> None:
        """End the report, if there is one, with what is to be written."""
        if self.options.report:
            self.show("Measuring", 0, 1)
            self.rows.append(measure())
            self.show("Measuring", 1, 1)

    def learn(self, full: OpenELM) -> Checkpoint:
        """Choose bits, round, and measure; uses the full model up."""
        scales = scale_dtype(self.stored)
        if self.options.target_bpw is not None:
            if self.known is None:
                self.known = sensitivity.measure(
                    full,
                    self.text.batches(_SENSITIVITY_WINDOWS),
                    text=self.text.name,
                    dtype=scales,
                    progress=self.stage("Measuring sensitivities"),
                )
            choices = sensitivity.assign(self.known.costs, self.config, self.options.target_bpw, self.stored)
        else:
            choices, self.exceptions = self.options.packing().plan(self.config)
        tensors = learned.quantize_model(
            full,
            choices,
            self.options.method,
            self.text.batches(),
            self.stored,
            scales,
            seed=self.options.seed or 0,
            progress=self.show,
        )

        def measure() -> Row:
            model = build_model(Checkpoint(self.config, Weights.of_arrays(tensors), dict(choices)), dtype=self.compute)
            figures = self.yardstick.measure(model)
            return report.make_row(self.name, self.config, choices, self.stored, *figures)

        self.add_row(measure)
        return Checkpoint(self.config, Weights.of_arrays(tensors), choices)

    def quality(self) -> list[Quality]:
        """What the report says of the model that is written, for its card."""
        if not self.rows:
            return []
        full, this = self.rows[0], self.rows[-1]
        text, tokens = self.text.held_out_name, self.yardstick.tokens
        return [Quality(text, tokens, this.perplexity, full.perplexity, this.kl_divergence)]


@contextlib.contextmanager
def _keeping(run: _Run, target: Path) -> Iterator[None]:
    """Where the block fails, what was measured in it for long is kept beside `target`."""
    try:
        yield
    except BaseException:
        kept = target.parent / f"{target.name}-{SENSITIVITIES}"
        if run.known is not None and run.options.sensitivities is None and not kept.exists():
            # What went wrong first is what to tell.
            with contextlib.suppress(OSError):
                run.known.save(kept)
        raise


def _method_name(options: QuantizeOptions) -> str | None:
    parts = ["bits by measured sensitivity"] if options.target_bpw is not None else []
    return " + ".join([*parts, *(method.upper() for method in options.method)]) or None
