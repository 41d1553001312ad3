"""The state of the engine in `/metrics`: read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .worker import Worker


class EngineState(Collector):
    """Gauges of a worker; `Metrics.registry` takes it."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def collect(self) -> Iterator[GaugeMetricFamily]:
        worker = self._worker
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "engine_up": ("Whether the engine's thread runs.", lambda: worker.is_alive),
            "texts_running": ("Texts that advance together.", lambda: worker.running),
            "texts_waiting": ("Texts that wait.", lambda: worker.waiting),
            "models_resident": ("Models in memory.", lambda: len(worker.models.residents)),
            "model_bytes": ("Bytes of their weights.", lambda: sum(one.nbytes for one in worker.models.residents)),
            "prompt_cache_bytes": (
                "Bytes of held prompts.",
                lambda: sum(one.tree.nbytes for one in worker.models.residents),
            ),
            "text_bytes_reserved": (
                "Bytes that running texts may come to take.",
                lambda: sum(one.engine.budget.reserved for one in worker.models.residents),
            ),
            "memory_active_bytes": ("Bytes in use by MLX.", mx.get_active_memory),
            "memory_cached_bytes": ("Bytes that MLX keeps for reuse.", mx.get_cache_memory),
            "memory_peak_bytes": ("The most bytes in use by MLX so far.", mx.get_peak_memory),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"mlx_openelm_{name}", text, value=float(value()))
