"""GGUF, llama.cpp's file format, through the `gguf` package: metadata, tokenizer and weights in one file.

Names and keys are those of llama.cpp's `openelm` architecture. It computes logits with the embedding, normalizes
queries and keys, and has a feed-forward gated by silu, whose `proj_1` it keeps as two tensors.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..config import EMBEDDING, HEAD, LAYERS, ModelConfig
from ..errors import RequestError, quote
from ..inputs import check_file
from ..text.tokenizer import Tokenizer
from ..wording import install, some
from . import gguf_blocks, gguf_header, gguf_metadata, gguf_tokenizer, raw
from .gguf_header import Placed
from .mlx import Checkpoint
from .packing import dequantize_weights
from .raw import Span
from .safetensors import Tensor, Weights, streaming

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
        raise RequestError(f"GGUF files need the package gguf: {install('gguf')}.") from None
    return gguf


def _tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a file: the Hugging Face name it comes from, and its shape."""
    shapes = config.tensor_shapes()
    names = {"token_embd": EMBEDDING}
    for layer in range(config.num_transformer_layers):
        names |= {f"blk.{layer}.{name}": f"{LAYERS}{layer}.{path}" for name, path in _PER_LAYER.items()}
    names["output_norm"] = "transformer.norm"
    if not config.share_input_output_layers:  # read only: llama.cpp's openelm has no such tensor
        names["output"] = HEAD
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
        raise RequestError(f"--gguf-type must be one of {', '.join(FILE_TYPES)}, got {quote(gguf_type)}.")
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
    step = max(1, gguf_blocks.CHUNK // columns)
    for start in range(0, rows, step):
        chunk = np.array(weight[start : start + step].astype(mx.float32))
        encoded[start : start + step] = quants.quantize(chunk, kind)
    return encoded


# In.


def check(path: Path) -> None:
    """Check that a file is GGUF and complete; types that `read` cannot unpack are accepted.

    Raises:
        RequestError: it is not.
    """
    if not is_gguf(path):
        raise RequestError(f"{path} is not a GGUF file; export it again.")
    if importlib.util.find_spec("gguf") is not None:
        gguf_header.read(path)


def is_gguf(path: Path) -> bool:
    """Whether a file says of itself that it is GGUF; RequestError where it cannot be read."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return file.read(len(gguf_header.MAGIC)) == gguf_header.MAGIC
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None


def read(path: Path) -> tuple[Checkpoint, Tokenizer]:
    """The model and the tokenizer in a GGUF file; no weight is read yet.

    Weights have the file's floating-point types; blocks of any type the package knows unpack to float32.

    Raises:
        RequestError: damaged, of another architecture, one part of several, a type that the package cannot unpack, or
            the package is missing.
    """
    _package()
    header = gguf_header.read(path)
    values, found = header.values, dict(header.tensors)
    gguf_metadata.check_model(values, path)
    for tensor in found.values():
        if tensor.kind not in _FLOATS and not gguf_blocks.can_unpack(tensor.kind):
            raise RequestError(
                f"{path} stores {tensor.name} as {tensor.kind}, which the gguf package does not unpack; convert "
                "a file of another type."
            )
    embedding = found.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise RequestError(f"{path} has no token_embd.weight of two dimensions, so it is not a model.")
    if _repeats(path, found.get("output.weight"), embedding):
        del found["output.weight"]
    config = gguf_metadata.read(
        values,
        path,
        vocab_size=embedding.shape[0],
        most_layers=len(found),
        tied="output.weight" not in found,
    )
    _check(path, _tensors(config), {name: tensor.shape for name, tensor in found.items()})
    stored = raw.tensors(path, {name: _span(tensor) for name, tensor in found.items()})
    parts: dict[str, list[Tensor]] = {}
    for name, (source, shape) in _tensors(config).items():
        kind = found[name].kind
        weight = stored[name] if kind in _FLOATS else gguf_blocks.unpacked(stored[name], kind, shape)
        parts.setdefault(source, []).append(weight)
    weights = Weights({source: _joined(*halves) for source, halves in parts.items()})
    tokenizer = gguf_tokenizer.read(values, path)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{path} has {tokenizer.vocab_size} tokens, but an embedding of {config.vocab_size} rows.")
    return Checkpoint(config, weights, rounded_to=_rounded_to(found)), tokenizer


def stored_bytes(path: Path) -> int:
    """What the tensors take in a file that `read` has read."""
    return sum(tensor.nbytes for tensor in gguf_header.read(path).tensors.values())


def _repeats(path: Path, head: Placed | None, embedding: Placed) -> bool:
    """Whether an output layer is the embedding again, byte for byte: some converters store what is shared twice."""
    if head is None or (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    both = raw.tensors(path, {tensor.name: _span(tensor) for tensor in (head, embedding)})
    return bool(mx.array_equal(both[head.name].read().view(mx.uint8), both[embedding.name].read().view(mx.uint8)))


def _span(tensor: Placed) -> Span:
    """Where a tensor's numbers lie; those in blocks as bytes."""
    if tensor.kind in _FLOATS:
        return Span(_FLOATS[tensor.kind], tensor.shape, tensor.offset)
    return Span(mx.uint8, tensor.bytes_shape, tensor.offset)


def _rounded_to(tensors: Mapping[str, Placed]) -> str | None:
    """The types of few bits in a file, in words; None where all is floating-point."""
    kinds = sorted({tensor.kind.lower() for tensor in tensors.values() if tensor.kind not in _FLOATS})
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds) or None


def _check(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, (_, shape) in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise RequestError(f"The tensors in {path} do not fit its keys: {some(problems, separator='; ')}.")


def _joined(first: Tensor, second: Tensor | None = None) -> Tensor:
    """A tensor of the rows of two, or the only one."""
    if second is None:
        return first
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    # Of two types that differ, one is float32, or they are the two half precisions: float32 holds both.
    dtype = first.dtype if first.dtype == second.dtype else mx.float32
    return Tensor(dtype, shape, lambda: mx.concatenate([first.cast(dtype).read(), second.cast(dtype).read()]))
