"""GGUF, llama.cpp's file format, through the `gguf` package: metadata, tokenizer and weights in one file.

Names and keys are those of llama.cpp's `openelm` architecture. It computes logits with the embedding, normalizes
queries and keys, and has a feed-forward gated by silu, whose `proj_1` it keeps as two tensors.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError
from ..tokenizer import Tokenizer
from . import gguf_metadata, gguf_tokenizer, raw
from .mlx import Checkpoint
from .packing import dequantize_weights
from .raw import Span
from .weights import Tensor, Weights, streaming

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

# The type's name in the package: its name in a file of that type (LlamaFileType).
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
BLOCK = 32  # weights of a row that share a float16 scale, in Q8_0 and Q4_0
_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}
_CHUNK = 1 << 22  # weights quantized at a time; the package makes several float32 copies of them
_MOST_VALUES = 1 << 20  # in a header; OpenELM's vocabulary takes 130,000

_PER_LAYER = {
    "attn_norm": "attn_norm",
    "attn_qkv": "attn.qkv_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.proj_1",  # its first half
    "ffn_up": "ffn.proj_1",  # its second half
    "ffn_down": "ffn.proj_2",
}


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise RequestError("GGUF files need the gguf package: pip install 'mlx-openelm[gguf]'") from None
    return gguf


def _tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a file: the Hugging Face name it comes from, and its shape."""
    shapes = config.tensor_shapes()
    names = {"token_embd": "transformer.token_embeddings"}
    for layer in range(config.num_transformer_layers):
        names |= {f"blk.{layer}.{name}": f"transformer.layers.{layer}.{path}" for name, path in _PER_LAYER.items()}
    names["output_norm"] = "transformer.norm"
    tensors = {}
    for name, path in names.items():
        shape = shapes[f"{path}.weight"]
        if path.endswith("proj_1"):
            shape = (shape[0] // 2, shape[1])
        tensors[f"{name}.weight"] = (f"{path}.weight", shape)
    return tensors


# Out.


def write(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    gguf_type: str,
    *,
    name: str,
    chat_template: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write a GGUF file at `path`, tensor by tensor; takes the weights out of `checkpoint`.

    Matrices get `gguf_type`, norms float32. The caller makes the file appear complete or not at all.

    Args:
        gguf_type: f32, f16, bf16, q8_0 or q4_0.
        name: what the file says the model is called.
        chat_template: jinja source, in place of the tokenizer's own.
        progress: called with the bytes written so far and in all.

    Returns:
        The matrices stored in another type, by Hugging Face name, and why.

    Raises:
        RequestError: a type or a model that llama.cpp's openelm does not have, or the gguf package is missing.
    """
    gguf = _package()
    config = checkpoint.config
    check_representable(config, gguf_type)
    types, exceptions = _types(config, gguf_type)
    sizes = {tensor: _bytes(shape, types[tensor]) for tensor, (_, shape) in _tensors(config).items()}
    writer = gguf.GGUFWriter(path, gguf_metadata.ARCHITECTURE)
    try:
        gguf_metadata.write(writer, config, FILE_TYPES[gguf_type], name)
        gguf_tokenizer.write(writer, tokenizer, config.vocab_size, chat_template or tokenizer.chat_template)
        for tensor, (_, shape) in _tensors(config).items():
            kind = gguf.GGMLQuantizationType[types[tensor]]
            writer.add_tensor_info(tensor, shape, None, sizes[tensor], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written, total = 0, sum(sizes.values())
        with streaming():
            for tensor, weight in _weights(checkpoint):
                writer.write_tensor_data(_encode(weight, gguf.GGMLQuantizationType[types[tensor]]))
                del weight
                written += sizes[tensor]
                if progress is not None:
                    progress(written, total)
    finally:
        writer.close()
    return exceptions


def check_representable(config: ModelConfig, gguf_type: str) -> None:
    """Refuse what llama.cpp could not load or would compute otherwise.

    Raises:
        RequestError: an unknown type, or a model with another head, norms or feed-forward.
    """
    if gguf_type not in FILE_TYPES:
        raise RequestError(f"--gguf-type must be one of {', '.join(FILE_TYPES)}, got {gguf_type!r}.")
    reason = None
    if not config.share_input_output_layers:
        reason = "its output layer is not the embedding, while llama.cpp's openelm has no output tensor"
    elif not config.normalize_qk_projections:
        reason = "it does not normalize queries and keys"
    elif not config.ffn_with_glu:
        reason = "its feed-forward is not gated (ffn_with_glu is false)"
    elif config.activation_fn_name not in ("swish", "silu"):
        reason = f"its activation is {config.activation_fn_name}, not silu"
    if reason:
        raise RequestError(f"llama.cpp cannot run this model, so it is not written as GGUF: {reason}.")


def _types(config: ModelConfig, gguf_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """The type of every tensor, and which matrices fall back to float16, by Hugging Face name."""
    types, exceptions = {}, {}
    for tensor, (source, shape) in _tensors(config).items():
        types[tensor] = gguf_type.upper()
        if len(shape) == 1:
            types[tensor] = "F32"
        elif types[tensor] in _BLOCK_BYTES and shape[1] % BLOCK:
            types[tensor] = "F16"
            exceptions[source] = f"stored as f16, since blocks of {BLOCK} do not divide rows of {shape[1]}"
    return types, exceptions


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    count = math.prod(shape)
    return count // BLOCK * _BLOCK_BYTES[kind] if kind in _BLOCK_BYTES else count * _FLOATS[kind].size


def bits_per_weight(config: ModelConfig, gguf_type: str) -> float:
    """Stored bits over parameters in a file of `gguf_type`, the norms' and the fallbacks' included."""
    types, _ = _types(config, gguf_type)
    total = sum(_bytes(shape, types[tensor]) for tensor, (_, shape) in _tensors(config).items())
    return 8 * total / config.num_parameters


def _weights(checkpoint: Checkpoint) -> Iterator[tuple[str, mx.array]]:
    """The tensors in the file's order, packed ones as float32, each taken out of the checkpoint."""
    weights = dequantize_weights(checkpoint.weights, checkpoint.quantization, mx.float32)
    checkpoint.weights, checkpoint.quantization = Weights({}), {}
    gate = up = None
    for tensor, (source, _) in _tensors(checkpoint.config).items():
        if tensor.endswith("ffn_gate.weight"):
            gate, up = mx.split(weights.take(source), 2)
            yield tensor, gate
            del gate
        elif tensor.endswith("ffn_up.weight"):
            assert up is not None
            yield tensor, up
            up = None
        else:
            yield tensor, weights.take(source)


def _encode(weight: mx.array, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor in a GGUF type, as an array of uint8."""
    import numpy as np
    from gguf import quants

    if kind.name in _FLOATS:
        stored = mx.contiguous(weight.astype(_FLOATS[kind.name]).reshape(-1))
        return np.frombuffer(memoryview(stored.view(mx.uint8)), np.uint8)  # type: ignore[arg-type]
    mx.eval(weight)  # once, not once for every chunk
    rows, columns = weight.shape
    encoded = np.empty((rows, columns // BLOCK * _BLOCK_BYTES[kind.name]), np.uint8)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        chunk = np.array(weight[start : start + step].astype(mx.float32))
        encoded[start : start + step] = quants.quantize(chunk, kind)
    return encoded


# In.


def check(path: Path) -> None:
    """Ask whether a file is GGUF and whole, as far as can be told; types that `read` does not know are fine.

    Raises:
        RequestError: it is not.
    """
    if not is_gguf(path):
        raise RequestError(f"{path} is not a GGUF file; export it again.")
    if importlib.util.find_spec("gguf") is not None:
        _open(path)


def is_gguf(path: Path) -> bool:
    """Whether a file says of itself that it is GGUF."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read(path: Path) -> tuple[Checkpoint, Tokenizer]:
    """The model and the tokenizer in a GGUF file; no weight is read yet.

    Weights have the file's floating-point types; blocks of Q8_0 and Q4_0 unpack to float32.

    Raises:
        RequestError: damaged, of another architecture, of other types, or the gguf package is missing.
    """
    reader = _open(path)
    if reader.byte_order != "I":
        raise RequestError(f"{path} was written for machines of the other byte order; convert the original again.")
    try:
        values = {name: value.contents() for name, value in reader.fields.items()}
    except (ValueError, IndexError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    gguf_metadata.check_architecture(values, path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in (*_FLOATS, *_BLOCK_BYTES):
            raise RequestError(
                f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which is not supported; "
                f"convert a file of type {', '.join(FILE_TYPES)}."
            )
    if "token_embd.weight" not in found:
        raise RequestError(f"{path} has no token_embd.weight, so it holds no model.")
    config = gguf_metadata.read(
        values, path, vocab_size=int(found["token_embd.weight"].shape[-1]), most_layers=len(found)
    )
    _check(path, _tensors(config), {name: _shape(tensor) for name, tensor in found.items()})
    spans = {}
    for name, tensor in found.items():
        shape, kind = _shape(tensor), tensor.tensor_type.name
        if kind in _BLOCK_BYTES:
            spans[name] = Span(mx.uint8, (shape[0], shape[1] // BLOCK, _BLOCK_BYTES[kind]), int(tensor.data_offset))
        else:
            spans[name] = Span(_FLOATS[kind], shape, int(tensor.data_offset))
    stored = raw.tensors(path, spans)
    parts: dict[str, list[Tensor]] = {}
    for name, (source, shape) in _tensors(config).items():
        kind = found[name].tensor_type.name
        tensor = _unpacked(stored[name], kind, shape) if kind in _BLOCK_BYTES else stored[name]
        parts.setdefault(source, []).append(tensor)
    weights = Weights({source: _joined(*halves) for source, halves in parts.items()})
    tokenizer = gguf_tokenizer.read(values, path)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{path} has {tokenizer.vocab_size} tokens, but an embedding of {config.vocab_size} rows.")
    blocks = sorted({tensor.tensor_type.name for tensor in reader.tensors} & _BLOCK_BYTES.keys())
    return Checkpoint(config, weights, rounded_to=" and ".join(blocks).lower() or None), tokenizer


class _Unreadable(ValueError):
    """Why a file cannot be read, in words for people."""


def _open(path: Path) -> Any:
    gguf = _package()

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        """The package believes any count, and takes what lies beyond the end of a file for empty."""

        values_read = 0

        def _get(self, offset: int, *args: Any, **kwargs: Any) -> Any:
            self.values_read += 1
            if offset >= len(self.data):
                raise _Unreadable("it is cut off")
            if self.values_read > _MOST_VALUES:
                raise _Unreadable(f"its header has more than {_MOST_VALUES} values")
            return super()._get(offset, *args, **kwargs)

    try:
        return Reader(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    # Whatever a damaged file makes the package, and NumPy under it, stumble over.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        # Our own reasons are for people, NumPy's are not.
        reason = str(error) if isinstance(error, _Unreadable) else "its header or its end is not as it should be"
        raise _damaged(path, reason) from None


def _damaged(path: Path, why: str) -> RequestError:
    return RequestError(f"{path} is damaged or no GGUF file ({why}); download it again.")


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _check(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, (_, shape) in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise RequestError(f"The tensors in {path} do not fit its keys: {'; '.join(problems[:8])}{rest}.")


def _joined(first: Tensor, second: Tensor | None = None) -> Tensor:
    """A tensor of the rows of two, or the only one."""
    if second is None:
        return first
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    # Of two types that differ, one is float32, or they are the two half precisions: float32 holds both.
    dtype = first.dtype if first.dtype == second.dtype else mx.float32
    return Tensor(dtype, shape, lambda: mx.concatenate([first.cast(dtype).read(), second.cast(dtype).read()]))


def _unpacked(blocks: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(mx.float32, shape, lambda: _unpack(blocks.read(), kind).reshape(shape))


def _unpack(blocks: mx.array, kind: str) -> mx.array:
    """uint8 [rows, blocks, bytes] as float32 [rows, blocks, 32]."""
    scales = blocks[..., :2].view(mx.float16).astype(mx.float32)
    values = blocks[..., 2:]
    if kind == "Q8_0":
        return scales * values.view(mx.int8).astype(mx.float32)
    # The low halves of the 16 bytes are the first 16 weights, the high halves the rest.
    halves = mx.concatenate([values & 15, values >> 4], axis=-1)
    return scales * (halves.astype(mx.float32) - 8)
