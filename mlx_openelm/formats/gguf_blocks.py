"""Tensors that GGUF files store in blocks of few bits; what each type means, the `gguf` package knows."""

from __future__ import annotations

import functools

import mlx.core as mx

from .safetensors import Tensor

CHUNK = 1 << 22  # weights packed or unpacked at a time; the package makes several float32 copies of them


@functools.cache
def can_unpack(kind: str) -> bool:
    """Whether the package unpacks a type, a name of `gguf.GGMLQuantizationType`: asked with one block of zeros."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def unpacked(blocks: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor that `blocks`, its bytes row by row, stand for; unread, as they are."""
    return Tensor(mx.float32, shape, lambda: _unpack(blocks.read(), kind, shape))


def _unpack(blocks: mx.array, kind: str, shape: tuple[int, ...]) -> mx.array:
    import numpy as np
    from gguf import GGMLQuantizationType, quants

    # Written into an array's own memory, so that a large tensor is held once.
    values = mx.zeros(shape, mx.float32)
    mx.eval(values)
    packed = np.asarray(memoryview(blocks)).reshape(-1, blocks.shape[-1])  # type: ignore[arg-type]
    rows = np.asarray(memoryview(values)).reshape(-1, shape[-1])  # type: ignore[arg-type]
    step = max(1, CHUNK // shape[-1])
    with np.errstate(all="ignore"):  # NaN scales appear in the logits, where they are refused
        for start in range(0, len(rows), step):
            chunk = packed[start : start + step]
            rows[start : start + step] = quants.dequantize(chunk, GGMLQuantizationType[kind])
    return values
