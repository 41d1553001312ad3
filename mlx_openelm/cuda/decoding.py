"""All layers for one token of one sequence in one CUDA kernel (`decoding.cu`), specialized for the model.

docs/benchmarks.md compares it with MLX's own kernels on an H100. To decode a token, `OpenELM.hidden_states` first
tries a `TokenKernel`; if that returns None, the layers run as usual.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cache import KVCache
from ..config import ModelConfig
from ..errors import OpenELMError
from ..native import OFF, VARIABLE
from . import compiler

THREADS = 512  # per block; there is one block per multiprocessor
_STRIDE = 256  # all inner sizes must be multiples of this
_SOURCE = Path(__file__).with_name("decoding.cu")

# How a projection is quantized: bits and group size, or (0, 0).
Kind = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """The sizes that the kernel is compiled for.

    `heads` and `inner` have one number per layer, `kinds` one entry per projection, four per layer.
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
    kinds: tuple[Kind, ...]
    grid: int

    @property
    def is_supported(self) -> bool:
        sizes = (self.model_dim, *self.inner, *(n * self.head_dim for n in self.heads))
        return (
            self.head_dim in (64, 128)
            and all(size % _STRIDE == 0 for size in sizes)
            and all(n % self.groups == 0 for n in self.heads)
        )

    def expected(self, dtype: mx.Dtype) -> Iterator[tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and type of every weight, in the order in which the kernel takes them."""
        for layer, (heads, inner) in enumerate(zip(self.heads, self.inner, strict=True)):
            for size in [self.model_dim] * 2 + [self.head_dim] * 2 * self.has_norms:
                yield (size,), dtype
            qkv, mixed = (heads + 2 * (heads // self.groups)) * self.head_dim, heads * self.head_dim
            sizes = [
                (qkv, self.model_dim),
                (self.model_dim, mixed),
                (2 * inner, self.model_dim),
                (self.model_dim, inner),
            ]
            for (rows, columns), (bits, group) in zip(sizes, self.kinds[4 * layer : 4 * layer + 4], strict=True):
                if bits == 0:
                    yield (rows, columns), dtype
                else:
                    yield (rows, columns * bits // 32), mx.uint32
                    yield from [((rows, columns // group), dtype)] * 2

    @property
    def most_parts(self) -> int:
        """Partial results of attention held at the same time: at most one per block, but at least one per head."""
        return max(self.grid, *self.heads)

    @property
    def parts_size(self) -> int:
        """Float32 numbers in these results, rounded up to 16 bytes."""
        return -(-self.most_parts * (self.head_dim + 2) // 4) * 4

    @property
    def most_qkv(self) -> int:
        return max((n + 2 * (n // self.groups)) * self.head_dim for n in self.heads)

    @property
    def most_inputs(self) -> int:
        return max(self.model_dim, *self.inner, *(n * self.head_dim for n in self.heads))

    @cached_property
    def scratch(self) -> int:
        """Float32 numbers of global memory through which the kernel's stages pass their results."""
        halves = self.most_qkv + 2 * self.model_dim + max(self.inner)
        return self.parts_size + -(-halves // 2)

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory per block."""
        rows = max(self.most_qkv, self.model_dim, *(2 * n for n in self.inner))
        inputs = 2 * self.most_inputs
        sums = self.most_inputs // 32 * 4
        partial = 4 * (THREADS // 8 + rows // self.grid + 4)
        return max(inputs + sums + partial, 4 * THREADS // 32 * self.head_dim)


def source(shape: Shape) -> str:
    """The complete source of the kernel `decode_token` for a model of this shape."""
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
    """The entry function: MLX passes every array as a parameter of its own, so it gathers them in a table."""
    tables: list[list[str]] = []  # one per layer, in the order of `Layer` in the source
    count = 0

    def next_name() -> str:
        nonlocal count
        count += 1
        return f"p{count - 1}"

    for layer in range(len(shape.heads)):
        present = [True, True, shape.has_norms, shape.has_norms]
        for bits, _ in shape.kinds[4 * layer : 4 * layer + 4]:
            present += [True, bits > 0, bits > 0]
        tables.append([next_name() if is_present else "nullptr" for is_present in present])
    for table in tables:
        table += [next_name(), next_name()]  # keys and values come after all weights
    pointers = [pointer for table in tables for pointer in table]
    fill = [f"pointers[{i}] = {pointer};" for i, pointer in enumerate(pointers)]
    names = [f"const void* p{i}" for i in range(count)]
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
    """The kernel, compiled for this GPU; None, with a warning, if that fails."""
    try:
        return compiler.compiled(source(shape))
    except OpenELMError as error:
        warnings.warn(f"Decoding without its CUDA kernel: {error}", stacklevel=2)
        return None


def is_allowed() -> bool:
    """Whether MLX computes on a GPU that can run the kernel."""
    return obstacle() is None and mx.default_device() == mx.Device(mx.gpu, 0)


@lru_cache(maxsize=1)
def obstacle() -> str | None:
    """Why this machine cannot run the kernel; None if it can: it needs an NVIDIA GPU, Ampere or newer, not shared."""
    if not mx.cuda.is_available():
        return "MLX has no CUDA here"
    if os.environ.get(VARIABLE, "").lower() in OFF:
        return f"disabled by {VARIABLE}"
    if compiler.capability() < (8, 0):
        return "the GPU is older than Ampere"
    return "programs share the GPU through MPS" if compiler.is_shared() else None


class _KernelLock:
    """Serializes the kernel to one thread.

    The kernel's blocks wait for each other, so two kernels running at the same time could deadlock. The calls of one
    thread depend on each other, which orders them. MLX keeps the lazy arrays of threads apart, so other threads run
    without the kernel while that thread lives. `arrivals` counts the blocks that wait, `last` is the result of the
    last call.
    """

    arrivals: mx.array
    last: mx.array
    _lock = threading.Lock()
    _thread: threading.Thread | None = None

    def is_mine(self) -> bool:
        """Whether the current thread may use the kernel: the first to ask may, then the next one after it has ended."""
        here = threading.current_thread()
        with self._lock:
            if self._thread is here:
                return True
            if self._thread is not None and self._thread.is_alive():
                return False
            self._thread = here
            self.arrivals, self.last = mx.zeros(4, mx.uint32), mx.zeros(1)
            mx.eval(self.arrivals, self.last)
            return True


_lock = _KernelLock()


class TokenKernel:
    """The kernel for one model, called for each token.

    Shapes and types of all weights are compared with the last call's: assignments and in-place operations change them.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self._known: Any = None  # the types and shapes that `_shape` describes
        self._shape: Shape | None = None

    def __reduce__(self) -> Any:
        return TokenKernel, (self._config,)  # the copy of a model has other weights

    def __call__(
        self, x: mx.array, weights: list[mx.array], kinds: Callable[[], list[Kind]], caches: Sequence[KVCache]
    ) -> mx.array | None:
        """The last layer's output [1, model_dim] for a token's embedding x [1, model_dim]; extends the caches.

        Returns None if the kernel does not support the types or sizes, or another thread uses it. Inside `mx.compile`
        and `mx.grad` MLX rejects it with a ValueError; set `MLX_OPENELM_NATIVE=0` there.

        Args:
            weights: for each layer the norms of attention and feed-forward, and of queries and keys if there are any;
                then `qkv_proj`, `out_proj`, `proj_1` (gate first), `proj_2`, with scales and biases if quantized.
            kinds: returns how each projection is quantized, four per layer.
            caches: one growing cache per layer, of one sequence.
        """
        shape = self._shape_for(x.dtype, weights, kinds)
        offset = caches[0].offset
        if shape is None or any(cache.offset != offset or not cache.has_dtype(x.dtype) for cache in caches):
            return None
        if (code := machine_code(shape)) is None or not _lock.is_mine():
            return None
        buffers = [
            cache.acquire_buffers(heads // shape.groups, shape.head_dim, x.dtype)
            for cache, heads in zip(caches, shape.heads, strict=True)
        ]
        capacity = buffers[0][0].shape[2]
        if any(keys.shape[2] != capacity for keys, _ in buffers):
            return None
        position = caches[0].next_position
        if position is None or position[0] != offset:
            position = offset, mx.array([offset, 0, 0, 0], mx.int32)
        inputs = [x, position[1], _lock.arrivals, _lock.last, *weights]
        for pair in buffers:
            inputs += pair
        y, following, _ = mx.fast.precompiled_cuda_kernel(
            name="decode_token",
            compiled_source=code,
            inputs=inputs,
            output_shapes=[x.shape, (4,), (shape.scratch,)],
            output_dtypes=[x.dtype, mx.int32, mx.float32],
            scalars=[capacity],
            grid=(shape.grid * THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            shared_memory=shape.shared,
            ensure_row_contiguous=True,
        )
        # Start now: a later step must never wait for one that is not evaluated, or belongs to a trace.
        mx.async_eval(y)
        _lock.last = y
        for cache in caches:
            cache.advance(y)
        caches[0].next_position = offset + 1, following
        return y

    def _shape_for(self, dtype: mx.Dtype, weights: list[mx.array], kinds: Callable[[], list[Kind]]) -> Shape | None:
        """What to compile the kernel for, or None if it does not support these weights."""
        found = [(weight.shape, weight.dtype) for weight in weights]
        if (dtype, found) != self._known:
            self._shape = self._describe(dtype, found, kinds())
            self._known = dtype, found
        return self._shape

    def _describe(
        self, dtype: mx.Dtype, found: list[tuple[tuple[int, ...], mx.Dtype]], kinds: list[Kind]
    ) -> Shape | None:
        config = self._config
        if dtype not in (mx.bfloat16, mx.float16):
            return None
        shape = Shape(
            dtype == mx.float16,
            config.model_dim,
            config.head_dim,
            config.num_query_heads[0] // config.num_kv_heads[0],
            config.normalize_qk_projections,
            config.rms_norm_eps,
            config.rope_freq_constant,
            config.num_query_heads,
            config.ffn_dims,
            tuple(kinds),
            compiler.multiprocessors(),
        )
        if not shape.is_supported or any(
            k * shape.groups != n for n, k in zip(shape.heads, config.num_kv_heads, strict=True)
        ):
            return None
        return shape if found == list(shape.expected(dtype)) else None
