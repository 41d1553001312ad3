"""The options of `quantize`, checked before any work."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any, TypedDict

from ..errors import RequestError
from ..generation.options import check_number
from ..inputs import to_path
from ..options import Option, Options, paths_as_text
from ..wording import flag
from .learned import parse_methods
from .recipes import BITS, GROUP_SIZE, Packing

NUM_SAMPLES = 128
SEQUENCE_LENGTH = 512
_MIN_SEQUENCE_LENGTH = 16

# Flags that ask for a model; with --report and none of them nothing is written.
_WRITING = ("q_bits", "q_group_size", "q_mode", "recipe", "target_bpw")
_FILE_FLAGS = ("calibration", "sensitivities", "report_data")
# Flags that choose the text.
_TEXT_FLAGS = ("calibration", "num_samples", "sequence_length", "seed")


@dataclass(frozen=True, repr=False)
class QuantizeOptions(Options):
    """How to quantize. The flags of `quantize`, with the same names and defaults.

    `num_samples` and `sequence_length` default to 128 and 512. With `report` and no flag that says how to quantize,
    no model is written.

    `target_bpw` is in bits per parameter, `sequence_length` in tokens, `num_samples` in windows of that length.

    Raises:
        RequestError: flags that contradict each other, or a missing file.
    """

    q_bits: Annotated[int | None, Option("Bits per weight.", default=BITS)] = None
    q_group_size: Annotated[int | None, Option("Weights that share a scale.", default=GROUP_SIZE)] = None
    q_mode: Annotated[
        str | None,
        Option(
            "Format of the quantized weights.",
            group="Quantization",
            metavar="affine|mxfp4|nvfp4|mxfp8",
            default="affine",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        Option(
            "Instead of --q-bits: low bits for most matrices, high bits for those that need them.",
            group="Quantization",
            flags=("--quant-predicate",),
            metavar="mixed_2_6|mixed_3_4|mixed_3_6|mixed_4_6",
        ),
    ] = None
    target_bpw: Annotated[
        float | None,
        Option("Bits per weight on average, at most; the matrices that lose most get more bits.", group="Calibration"),
    ] = None
    method: Annotated[
        tuple[str, ...],
        Option(
            "Learn from text how to round the weights; repeatable, or with commas.",
            group="Calibration",
            metavar="awq|gptq|dwq",
        ),
    ] = ()
    calibration: Annotated[
        str | None,
        Option(
            "Text for --target-bpw and --method: a text file, or .jsonl with `text` on every line.",
            group="Calibration",
            metavar="FILE",
            default="a text in the package",
        ),
    ] = None
    num_samples: Annotated[
        int | None,
        Option("Windows of the calibration text to use.", group="Calibration", default=str(NUM_SAMPLES)),
    ] = None
    sequence_length: Annotated[
        int | None, Option("Tokens per window.", group="Calibration", default=str(SEQUENCE_LENGTH))
    ] = None
    sensitivities: Annotated[
        str | None,
        Option(
            "With --target-bpw, a file of sensitivities that an earlier run saved, instead of measuring them.",
            group="Calibration",
            metavar="FILE",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option("Seed for choosing windows: the same seed gives the same model.", group="Calibration", default="0"),
    ] = None
    report: Annotated[
        bool,
        Option("Compare bits, modes and recipes on held-out text: size, perplexity, KL divergence.", group="Report"),
    ] = False
    report_data: Annotated[
        str | None,
        Option(
            "Text for --report: a text file, or .jsonl with `text` on every line.",
            group="Report",
            metavar="FILE",
            default="a text in the package",
        ),
    ] = None

    def __post_init__(self) -> None:
        paths_as_text(self)
        object.__setattr__(self, "method", parse_methods(self.method))
        if self.target_bpw is not None:
            given = [name for name in _WRITING if name != "target_bpw" and getattr(self, name) is not None]
            if given:
                raise RequestError(f"--target-bpw chooses bits and groups itself; leave {flag(given[0])} out.")
            check_number("--target-bpw", self.target_bpw, math.ulp(0.0), sys.float_info.max, "a positive number")
        if self.q_mode not in (None, "affine") and self.method:
            raise RequestError(f"--method needs scales to learn, which --q-mode {self.q_mode} does not have.")
        self.packing()
        if self.sensitivities is not None and self.target_bpw is None:
            raise RequestError("--sensitivities needs --target-bpw.")
        if self.report_data is not None and not self.report:
            raise RequestError("--report-data needs --report.")
        for name in _TEXT_FLAGS if not (self.is_learned or self.report) else ():
            if getattr(self, name) is not None:
                raise RequestError(f"{flag(name)} needs --target-bpw, --method or --report: nothing else reads text.")
        if self.num_samples is not None and not self.is_learned:
            raise RequestError("--num-samples needs --target-bpw or --method: a report alone learns from no text.")
        if self.calibration is not None and self.report_data is not None and not self.is_learned:
            raise RequestError("With --report-data, only --target-bpw and --method read --calibration.")
        for name, least in (("num_samples", 1), ("sequence_length", _MIN_SEQUENCE_LENGTH)):
            if (value := getattr(self, name)) is not None:
                check_number(flag(name), value, least, math.inf, f"{least} or more", kind=Integral)
        for name in _FILE_FLAGS:
            if (value := getattr(self, name)) is not None and not to_path(value).is_file():
                raise RequestError(f"{flag(name)} must name a file; {value} is not one.")

    def packing(self, dtype: str | None = None) -> Packing:
        """The packing that the bits or the recipe mean, without a budget."""
        return Packing(True, self.q_bits, self.q_group_size, self.q_mode or "affine", self.recipe, dtype=dtype)

    @property
    def writes(self) -> bool:
        """Whether a model is to be written, and not only a report made."""
        return bool(self.method) or any(getattr(self, name) is not None for name in _WRITING) or not self.report

    @property
    def is_learned(self) -> bool:
        """Whether the written model depends on the calibration text."""
        return bool(self.method) or self.target_bpw is not None

    def flags(self) -> dict[str, Any]:
        """The given flags that the model depends on, by name; files as paths."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: Path(values[name]) for name in _FILE_FLAGS if values[name] is not None}
        values["method"] = ",".join(self.method) or None
        return {name: value for name, value in values.items() if value is not None and not name.startswith("report")}


class QuantizeKeywords(TypedDict, total=False):
    """The names and types in `QuantizeOptions`, for type checkers and editors; a test compares the two."""

    q_bits: int | None
    q_group_size: int | None
    q_mode: str | None
    recipe: str | None
    target_bpw: float | None
    method: tuple[str, ...]
    calibration: str | None
    num_samples: int | None
    sequence_length: int | None
    sensitivities: str | None
    seed: int | None
    report: bool
    report_data: str | None
