"""Small models that the CUDA kernel for decoding supports, and the reference's logits for them."""

from __future__ import annotations

from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy_model

# (bits, group size) of each projection in turn; None is not quantized.
Packings = list[tuple[int, int] | None]
ALL_PACKINGS: Packings = [(2, 32), (3, 64), (5, 128), None, (6, 64), (8, 32), (4, 128)]


def make_model(dtype: mx.Dtype, packings: Packings, head_dim: int, norms: bool = True) -> OpenELM:
    """Two layers whose random weights make every part matter; projection n is packed as `packings[n % len]`."""
    heads = [256 // head_dim, 512 // head_dim]
    config = ModelConfig.from_dict(
        {
            "num_transformer_layers": 2,
            "model_dim": 256,
            "head_dim": head_dim,
            "vocab_size": 64,
            "num_query_heads": heads,
            "num_kv_heads": [n // 2 for n in heads],
            "ffn_multipliers": [1.0, 2.0],
            "num_gqa_groups": 2,
            "normalize_qk_projections": norms,
            "share_input_output_layers": True,
        }
    )
    rng = np.random.default_rng(0)
    model = OpenELM(config, initialize=False)
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape)
        weight = 1 + 0.3 * noise if len(shape) == 1 else noise / shape[1] ** 0.5
        model.load_weights([(name, mx.array(weight.astype(np.float32)).astype(dtype))], strict=False)
    numbers = iter(range(1000))

    def packing(path: str, module: nn.Module) -> bool | dict[str, int]:
        if "proj" not in path or (choice := packings[next(numbers) % len(packings)]) is None:
            return False
        return {"bits": choice[0], "group_size": choice[1]}

    nn.quantize(model, class_predicate=packing)
    return model


def plain_logits(model: OpenELM, ids: list[int]) -> np.ndarray:
    """The reference's logits [length, vocab] for the model's dequantized weights, in float64."""
    weights = {}
    for path, module in model.named_modules():
        if "scales" in module:
            packing = {"bits": module.bits, "group_size": module.group_size}
            parts = [module[part].astype(mx.float32) for part in ("scales", "biases")]
            weights[f"{path}.weight"] = mx.dequantize(module["weight"], *parts, **packing)
        elif "weight" in module:
            weights[f"{path}.weight"] = module["weight"]
    return numpy_model.logits(
        model.config, {name: np.array(value.astype(mx.float32)) for name, value in weights.items()}, np.array([ids])
    )[0]
