"""The keys of llama.cpp's `openelm` architecture: a configuration into them, and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig, make_divisible, spread
from ..errors import RequestError, quote

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "openelm"
# What ends a generation in llama.cpp beside `eos`: the end of a turn, and of a message.
OTHER_ENDS = ("eot", "eom")
_MOST = 1 << 24  # of a size; beyond it a file is damaged


def write(writer: GGUFWriter, config: ModelConfig, file_type: str, name: str) -> None:
    """Add the keys of a model; `file_type` is the name of a LlamaFileType."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(config.num_parameters, 0, 0, 0))
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_transformer_layers)
    writer.add_context_length(config.max_context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length(list(config.ffn_dims))
    writer.add_head_count(list(config.num_query_heads))
    writer.add_head_count_kv(list(config.num_kv_heads))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_freq_constant))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def check_model(values: dict[str, Any], path: Path) -> None:
    """Raise `RequestError` for another architecture, for a part of a model, and for files that are not models."""
    if (parts := values.get("split.count", 1)) != 1:
        raise RequestError(
            f"{path} is one of the {quote(parts)} files of a split model; join them with llama.cpp's "
            "`llama-gguf-split --merge`."
        )
    if (architecture := values.get("general.architecture")) is None:
        raise RequestError(f"{path} has no general.architecture, so it is not a model.")
    if architecture != ARCHITECTURE:
        raise RequestError(f"{path} is a {quote(architecture)} model; mlx-openelm runs {ARCHITECTURE!r}.")
    if (kind := values.get("general.type", "model")) != "model":
        raise RequestError(f"{path} is not a model: its general.type is {quote(kind)}.")


def end_ids(values: dict[str, Any]) -> list[int]:
    """The tokens that end a generation, the end of a text first; those that the file does not have are left out."""
    count = len(values.get("tokenizer.ggml.tokens", ()))
    others = [values.get(f"tokenizer.ggml.{name}_token_id") for name in OTHER_ENDS]
    first = values.get("tokenizer.ggml.eos_token_id", 2)
    return list(dict.fromkeys([first, *(i for i in others if type(i) is int and 0 <= i < count)]))


def read(values: dict[str, Any], path: Path, *, vocab_size: int, most_layers: int, tied: bool = True) -> ModelConfig:
    """The configuration that a file's keys describe.

    Args:
        vocab_size: the rows of the embedding, which no key tells for certain.
        most_layers: a bound for what a damaged file may claim.
        tied: whether the output layer is the embedding, which the tensors tell.

    Raises:
        RequestError: a key that is missing or cannot be right, or positions scaled in a way OpenELM does not support.
    """

    def key(name: str, default: Any = None) -> Any:
        value = values.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise RequestError(f"{path} has no {ARCHITECTURE}.{name}.")
        return value

    def count(name: str, most: int = _MOST, default: int | None = None) -> int:
        return _whole(path, name, key(name, default), most)

    def per_layer(name: str, default: Any = None) -> tuple[int, ...]:
        value = key(name, default)
        sizes = value if isinstance(value, list | tuple) else [value] * layers
        if len(sizes) != layers:
            raise RequestError(f"{path}: {ARCHITECTURE}.{name} has {len(sizes)} values for {layers} layers.")
        return tuple(_whole(path, name, size, _MOST) for size in sizes)

    def number(name: str, default: float | None = None) -> float:
        value = key(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise RequestError(f"{path}: {ARCHITECTURE}.{name} is {quote(value)}, which cannot be.")
        return _decimal(value)

    layers, model_dim = count("block_count", most_layers), count("embedding_length")
    head_dim, context = count("attention.key_length"), count("context_length", _MOST // 2)
    for name in ("attention.value_length", "rope.dimension_count"):
        if count(name, default=head_dim) != head_dim:
            raise RequestError(f"{path}: {ARCHITECTURE}.{name} is {key(name)}, but the heads have {head_dim}.")
    _check_positions(values, path)
    widths, heads = per_layer("feed_forward_length"), per_layer("attention.head_count")
    kv_heads = per_layer("attention.head_count_kv", heads)
    groups = max(1, heads[0] // kv_heads[0])
    multipliers, divisor = _multipliers(widths, (0.5, 4.0), model_dim, (256, 128, 64))
    query_widths = tuple(count * head_dim for count in heads)
    query_multipliers, _ = _multipliers(query_widths, (0.5, 1.0), model_dim, (head_dim * groups,))
    ends = end_ids(values)
    try:
        return ModelConfig(
            num_transformer_layers=layers,
            model_dim=model_dim,
            head_dim=head_dim,
            vocab_size=vocab_size,
            num_query_heads=heads,
            num_kv_heads=kv_heads,
            ffn_multipliers=multipliers,
            qkv_multipliers=(0.5, 1.0) if query_multipliers == spread((0.5, 1.0), layers) else query_multipliers,
            num_gqa_groups=groups,
            ffn_dim_divisor=divisor,
            normalize_qk_projections=True,
            share_input_output_layers=tied,
            rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
            rope_freq_constant=number("rope.freq_base", 10000.0),
            rope_max_length=2 * context,  # llama.cpp has no such limit; the published models have this one
            max_context_length=context,
            bos_token_id=values.get("tokenizer.ggml.bos_token_id", 1),
            eos_token_id=ends[0] if len(ends) == 1 else tuple(ends),
        )
    except RequestError as error:
        raise RequestError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _whole(path: Path, name: str, value: Any, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise RequestError(f"{path}: {ARCHITECTURE}.{name} is {quote(value)}, which cannot be.")
    return value


def _check_positions(values: dict[str, Any], path: Path) -> None:
    """As llama.cpp reads the keys: what is not said to be unscaled is scaled by the factor, if there is one."""
    kind = values.get(f"{ARCHITECTURE}.rope.scaling.type", "linear")
    factors = [values.get(f"{ARCHITECTURE}.rope.{name}", 1) for name in ("scaling.factor", "scale_linear")]
    if kind != "none" and (kind != "linear" or any(factor not in (0, 1) for factor in factors)):
        raise RequestError(f"{path} scales its positions ({quote(kind)}), which OpenELM does not.")


def _multipliers(
    widths: tuple[int, ...], bounds: tuple[float, float], model_dim: int, divisors: tuple[int, ...]
) -> tuple[tuple[float, ...], int]:
    """Multipliers of model_dim and the divisor that give the widths: the paper's where they do, else exact ones."""
    spaced = spread(bounds, len(widths))
    for divisor in divisors:
        if tuple(make_divisible(m * model_dim, divisor) for m in spaced) == widths:
            return spaced, divisor
    return tuple(width / model_dim for width in widths), math.gcd(*widths)


def _decimal(value: float) -> float:
    """The number whose float32 a file holds: 1e-06, not 9.999999974752427e-07."""
    number = float(f"{value:.7g}")
    return int(number) if number.is_integer() else number
