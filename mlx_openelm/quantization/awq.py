"""AWQ (arXiv:2306.00978): spread the columns that matter most over more of a matrix's levels.

Columns are multiplied, and what feeds them is divided: OpenELM's norms before `qkv_proj` and `proj_1`, and
the up half of `proj_1` before `proj_2`. The full model stays what it was; only rounding falls otherwise.
"""

from __future__ import annotations

import mlx.core as mx

from ..model import TransformerLayer
from .rounding import Grid, extremes, groups, levels, values
from .uniform import Quantization

# Exponents tried on the inputs' size: 0 leaves the matrix as it is, 1 evens its inputs out.
_EXPONENTS = tuple(step / 20 for step in range(21))


def column_scales(weight: mx.array, moments: mx.array, choice: Quantization, dtype: mx.Dtype) -> mx.array:
    """Factors [in] for the columns of weight [out, in], under which rounding changes its products least.

    Args:
        moments: the mean of x xᵀ [in, in] over the inputs x.
    """
    size = mx.sqrt(mx.maximum(mx.diag(moments), 1e-12))
    best, least = mx.ones_like(size), None
    for exponent in _EXPONENTS:
        scales = size**exponent
        scales = scales / mx.sqrt(scales.max() * scales.min())
        difference = _rounded(weight * scales, choice, dtype) / scales - weight
        error = float(((difference @ moments) * difference).sum().item())  # type: ignore[arg-type]
        if least is None or error < least:
            best, least = scales, error
    return best


def _rounded(weight: mx.array, choice: Quantization, dtype: mx.Dtype) -> mx.array:
    grid: Grid = extremes(weight, choice, dtype)
    return values(levels(groups(weight, choice.group_size), grid, choice.bits), grid).reshape(weight.shape)


def fold(layer: TransformerLayer, path: str, moments: mx.array, choice: Quantization, dtype: mx.Dtype) -> mx.array:
    """Scale the columns of one matrix of `layer` and unscale what feeds it; returns its new moments [in, in].

    `attn.out_proj` stays as it is: its inputs are shared by the queries of a group.
    """
    module = {"attn.qkv_proj": layer.attn.qkv_proj, "ffn.proj_1": layer.ffn.proj_1, "ffn.proj_2": layer.ffn.proj_2}
    if path not in module:
        return moments
    weight = module[path]["weight"]
    scales = column_scales(weight.astype(mx.float32), moments, choice, dtype)
    if path == "ffn.proj_2":
        feeding = layer.ffn.proj_1["weight"]
        inner = scales.shape[0]
        factors = mx.concatenate([mx.ones((inner,)), 1 / scales])
        layer.ffn.proj_1["weight"] = (feeding.astype(mx.float32) * factors[:, None]).astype(feeding.dtype)
    else:
        norm = layer.attn_norm if path == "attn.qkv_proj" else layer.ffn_norm
        before = norm["weight"].astype(mx.float32)
        # The columns make good what storing the norm rounds away.
        after = (before / scales).astype(dtype).astype(mx.float32)
        scales = mx.where(after == 0, 1.0, before / mx.where(after == 0, 1.0, after))
        norm["weight"] = mx.where(after == 0, before, after).astype(norm["weight"].dtype)
    module[path]["weight"] = (weight.astype(mx.float32) * scales).astype(weight.dtype)
    mx.eval(layer.parameters())
    return moments / scales[:, None] / scales
