"""What `/metrics` shows, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # a time for each counter
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_openelm_requests", "Requests by route and outcome.", ["route", "outcome"], registry=registry
        )
        self.prompt_tokens = Counter("mlx_openelm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "mlx_openelm_cached_prompt_tokens", "Tokens of prompts that were processed before.", registry=registry
        )
        self.prompts = Counter(
            "mlx_openelm_prompts", "Prompts by whether their beginning was held.", ["cache"], registry=registry
        )
        self.tokens = Counter("mlx_openelm_generated_tokens", "Generated tokens.", registry=registry)
        self.drafted = Counter("mlx_openelm_drafted_tokens", "Drafted tokens.", registry=registry)
        self.accepted = Counter(
            "mlx_openelm_accepted_draft_tokens", "Drafted tokens that were right.", registry=registry
        )
        self.restarts = Counter("mlx_openelm_engine_restarts", "Times the engine was started again.", registry=registry)
        self.first_token = Histogram(
            "mlx_openelm_time_to_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=_FIRST,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "mlx_openelm_inter_token_seconds",
            "Seconds between two tokens of a text.",
            buckets=_BETWEEN,
            registry=registry,
        )

    def began(self, seconds: float, prompt: int, cached: int) -> None:
        """The first token of a text."""
        self.first_token.observe(seconds)
        self.prompt_tokens.inc(prompt)
        self.cached_tokens.inc(cached)
        self.prompts.labels("hit" if cached else "miss").inc()

    def show(self) -> bytes:
        """All of them, as text."""
        return generate_latest(self.registry)
