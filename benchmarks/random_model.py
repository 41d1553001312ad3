"""Models of the published sizes with random weights, for the benchmarks: the same numbers for each of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path


def write(size: str, folder: Path) -> None:
    """A new float32 MLX folder of a published size, tensor by tensor, without a tokenizer.

    Matrices have the scale of trained ones, norms are 1.
    """
    import mlx_openelm  # noqa: F401 (before MLX, for BLAS)
    from mlx_openelm.config import ModelConfig
    from mlx_openelm.formats import mlx as mlx_format
    from mlx_openelm.formats.weights import Tensor, Weights

    import mlx.core as mx

    def values(shape: tuple[int, ...]) -> mx.array:
        return mx.ones(shape) if len(shape) == 1 else mx.random.normal(shape) / shape[1] ** 0.5

    mx.random.seed(0)
    config = ModelConfig.from_name(size)
    shapes = config.tensor_shapes()
    weights = Weights({name: Tensor(mx.float32, shape, partial(values, shape)) for name, shape in shapes.items()})
    folder.mkdir()
    mlx_format.write(folder, mlx_format.Checkpoint(config, weights))
