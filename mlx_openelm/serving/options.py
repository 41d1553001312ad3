"""The options of `serve`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Annotated, Any

from ..errors import RequestError, quote
from ..generation.engine import MAX_ROWS
from ..generation.options import MAX_NUM_DRAFT_TOKENS, CacheOptions, SamplingParams, check_number
from ..options import Option

_DEFAULTS = (
    *("temp", "top_p", "top_k", "min_p", "max_tokens", "num_draft_tokens", "prefill_step_size"),
    *(field.name for field in fields(CacheOptions)),
)
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, repr=False)
class ServeOptions(CacheOptions):
    """The options of `serve`: where it listens, what requests get by default, and its limits.

    - `temp`, `top_p`, `top_k`, `min_p`, `max_tokens`, `num_draft_tokens`, and how keys and values are cached: what a
      request gets that does not say.
    - `max_rows`: texts that advance together; `max_queue` more wait, and further ones are refused.
    - `timeout`: seconds that a request may take from its first byte to the last of its answer.
    - `max_body_bytes`: the largest body of a request.
    """

    host: Annotated[
        str, Option("Address to listen at; 0.0.0.0 is all of this machine's.", group="Network", metavar="ADDRESS")
    ] = "127.0.0.1"
    port: Annotated[int, Option("Port to listen at; 0 takes a free one.", group="Network")] = 8080
    allowed_origins: Annotated[
        Sequence[str] | None,
        Option(
            "Web page that may use the server from a browser, such as https://chat.example; comma-separated or "
            "repeated; * is any.",
            group="Network",
            metavar="ORIGIN,...",
            default="none but its own",
        ),
    ] = None
    log_level: Annotated[str, Option("What to log.", group="Output", metavar="|".join(LOG_LEVELS))] = "INFO"
    temp: Annotated[float, Option("Temperature of requests that give none.", group="Requests")] = 0.0
    top_p: Annotated[float, Option("Top-p of requests that give none.", group="Requests")] = 1.0
    top_k: Annotated[int, Option("Top-k of requests that give none; 0 is off.", group="Requests")] = 0
    min_p: Annotated[float, Option("Min-p of requests that give none; 0 is off.", group="Requests")] = 0.0
    max_tokens: Annotated[
        int,
        Option(
            "Tokens of requests that do not limit them; -1 is up to the end of the context.",
            flags=("-m",),
            group="Requests",
        ),
    ] = 512
    prefill_step_size: Annotated[
        int | None,
        Option(
            "Tokens of a prompt to process at a time.", group="Key-value cache", default="2048 on a GPU, 128 on a CPU"
        ),
    ] = None
    num_draft_tokens: Annotated[
        int | None,
        Option("Tokens to draft at a time, with --draft-model.", group="Drafts", default="as many as pay"),
    ] = None
    max_rows: Annotated[int, Option("Texts that advance together.", group="Limits")] = MAX_ROWS
    max_queue: Annotated[
        int, Option("Texts that wait; further ones are refused, with the time to try again.", group="Limits")
    ] = 128
    timeout: Annotated[float, Option("Seconds that a request may take.", group="Limits")] = 600.0
    max_body_bytes: Annotated[int, Option("Bytes of a request's body.", group="Limits", metavar="N")] = 4 << 20

    def validate(self, vocab_size: int | None = None, head_dim: int | None = None) -> None:
        """Raise a `RequestError` that names the flag of a bad value."""
        CacheOptions.validate(self, vocab_size, head_dim)
        if self.prefill_step_size is not None:
            check_number("--prefill-step-size", self.prefill_step_size, 1, math.inf, "1 or more", kind=Integral)
        check_number("--port", self.port, 0, 65535, "from 0 to 65535", kind=Integral)
        if self.log_level.upper() not in LOG_LEVELS:
            raise RequestError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, got {quote(self.log_level)}.")
        SamplingParams(temp=self.temp, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p).validate()
        expected = "1 or more, or -1 for no limit"
        check_number("--max-tokens", self.max_tokens or -2, -1, math.inf, expected, kind=Integral)
        if self.num_draft_tokens is not None:
            expected = f"a whole number from 0 to {MAX_NUM_DRAFT_TOKENS}"
            check_number("--num-draft-tokens", self.num_draft_tokens, 0, MAX_NUM_DRAFT_TOKENS, expected, kind=Integral)
        check_number("--max-rows", self.max_rows, 1, math.inf, "a whole number, 1 or above", kind=Integral)
        check_number("--max-queue", self.max_queue, 0, math.inf, "a whole number, 0 or above", kind=Integral)
        check_number("--timeout", self.timeout, 0.001, 1e9, "a number of seconds above 0")
        check_number("--max-body-bytes", self.max_body_bytes, 1, math.inf, "a whole number above 0", kind=Integral)

    def for_requests(self) -> dict[str, Any]:
        """The options of a text whose request says nothing."""
        chosen = {name: getattr(self, name) for name in _DEFAULTS}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that may use the server, one by one."""
        given = [self.allowed_origins] if isinstance(self.allowed_origins, str) else self.allowed_origins or ()
        return tuple(origin.strip().rstrip("/") for text in given for origin in text.split(",") if origin.strip())
