"""The tensors of llama.cpp's `openelm` architecture: their names and shapes, and the Hugging Face names for them.

Source: llama.cpp's gguf-py/gguf/constants.py (MODEL_ARCH.OPENELM) and tensor_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config import EMBEDDING, HEAD, LAYERS, NORM, ModelConfig
from ..errors import RequestError
from ..wording import some

# Names without `.weight`.
EMBEDDING_TENSOR, HEAD_TENSOR = "token_embd", "output"
GATE, UP = "ffn_gate", "ffn_up"
_PER_LAYER = {
    "attn_norm": "attn_norm",
    "attn_qkv": "attn.qkv_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.out_proj",
    "ffn_norm": "ffn_norm",
    GATE: "ffn.proj_1",  # its first half
    UP: "ffn.proj_1",  # its second half
    "ffn_down": "ffn.proj_2",
}


def layout(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor by its name in a file, in the file's order: the Hugging Face tensor it comes from, and its shape."""
    shapes = config.tensor_shapes()
    names = {EMBEDDING_TENSOR: EMBEDDING}
    for layer in range(config.num_transformer_layers):
        names |= {f"blk.{layer}.{name}": f"{LAYERS}{layer}.{path}" for name, path in _PER_LAYER.items()}
    names["output_norm"] = NORM
    if not config.share_input_output_layers:  # read only: llama.cpp's openelm has no such tensor
        names[HEAD_TENSOR] = HEAD
    tensors = {}
    for name, path in names.items():
        shape = shapes[f"{path}.weight"]
        if path.endswith("proj_1"):
            shape = (shape[0] // 2, shape[1])
        tensors[f"{name}.weight"] = (f"{path}.weight", shape)
    return tensors


def check(path: Path, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes in a file, `found` by name, with those that its keys describe.

    Raises:
        RequestError: a tensor is missing, unexpected, or of another shape.
    """
    expected = layout(config)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, (_, shape) in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise RequestError(f"The tensors in {path} do not match its keys: {some(problems, separator='; ')}.")
