"""The keys of llama.cpp's `openelm` architecture: a configuration into them, and back.

Source: llama.cpp's gguf-py/gguf/constants.py and src/llama-model.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig, make_divisible, spread
from ..errors import RequestError, quote

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURE = "openelm"
# llama.cpp's end tokens besides `eos`: end of turn, end of message.
OTHER_ENDS = ("eot", "eom")
_MAX_SIZE = 1 << 24  # a key with a larger number is damaged


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


def check_model(values: Mapping[str, Any], path: Path) -> None:
    """Check that a file's keys are those of a whole OpenELM model.

    Raises:
        RequestError: another architecture, one part of a split model, or not a model.
    """
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


def end_ids(values: Mapping[str, Any]) -> list[int]:
    """The ids of the tokens that end a generation, `eos` first; others that are out of range are left out."""
    count = len(values.get("tokenizer.ggml.tokens", ()))
    others = [values.get(f"tokenizer.ggml.{name}_token_id") for name in OTHER_ENDS]
    first = values.get("tokenizer.ggml.eos_token_id", 2)
    return list(dict.fromkeys([first, *(i for i in others if type(i) is int and 0 <= i < count)]))


def read(values: Mapping[str, Any], path: Path, *, vocab_size: int, max_layers: int, tied: bool = True) -> ModelConfig:
    """The configuration that a file's keys describe.

    Args:
        vocab_size: the rows of the embedding; no key states it reliably.
        max_layers: the largest accepted block_count, so that a damaged one cannot exhaust memory.
        tied: whether the output layer is the embedding, known from the tensors.

    Raises:
        RequestError: a key is missing or invalid, or positions are scaled, which OpenELM does not support.
    """
    keys = _Keys(values, path)
    layers, model_dim = keys.size("block_count", max_layers), keys.size("embedding_length")
    head_dim, context = keys.size("attention.key_length"), keys.size("context_length", _MAX_SIZE // 2)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := keys.size(name, default=head_dim)) != head_dim:
            raise RequestError(f"{path}: {ARCHITECTURE}.{name} is {size}, but heads have {head_dim} dimensions.")
    _check_positions(values, path)
    widths, heads = keys.per_layer("feed_forward_length", layers), keys.per_layer("attention.head_count", layers)
    kv_heads = keys.per_layer("attention.head_count_kv", layers, heads)
    groups = max(1, heads[0] // kv_heads[0])
    ffn_multipliers, divisor = _multipliers(widths, (0.5, 4.0), model_dim, (256, 128, 64))
    query_widths = tuple(count * head_dim for count in heads)
    qkv_multipliers, _ = _multipliers(query_widths, (0.5, 1.0), model_dim, (head_dim * groups,))
    ends = end_ids(values)
    try:
        return ModelConfig(
            num_transformer_layers=layers,
            model_dim=model_dim,
            head_dim=head_dim,
            vocab_size=vocab_size,
            num_query_heads=heads,
            num_kv_heads=kv_heads,
            ffn_multipliers=ffn_multipliers,  # type: ignore[arg-type]
            qkv_multipliers=qkv_multipliers,
            num_gqa_groups=groups,
            ffn_dim_divisor=divisor,
            normalize_qk_projections=True,
            share_input_output_layers=tied,
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_freq_constant=keys.number("rope.freq_base", 10000.0),
            rope_max_length=2 * context,  # llama.cpp has no such limit; this is the published models'
            max_context_length=context,
            bos_token_id=values.get("tokenizer.ggml.bos_token_id", 1),
            eos_token_id=ends[0] if len(ends) == 1 else tuple(ends),
        )
    except RequestError as error:
        raise RequestError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


class _Keys:
    """The values of the architecture's keys, checked on access; errors name the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self._values = values
        self._path = path

    def size(self, name: str, highest: int = _MAX_SIZE, default: int | None = None) -> int:
        """A whole number from 1 to `highest`."""
        return self._checked_size(name, self._value(name, default), highest)

    def per_layer(self, name: str, layers: int, default: Any = None) -> tuple[int, ...]:
        """One size for each layer: a list in the file, or one number for all layers."""
        value = self._value(name, default)
        sizes = value if isinstance(value, list | tuple) else [value] * layers
        if len(sizes) != layers:
            raise RequestError(f"{self._path}: {ARCHITECTURE}.{name} has {len(sizes)} values for {layers} layers.")
        return tuple(self._checked_size(name, size, _MAX_SIZE) for size in sizes)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._invalid(name, value)
        return _decimal(value)

    def _value(self, name: str, default: Any) -> Any:
        value = self._values.get(f"{ARCHITECTURE}.{name}", default)
        if value is None:
            raise RequestError(f"{self._path} has no {ARCHITECTURE}.{name}.")
        return value

    def _checked_size(self, name: str, value: Any, highest: int) -> int:
        if type(value) is not int or not 0 < value <= highest:
            raise self._invalid(name, value)
        return value

    def _invalid(self, name: str, value: Any) -> RequestError:
        return RequestError(f"{self._path}: {ARCHITECTURE}.{name} is {quote(value)}, which is not a valid value.")


def _check_positions(values: Mapping[str, Any], path: Path) -> None:
    """Refuse scaled positions. As in llama.cpp, the type defaults to linear, and a factor of 0 or 1 means no scaling.

    Raises:
        RequestError: the file scales its positions.
    """
    kind = values.get(f"{ARCHITECTURE}.rope.scaling.type", "linear")
    factors = [values.get(f"{ARCHITECTURE}.rope.{name}", 1) for name in ("scaling.factor", "scale_linear")]
    if kind != "none" and (kind != "linear" or any(factor not in (0, 1) for factor in factors)):
        raise RequestError(f"{path} scales its positions ({quote(kind)}), which OpenELM does not support.")


def _multipliers(
    widths: tuple[int, ...], bounds: tuple[float, float], model_dim: int, divisors: tuple[int, ...]
) -> tuple[float | tuple[float, ...], int]:
    """Multipliers of model_dim that give the layers' widths, and the divisor that these are rounded to.

    They are the paper's bounds if multipliers evenly spaced between them give the widths; otherwise exact ratios, one
    number if all are equal: Apple's code takes no list for query heads, and two numbers for bounds.
    """
    for divisor in divisors:
        if tuple(make_divisible(m * model_dim, divisor) for m in spread(bounds, len(widths))) == widths:
            return bounds, divisor
    ratios = tuple(width / model_dim for width in widths)
    return ratios[0] if len(set(ratios)) == 1 else ratios, math.gcd(*widths)


def _decimal(value: float) -> float:
    """The short decimal that a float32 was rounded from: 1e-06, not 9.999999974752427e-07."""
    number = float(f"{value:.7g}")
    return int(number) if number.is_integer() else number
