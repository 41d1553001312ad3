"""Model folders in the layout of `apple/OpenELM-*`, for Apple's code and every program that reads its models.

`formats.mlx` reads such folders, since MLX keeps their names and layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from ..config import ModelConfig, make_divisible, spread
from ..errors import RequestError
from ..hub.catalog import Release
from . import safetensors, shards
from .mlx import Checkpoint

# Apple's repositories all have the same two code files; a folder's config names the repository whose code runs it.
CODE_REPO = "apple/OpenELM-270M"
CODE = {
    "AutoConfig": "configuration_openelm.OpenELMConfig",
    "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM",
}
TRANSFORMERS_VERSION = "4.39.3"  # the version Apple's code was published with, and runs in
_RMS_NORM_EPS = 1e-6  # a constant in Apple's code
_MOST_BOUNDS = 40  # that are tried at each end


def write(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    release: Release | None = None,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> None:
    """Write weights, `config.json` and `generation_config.json`; empties `checkpoint.weights`.

    Args:
        release: the published model that this is; the config then names its repository for the code.
        progress: called with the bytes written so far and the total.

    Raises:
        RequestError: a model that Apple's code computes differently, or one whose weights are packed.
    """
    if checkpoint.quantization:
        raise RequestError("A Hugging Face folder cannot have packed weights; dequantize the model first.")
    config = checkpoint.config
    if config.rms_norm_eps != _RMS_NORM_EPS:
        raise RequestError(
            f"rms_norm_eps is {config.rms_norm_eps}, but Apple's code always uses "
            f"{_RMS_NORM_EPS}; convert to MLX instead."
        )
    repo = CODE_REPO if release is None else release.hub_repo
    values = _config_values(config, str(checkpoint.dtype).removeprefix("mlx.core."), repo)
    shards.write(
        folder, checkpoint.weights, metadata={"format": "pt"}, max_shard_bytes=max_shard_bytes, progress=progress
    )
    if (folder / "model.safetensors").exists():
        (folder / safetensors.INDEX).unlink()  # as in transformers: an index only with several shards
    _write_json(folder / "config.json", values)
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.to_dict()["eos_token_id"],
        "transformers_version": TRANSFORMERS_VERSION,
    }
    _write_json(folder / "generation_config.json", generation)


def _config_values(config: ModelConfig, dtype: str, repo: str) -> dict[str, Any]:
    values = config.to_dict() | {
        "auto_map": {name: f"{repo}--{code}" for name, code in CODE.items()},
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    values |= _scaling(config)
    if not config.share_input_output_layers:
        # transformers 4 ties an output layer to the embedding unless told otherwise; a shared one does not exist there.
        values["tie_word_embeddings"] = False
    del values["rms_norm_eps"]  # Apple's configurations have no such key
    return dict(sorted(values.items()))


def _scaling(config: ModelConfig) -> dict[str, Any]:
    """Multipliers from which Apple's code computes the sizes of the layers.

    It ignores `num_query_heads`, accepts as `qkv_multipliers` only one number or two bounds, and takes two
    `ffn_multipliers` for bounds, which are rounded.

    Raises:
        RequestError: no multipliers give the model's query heads.
    """
    values: dict[str, Any] = {}
    ffn = config.ffn_multipliers
    if len(ffn) == 2 and spread(ffn, 2) != ffn:  # only one number for both layers is not rounded
        values["ffn_multipliers"] = ffn[0]
    # The heads of keys and values are read as they are; the number of groups only rounds the query heads.
    for groups in dict.fromkeys((config.num_gqa_groups, config.num_query_heads[0] // config.num_kv_heads[0], 1)):
        if (multipliers := _qkv_multipliers(config, groups)) is not None:
            return values | {"num_gqa_groups": groups, "qkv_multipliers": multipliers}
    raise RequestError(
        f"The model's query heads are {list(config.num_query_heads)}, which Apple's code cannot compute from any "
        "qkv_multipliers, one number or two bounds; convert to MLX instead."
    )


def _qkv_multipliers(config: ModelConfig, groups: int) -> float | list[float] | None:
    """One number or two bounds that give the model's query heads, rounded to whole groups; its own if possible."""
    widths = [heads * config.head_dim for heads in config.num_query_heads]

    def width(multiplier: float) -> int:
        return make_divisible(config.model_dim * multiplier, config.head_dim * groups)

    def fits(bounds: tuple[float, ...]) -> bool:
        return all(width(m) == expected for m, expected in zip(spread(bounds, len(widths)), widths, strict=True))

    def candidates(expected: int) -> list[float]:
        highest = 100 * (expected + config.head_dim * groups) // config.model_dim + 1
        found = [hundredths / 100 for hundredths in range(1, highest + 1) if width(hundredths / 100) == expected]
        return sorted(found[:: len(found) // _MOST_BOUNDS + 1], key=lambda m: abs(m - expected / config.model_dim))

    own = config.qkv_multipliers
    if isinstance(own, tuple) and len(own) == 2 and fits(own):
        return list(own)
    if len(set(widths)) == 1:
        numbers = [own] if not isinstance(own, tuple) else []
        return next((m for m in [*numbers, widths[0] / config.model_dim] if width(m) == widths[0]), None)
    pairs = product(candidates(widths[0]), candidates(widths[-1]))
    return next((list(pair) for pair in pairs if fits(pair)), None)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
