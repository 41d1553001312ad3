"""Tiny random models and helpers for the tests of quantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm.config import ModelConfig
from mlx_openelm.formats import rounding
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.model import OpenELM
from mlx_openelm.quantization import sensitivity

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

FIXTURES = Path(__file__).parent / "fixtures"
SHAKESPEARE = FIXTURES / "shakespeare-hf"


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers whose widths are 32, 64, 96 and 128."""
    values: dict[str, Any] = {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "head_dim": 16,
        "vocab_size": 256,
        "num_query_heads": (2, 4),
        "num_kv_heads": (1, 2),
        "ffn_multipliers": (1.5, 2.0),
        "ffn_dim_divisor": 32,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }
    return ModelConfig(**values | changes)


def tiny_model(seed: int = 0, **changes: Any) -> OpenELM:
    """A model of `tiny_config` with random weights, norms included; the same seed gives the same model."""
    model = OpenELM(tiny_config(**changes))
    generator = np.random.default_rng(seed)
    loaded = []
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim == 1:
            values = generator.uniform(0.3, 1.7, weight.shape)
        else:
            spread = 0.3 if name.startswith(("transformer.token_embeddings", "lm_head")) else weight.shape[1] ** -0.5
            values = generator.normal(0, spread, weight.shape)
        loaded.append((name, mx.array(values.astype(np.float32))))
    model.load_weights(loaded)
    model.eval()
    return model


def random_windows(count: int, length: int, vocabulary: int = 256, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, vocabulary, (count, length)).tolist()


def write_tiny(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny model with the trained checkpoint's tokenizer, as a Hugging Face folder."""
    folder.mkdir()
    model = tiny_model(seed, **{"vocab_size": 2048} | changes)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(SHAKESPEARE / name, folder / name)
    return folder


def search_little() -> Iterator[None]:
    """For a module of tests that do not look at quality: of the ranges that a grid may have, few are tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_SHRINKS", rounding._SHRINKS[::6])
        yield


def measure_few_choices(patch: pytest.MonkeyPatch) -> None:
    """Of the choices for a matrix, only some with groups of 32 are measured."""
    every = sensitivity.candidates

    def few(config: ModelConfig) -> dict[str, list[Quantization]]:
        return {
            path: [one for one in some if one.group_size == 32 and one.bits in (2, 3, 4, 8)]
            for path, some in every(config).items()
        }

    patch.setattr(sensitivity, "candidates", few)


def unpack_levels(words: np.ndarray, bits: int) -> np.ndarray:
    """Levels [out, in] of words [out, in * bits / 32]: a stream of bits, lowest first, in plain NumPy."""
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def is_bfloat16(array: mx.array) -> bool:
    """Whether bfloat16 holds every value of a float32 array exactly: the low 16 bits are zero."""
    return not (np.array(array.astype(mx.float32)).view(np.uint32) & 0xFFFF).any()
