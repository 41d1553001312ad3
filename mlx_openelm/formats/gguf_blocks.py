"""The types of GGUF tensors: their sizes, and converting to and from quantized blocks.

The `gguf` package encodes and decodes the blocks; it is called on a few rows at a time.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import OpenELMError
from ..finite import check_finite
from .safetensors import Tensor

if TYPE_CHECKING:
    import numpy as np

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
BLOCK = 32  # weights of a row that share a float16 scale, in Q8_0 and Q4_0
BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}  # the scale, then 8 or 4 bits per weight
CHUNK = 1 << 22  # weights packed or unpacked at a time; the package makes several float32 copies of them


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """The size in bytes of a stored tensor of a type we write (`FLOATS` and `BLOCK_BYTES`)."""
    count = math.prod(shape)
    return count // BLOCK * BLOCK_BYTES[kind] if kind in BLOCK_BYTES else count * FLOATS[kind].size


def encode(weight: mx.array, kind: str, name: str) -> np.ndarray:
    """The bytes of a tensor in a type we write, as uint8: flat for a float type, by rows for blocks.

    Raises:
        OpenELMError: a quantized type, and the weight called `name` is not finite, or too large for the type.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    if kind in FLOATS:
        stored = mx.contiguous(weight.astype(FLOATS[kind]).reshape(-1))
        return np.frombuffer(memoryview(stored.view(mx.uint8)), np.uint8)  # type: ignore[arg-type]
    mx.eval(weight)  # once, not once for every chunk
    rows, columns = weight.shape
    encoded = np.empty((rows, columns // BLOCK * BLOCK_BYTES[kind]), np.uint8)
    step = max(1, CHUNK // columns)
    with np.errstate(all="ignore"):  # what cannot be stored shows up in the scales
        for start in range(0, rows, step):
            chunk = np.array(weight[start : start + step].astype(mx.float32))
            encoded[start : start + step] = quants.quantize(chunk, GGMLQuantizationType[kind])
    scales = encoded.reshape(rows, -1, BLOCK_BYTES[kind])[..., :2].copy().view(np.float16)
    if not np.isfinite(scales).all():
        check_finite(weight, name, "quantized")
        raise OpenELMError(f"{name} is too large for {kind.lower()}, as in a damaged file; use --gguf-type f32.")
    return encoded


@functools.cache
def can_unpack(kind: str) -> bool:
    """Whether the package can unpack a type, by its name in `gguf.GGMLQuantizationType`; tested on a block of zeros."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:  # raised for unsupported types, of which the package has no list
        return False
    return True


def unpacked(blocks: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of `shape` that is stored as `blocks`, uint8 [..., bytes per row]; nothing is read yet."""
    return Tensor(mx.float32, shape, lambda: _unpack(blocks.read(), kind, shape))


def _unpack(blocks: mx.array, kind: str, shape: tuple[int, ...]) -> mx.array:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    # Written into the result's own memory, so that a large tensor is held once.
    values = mx.zeros(shape, mx.float32)
    mx.eval(values)
    packed = np.asarray(memoryview(blocks)).reshape(-1, blocks.shape[-1])  # type: ignore[arg-type]
    rows = np.asarray(memoryview(values)).reshape(-1, shape[-1])  # type: ignore[arg-type]
    step = max(1, CHUNK // shape[-1])
    with np.errstate(all="ignore"):  # NaN scales show up in the logits, which are checked
        for start in range(0, len(rows), step):
            chunk = packed[start : start + step]
            rows[start : start + step] = quants.dequantize(chunk, GGMLQuantizationType[kind])
    return values
