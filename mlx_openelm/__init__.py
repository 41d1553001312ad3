"""mlx-openelm: Apple's OpenELM language models in MLX, on CPUs and GPUs.

from mlx_openelm import load, generate
model, tokenizer = load("tiny")
print(generate(model, tokenizer, "Once upon a time"))
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from . import backend, blas, threads  # noqa: F401 (threads watches forks from the start)
from .version import __version__

__all__ = [
    "AdapterSwitch",
    "CacheOptions",
    "Engine",
    "EvaluateOptions",
    "FineTuneOptions",
    "FineTuned",
    "GRPOOptions",
    "GenerationOptions",
    "GenerationResult",
    "Listener",
    "Loading",
    "ModelConfig",
    "OpenELM",
    "OpenELMError",
    "Piece",
    "PreferenceOptions",
    "PretrainOptions",
    "Pretrained",
    "QuantizeOptions",
    "RequestError",
    "Tokenizer",
    "TokenizerOptions",
    "__version__",
    "average",
    "batch_generate",
    "convert",
    "dpo",
    "evaluate",
    "export",
    "finetune",
    "fuse",
    "generate",
    "grpo",
    "load",
    "load_prompt_cache",
    "make_prompt_cache",
    "perplexity",
    "pretrain",
    "quantize",
    "save_prompt_cache",
    "stream_generate",
    "train_tokenizer",
]

if TYPE_CHECKING:
    from .adapters.switching import AdapterSwitch
    from .config import ModelConfig
    from .errors import OpenELMError, RequestError
    from .evaluation.perplexity import perplexity
    from .generation.batch import GenerationResult, batch_generate
    from .generation.cache_files import load_prompt_cache, make_prompt_cache, save_prompt_cache
    from .generation.engine import Engine
    from .generation.options import CacheOptions, GenerationOptions
    from .generation.piece import Piece
    from .generation.stream import generate, stream_generate
    from .harness.evaluating import evaluate
    from .harness.options import EvaluateOptions
    from .jobs.average import average
    from .jobs.convert import convert
    from .jobs.export import export
    from .jobs.fuse import fuse
    from .jobs.quantize import quantize
    from .loading import load
    from .model import OpenELM
    from .quantization.options import QuantizeOptions
    from .text.tokenizer import Tokenizer
    from .training.finetune import FineTuned, finetune
    from .training.grpo import grpo
    from .training.options import FineTuneOptions
    from .training.options.grpo import GRPOOptions
    from .training.options.preference import PreferenceOptions
    from .training.options.pretraining import PretrainOptions
    from .training.options.tokenizer import TokenizerOptions
    from .training.preference import dpo
    from .training.pretrain import Pretrained, pretrain
    from .training.run.listener import Listener
    from .training.run.preparing import Loading
    from .training.train_tokenizer import train_tokenizer

# MLX binds its BLAS when it is first imported, and every module of ours is imported after this one.
blas.preload()

_HOMES = {
    "load": "loading",
    "generate": "generation.stream",
    "stream_generate": "generation.stream",
    "batch_generate": "generation.batch",
    "GenerationResult": "generation.batch",
    "Engine": "generation.engine",
    "make_prompt_cache": "generation.cache_files",
    "save_prompt_cache": "generation.cache_files",
    "load_prompt_cache": "generation.cache_files",
    "Piece": "generation.piece",
    "GenerationOptions": "generation.options",
    "CacheOptions": "generation.options",
    "convert": "jobs.convert",
    "quantize": "jobs.quantize",
    "QuantizeOptions": "quantization.options",
    "export": "jobs.export",
    "average": "jobs.average",
    "fuse": "jobs.fuse",
    "finetune": "training.finetune",
    "FineTuned": "training.finetune",
    "FineTuneOptions": "training.options",
    "dpo": "training.preference",
    "grpo": "training.grpo",
    "GRPOOptions": "training.options.grpo",
    "PreferenceOptions": "training.options.preference",
    "pretrain": "training.pretrain",
    "Pretrained": "training.pretrain",
    "PretrainOptions": "training.options.pretraining",
    "Listener": "training.run.listener",
    "Loading": "training.run.preparing",
    "train_tokenizer": "training.train_tokenizer",
    "perplexity": "evaluation.perplexity",
    "evaluate": "harness.evaluating",
    "EvaluateOptions": "harness.options",
    "AdapterSwitch": "adapters.switching",
    "OpenELM": "model",
    "ModelConfig": "config",
    "TokenizerOptions": "training.options.tokenizer",
    "Tokenizer": "text.tokenizer",
    "OpenELMError": "errors",
    "RequestError": "errors",
}
# The functions that take the fields of a class of options as keywords.
_OPTIONS = {
    "generate": "GenerationOptions",
    "stream_generate": "GenerationOptions",
    "batch_generate": "GenerationOptions",
    "quantize": "QuantizeOptions",
    "train_tokenizer": "TokenizerOptions",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import mlx_openelm` and `--help` stay quick.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    from importlib import import_module

    with backend.naming_the_extra():
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    from . import keywords

    value = keywords.checked(value, __getattr__(_OPTIONS[name]) if name in _OPTIONS else None)
    globals()[name] = value  # later uses find it here
    return value
