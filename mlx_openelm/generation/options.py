"""The options of generation, and checks of options, token ids and caches. Errors name the command's flags."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

import mlx.core as mx

from ..cache import check_window
from ..errors import RequestError, quote
from ..inputs import check_characters
from ..options import Option, Options

# These bounds keep every product and sum of logits inside float32, where an overflow would end in NaN.
PENALTY_LIMIT = 1000.0
BIAS_LIMIT = 1e30
MAX_TEMP = 1000.0  # nearly uniform

MAX_NUM_DRAFT_TOKENS = 64

# The options that a sampler is made from.
_SAMPLER_OPTIONS = ("temp", "top_p", "top_k", "min_p", "min_tokens_to_keep", "xtc_probability", "xtc_threshold", "seed")

# The options that logits processors are made from.
PENALTIES = ("logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty")
# The options that say what the text must be; at most one is given.
CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choice")
EMPTY_PROMPT = "The prompt is empty; give some text."
NOT_UTF8 = "The prompt is not UTF-8 text; give the prompt in UTF-8."


@dataclass(frozen=True, repr=False)
class SamplingParams(Options):
    """How the next token is chosen. Names and meanings are mlx-lm's; the defaults mean "off" (greedy decoding).

    - `temp`: 0 takes the most likely token.
    - `top_p`: the smallest set of most likely tokens that holds this much probability; 0 and 1 mean off.
    - `top_k`: exactly this many of the most likely tokens; 0, or at least the size of the vocabulary, means off.
    - `min_p`: tokens at least this likely relative to the most likely one, and never fewer than
      `min_tokens_to_keep` (which affects `min_p` only).
    - `xtc_probability`, `xtc_threshold`: with this probability, drop all but the least likely of the tokens
      above the threshold ("exclude top choices").
    - `repetition_penalty`: positive logits of tokens in the context are divided by it, negative ones
      multiplied, once each (Keskar et al., 2019, CTRL, section 4.1). `None` and 1 mean off.
    - `presence_penalty`: subtracted from the logit of every token in the context, once each.
    - `frequency_penalty`: subtracted once for every time the token is in the context. Both may be negative.
    - `*_context_size`: the number of last tokens that the penalty reads, including the prompt and, if their ids are
      given, the tokens in the prompt cache. `None` is all of them, as in transformers (in mlx-lm it is 20). Presence
      and frequency penalties count the prompt too, as in mlx-lm and unlike the OpenAI API.
    - `logit_bias`: token id to a number added to its logit; `-inf` bans the token.
    """

    temp: Annotated[float, Option("Sampling temperature; 0 always takes the most likely token.")] = 0.0
    top_p: Annotated[
        float, Option("Sample from the most likely tokens that together have this probability; 0 or 1 is off.")
    ] = 1.0
    top_k: Annotated[int, Option("Sample from the N most likely tokens; 0 is off.", group="Sampling")] = 0
    min_p: Annotated[
        float,
        Option(
            "Sample from tokens with at least this share of the most likely token's probability; 0 is off.",
            group="Sampling",
        ),
    ] = 0.0
    min_tokens_to_keep: Annotated[int, Option("Tokens that --min-p keeps at least.", group="Sampling")] = 1
    xtc_probability: Annotated[
        float, Option("At each token, exclude the top choices (XTC) with this probability.", group="Sampling")
    ] = 0.0
    xtc_threshold: Annotated[
        float,
        Option("XTC excludes all but the least likely of the tokens above this probability.", group="Sampling"),
    ] = 0.1
    repetition_penalty: Annotated[
        float | None,
        Option(
            "Make tokens that are in the context less likely, by this factor; Apple suggests 1.2.",
            group="Penalties",
            default="1, which is off",
        ),
    ] = None
    repetition_context_size: Annotated[
        int | None,
        Option("Tokens that --repetition-penalty looks at, counted from the last.", group="Penalties", default="all"),
    ] = None
    presence_penalty: Annotated[
        float, Option("Subtract this from the logits of tokens that are in the context.", group="Penalties")
    ] = 0.0
    presence_context_size: Annotated[
        int | None,
        Option("Tokens that --presence-penalty looks at, counted from the last.", group="Penalties", default="all"),
    ] = None
    frequency_penalty: Annotated[
        float,
        Option("Subtract this from a token's logit for each time it is in the context.", group="Penalties"),
    ] = 0.0
    frequency_context_size: Annotated[
        int | None,
        Option("Tokens that --frequency-penalty looks at, counted from the last.", group="Penalties", default="all"),
    ] = None
    logit_bias: Annotated[
        Mapping[int, float] | None,
        Option(
            "Add VALUE to the logit of the token ID; -inf bans the token. Repeatable; or a JSON object of them.",
            group="Penalties",
            metavar="ID=VALUE",
        ),
    ] = None

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise a `RequestError` that names the flag of a bad value; token ids are checked if `vocab_size` is given."""
        check_number("--temp", self.temp, 0, MAX_TEMP, f"between 0 and {MAX_TEMP:g}")
        check_number("--top-p", self.top_p, 0, 1, "between 0 and 1")
        check_number("--top-k", self.top_k, 0, math.inf, "a whole number, 0 or above", kind=Integral)
        check_number("--min-p", self.min_p, 0, 1, "between 0 and 1")
        at_least_1 = "a whole number, 1 or above"
        check_number("--min-tokens-to-keep", self.min_tokens_to_keep, 1, math.inf, at_least_1, kind=Integral)
        check_number("--xtc-probability", self.xtc_probability, 0, 1, "between 0 and 1")
        check_number("--xtc-threshold", self.xtc_threshold, 0, 0.5, "between 0 and 0.5")
        if self.repetition_penalty is not None:
            expected = f"between {1 / PENALTY_LIMIT:g} and {PENALTY_LIMIT:g} (1 changes nothing)"
            check_number("--repetition-penalty", self.repetition_penalty, 1 / PENALTY_LIMIT, PENALTY_LIMIT, expected)
        for name in ("presence", "frequency"):
            expected = f"between {-PENALTY_LIMIT:g} and {PENALTY_LIMIT:g} (0 changes nothing)"
            value = getattr(self, f"{name}_penalty")
            check_number(f"--{name}-penalty", value, -PENALTY_LIMIT, PENALTY_LIMIT, expected)
        for name in ("repetition", "presence", "frequency"):
            size = getattr(self, f"{name}_context_size")
            if size is not None:
                check_number(f"--{name}-context-size", size, 1, math.inf, at_least_1, kind=Integral)
        if self.logit_bias is not None:
            check_logit_bias(self.logit_bias, vocab_size)

    @property
    def changes_logits(self) -> bool:
        """Whether a bias or a penalty is on."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty not in (None, 1)
        return bool(self.logit_bias or penalties)


@dataclass(frozen=True, repr=False)
class CacheOptions(Options):
    """How keys and values are cached.

    - `max_kv_size`: keep at most this many positions, the first 4 and the latest; None keeps all.
    - `kv_bits`, `kv_group_size`: quantize keys and values to this many bits once the cache holds `quantized_kv_start`
      positions; by default the group size is head_dim, at most 64.
    """

    max_kv_size: Annotated[
        int | None,
        Option(
            "Keep the keys and values of N tokens at most: of the first 4 and the latest.",
            group="Key-value cache",
            default="all tokens",
        ),
    ] = None
    kv_bits: Annotated[
        int | None,
        Option(
            "Store keys and values in this many bits.",
            group="Key-value cache",
            metavar="2|3|4|5|6|8",
            default="not quantized",
        ),
    ] = None
    kv_group_size: Annotated[
        int | None,
        Option(
            "Keys or values that share a scale, with --kv-bits.",
            group="Key-value cache",
            metavar="32|64|128",
            default="64",
        ),
    ] = None
    quantized_kv_start: Annotated[
        int, Option("Quantize only once the cache holds N tokens, with --kv-bits.", group="Key-value cache")
    ] = 0

    def validate(self, vocab_size: int | None = None, head_dim: int | None = None) -> None:
        """Raise a `RequestError` that names the flag of a bad value; groups must divide `head_dim` if that is given.

        `vocab_size` is for subclasses, whose options may hold token ids.
        """
        check_number("--quantized-kv-start", self.quantized_kv_start, 0, math.inf, "0 or more", kind=int)
        if self.max_kv_size is not None:
            check_window(self.max_kv_size)
        if self.kv_bits is None:
            if self.kv_group_size is not None:
                raise RequestError("--kv-group-size needs --kv-bits.")
            return
        if self.max_kv_size is not None:
            raise RequestError("--kv-bits cannot be combined with --max-kv-size.")
        if type(self.kv_bits) is not int or self.kv_bits not in (2, 3, 4, 5, 6, 8):
            raise RequestError(f"--kv-bits must be 2, 3, 4, 5, 6 or 8, got {quote(self.kv_bits)}.")
        dim = 128 if head_dim is None else head_dim  # 128 can be divided by every group size
        size = self.group_size(dim)
        if type(size) is not int or size not in (32, 64, 128) or dim % size:
            raise RequestError(f"--kv-group-size must be 32, 64 or 128 and divide head_dim, {dim}; got {quote(size)}.")

    def group_size(self, head_dim: int) -> int:
        """`kv_group_size`, or its default for this head_dim."""
        return min(64, head_dim) if self.kv_group_size is None else self.kv_group_size


@dataclass(frozen=True, repr=False)
class GenerationOptions(SamplingParams, CacheOptions):
    """All options of `generate`, written once for Python and the command line.

    - `max_tokens`: the maximum number of tokens; -1 continues to the end of the context.
    - `seed`: the same seed gives the same text; None draws a random one.
    - `stop`: strings that end the text; they are not part of it.
    - `echo`: the text begins with the prompt's.
    - `prefill_step_size`: prompt tokens processed at a time; None is what suits the device. A rest of fewer than 12
      tokens joins the piece before it.
    - `top_logprobs`: how many of the most likely tokens each `Piece` lists; 0 is none.
    - `json_schema`, `json_object`, `regex`, `grammar`, `choice`: what the text must be, one of them: JSON for a schema
      (a mapping, its text, or a file), any JSON object, a match of a whole regular expression, a sentence of a Lark or
      GBNF grammar (its text, or a file), one of several texts.
    - `prompt_lookup`: tokens that followed the same words earlier, in the prompt, the text or earlier texts, are
      checked together with the next one; `num_draft_tokens` is how many, and how many a draft model proposes. None
      chooses the number by measured times; 0 turns drafting off. Neither changes the distribution of the text.
    """

    max_tokens: Annotated[
        int, Option("Tokens to generate at most; -1 is up to the end of the context.", flags=("-m",))
    ] = 256
    seed: Annotated[int | None, Option("Seed for sampling: the same seed gives the same text.", default="random")] = (
        None
    )
    stop: Annotated[
        str | Sequence[str] | None, Option("Stop before this text, if the model generates it; repeatable.")
    ] = ()
    echo: Annotated[bool, Option("Print the prompt before the text that follows.", group="Output")] = False
    prefill_step_size: Annotated[
        int | None,
        Option(
            "Tokens of the prompt to process at a time.", group="Key-value cache", default="2048 on a GPU, 128 on a CPU"
        ),
    ] = None
    top_logprobs: Annotated[
        int,
        Option("Show the N most likely tokens at each place: after the text, or in the JSON.", group="Output"),
    ] = 0
    prompt_lookup: Annotated[
        bool,
        Option(
            "Draft what followed the same words earlier, in the prompt or the text: faster where text repeats.",
            group="Drafts",
        ),
    ] = False
    num_draft_tokens: Annotated[
        int | None,
        Option(
            "Tokens to draft at a time, with --draft-model or --prompt-lookup; 0 drafts none.",
            group="Drafts",
            default="as many as pay, by measured times",
        ),
    ] = None
    json_schema: Annotated[
        str | Mapping[str, Any] | None,
        Option("Generate compact JSON that is valid for this schema.", group="Constraints", metavar="FILE|TEXT"),
    ] = None
    json_object: Annotated[bool, Option("Generate a JSON object, compact.", group="Constraints")] = False
    regex: Annotated[
        str | None, Option("Generate text that this regular expression matches as a whole.", group="Constraints")
    ] = None
    grammar: Annotated[
        str | None,
        Option("Generate text of this Lark or GBNF grammar.", group="Constraints", metavar="FILE|TEXT"),
    ] = None
    choice: Annotated[
        str | Sequence[str] | None,
        Option(
            "Generate one of these texts, or of a JSON list of texts; repeatable.", group="Constraints", metavar="A,B,C"
        ),
    ] = None

    def validate(self, vocab_size: int | None = None, head_dim: int | None = None) -> None:
        """Raise a `RequestError` that names the flag of a bad value, of any option.

        Token ids and group sizes are checked against the model's `vocab_size` and `head_dim` if these are given.
        """
        SamplingParams.validate(self, vocab_size)
        CacheOptions.validate(self, vocab_size, head_dim)
        expected = "1 or more, or -1 for no limit"
        check_number("--max-tokens", self.max_tokens, -1, math.inf, expected, kind=Integral)
        if self.max_tokens == 0:
            raise RequestError(f"--max-tokens must be {expected}, got 0")
        if self.prefill_step_size is not None:
            check_number("--prefill-step-size", self.prefill_step_size, 1, math.inf, "1 or more", kind=Integral)
        if self.seed is not None:
            check_seed(self.seed)
        if not isinstance(self.stop, str | Sequence | None):
            raise RequestError(f"--stop must be text, or a list of texts, got {quote(self.stop)}.")
        for stop in [self.stop] if isinstance(self.stop, str) else self.stop or ():
            check_stop(stop)
        for name in ("echo", "prompt_lookup", "json_object"):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"--{name.replace('_', '-')} must be True or False, got {quote(value)}.")
        check_number("--top-logprobs", self.top_logprobs, 0, math.inf, "a whole number, 0 or above", kind=Integral)
        if self.num_draft_tokens is not None:
            expected = f"a whole number from 0 to {MAX_NUM_DRAFT_TOKENS}"
            check_number("--num-draft-tokens", self.num_draft_tokens, 0, MAX_NUM_DRAFT_TOKENS, expected, kind=Integral)
        given = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise RequestError(f"{named} cannot be combined; give one.")

    @property
    def constraints(self) -> list[str]:
        """The names of those options that say what the text must be; one at most is valid."""
        return [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]

    def check_drafts(self, has_draft_model: bool) -> None:
        """Raise a `RequestError` for a number of tokens to draft that nothing can draft."""
        if self.num_draft_tokens and not has_draft_model and not self.prompt_lookup:
            raise RequestError("--num-draft-tokens needs --draft-model or --prompt-lookup.")

    def check_sampler(self) -> None:
        """Raise a `RequestError` if an option is set that a `sampler` of the caller's own replaces."""
        given = [name for name in _SAMPLER_OPTIONS if getattr(self, name) != getattr(GenerationOptions, name)]
        if given:
            raise RequestError(f"sampler replaces {', '.join(given)}; give one or the other.")


