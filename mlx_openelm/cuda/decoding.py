"""All layers for one token of one sequence in one CUDA kernel (`decoding.cu`), made for the model at hand.

Measured on an H100 beside MLX's own kernels: see docs/benchmarks.md. `OpenELM.hidden_states` asks `step` first where a
token is to be decoded, and goes on as ever where that gives None.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import mlx.core as mx

from ..cache import KVCache
from ..environment import says_off
from ..errors import OpenELMError
from ..native import VARIABLE
from . import compiler

THREADS = 512  # of a block, of which each multiprocessor has one
_STRIDE = 256  # what all inner sizes must be multiples of
_SOURCE = Path(__file__).with_name("decoding.cu")

# A weight [rows, in]: its values, then scales and biases if it is packed; and its kind, (bits, group size) or (0, 0).
Weight = tuple[list[mx.array], tuple[int, int]]


@dataclass(frozen=True)
class Shape:
    """What the kernel is made for; `heads` and `inner` have a number a layer, `kinds` four: a projection each.

    `grid` is the number of blocks.
    """

    half: bool
    model_dim: int
    head_dim: int
    groups: int
    has_norms: bool
    eps: float
    base: float
    heads: tuple[int, ...]
    inner: tuple[int, ...]
    kinds: tuple[tuple[int, int], ...]
    grid: int

    @property
    def is_served(self) -> bool:
        sizes = (self.model_dim, *self.inner, *(n * self.head_dim for n in self.heads))
        return (
            self.head_dim in (64, 128)
            and all(size % _STRIDE == 0 for size in sizes)
            and all(n % self.groups == 0 for n in self.heads)
        )

    @property
    def most_parts(self) -> int:
        """Results of attention that are held at a time: at most one a block, but at least one a head."""
        return max(self.grid, *self.heads)

    @property
    def parts_size(self) -> int:
        """Numbers of these results, in whole 16 bytes."""
        return -(-self.most_parts * (self.head_dim + 2) // 4) * 4

    @property
    def most_qkv(self) -> int:
        return max((n + 2 * (n // self.groups)) * self.head_dim for n in self.heads)

    @property
    def most_inputs(self) -> int:
        return max(self.model_dim, *self.inner, *(n * self.head_dim for n in self.heads))

    @property
    def scratch(self) -> int:
        """Float32 numbers of memory that the kernel's steps hand to each other."""
        halves = self.most_qkv + 2 * self.model_dim + max(self.inner)
        return self.parts_size + -(-halves // 2)

    @property
    def shared(self) -> int:
        """Bytes of memory that a block's threads share."""
        rows = max(self.most_qkv, self.model_dim, *(2 * n for n in self.inner))
        inputs = 2 * self.most_inputs
        sums = self.most_inputs // 32 * 4
        partial = 4 * (THREADS // 8 + rows // self.grid + 4)
        return max(inputs + sums + partial, 4 * THREADS // 32 * self.head_dim)


def source(shape: Shape) -> str:
    """The kernel `decode_token` for a model of this shape, whole."""
    distinct = sorted(set(shape.kinds))
    numbers = [distinct.index(kind) for kind in shape.kinds]
    rows = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
    cases = " ".join(
        f"if ((kind) == {n}) {{ constexpr int bits = {bits}, group = {max(group, 1)}; call; }}"
        for n, (bits, group) in enumerate(distinct)
    )
    defines = {
        "HALF": int(shape.half),
        "THREADS": THREADS,
        "LAYERS": len(shape.heads),
        "MODEL_DIM": shape.model_dim,
        "HEAD_DIM": shape.head_dim,
        "GROUPS": shape.groups,
        "NORMS": int(shape.has_norms),
        "MOST_PARTS": shape.most_parts,
        "PARTS_SIZE": shape.parts_size,
        "MOST_QKV": shape.most_qkv,
        "MOST_IN": shape.most_inputs,
        "EPS": f"{float(shape.eps)!r}f",
        "LOG_BASE": f"{math.log2(shape.base)!r}f",
        "SCALE": f"{shape.head_dim**-0.5!r}f",
        "FOR_KIND(kind, call)": f"do {{ {cases} }} while (0)",
    }
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    lines += [
        "typedef unsigned short half_t;",
        "typedef unsigned int word_t;",
        f"__constant__ int HEADS[] = {{{', '.join(map(str, shape.heads))}}};",
        f"__constant__ int INNER[] = {{{', '.join(map(str, shape.inner))}}};",
        f"__constant__ int KINDS[][4] = {{{', '.join('{' + ', '.join(map(str, row)) + '}' for row in rows)}}};",
    ]
    return "\n".join([*lines, _SOURCE.read_text(), _entry(shape)])


def _entry(shape: Shape) -> str:
    """The function that is called: MLX gives every array as a parameter of its own, so they are gathered in a table."""
    names: list[str] = []
    fill: list[str] = []

    def point(is_there: bool) -> None:
        fill.append(f"pointers[{len(fill)}] = {f'p{len(names)}' if is_there else 'nullptr'};")
        if is_there:
            names.append(f"const void* p{len(names)}")

    for layer in range(len(shape.heads)):
        for is_there in (True, True, shape.has_norms, shape.has_norms):
            point(is_there)
        for bits, _ in shape.kinds[4 * layer : 4 * layer + 4]:
            for is_there in (True, bits > 0, bits > 0):
                point(is_there)
        point(True)
        point(True)
    return f"""
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_token(
    const half_t* x, const int* position, word_t* arrivals, const void* after, {", ".join(names)},
    half_t* y, int* next_position, char* scratch, int capacity) {{
  extern __shared__ uint4 shared[];
  __shared__ const void* pointers[{len(fill)}];
  if (threadIdx.x == 0) {{
    {" ".join(fill)}
  }}
  __syncthreads();
  decode(pointers, x, position, arrivals, y, next_position, scratch, shared, capacity);
}}
"""


@lru_cache(maxsize=8)
def machine_code(shape: Shape) -> bytes | None:
    """The kernel, compiled for this GPU; None, with a warning, where that fails."""
    try:
        return compiler.compiled(source(shape))
    except OpenELMError as error:
        warnings.warn(f"Decoding goes without its CUDA kernel: {error}", stacklevel=2)
        return None


def is_allowed() -> bool:
    """Whether MLX computes on a GPU that can run the kernel."""
    return obstacle() is None and mx.default_device().type == mx.DeviceType.gpu


@cache
def obstacle() -> str | None:
    """Why this machine cannot run the kernel; None if it can: it has an NVIDIA GPU since Ampere, and that to itself."""
    if not mx.cuda.is_available():
        return "MLX has no CUDA here"
    if says_off(os.environ.get(VARIABLE, "")):
        return f"{VARIABLE} says so"
    if compiler.capability() < (8, 0):
        return "the GPU is older than Ampere"
    return "programs share the GPU through MPS" if compiler.is_shared() else None


class _Turns:
    """Lets one thread use the kernel, and one call follow the other.

    Its blocks wait for each other, so two of it at the same time could each hold what the other waits for. Calls of a
    thread depend on each other; other threads, whose lazy arrays MLX keeps apart, do without while that one lives.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.arrivals = self.last = mx.zeros(0)

    def is_mine(self) -> bool:
        here = threading.current_thread()
        if self._thread is here:
            return True
        if self._thread is not None and self._thread.is_alive():
            return False
        self._thread = here
        self.arrivals, self.last = mx.zeros(4, mx.uint32), mx.zeros(1)
        mx.eval(self.arrivals, self.last)
        return True


_turns = _Turns()


def step(
    x: mx.array,
    norms: Sequence[Sequence[mx.array]],
    projections: Sequence[Sequence[Weight]],
    caches: Sequence[KVCache],
    *,
    head_dim: int,
    num_heads: Sequence[tuple[int, int]],
    inner: Sequence[int],
    eps: float,
    base: float,
) -> mx.array | None:
    """The last layer's output [1, model_dim] for a token's embedding x, with its keys and values in the caches.

    None, and nothing changed, where the kernel does not serve: other types and sizes, and other threads than the first.

    Args:
        norms: weights for each layer: the attention's, the feed-forward's, then the queries' and the keys', if any.
        projections: `qkv_proj`, `out_proj`, `proj_1` (gate first) and `proj_2` of each layer.
        caches: growing ones that hold equally many positions.
        num_heads: query heads and key-value heads of each layer.
        inner: the feed-forward's size in each layer.
    """
    if x.dtype not in (mx.bfloat16, mx.float16):
        return None
    offset = caches[0].offset
    shape = Shape(
        x.dtype == mx.float16,
        x.shape[-1],
        head_dim,
        num_heads[0][0] // num_heads[0][1],
        len(norms[0]) > 2,
        eps,
        base,
        tuple(heads for heads, _ in num_heads),
        tuple(inner),
        tuple(kind for layer in projections for _, kind in layer),
        compiler.multiprocessors(),
    )
    if not _serves(shape) or any(cache.offset != offset or not cache.holds(x.dtype) for cache in caches):
        return None
    arrays: list[mx.array] = []
    sizes = set()
    for layer_norms, layer_weights, cache_, (_, kv_heads) in zip(norms, projections, caches, num_heads, strict=True):
        arrays += layer_norms
        for parts, (bits, _) in layer_weights:
            if any(part.dtype != x.dtype for part in (parts[1:] if bits else parts)):
                return None
            arrays += parts
        if any(weight.dtype != x.dtype for weight in layer_norms):
            return None
        keys, values = cache_.own_buffers(kv_heads, head_dim, x.dtype)
        sizes.add(keys.shape[2])
        arrays += [keys, values]
    if len(sizes) > 1 or (code := machine_code(shape)) is None or not _turns.is_mine():
        return None
    position = caches[0].next_position
    if position is None or position[0] != offset:
        position = offset, mx.array([offset, 0, 0, 0], mx.int32)
    y, following, _ = mx.fast.precompiled_cuda_kernel(
        name="decode_token",
        compiled_source=code,
        inputs=[x, position[1], _turns.arrivals, _turns.last, *arrays],
        output_shapes=[x.shape, (4,), (shape.scratch,)],
        output_dtypes=[x.dtype, mx.int32, mx.float32],
        scalars=[sizes.pop()],
        grid=(shape.grid * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        shared_memory=shape.shared,
        ensure_row_contiguous=True,
    )
    _turns.last = y
    for cache_ in caches:
        cache_.wrote(y)
    caches[0].next_position = offset + 1, following
    return y


@lru_cache(maxsize=64)
def _serves(shape: Shape) -> bool:
    return shape.is_served
