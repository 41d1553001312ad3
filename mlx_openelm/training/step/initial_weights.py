"""The weights that a new model starts from, drawn as CoreNet draws them."""

from __future__ import annotations

import mlx.core as mx

from ...config import EMBEDDING, ModelConfig

# The matrices that write into the residual stream; their deviations fall with the number of layers.
_INTO_RESIDUAL = ("attn.out_proj.weight", "ffn.proj_2.weight")


def initial_weights(config: ModelConfig, seed: int) -> dict[str, mx.array]:
    """Random float32 weights by name, the same for the same seed, not evaluated yet.

    Norms are one. Matrices are normal with a standard deviation of 1 / sqrt(inputs), the embedding 1 / sqrt(model_dim),
    and what is added to the residual stream 1 / sqrt(model_dim * 2 * layers) (CoreNet's
    `GeneralGPTModel.reset_parameters`).
    """
    shapes = config.tensor_shapes()
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {
        name: mx.ones(shape) if len(shape) == 1 else mx.random.normal(shape, scale=_scale(name, shape, config), key=key)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def _scale(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    """The standard deviation of a matrix [out, in]."""
    if name.endswith(_INTO_RESIDUAL):
        return (config.model_dim * 2 * config.num_transformer_layers) ** -0.5
    return config.model_dim**-0.5 if name.startswith(EMBEDDING) else shape[1] ** -0.5
