"""GGUF, llama.cpp's file format, through the `gguf` package: metadata, tokenizer and weights in one file.

Names and keys are those of llama.cpp's `openelm` architecture. It computes logits with the embedding, normalizes
queries and keys, and has a SiLU-gated feed-forward, whose `proj_1` it stores as two tensors.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError, quote
from ..inputs import check_file
from ..text.tokenizer import Tokenizer
from ..wording import install
from . import gguf_blocks, gguf_header, gguf_metadata, gguf_tensors, gguf_tokenizer, raw
from .gguf_blocks import BLOCK, BLOCK_BYTES, FLOATS
from .gguf_header import TensorInfo
from .mlx import Checkpoint
from .packing import dequantize_weights
from .raw import Span
from .safetensors import Tensor, Weights, streaming

# The values of --gguf-type, each with the file's type in `gguf.LlamaFileType`.
FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
_EMBEDDING, _HEAD = f"{gguf_tensors.EMBEDDING_TENSOR}.weight", f"{gguf_tensors.HEAD_TENSOR}.weight"


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise RequestError(f"GGUF files need the package gguf: {install('gguf')}.") from None
    return gguf


# Writing.


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
        name: the model's name in the file (`general.name`).
        chat_template: jinja source, in place of the tokenizer's own.
        progress: called with the bytes written so far and the total.

    Returns:
        The matrices stored in another type, by Hugging Face name, with the reason.

    Raises:
        RequestError: an unknown type, a model that llama.cpp does not support, or the gguf package is missing.
        OpenELMError: a matrix to be quantized is not finite.
    """
    gguf = _package()
    config = checkpoint.config
    check_representable(config, gguf_type)
    types, exceptions = _types(config, gguf_type)
    shapes = {tensor: shape for tensor, (_, shape) in gguf_tensors.layout(config).items()}
    sizes = {tensor: gguf_blocks.nbytes(shape, types[tensor]) for tensor, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, gguf_metadata.ARCHITECTURE)
    try:
        gguf_metadata.write(writer, config, FILE_TYPES[gguf_type], name)
        gguf_tokenizer.write(writer, tokenizer, config.vocab_size, tokenizer.templates(chat_template))
        for tensor, shape in shapes.items():
            kind = gguf.GGMLQuantizationType[types[tensor]]
            writer.add_tensor_info(tensor, shape, None, sizes[tensor], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written, total = 0, sum(sizes.values())
        names = {tensor: source for tensor, (source, _) in gguf_tensors.layout(config).items()}
        with streaming():
            for tensor, weight in _drain(checkpoint):
                writer.write_tensor_data(gguf_blocks.encode(weight, types[tensor], names[tensor]))
                del weight  # before the next one is read
                written += sizes[tensor]
                if progress is not None:
                    progress(written, total)
    finally:
        writer.close()
    return exceptions


def check_representable(config: ModelConfig, gguf_type: str) -> None:
    """Refuse what llama.cpp could not load or would compute differently.

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
        raise RequestError(f"Cannot export to GGUF, since llama.cpp does not support this model: {reason}.")


def _types(config: ModelConfig, gguf_type: str) -> tuple[dict[str, str], dict[str, str]]:
    """The type of every tensor by its name in the file, and what falls back to float16 by Hugging Face name."""
    types, exceptions = {}, {}
    for tensor, (source, shape) in gguf_tensors.layout(config).items():
        types[tensor] = gguf_type.upper()
        if len(shape) == 1:
            types[tensor] = "F32"
        elif types[tensor] in BLOCK_BYTES and shape[1] % BLOCK:
            types[tensor] = "F16"
            exceptions[source] = f"stored as f16, since blocks of {BLOCK} do not divide rows of {shape[1]}"
    return types, exceptions


def bits_per_weight(config: ModelConfig, gguf_type: str) -> float:
    """Stored bits per parameter in a file of `gguf_type`, including norms and float16 fallbacks."""
    types, _ = _types(config, gguf_type)
    layout = gguf_tensors.layout(config)
    total = sum(gguf_blocks.nbytes(shape, types[tensor]) for tensor, (_, shape) in layout.items())
    return 8 * total / config.num_parameters


def _drain(checkpoint: Checkpoint) -> Iterator[tuple[str, mx.array]]:
    """The tensors by name in the file's order, each taken out of the checkpoint; packed matrices become float32."""
    weights = dequantize_weights(checkpoint.weights, checkpoint.quantization, mx.float32)
    checkpoint.weights, checkpoint.quantization = Weights({}), {}
    up = None
    for tensor, (source, _) in gguf_tensors.layout(checkpoint.config).items():
        if tensor.endswith(f"{gguf_tensors.GATE}.weight"):
            gate, up = mx.split(weights.take(source), 2)  # [2 * inner, dim] -> [inner, dim] each
            yield tensor, gate
            del gate
        elif up is not None:  # the half after the gate
            yield tensor, up
            up = None
        else:
            yield tensor, weights.take(source)


# Reading.


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
    """Whether a file begins as GGUF files do.

    Raises:
        RequestError: it cannot be read.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            return file.read(len(gguf_header.MAGIC)) == gguf_header.MAGIC
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None


def read(path: Path) -> tuple[Checkpoint, Tokenizer]:
    """The model and the tokenizer in a GGUF file; no weight is read yet.

    Weights keep the file's floating-point types; quantized blocks unpack to float32.

    Raises:
        RequestError: the file is damaged, of another architecture, one of several parts, or has a type that the
            package cannot unpack; or the package is missing.
    """
    _package()
    header = gguf_header.read(path)
    values, tensors = header.values, dict(header.tensors)
    gguf_metadata.check_model(values, path)
    _check_types(path, tensors.values())
    embedding = tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise RequestError(f"{path} has no two-dimensional {_EMBEDDING}, so it is not a model.")
    if _is_copy(path, tensors.get(_HEAD), embedding):
        del tensors[_HEAD]
    config = gguf_metadata.read(
        values,
        path,
        vocab_size=embedding.shape[0],
        max_layers=len(tensors),
        tied=_HEAD not in tensors,
    )
    gguf_tensors.check(path, config, {name: tensor.shape for name, tensor in tensors.items()})
    weights = _weights(path, config, tensors)
    tokenizer = gguf_tokenizer.read(values, path)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{path} has {tokenizer.vocab_size} tokens, but an embedding of {config.vocab_size} rows.")
    return Checkpoint(config, weights, rounded_to=_quantized_types(tensors)), tokenizer


def stored_bytes(path: Path) -> int:
    """The bytes that the tensors take in a file, without padding; errors as in `gguf_header.read`."""
    return sum(tensor.nbytes for tensor in gguf_header.read(path).tensors.values())


def _check_types(path: Path, tensors: Iterable[TensorInfo]) -> None:
    for tensor in tensors:
        if tensor.kind not in FLOATS and not gguf_blocks.can_unpack(tensor.kind):
            raise RequestError(
                f"{path} stores {tensor.name} as {tensor.kind}, which the gguf package cannot unpack; convert "
                "a file of another type."
            )


def _is_copy(path: Path, head: TensorInfo | None, embedding: TensorInfo) -> bool:
    """Whether the output layer is the embedding again, byte for byte: some converters store a shared matrix twice."""
    if head is None or (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    both = raw.tensors(path, {tensor.name: _span(tensor) for tensor in (head, embedding)})
    return bool(mx.array_equal(both[head.name].read().view(mx.uint8), both[embedding.name].read().view(mx.uint8)))


def _span(tensor: TensorInfo) -> Span:
    """A tensor's bytes in the file: values of a float type, blocks as uint8."""
    if tensor.kind in FLOATS:
        return Span(FLOATS[tensor.kind], tensor.shape, tensor.offset)
    return Span(mx.uint8, tensor.bytes_shape, tensor.offset)


def _quantized_types(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The quantized types in a file, for messages ("q4_k and q6_k"); None if all are floating-point."""
    kinds = sorted({tensor.kind.lower() for tensor in tensors.values() if tensor.kind not in FLOATS})
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds) or None


def _weights(path: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> Weights:
    """The tensors under their Hugging Face names, unread; gate and up become one matrix."""
    stored = raw.tensors(path, {name: _span(tensor) for name, tensor in tensors.items()})
    parts: dict[str, list[Tensor]] = {}
    for name, (source, shape) in gguf_tensors.layout(config).items():
        kind = tensors[name].kind
        weight = stored[name] if kind in FLOATS else gguf_blocks.unpacked(stored[name], kind, shape)
        parts.setdefault(source, []).append(weight)
    return Weights({source: _concatenated(*halves) for source, halves in parts.items()})


def _concatenated(first: Tensor, second: Tensor | None = None) -> Tensor:
    """The rows of the first tensor, then those of the second, if there is one."""
    if second is None:
        return first
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    # If the types differ, one is float32 or they are the two half precisions; float32 holds the values of both.
    dtype = first.dtype if first.dtype == second.dtype else mx.float32
    return Tensor(dtype, shape, lambda: mx.concatenate([first.cast(dtype).read(), second.cast(dtype).read()]))