def check_number(flag: str, value: object, low: float, high: float, expected: str, kind: type = Real) -> None:
    """Raise a `RequestError` unless `value` is of type `kind`, not a bool, not NaN, and in [low, high].

    Args:
        expected: the rest of the sentence "--flag must be", for the message.
    """
    is_kind = isinstance(value, kind) and not isinstance(value, bool)
    if not is_kind or not low <= value <= high:  # type: ignore[operator]
        number = "a number" if kind is Real else "a whole number"
        if not is_kind and expected.startswith(("between", "from")):
            expected = f"{number} {expected}"
        elif not is_kind and expected[0].isdigit():
            expected = f"{number}, {expected}"
        # The `repr` of NumPy's numbers has their type.
        got = float(value) if isinstance(value, Real) and not isinstance(value, int) else value
        raise RequestError(f"{flag} must be {expected}, got {quote(got)}")


def check_logit_bias(logit_bias: Any, vocab_size: int | None) -> None:
    """Raise a `RequestError` unless it maps token ids to numbers or -inf, and leaves at least one token.

    Args:
        vocab_size: the number of token ids; None allows any.
    """
    if not isinstance(logit_bias, Mapping):
        raise RequestError(f"--logit-bias must map token ids to numbers, got {quote(logit_bias)}")
    last = math.inf if vocab_size is None else vocab_size - 1
    expected = "token ids" if vocab_size is None else f"token ids from 0 to {last}"
    for token, bias in logit_bias.items():
        check_number("--logit-bias: the keys", token, 0, last, expected, kind=Integral)
        if bias != -math.inf:
            check_number(f"--logit-bias of token {token}", bias, -BIAS_LIMIT, BIAS_LIMIT, "a number, or -inf")
    if len(logit_bias) == vocab_size and all(bias == -math.inf for bias in logit_bias.values()):
        raise RequestError("--logit-bias bans every token of the vocabulary; leave at least one")


