"""AWQ (arXiv:2306.00978): spread the columns that matter most over more of a matrix's levels.

Columns are multiplied, and what feeds them is divided: OpenELM's norms before `qkv_proj` and `proj_1`, and
the up half of `proj_1` before `proj_2`. The full model stays what it was; only rounding falls otherwise.
"""

from __future__ import annotations

import mlx.core as mx

from ..formats.packing import Quantization
from ..formats.rounding import round_error
from ..model import TransformerLayer
from ..modules import module_at

# Exponents tried on the inputs' size, also divided by the columns' own: 0 leaves the matrix as it is.
_EXPONENTS = tuple(step / 10 for step in range(1, 9))
# Rows of a matrix that stand for all while exponents are compared.
_ROWS = 256


def column_scales(weight: mx.array, moments: mx.array, choice: Quantization, dtype: mx.Dtype) -> mx.array:
    """Factors [in] for the columns of weight [out, in], under which rounding changes its products least.

    Args:
        moments: the mean of x xᵀ [in, in] over the inputs x.
        dtype: what scales and biases will be stored in.
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
    """Scale the columns of one matrix of `layer` and unscale what feeds it; returns its new moments [in, in].

    `attn.out_proj` has no place here: its inputs are shared by the queries of a group.

    Args:
        path: `attn.qkv_proj`, `ffn.proj_1` or `ffn.proj_2`; without a gate the last stays as it is.
        dtype: what norms will be stored in.
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
        # The columns make good what storing the norm rounds away; a weight of 0 has nothing to divide.
        scales = mx.where(stored == 0, 1.0, before / mx.where(stored == 0, 1.0, stored))
        norm["weight"] = mx.where(stored == 0, before, stored).astype(norm["weight"].dtype)
    module["weight"] = _times(module["weight"], scales)
    mx.eval(layer.parameters())
    return moments / scales[:, None] / scales


def _times(weight: mx.array, factors: mx.array) -> mx.array:
    return (weight.astype(mx.float32) * factors).astype(weight.dtype)
