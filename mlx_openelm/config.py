"""The shape of an OpenELM model: layer-wise scaling, the four published sizes, validation.

Source of the rules: arXiv:2404.14619 section 2.1 and the configuration published with `apple/OpenELM-*`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import QUOTED, RequestError, quote
from .inputs import kind_of, read_json

# Layers, model_dim and head_dim of the published sizes; they share everything else.
SIZES = {"270M": (16, 1280, 64), "450M": (20, 1536, 64), "1_1B": (28, 2048, 64), "3B": (36, 3072, 128)}

# The parts by module path; the matrices of a layer by the path within it, in the order they are applied.
EMBEDDING, LAYERS, NORM, HEAD = "transformer.token_embeddings", "transformer.layers.", "transformer.norm", "lm_head"
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

# Beyond these limits a file is damaged or hostile.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_NUMBER = 1e12
# Kinds of numbers: types, lowest and highest value, and their description in messages.
_SIZE = (int, 1, _MAX_SIZE, f"a positive whole number, at most {_MAX_SIZE}")
_POSITIVE = ((int, float), math.ulp(0.0), _MAX_NUMBER, "a positive number")
_TOKEN_ID = (int, 0, math.inf, "a token id, 0 or more")


def make_divisible(value: float, divisor: int) -> int:
    """`value` rounded to the nearest multiple of `divisor`, at least one, and one more if rounding loses over 10%."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def spread(bounds: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` values evenly spaced from bounds[0] to bounds[1], rounded to 2 decimals.

    As in NumPy, values are scaled, then rounded; Python's `round` treats some halves differently.
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

    A per-layer field may be given as one number for all layers, as two bounds (multipliers), as a list with one
    number per layer, or left out if the multipliers determine it. After construction `num_query_heads`,
    `num_kv_heads` and `ffn_multipliers` are tuples with one number per layer, and so is `ffn_dims`, the inner size of
    each layer's feed-forward.

    Raises:
        RequestError: a value is invalid; the message names the field.
    """

    num_transformer_layers: int
    model_dim: int
    head_dim: int
    vocab_size: int
    num_query_heads: tuple[int, ...] = ()
    num_kv_heads: tuple[int, ...] = ()
    ffn_multipliers: tuple[float, ...] = 4.0  # type: ignore[assignment]  # Apple's default, for every layer
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
    ffn_dims: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in _SIZE_FIELDS:
            _check(name, getattr(self, name), _SIZE)
        if self.num_transformer_layers > _MAX_LAYERS:  # before anything is built per layer
            raise _invalid("num_transformer_layers", self.num_transformer_layers, f"at most {_MAX_LAYERS}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "true or false")
        for name in ("rms_norm_eps", "rope_freq_constant"):
            _check(name, getattr(self, name), _POSITIVE)
        if self.head_dim % 2:
            raise _invalid("head_dim", self.head_dim, "even, since RoPE rotates pairs")
        if self.activation_fn_name not in ACTIVATIONS:
            raise _invalid("activation_fn_name", self.activation_fn_name, f"one of {', '.join(ACTIVATIONS)}")
        if self.normalization_layer_name != "rms_norm":
            raise _invalid("normalization_layer_name", self.normalization_layer_name, "rms_norm")
        _check("bos_token_id", self.bos_token_id, _TOKEN_ID)
        eos = self.eos_token_id
        for token in eos if isinstance(eos, tuple | list) else (eos,):
            _check("eos_token_id", token, _TOKEN_ID)

        object.__setattr__(self, "eos_token_id", tuple(eos) if isinstance(eos, list) else eos)
        if isinstance(self.qkv_multipliers, list):
            object.__setattr__(self, "qkv_multipliers", tuple(self.qkv_multipliers))

        layers, given = self.num_transformer_layers, {}
        for name in ("qkv_multipliers", "ffn_multipliers", "num_query_heads", "num_kv_heads"):
            value, is_count = getattr(self, name), name.startswith("num_")
            if is_count and value in (None, (), []):
                continue
            numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * layers
            if len(numbers) != layers and (is_count or len(numbers) != 2):
                forms = "" if is_count else "one number, two bounds, or "
                raise _invalid(name, f"a list of {len(numbers)}", f"{forms}{layers} numbers, one per layer")
            for number in numbers:
                _check(name, number, _SIZE if is_count else _POSITIVE)
            given[name] = numbers
        self._scale_layers(**given)

    def _scale_layers(
        self,
        qkv_multipliers: tuple[float, ...],
        ffn_multipliers: tuple[float, ...],
        num_query_heads: tuple[int, ...] = (),
        num_kv_heads: tuple[int, ...] = (),
    ) -> None:
        """Set the sizes of each layer: as given, else from the multipliers (section 2.1 of the paper)."""
        layers, groups = self.num_transformer_layers, self.num_gqa_groups
        if len(ffn_multipliers) == 2 and isinstance(self.ffn_multipliers, list | tuple):
            ffn_multipliers = spread(ffn_multipliers, layers)
        if not num_query_heads:
            if len(qkv_multipliers) == 2 and isinstance(self.qkv_multipliers, tuple):
                qkv_multipliers = spread(qkv_multipliers, layers)
            # Query widths are divisible by head_dim times the group size, so that every layer has whole groups.
            widths = (make_divisible(self.model_dim * m, self.head_dim * groups) for m in qkv_multipliers)
            num_query_heads = tuple(width // self.head_dim for width in widths)
        if not num_kv_heads:
            for heads in num_query_heads:
                if heads % groups:
                    raise _invalid("num_query_heads", heads, f"divisible by num_gqa_groups, {groups}, in every layer")
            num_kv_heads = tuple(heads // groups for heads in num_query_heads)
        for layer, (query, kv) in enumerate(zip(num_query_heads, num_kv_heads, strict=True)):
            if query % kv:
                raise _invalid("num_query_heads", query, f"divisible by num_kv_heads, {kv}, in layer {layer}")
        ffn_dims = tuple(make_divisible(self.model_dim * m, self.ffn_dim_divisor) for m in ffn_multipliers)
        object.__setattr__(self, "num_query_heads", num_query_heads)
        object.__setattr__(self, "num_kv_heads", num_kv_heads)
        object.__setattr__(self, "ffn_multipliers", ffn_multipliers)
        object.__setattr__(self, "ffn_dims", ffn_dims)

    @property
    def size(self) -> str | None:
        """The name of the published size, like `270M` or `1.1B`; None for another."""
        names = {shape: name.replace("_", ".") for name, shape in SIZES.items()}
        return names.get((self.num_transformer_layers, self.model_dim, self.head_dim))

    @classmethod
    def from_name(cls, name: str) -> ModelConfig:
        """The configuration of a published size: `OpenELM-270M`, `apple/OpenELM-1_1B-Instruct`, `3b`, ...

        Raises:
            RequestError: there is no such size.
        """
        size = name.lower().removeprefix("apple/").removeprefix("openelm-").removesuffix("-instruct")
        size = size.upper().replace(".", "_")
        if size not in SIZES:
            raise RequestError(f"There is no OpenELM size {quote(name)}; give one of {', '.join(SIZES)}.")
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
            RequestError: not an OpenELM configuration, a missing size, or an invalid value.
        """
        if not isinstance(values, dict):
            raise RequestError(f"The configuration must be a JSON object, not {kind_of(values)}.")
        model_type = values.get("model_type", "openelm")
        if model_type != "openelm":
            raise RequestError(f"This is a {quote(model_type)} model; mlx-openelm runs model_type 'openelm'.")
        known = {f.name for f in fields(cls) if f.init}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        for name in ("num_transformer_layers", "model_dim", "head_dim", "vocab_size"):
            if given.get(name) is None:
                raise RequestError(f"The configuration has no {name}.")
        return cls(**{k: v for k, v in given.items() if v is not None})

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """A configuration from a `config.json`, or from its folder.

        Raises:
            RequestError: the file is missing, is not JSON, or has an invalid value.
        """
        return cls.from_dict(read_json(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """The keys of `config.json`, with per-layer values as lists, as Apple's code and mlx-lm read them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | {"model_type": "openelm", "architectures": ["OpenELMForCausalLM"], "use_cache": True}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a generation, as a tuple."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its Hugging Face name; all checks and counts use this list."""
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
        shapes[f"{NORM}.weight"] = (dim,)
        if not self.share_input_output_layers:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, dim)
        return shapes

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """The shape [out, in] of every matrix by module path; these can be quantized."""
        shapes = self.tensor_shapes().items()
        return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}

    @property
    def fits_float16(self) -> bool:
        """Whether activations fit float16: those of the 3B model, or one of its shape, overflow it."""
        return (self.num_transformer_layers, self.model_dim, self.head_dim) != SIZES["3B"]

    @property
    def num_parameters(self) -> int:
        """The number of weights; a shared embedding counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _check(name: str, value: Any, kind: tuple[Any, float, float, str]) -> None:
    """Raise RequestError unless `value` is a number of this kind (`_SIZE`, `_POSITIVE`, `_TOKEN_ID`)."""
    types, lowest, highest, expected = kind
    if isinstance(value, bool) or not isinstance(value, types) or not lowest <= value <= highest:
        raise _invalid(name, value, expected)


def _invalid(name: str, value: object, expected: str) -> RequestError:
    text = value[:QUOTED] if isinstance(value, str) else quote(value)
    return RequestError(f"The configuration's {name} is {text}; it must be {expected}.")