def check_seed(seed: Any) -> None:
    """Raise a `RequestError` unless it is a whole number of 64 bits."""
    check_number("--seed", seed, 0, 2**64 - 1, "a whole number from 0 to 2**64 - 1", kind=Integral)


def check_stop(stop: Any) -> None:
    """Raise a `RequestError` unless it is text and not empty."""
    if not isinstance(stop, str) or not stop:
        raise RequestError(f"--stop must be text that is not empty, got {quote(stop)}")
    check_characters("--stop", stop)


def token_ids(ids: Any, vocab_size: int, name: str = "The prompt") -> list[int]:
    """Token ids as a list, from a sequence or a one-dimensional array.

    Raises:
        RequestError: `ids` is anything else, or an id is not in the vocabulary.
    """
    values: Any = ids.tolist() if isinstance(ids, mx.array) else ids
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise RequestError(f"{name} must be a list of token ids, got {quote(values)}.")
    values = list(values)
    for token in values:
        if isinstance(token, bool) or not isinstance(token, Integral):
            several = "; several prompts are for batch_generate" if isinstance(token, str) else ""
            raise RequestError(
                f"{name} must be a flat list of token ids, which are whole numbers; got {quote(token)}{several}."
            )
        if not 0 <= int(token) < vocab_size:
            raise RequestError(f"{name} has the token id {quote(token)}; the vocabulary ends at {vocab_size - 1}.")
    return [int(token) for token in values]
