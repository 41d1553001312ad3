"""The data classes of an adapter: low-rank changes to a model's matrices, independent of file format and model."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from ..config import EMBEDDING, LAYER_MATRICES

# The names of an adapter's files: its settings, and its weights in mlx-lm's and in PEFT's format.
CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS = "adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"
FILES = (CONFIG, MLX_WEIGHTS, PEFT_WEIGHTS)

# The modules an adapter can change, by the last part of their paths: the matrices of a layer, and the embedding.
PROJECTIONS = tuple(path.rpartition(".")[2] for path in LAYER_MATRICES)
TARGET_MODULES = (EMBEDDING.rpartition(".")[2], *PROJECTIONS)

# The smallest length of a row or column that DoRA divides by.
MIN_NORM = 1e-12


@dataclass(frozen=True)
class LowRank:
    """The change of one matrix: `scale * a @ b` is added to it.

    Args:
        a: [in, rank]; for the embedding [vocab, rank].
        b: [rank, out]; for the embedding [rank, model_dim].
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        magnitude: DoRA's length of each output row [out] (arXiv:2402.09353); for the embedding, of each column
            [model_dim], as in PEFT. None for LoRA.
        output_side: for an embedding that is also the output layer, whether the logits are changed too, as in mlx-lm;
            PEFT and CoreNet change the input side only.
    """

    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None
    output_side: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True)
class BaseCopy:
    """A copy of one of the base's weights in an adapter's file.

    Args:
        name: the tensor's name in the model.
        value: the tensor in the adapter's file.
        refusal: the error message if the base's weight differs.
    """

    name: str
    value: mx.array
    refusal: str


@dataclass
class Adapter:
    """The changes of a model, by module path (`transformer.layers.0.attn.qkv_proj`).

    `weights` holds whole tensors by name, as full fine-tuning writes them; an adapter has these or `modules`.
    `base_copies` are compared with the base before the adapter is used, and then removed.
    """

    modules: dict[str, LowRank] = field(default_factory=dict)
    weights: dict[str, mx.array] = field(default_factory=dict)
    dropout: float = 0.0
    base_model: str | None = None
    base_copies: list[BaseCopy] = field(default_factory=list)
