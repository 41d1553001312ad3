"""AWQ (arXiv:2306.00978): scale up the columns that matter most, so that rounding changes them less.

Columns are multiplied by a scale, and the layer before them is divided by it: OpenELM's norms before `qkv_proj` and
`proj_1`, and the up half of `proj_1` before `proj_2`. The full model's outputs do not change, only the rounding.
"""

from __future__ import annotations

import mlx.core as mx

from ..formats.mlx import Quantization
from ..formats.rounding import round_error
from ..model import TransformerLayer
from ..modules import module_at

# Exponents to try on the size of the inputs, or on that size over the size of the columns.
_EXPONENTS = tuple(step / 10 for step in range(1, 9))
# Rows sampled from a matrix to compare exponents.
_ROWS = 256


def column_scales(weight: mx.array, moments: mx.array, choice: Quantization, dtype: mx.Dtype) -> mx.array:
    """Scales [in] for the columns of weight [out, in] that minimize the rounding error of its products.

    Args:
        moments: the mean of x xᵀ [in, in] over the inputs x.
        dtype: the type that scales and biases will be stored in.
    """
    sample = weight[:: max(1, weight.shape[0] // _ROWS)].astype(mx.float32)
    inputs = mx.sqrt(mx.maximum(mx.diag(moments), 1e-12))
    columns = mx.sqrt(mx.maximum(mx.square(weight.astype(mx.float32)).mean(axis=0), 1e-12))
    best = mx.ones_like(inputs)
    least = round_error(sample, moments, choice, dtype)
    for exponent in _EXPONENTS:
        for size in (inputs, inputs / columns):
            scales = size**exponent
            scales = scales / mx.sqrt(scales.max() * scales.min())
            error = round_error(sample * scales, moments / scales[:, None] / scales, choice, dtype)
            if error < least:
                best, least = scales, error
    return best


def fold(
    layer: TransformerLayer,
    path: str,
    moments: mx.array,
    choice: Quantization,
    dtype: mx.Dtype,
    scale_dtype: mx.Dtype,
) -> mx.array:
    """Scale the columns of one matrix of `layer`, and divide the layer before it; returns its new moments [in, in].

    `attn.out_proj` cannot be scaled: the query heads of a group share its inputs.

    Args:
        path: `attn.qkv_proj`, `ffn.proj_1` or `ffn.proj_2`; without a gate `ffn.proj_2` stays unchanged.
        moments: the mean of x xᵀ [in, in] over its inputs x.
        dtype: the type that norms will be stored in.
    """
    module = module_at(layer, path)
    if path == "ffn.proj_2" and not layer.ffn.gated:
        return moments
    scales = column_scales(module["weight"], moments, choice, scale_dtype)
    if path == "ffn.proj_2":
        factors = mx.concatenate([mx.ones_like(scales), 1 / scales])
        layer.ffn.proj_1["weight"] = _times(layer.ffn.proj_1["weight"], factors[:, None])
    else:
        norm = layer.attn_norm if path == "attn.qkv_proj" else layer.ffn_norm
        before = norm["weight"].astype(mx.float32)
        stored = (before / scales).astype(norm["weight"].dtype).astype(dtype).astype(mx.float32)
        # The columns absorb the rounding of the stored norm; a norm weight of 0 is left alone.
        scales = mx.where(stored == 0, 1.0, before / mx.where(stored == 0, 1.0, stored))
        norm["weight"] = mx.where(stored == 0, before, stored).astype(norm["weight"].dtype)
    module["weight"] = _times(module["weight"], scales)
    mx.eval(layer.parameters())
    return moments / scales[:, None] / scales


def _times(weight: mx.array, factors: mx.array) -> mx.array:
    return (weight.astype(mx.float32) * factors).astype(weight.dtype)
