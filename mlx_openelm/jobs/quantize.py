"""Quantize a model by measuring it: bit budgets, learned methods, and a report on held-out text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx

from .. import backend, console
from ..config import ModelConfig
from ..errors import RequestError
from ..evaluation.windows import reading_note
from ..formats import atomic
from ..formats.mlx import Checkpoint, Quantization, scale_dtype
from ..formats.packing import bits_per_weight
from ..formats.safetensors import Weights
from ..inputs import to_path
from ..loading import build_model, check_dtype, dtype_for
from ..messages import warn
from ..model import OpenELM
from ..publishing.card_text import Quality
from ..publishing.command_line import command_line, source_flags
from ..quantization import learned, report, sensitivity
from ..quantization.learned import Progress
from ..quantization.options import QuantizeKeywords, QuantizeOptions
from ..quantization.report import Evaluator, Row
from ..quantization.sensitivity import Sensitivities
from ..quantization.text import CalibrationText, read_text
from ..sources import Source, open_source
from ..wording import duration, flag
from .convert import check_unquantized, requantize
from .writing import write_folder

SENSITIVITIES = "sensitivities.json"
# The number of windows that sensitivities are measured on.
_SENSITIVITY_WINDOWS = 8
# A report that takes longer than this is announced, in seconds.
_LONG_SECONDS = 10.0
# Bytes per parameter that calibration in float32 needs: the model, and the rounded matrices of a report.
_BYTES_PER_PARAMETER = 9


@dataclass(frozen=True)
class Quantized:
    """What `quantize` did.

    Attributes:
        path: the folder; None if only a report was asked for.
        bits_per_weight: bits per parameter as stored.
        choices: how each matrix is packed, by module path.
        exceptions: descriptions of matrices packed differently from the rest, by module path.
        costs: if bits were chosen by sensitivity, the measured cost of each choice, by module path.
        calibrated_on: a description of the calibration text; None if none was used.
        report: the rows of the report.
        measured_on: the tokens and the text that the report was measured on.
    """

    path: Path | None = None
    bits_per_weight: float | None = None
    choices: dict[str, Quantization] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    calibrated_on: str | None = None
    report: list[Row] = field(default_factory=list)
    measured_on: str | None = None


def quantize(
    model: str | Path,
    mlx_path: str | Path = "mlx_model",
    options: QuantizeOptions | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = True,
    say: Callable[[str], None] | None = None,
    **keywords: Unpack[QuantizeKeywords],
) -> Quantized:
    """Write a quantized model as an MLX folder, report what it costs, or both.

    Args:
        model: as in `convert`.
        options: how to quantize; 4 bits in groups of 64 by default.
        keywords: the fields of `QuantizeOptions`, in place of `options`: `q_bits=8`.
        dtype: the type of tensors that are not quantized; bfloat16 by default.
        tokenizer, config_yaml, revision: as in `convert`.
        overwrite: replace `mlx_path` if it exists.
        progress: called with the name of a stage, the amount done, and the total; by default a bar shows each stage,
            None or False shows none.
        say: called with a line about what takes long, such as a report; by default it is printed between the bars.

    Raises:
        RequestError: an invalid request; nothing was written.
        OpenELMError: a download, a method or writing failed; nothing was left behind.
    """
    if options is not None and keywords:
        raise RequestError(f"options and {next(iter(keywords))} both say how to quantize; give one of them.")
    options = options or QuantizeOptions(**keywords)
    if (warning := backend.slow_training_warning()) is not None:
        warn(warning)
    dtype = check_dtype(model, dtype)
    target = atomic.check_target(Path(mlx_path), overwrite=overwrite) if options.writes else Path(mlx_path)

    open_model = partial(open_source, model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    source = open_model()
    config = source.checkpoint.config
    stored = dtype_for(dtype, config) or mx.bfloat16
    flags = {"model": str(model), "mlx_path": Path(mlx_path), **options.flags(), "dtype": dtype}
    opened_with = source_flags(tokenizer, config_yaml, revision)
    check_unquantized(source, "quantize", _asked(flags, options), opened_with)
    _check_source(source, target, options, stored)

    with console.stages(progress) as show:
        if say is None:
            say = show.say if isinstance(show, console.Stages) else lambda _: None
        run = _Run(options, config, stored, show, say)
        if options.is_learned or options.report:
            full = run.load(source)
            run.compare(full)
            if not options.writes:
                return Quantized(report=run.rows, measured_on=run.measured_on())
            if options.is_learned:
                with _sensitivities_kept(run, target):
                    source.checkpoint = run.learn(full)
            else:
                plan = options.packing().plan(config)[0]
                run.add_row(lambda: report.row_of(run.name, full, plan, run.evaluator, stored))
                source = open_model()  # its weights are in `full`
        if not options.is_learned:
            run.exceptions = requantize(source.checkpoint, options.packing(dtype))
        choices = source.checkpoint.quantization

        with _sensitivities_kept(run, target):
            write_folder(
                source,
                target,
                command=command_line("quantize", flags | opened_with),
                overwrite=overwrite,
                progress=run.stage("Writing"),
                card={"method": _method_name(options), "recipe": options.recipe, "quality": run.quality()},
                extra=run.save_sensitivities,
            )
        return Quantized(
            path=to_path(mlx_path),
            bits_per_weight=bits_per_weight(config, choices, stored.size),
            choices=choices,
            exceptions=run.exceptions,
            costs=run.costs(choices),
            calibrated_on=str(run.text) if options.is_learned else None,
            report=run.rows,
            measured_on=run.measured_on(),
        )


def _asked(flags: Mapping[str, Any], options: QuantizeOptions) -> dict[str, Any]:
    """The flags of the whole request: with those of the report, and without a folder if none is written."""
    values = dict(flags) | {"report": options.report, "report_data": options.report_data}
    return values if options.writes else {name: value for name, value in values.items() if name != "mlx_path"}


def _check_source(source: Source, target: Path, options: QuantizeOptions, stored: mx.Dtype) -> None:
    """Refuse a target that cannot be written, and too small a budget, before any weight is read."""
    if options.writes:
        atomic.keep_apart(target, source.path, "the model to quantize")
        source.tokenizer.check_writable()
    if options.target_bpw is not None:
        sensitivity.check_target(options.target_bpw, source.checkpoint.config, stored)


class _Run:
    """The state that the steps of one `quantize` call share."""

    text: CalibrationText
    evaluator: Evaluator

    def __init__(
        self,
        options: QuantizeOptions,
        config: ModelConfig,
        stored: mx.Dtype,
        progress: Progress,
        say: Callable[[str], None],
    ):
        self.options, self.config, self.stored, self.progress, self.say = options, config, stored, progress, say
        self.sensitivities: Sensitivities | None = None
        self.rows: list[Row] = []
        self.exceptions: dict[str, str] = {}
        flags = options.flags().items()
        self.name = "this: " + " ".join(f"{flag(name)} {v}" for name, v in flags if not isinstance(v, Path))
        # The rounding of half precision hides small divergences, so use float32 on a CPU, and where memory allows.
        available = backend.available_memory()
        fits = available is None or config.num_parameters * _BYTES_PER_PARAMETER < available
        self.compute = "float32" if fits or not backend.on_gpu() else None

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The progress callback of one stage."""
        return lambda done, total: self.progress(name, done, total)

    def load(self, source: Source) -> OpenELM:
        """Read the text, known sensitivities, and the full model; takes the weights out of `source`."""
        if self.options.sensitivities is not None:
            self.sensitivities = sensitivity.read(to_path(self.options.sensitivities), self.config)
        for file in (self.options.calibration, self.options.report_data):
            if file is not None and (note := reading_note(file)) is not None:
                self.say(note)
        self.text = read_text(source.tokenizer, self.config, self.options)
        self.progress("Loading", 0, 1)
        with source.reading():
            full = build_model(source.checkpoint, dtype=self.compute)
        self.progress("Loading", 1, 1)
        return full

    def compare(self, full: OpenELM) -> None:
        """With `report`, add the rows of the full model and of plain quantizations."""
        if self.options.report:
            started = time.monotonic()
            self.evaluator = Evaluator(full, self.text.held_out, progress=self.stage("Reading the held-out text"))
            count, seconds = report.estimate(self.config, time.monotonic() - started)
            if seconds > _LONG_SECONDS:
                self.say(f"The report compares {count} quantizations, which takes about {duration(seconds)}.")
            self.rows += report.compare(full, self.evaluator, self.stored, progress=self.stage("Comparing"))

    def add_row(self, measure: Callable[[], Row]) -> None:
        """With `report`, add the row of the model that is written."""
        if self.options.report:
            self.progress("Measuring", 0, 1)
            self.rows.append(measure())
            self.progress("Measuring", 1, 1)

    def learn(self, full: OpenELM) -> Checkpoint:
        """Choose bits, round by the learned methods, and measure the result; empties the full model."""
        choices = self._choose(full)
        tensors = learned.quantize_model(
            full,
            choices,
            self.options.method,
            self.text.batches(),
            self.stored,
            scale_dtype(self.stored),
            seed=self.options.seed or 0,
            progress=self.progress,
        )

        def measure() -> Row:
            model = build_model(Checkpoint(self.config, Weights.of_arrays(tensors), dict(choices)), dtype=self.compute)
            perplexity, divergence = self.evaluator.measure(model)
            return report.make_row(self.name, self.config, choices, self.stored, perplexity, divergence)

        self.add_row(measure)
        return Checkpoint(self.config, Weights.of_arrays(tensors), choices)

    def _choose(self, full: OpenELM) -> dict[str, Quantization]:
        """How to pack each matrix, by module path: under the bit budget if there is one, else as the flags say."""
        if self.options.target_bpw is None:
            choices, self.exceptions = self.options.packing().plan(self.config)
            return choices
        if self.sensitivities is None:
            self.sensitivities = sensitivity.measure(
                full,
                self.text.batches(_SENSITIVITY_WINDOWS),
                text=self.text.name,
                dtype=scale_dtype(self.stored),
                progress=self.stage("Measuring sensitivities"),
            )
        return sensitivity.assign(self.sensitivities.costs, self.config, self.options.target_bpw, self.stored)

    def costs(self, choices: dict[str, Quantization]) -> dict[str, float]:
        """The measured cost of each choice by module path; empty without sensitivities."""
        if self.sensitivities is None:
            return {}
        return {path: self.sensitivities.costs[path][choice] for path, choice in choices.items()}

    def save_sensitivities(self, folder: Path) -> None:
        """Write the sensitivities, if there are any, into a folder."""
        if self.sensitivities is not None:
            self.sensitivities.save(folder / SENSITIVITIES)

    def measured_on(self) -> str | None:
        """The tokens and the text of the report; None without one."""
        return f"{self.evaluator.tokens:,} tokens of {self.text.held_out_name}" if self.rows else None

    def quality(self) -> list[Quality]:
        """The measured quality of the written model, for its card."""
        if not self.rows:
            return []
        full, this = self.rows[0], self.rows[-1]
        text, tokens = self.text.held_out_name, self.evaluator.tokens
        return [Quality(text, tokens, this.perplexity, full.perplexity, this.kl_divergence)]


@contextlib.contextmanager
def _sensitivities_kept(run: _Run, target: Path) -> Iterator[None]:
    """If the block fails, save the sensitivities beside `target`: they took long to measure."""
    try:
        yield
    except BaseException:
        path = target.parent / f"{target.name}-{SENSITIVITIES}"
        if run.sensitivities is not None and run.options.sensitivities is None and not path.exists():
            # A failure to save must not hide the first error.
            with contextlib.suppress(OSError):
                run.sensitivities.save(path)
        raise


def _method_name(options: QuantizeOptions) -> str | None:
    """The method that a model card names."""
    parts = ["bits by measured sensitivity"] if options.target_bpw is not None else []
    return " + ".join([*parts, *(method.upper() for method in options.method)]) or None
