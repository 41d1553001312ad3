"""The options of `bench`: which sizes to measure, how often, and beside what."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral
from typing import Annotated, NamedTuple

from ...errors import RequestError, quote
from ...generation.options import MAX_NUM_DRAFT_TOKENS, CacheOptions, check_number
from ...options import Option

OURS, MLX_LM = "mlx-openelm", "mlx-lm"


class Size(NamedTuple):
    """The tokens of a prompt, the new ones, the rows that are decoded together, and whether with drafts."""

    prompt: int
    generated: int
    rows: int = 1
    drafts: bool = False

    @property
    def label(self) -> str:
        """`512+128`, or `512+128, 8 rows, drafts`."""
        rows = f", {self.rows} rows" if self.rows > 1 else ""
        return f"{self.prompt}+{self.generated}{rows}{', drafts' if self.drafts else ''}"


@dataclass(frozen=True, repr=False)
class BenchOptions(CacheOptions):
    """The options of `bench`: which sizes to measure, how often, and beside what.

    - `prompt_tokens`, `generation_tokens`, `batch`: numbers, comma-separated; every combination is measured.
    - `draft_model`, `num_draft_tokens`, `prompt_lookup`: also measure with drafts, as in `generate`. Prompts are then
      text, since random tokens would be continued by nothing that a draft could foresee.
    - `repetitions`: timed runs of each size.
    - `prefill_step_size`: prompt tokens processed at a time; None is each program's default.
    - `delay`: seconds to wait before each run, for machines that throttle when they are hot.
    - `compare`: another program to measure, in turns with ours: mlx-lm.
    """

    prompt_tokens: Annotated[
        str, Option("Tokens of the prompt; several numbers are measured in turn.", flags=("-p",), metavar="N,...")
    ] = "512"
    generation_tokens: Annotated[
        str, Option("Tokens to generate; each number with each prompt.", flags=("-g",), metavar="N,...")
    ] = "128"
    batch: Annotated[
        str,
        Option("Texts to generate together, each with its prompt.", flags=("-b", "--batch-size"), metavar="N,..."),
    ] = "1"
    repetitions: Annotated[
        int, Option("Timed runs of each size, after a warm-up; the median counts.", flags=("-n",))
    ] = 5
    compare: Annotated[
        str | None,
        Option("Also measure mlx-lm, on the same files and in turns with ours.", metavar="mlx-lm", default="nothing"),
    ] = None
    draft_model: Annotated[
        str | None,
        Option(
            "Also measure with drafts of this smaller model.", group="Drafts", metavar="auto|MODEL", default="no drafts"
        ),
    ] = None
    num_draft_tokens: Annotated[
        int | None,
        Option("Tokens to draft at a time.", group="Drafts", default="as many as pay; in mlx-lm 3"),
    ] = None
    prompt_lookup: Annotated[
        bool, Option("Also measure with drafts of what followed the same words earlier.", group="Drafts")
    ] = False
    prefill_step_size: Annotated[
        int | None,
        Option(
            "Prompt tokens to process at a time.", group="Measuring", default="what suits the device, in mlx-lm 2048"
        ),
    ] = None
    delay: Annotated[
        float, Option("Seconds to wait before each run, so that a hot machine can cool down.", group="Measuring")
    ] = 0.0

    def validate(self, vocab_size: int | None = None, head_dim: int | None = None) -> None:
        """Raise a `RequestError` that names the flag of a bad value, or the package that a comparison lacks."""
        CacheOptions.validate(self, vocab_size, head_dim)
        check_number("--repetitions", self.repetitions, 1, math.inf, "1 or more", kind=Integral)
        check_number("--delay", self.delay, 0, 3600, "from 0 to 3600 seconds")
        if self.prefill_step_size is not None:
            check_number("--prefill-step-size", self.prefill_step_size, 1, math.inf, "1 or more", kind=Integral)
        self._check_drafts()
        self.sizes()
        if self.compare is None:
            return
        if self.compare.replace("_", "-").lower() != MLX_LM:
            raise RequestError(f"--compare must be {MLX_LM}, got {quote(self.compare)}.")
        if (lacking := self._lacking_in_mlx_lm()) is not None:
            raise RequestError(f"--compare {MLX_LM}: it has no {lacking}.")
        if find_spec("mlx_lm") is None:
            raise RequestError(f"--compare {MLX_LM} needs mlx-lm, which is not installed: pip install mlx-lm.")

    def sizes(self) -> list[Size]:
        """Every prompt length with every number of new tokens and every number of rows."""
        prompts = _numbers("--prompt-tokens", self.prompt_tokens)
        generated = _numbers("--generation-tokens", self.generation_tokens)
        batches = _numbers("--batch", self.batch)
        kinds = (False, True) if self.drafts else (False,)
        combinations = itertools.product(prompts, generated, batches, kinds)
        return [Size(*combination) for combination in combinations]

    @property
    def drafts(self) -> bool:
        """Whether to measure with drafts too."""
        return self.draft_model is not None or self.prompt_lookup

    def _check_drafts(self) -> None:
        """Raise a `RequestError` for a number of tokens that is out of range, or that nothing drafts."""
        if self.num_draft_tokens is None:
            return
        expected = f"a whole number from 1 to {MAX_NUM_DRAFT_TOKENS}"
        check_number("--num-draft-tokens", self.num_draft_tokens, 1, MAX_NUM_DRAFT_TOKENS, expected, kind=Integral)
        if not self.drafts:
            raise RequestError("--num-draft-tokens needs --draft-model or --prompt-lookup.")

    def _lacking_in_mlx_lm(self) -> str | None:
        """What to measure that mlx-lm does not have, for the end of a sentence."""
        batches = any(size.rows > 1 for size in self.sizes())
        if batches and self.kv_bits is not None:
            return "quantized caches in batches; leave out --kv-bits or --batch"
        if self.prompt_lookup:
            return "prompt lookup; leave out --prompt-lookup"
        if self.drafts and batches:
            return "drafts in batches; leave out --draft-model or --batch"
        if self.drafts and self.max_kv_size is not None:
            return "drafts with sliding caches; leave out --draft-model or --max-kv-size"
        return None


def _numbers(flag: str, text: str) -> list[int]:
    """Comma-separated numbers from 1 on, without repetitions."""
    try:
        values = [int(part) for part in str(text).split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise RequestError(f"{flag} must be numbers from 1 on, separated by commas, got {quote(text)}.")
    return list(dict.fromkeys(values))
