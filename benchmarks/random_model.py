"""Models of the published sizes with random weights; every benchmark gets the same numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_openelm.config import ModelConfig

    import mlx.core as mx


def weights(config: ModelConfig, dtype: mx.Dtype) -> Any:
    """Random `Weights` for a model, each tensor made when it is read.

    Matrices have about the scale of trained ones, norms are 1.
    """
    from mlx_openelm.formats.safetensors import Tensor, Weights

    import mlx.core as mx

    def values(shape: tuple[int, ...]) -> mx.array:
        value = mx.ones(shape) if len(shape) == 1 else mx.random.normal(shape) / shape[1] ** 0.5
        return value.astype(dtype)

    mx.random.seed(0)
    shapes = config.tensor_shapes()
    return Weights({name: Tensor(dtype, shape, partial(values, shape)) for name, shape in shapes.items()})


def write(size: str, folder: Path) -> None:
    """Write a float32 MLX folder of a published size, tensor by tensor, without a tokenizer."""
    import mlx_openelm  # noqa: F401 (before MLX, for BLAS)
    from mlx_openelm.config import ModelConfig
    from mlx_openelm.formats import mlx as mlx_format

    import mlx.core as mx

    config = ModelConfig.from_name(size)
    folder.mkdir()
    mlx_format.write(folder, mlx_format.Checkpoint(config, weights(config, mx.float32)))
