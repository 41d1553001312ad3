"""Model folders in the layout of `apple/OpenELM-*`, for Apple's code and every program that reads its models.

`formats.mlx` reads such folders, since MLX keeps their names and layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ModelConfig
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
    dtype = str(checkpoint.dtype).removeprefix("mlx.core.")
    shards.write(
        folder, checkpoint.weights, metadata={"format": "pt"}, max_shard_bytes=max_shard_bytes, progress=progress
    )
    if (folder / "model.safetensors").exists():
        (folder / safetensors.INDEX).unlink()  # as in transformers: an index only with several shards
    _write_json(folder / "config.json", _config_values(config, dtype, repo))
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
    del values["rms_norm_eps"]  # Apple's configurations have no such key
    return dict(sorted(values.items()))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
