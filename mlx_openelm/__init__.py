"""mlx-openelm: Apple's OpenELM language models on Apple silicon.

from mlx_openelm import load, generate
model, tokenizer = load("tiny")
print(generate(model, tokenizer, "Once upon a time"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import backend, blas
from .version import __version__

__all__ = [
    "AdapterSwitch",
    "FineTuneOptions",
    "__version__",
    "convert",
    "finetune",
    "fuse",
    "generate",
    "load",
    "quantize",
    "stream_generate",
]

if TYPE_CHECKING:
    from .adapters.switching import AdapterSwitch
    from .generation.decoding import generate, stream_generate
    from .jobs.convert import convert
    from .jobs.fuse import fuse
    from .jobs.quantize import quantize
    from .loading import load
    from .training.finetune import finetune
    from .training.options import FineTuneOptions

# MLX binds its BLAS when it is first imported, and every module of ours is imported after this one.
blas.preload()

_HOMES = {
    "load": "loading",
    "convert": "jobs.convert",
    "generate": "generation.decoding",
    "stream_generate": "generation.decoding",
    "finetune": "training.finetune",
    "FineTuneOptions": "training.options",
    "fuse": "jobs.fuse",
    "quantize": "jobs.quantize",
    "AdapterSwitch": "adapters.switching",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import mlx_openelm` and `--help` stay quick.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    with backend.naming_the_extra():
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
