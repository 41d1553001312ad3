"""The shape of an OpenELM model: layer-wise scaling, the four published sizes, validation.

Source of the rules: arXiv:2404.14619 section 2.1 and the configuration published with `apple/OpenELM-*`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import QUOTED, RequestError, quote
from .inputs import kind_of, read_json

# Layers, model_dim, head_dim of the published sizes; all else they share.
SIZES = {"270M": (16, 1280, 64), "450M": (20, 1536, 64), "1_1B": (28, 2048, 64), "3B": (36, 3072, 128)}

# Where the matrices are, by module path; those of a layer by path within it, in the order a token meets them.
EMBEDDING, HEAD, LAYERS = "transformer.token_embeddings", "lm_head", "transformer.layers."
LAYER_MATRICES = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")

ACTIVATIONS = ("swish", "silu", "gelu", "relu")

_SIZE_FIELDS = (
    "num_transformer_layers",
    "model_dim",
    "head_dim",
    "vocab_size",
    "num_gqa_groups",
    "ffn_dim_divisor",
    "rope_max_length",
    "max_context_length",
)
_SWITCHES = ("ffn_with_glu", "normalize_qk_projections", "share_input_output_layers")

# The largest sizes and the largest number that could be meant; beyond them a file is damaged or hostile.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_NUMBER = 1e12


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to the nearest multiple of `divisor`, at least one, and one up if that lost over 10%."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def spread(bounds: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` values evenly spaced from bounds[0] to bounds[1], rounded to 2 decimals.

    The original rounds NumPy floats, which scale before they round; halves fall differently from Python's.
    """
    first, last = bounds
    step = (last - first) / (count - 1) if count > 1 else 0.0
    values = [first + i * step for i in range(count)]
    if count > 1:
        values[-1] = last
    return tuple(round(value * 100) / 100 for value in values)


