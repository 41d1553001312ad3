"""A small model in a GGUF file, written byte by byte so that tests can change anything in it."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"),
    "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
LAYERS, DIM, HEAD_DIM, HEADS, KV_HEADS, FFN = 2, 256, 128, (2, 2), (1, 1), (256, 512)
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
TYPES = [2, 3, 3] + [6] * 256 + [1] * 4
SHAPES = {"token_embd.weight": (len(PIECES), DIM), "output_norm.weight": (DIM,)} | {
    f"blk.{layer}.{name}.weight": shape
    for layer in range(LAYERS)
    for name, shape in {
        "attn_norm": (DIM,),
        "attn_qkv": ((HEADS[layer] + 2 * KV_HEADS[layer]) * HEAD_DIM, DIM),
        "attn_q_norm": (HEAD_DIM,),
        "attn_k_norm": (HEAD_DIM,),
        "attn_output": (DIM, HEADS[layer] * HEAD_DIM),
        "ffn_norm": (DIM,),
        "ffn_gate": (FFN[layer], DIM),
        "ffn_up": (FFN[layer], DIM),
        "ffn_down": (DIM, FFN[layer]),
    }.items()
}


@dataclass
class RawTensor:
    """Bytes, their type number, the shape from the outermost dimension; placed after the last tensor by default."""

    kind: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


@dataclass
class RawFile:
    """Keys and tensors in the file's order; a key has a type (`u32`, `array of f32`, ...) and a value."""

    keys: list[tuple[str | bytes, str, Any]]
    tensors: list[tuple[str | bytes, RawTensor]]
    version: int = 3
    alignment: int = 32
    counts: tuple[int, int] | None = None
    tail: bytes = field(default=b"")

    def key(self, name: str, kind: str, value: Any) -> None:
        """Set a key, or add it."""
        names = [key for key, _, _ in self.keys]
        place = names.index(name) if name in names else len(names)
        self.keys[place : place + 1] = [(name, kind, value)]

    def tensor(self, name: str, **changes: Any) -> None:
        """Change a tensor."""
        self.tensors = [(n, replace(tensor, **changes) if n == name else tensor) for n, tensor in self.tensors]

    def pack(self) -> bytes:
        tensors, keys = self.counts or (len(self.tensors), len(self.keys))
        header = b"GGUF" + struct.pack("<IQQ", self.version, tensors, keys)
        for name, kind, value in self.keys:
            header += _text(name) + struct.pack("<I", _number(kind)) + _value(kind, value)
        data = b""
        for name, tensor in self.tensors:
            header += _text(name) + struct.pack("<I", len(tensor.shape))
            header += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
            header += struct.pack("<IQ", tensor.kind, len(data) if tensor.offset is None else tensor.offset)
            data += tensor.data + b"\xaa" * (-len(tensor.data) % self.alignment)
        return header + b"\xaa" * (-len(header) % self.alignment) + data + self.tail

    def write(self, path: Path) -> Path:
        path.write_bytes(self.pack())
        return path


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _number(kind: str) -> int:
    return {"str": 8}.get(kind, 9) if kind not in SCALARS else SCALARS[kind][0]


def _value(kind: str, value: Any) -> bytes:
    if kind in SCALARS:
        return struct.pack(f"<{SCALARS[kind][1]}", value)
    if kind == "str":
        return _text(value)
    of = kind.removeprefix("array of ")
    start = struct.pack("<IQ", _number(of), len(value))
    if of in SCALARS:
        return start + struct.pack(f"<{len(value)}{SCALARS[of][1]}", *value)
    return start + b"".join(_value(of, entry) for entry in value)


def small_file() -> RawFile:
    """Random float32 weights; row lengths are multiples of 256, which the blocks of every type divide."""
    rng = np.random.default_rng(0)
    keys: list[tuple[str | bytes, str, Any]] = [
        ("general.architecture", "str", "openelm"),
        ("openelm.block_count", "u32", LAYERS),
        ("openelm.context_length", "u32", 128),
        ("openelm.embedding_length", "u32", DIM),
        ("openelm.feed_forward_length", "array of i32", FFN),
        ("openelm.attention.head_count", "array of i32", HEADS),
        ("openelm.attention.head_count_kv", "array of i32", KV_HEADS),
        ("openelm.attention.key_length", "u32", HEAD_DIM),
        ("openelm.attention.value_length", "u32", HEAD_DIM),
        ("openelm.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        ("openelm.rope.freq_base", "f32", 10000.0),
        ("openelm.rope.dimension_count", "u32", HEAD_DIM),
        ("tokenizer.ggml.model", "str", "llama"),
        ("tokenizer.ggml.pre", "str", "default"),
        ("tokenizer.ggml.tokens", "array of str", PIECES),
        ("tokenizer.ggml.scores", "array of f32", [-float(i) for i in range(len(PIECES))]),
        ("tokenizer.ggml.token_type", "array of i32", TYPES),
    ]
    tensors: list[tuple[str | bytes, RawTensor]] = []
    for name, shape in SHAPES.items():
        values = rng.standard_normal(shape)
        weight = 1 + values / 10 if len(shape) == 1 else values / shape[-1] ** 0.5
        tensors.append((name, RawTensor(0, shape, weight.astype(np.float32).tobytes())))
    return RawFile(keys, tensors)


def random_blocks(shape: tuple[int, ...], block: int, block_bytes: int, seed: int = 0) -> bytes:
    """Random bytes, which are valid blocks of any type."""
    return np.random.default_rng(seed).bytes(math.prod(shape) // block * block_bytes)


def keep_weights_as_they_are(llama_cpp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop llama.cpp from repacking weights for AMX, which kills the process in containers that do not permit AMX."""
    default_params = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        params = default_params()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_repacking)