@dataclass(frozen=True)
class ModelConfig:
    """Every size and switch of one model, under the names of the Hugging Face configuration.

    The per-layer fields may be given as one number for all layers, as a pair of bounds
    (multipliers), as a full list, or left out where the multipliers determine them; afterwards
    `num_query_heads`, `num_kv_heads` and `ffn_multipliers` are tuples with one entry a layer.

    Raises:
        RequestError: a value that cannot be right, naming the field.
    """

    num_transformer_layers: int
    model_dim: int
    head_dim: int
    vocab_size: int
    num_query_heads: tuple[int, ...] = ()
    num_kv_heads: tuple[int, ...] = ()
    ffn_multipliers: tuple[float, ...] = (4.0,)
    qkv_multipliers: float | tuple[float, ...] = 1.0
    num_gqa_groups: int = 1
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = False
    share_input_output_layers: bool = False
    rms_norm_eps: float = 1e-6
    rope_freq_constant: float = 10000
    rope_max_length: int = 4096
    max_context_length: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        for name in _SIZE_FIELDS:
            _check_size(name, getattr(self, name))
        if self.num_transformer_layers > _MAX_LAYERS:  # before anything is made for each of them
            raise _invalid("num_transformer_layers", self.num_transformer_layers, f"at most {_MAX_LAYERS}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "true or false")
        for name in ("rms_norm_eps", "rope_freq_constant"):
            _check_positive(name, getattr(self, name))
        if self.head_dim % 2:
            raise _invalid("head_dim", self.head_dim, "even, since RoPE rotates pairs")
        if self.activation_fn_name not in ACTIVATIONS:
            raise _invalid("activation_fn_name", self.activation_fn_name, f"one of {', '.join(ACTIVATIONS)}")
        if self.normalization_layer_name != "rms_norm":
            raise _invalid("normalization_layer_name", self.normalization_layer_name, "rms_norm")
        _check_token_id("bos_token_id", self.bos_token_id)
        eos = self.eos_token_id
        for token in eos if isinstance(eos, tuple | list) else (eos,):
            _check_token_id("eos_token_id", token)

        object.__setattr__(self, "eos_token_id", tuple(eos) if isinstance(eos, list) else eos)
        object.__setattr__(self, "qkv_multipliers", self._checked_multipliers("qkv_multipliers"))
        object.__setattr__(self, "ffn_multipliers", self._per_layer_multipliers("ffn_multipliers"))
        object.__setattr__(self, "num_query_heads", self._query_heads())
        object.__setattr__(self, "num_kv_heads", self._kv_heads())

    # Per-layer fields, from any of the forms a file may give them in.

    def _checked_multipliers(self, name: str) -> float | tuple[float, ...]:
        value = getattr(self, name)
        if isinstance(value, list | tuple):
            if len(value) not in (2, self.num_transformer_layers):
                expected = f"one number, two bounds, or {self.num_transformer_layers} numbers, one a layer"
                raise _invalid(name, f"a list of {len(value)}", expected)
            for entry in value:
                _check_positive(name, entry)
            return tuple(value)
        _check_positive(name, value)
        return value

    def _per_layer_multipliers(self, name: str) -> tuple[float, ...]:
        value = self._checked_multipliers(name)
        if not isinstance(value, tuple):
            return (value,) * self.num_transformer_layers
        return spread(value, self.num_transformer_layers) if len(value) == 2 else value

    def _heads_list(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        heads = tuple(value) if isinstance(value, list | tuple) else (value,) * self.num_transformer_layers
        if len(heads) != self.num_transformer_layers:
            raise _invalid(name, f"a list of {len(heads)}", f"{self.num_transformer_layers} numbers, one a layer")
        for count in heads:
            _check_size(name, count)
        return heads

    def _query_heads(self) -> tuple[int, ...]:
        if self.num_query_heads not in (None, (), []):
            return self._heads_list("num_query_heads")
        # Query widths are made divisible by head_dim times the group size, so that groups come out whole.
        divisor = self.head_dim * self.num_gqa_groups
        widths = self._per_layer_multipliers("qkv_multipliers")
        return tuple(make_divisible(self.model_dim * m, divisor) // self.head_dim for m in widths)

    def _kv_heads(self) -> tuple[int, ...]:
        if self.num_kv_heads not in (None, (), []):
            kv_heads = self._heads_list("num_kv_heads")
        else:
            for heads in self.num_query_heads:
                if heads % self.num_gqa_groups:
                    raise _invalid(
                        "num_query_heads", heads, f"divisible by num_gqa_groups, {self.num_gqa_groups}, in every layer"
                    )
            kv_heads = tuple(heads // self.num_gqa_groups for heads in self.num_query_heads)
        for layer, (query, kv) in enumerate(zip(self.num_query_heads, kv_heads, strict=True)):
            if query % kv:
                raise _invalid("num_query_heads", query, f"divisible by num_kv_heads, {kv}, in layer {layer}")
        return kv_heads

    # Ways in and out.

    @classmethod
    def from_name(cls, name: str) -> ModelConfig:
        """The configuration of a published size: `OpenELM-270M`, `apple/OpenELM-1_1B-Instruct`, `3b`, ...

        Raises:
            RequestError: no such size.
        """
        size = name.lower().removeprefix("apple/").removeprefix("openelm-").removesuffix("-instruct")
        size = size.upper().replace(".", "_")
        if size not in SIZES:
            raise RequestError(f"No OpenELM size is called {quote(name)}; there are {', '.join(SIZES)}.")
        layers, model_dim, head_dim = SIZES[size]
        return cls(
            num_transformer_layers=layers,
            model_dim=model_dim,
            head_dim=head_dim,
            vocab_size=32000,
            num_gqa_groups=4,
            qkv_multipliers=(0.5, 1.0),
            ffn_multipliers=(0.5, 4.0),
            normalize_qk_projections=True,
            share_input_output_layers=True,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """A configuration from the keys of a Hugging Face or MLX `config.json`; unknown keys are ignored.

        Raises:
            RequestError: not an OpenELM configuration, a missing size, or a value that cannot be right.
        """
        if not isinstance(values, dict):
            raise RequestError(f"The configuration must be a JSON object, not {kind_of(values)}.")
        model_type = values.get("model_type", "openelm")
        if model_type != "openelm":
            raise RequestError(f"This is a {quote(model_type)} model; mlx-openelm runs model_type 'openelm'.")
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        for name in ("num_transformer_layers", "model_dim", "head_dim", "vocab_size"):
            if given.get(name) is None:
                raise RequestError(f"The configuration has no {name}.")
        return cls(**{k: v for k, v in given.items() if v is not None})

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """A configuration from a `config.json`, or from the folder that holds one.

        Raises:
            RequestError: the file is missing, is not JSON, or cannot be right.
        """
        return cls.from_dict(read_json(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """The keys of `config.json`, every list expanded, as the original and mlx-lm read them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | {"model_type": "openelm", "architectures": ["OpenELMForCausalLM"], "use_cache": True}

    # What follows from the sizes.

    @property
    def ffn_dims(self) -> tuple[int, ...]:
        """The inner size of each layer's feed-forward."""
        return tuple(make_divisible(m * self.model_dim, self.ffn_dim_divisor) for m in self.ffn_multipliers)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight under its Hugging Face name; the one list that checks and counts use."""
        dim, head_dim = self.model_dim, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (self.vocab_size, dim)}
        layers = zip(self.num_query_heads, self.num_kv_heads, self.ffn_dims, strict=True)
        for layer, (query, kv, inner) in enumerate(layers):
            prefix = f"{LAYERS}{layer}"
            shapes[f"{prefix}.attn.qkv_proj.weight"] = ((query + 2 * kv) * head_dim, dim)
            shapes[f"{prefix}.attn.out_proj.weight"] = (dim, query * head_dim)
            if self.normalize_qk_projections:
                shapes[f"{prefix}.attn.q_norm.weight"] = (head_dim,)
                shapes[f"{prefix}.attn.k_norm.weight"] = (head_dim,)
            shapes[f"{prefix}.ffn.proj_1.weight"] = (2 * inner if self.ffn_with_glu else inner, dim)
            shapes[f"{prefix}.ffn.proj_2.weight"] = (dim, inner)
            shapes[f"{prefix}.attn_norm.weight"] = (dim,)
            shapes[f"{prefix}.ffn_norm.weight"] = (dim,)
        shapes["transformer.norm.weight"] = (dim,)
        if not self.share_input_output_layers:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, dim)
        return shapes

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """The shape [out, in] of every matrix by module path: what can be quantized."""
        shapes = self.tensor_shapes().items()
        return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}

    @property
    def fits_float16(self) -> bool:
        """Whether float16 holds the activations: those of the 3B model, or one of its shape, leave its range."""
        return (self.num_transformer_layers, self.model_dim, self.head_dim) != SIZES["3B"]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_SIZE:
        raise _invalid(name, value, f"a positive whole number, at most {_MAX_SIZE}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
        raise _invalid(name, value, "a positive number")


def _check_token_id(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _invalid(name, value, "a token id, 0 or more")


def _invalid(name: str, value: object, expected: str) -> RequestError:
    shown = value[:QUOTED] if isinstance(value, str) else quote(value)
    return RequestError(f"The configuration's {name} is {shown}; it must be {expected}.")
