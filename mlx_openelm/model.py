"""OpenELM in MLX (arXiv:2404.14619): pre-norm decoder, grouped-query attention, SwiGLU, layer-wise scaling.

Modules carry the names of the Hugging Face checkpoint, so a checkpoint's keys are the module paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache import KVCache
from .config import ModelConfig
from .cuda import decoding
from .ops import layers as ops

ACTIVATIONS = {"swish": nn.silu, "silu": nn.silu, "gelu": nn.gelu, "relu": nn.relu}


# Layers start with zeros, which take no memory until used; `OpenELM.initialize` or a checkpoint brings weights.
# MLX's own constructors draw random ones, and each draw adds to an unevaluated chain of states that is never let go.


class Linear(nn.Linear):
    """A linear layer without bias, through `ops.linear`."""

    def __init__(self, in_dims: int, out_dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_dims, in_dims))

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """The product, plus the residual if there is one: in one on a GPU."""
        return ops.linear(x, self["weight"], residual)

    def to_quantized(self, *packing: Any, **named: Any) -> QuantizedLinear:
        return _packed(QuantizedLinear, self["weight"], *packing, **named)


class QuantizedLinear(nn.QuantizedLinear):
    """The same with a packed weight, through `ops.quantized_linear`; `rounds` lets few rows be rounded there."""

    rounds = False

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        return ops.quantized_linear(x, self, residual)


class Embedding(nn.Embedding):
    """Token embeddings that also serve as the output layer."""

    def __init__(self, num_embeddings: int, dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.linear(x, self["weight"])

    def to_quantized(self, *packing: Any, **named: Any) -> QuantizedEmbedding:
        layer = _packed(QuantizedEmbedding, self["weight"], *packing, **named)
        layer.num_embeddings, layer.dims = self["weight"].shape
        return layer


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """The same with a packed weight."""

    rounds = False

    def __call__(self, tokens: mx.array) -> mx.array:
        return ops.quantized_rows(tokens, self)

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.quantized_linear(x, self)


def _packed(
    kind: Any, weight: mx.array, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
) -> Any:
    """A layer of a packed kind from a plain weight [out, in]; MLX's constructor would draw a random one first.

    Group size and bits are the mode's unless given.
    """
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.weight, layer.scales, *biases = mx.quantize(weight, group_size, bits, mode)
    layer.biases = biases[0] if biases else None
    layer.mode, layer.group_size = mode, weight.shape[1] // layer.scales.shape[1]
    layer.bits = layer.weight.shape[1] * 32 // weight.shape[1]
    layer.freeze()
    return layer


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization, through `ops.rms_norm`."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self["weight"], self.eps)


_PROJECTIONS = Linear, QuantizedLinear


def project(layer: nn.Module, x: mx.array, residual: mx.array) -> mx.array:
    """layer(x) + residual; in one product where layer and device can."""
    if isinstance(layer, _PROJECTIONS):
        return layer(x, residual)
    onto = getattr(type(layer), "onto", None)
    return residual + layer(x) if onto is None else onto(layer, residual, x)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalized over head_dim, then rotated."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        heads, kv_heads = self.num_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.norms = ops.HeadNorms(config.rms_norm_eps) if config.normalize_qk_projections else None
        self.qkv_proj = Linear(config.model_dim, (heads + 2 * kv_heads) * config.head_dim)
        self.out_proj = Linear(heads * config.head_dim, config.model_dim)
        if config.normalize_qk_projections:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(
        self, qkv: mx.array, residual: mx.array, attend: ops.Attend, shape: tuple[int, int], cache: Any
    ) -> mx.array:
        """residual + out_proj(attention), from what `qkv_proj` gave."""
        norms = self.norms and self.norms.use(self["q_norm"]["weight"], self["k_norm"]["weight"])
        mixed = attend(qkv, shape, self.num_heads, norms, cache)
        return project(self["out_proj"], mixed, residual)


class FeedForward(nn.Module):
    """proj_2(silu(gate) * up); without GLU proj_2(activation(proj_1))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        inner = config.ffn_dims[layer]
        self.gated = config.ffn_with_glu
        self.activation = ACTIVATIONS[config.activation_fn_name]
        self.has_swiglu = self.gated and self.activation is nn.silu
        self.proj_1 = Linear(config.model_dim, 2 * inner if self.gated else inner)
        self.proj_2 = Linear(inner, config.model_dim)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        """residual + proj_2(activation), from what `proj_1` gave."""
        return project(self["proj_2"], self._activate(x), residual)

    def _activate(self, x: mx.array) -> mx.array:
        if self.has_swiglu:
            return ops.swiglu(x)
        if not self.gated:
            return self.activation(x)
        gate, up = mx.split(x, 2, axis=-1)
        return self.activation(gate) * up


class TransformerLayer(nn.Module):
    """Attention, then the feed-forward, each in two stages: a norm and a projection, then the rest up to the residual.

    Training keeps what goes from stage to stage and computes the rest again in the backward pass.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, attend: ops.Attend, shape: tuple[int, int], cache: Any) -> mx.array:
        if attend.takes_layers(x, cache) and self._is_plain():
            return self._at_once(x, attend, shape, cache)
        x = self["attn"](self.project(x), x, attend, shape, cache)
        return self["ffn"](self.expand(x), x)

    def project(self, x: mx.array) -> mx.array:
        """Queries, keys and values of x [N, model_dim]."""
        return self["attn"]["qkv_proj"](self["attn_norm"](x))

    def expand(self, x: mx.array) -> mx.array:
        """The feed-forward's gate and up of x [N, model_dim]."""
        return self["ffn"]["proj_1"](self["ffn_norm"](x))

    def _norms(self) -> list[nn.Module]:
        attn = self["attn"]
        return [self["attn_norm"], self["ffn_norm"], *([attn["q_norm"], attn["k_norm"]] if attn.norms else [])]

    def _projections(self) -> list[nn.Module]:
        attn, ffn = self["attn"], self["ffn"]
        return [attn["qkv_proj"], attn["out_proj"], ffn["proj_1"], ffn["proj_2"]]

    def _is_plain(self) -> bool:
        """Whether `ops.Attend.layer` knows all that it is made of: not adapters, nor other activations or packings."""
        return (
            self["ffn"].has_swiglu
            and all(type(norm) is RMSNorm for norm in self._norms())
            and all(
                type(p) is Linear or (type(p) is QuantizedLinear and p.mode == "affine") for p in self._projections()
            )
        )

    def add_plain_weights(self, weights: list[mx.array]) -> bool:
        """Append them in the order of `decoding.TokenKernel`; False where it does not know all that this is made of."""
        attn, ffn = self["attn"], self["ffn"]
        if type(self) is not TransformerLayer or type(attn) is not Attention or type(ffn) is not FeedForward:
            return False
        if not ffn.has_swiglu:
            return False
        for norm in self._norms():
            if type(norm) is not RMSNorm:
                return False
            weights.append(norm["weight"])
        for projection in (attn["qkv_proj"], attn["out_proj"], ffn["proj_1"], ffn["proj_2"]):
            if type(projection) is Linear:
                weights.append(projection["weight"])
            elif type(projection) is QuantizedLinear and projection.mode == "affine":
                weights += projection["weight"], projection["scales"], projection["biases"]
            else:
                return False
        return True

    def _at_once(self, x: mx.array, attend: ops.Attend, shape: tuple[int, int], cache: Any) -> mx.array:
        norms, projections = [norm["weight"] for norm in self._norms()], [ops.stored(p) for p in self._projections()]
        return attend.layer(x, shape, self["attn"].num_heads, self["attn_norm"].eps, norms, projections, cache)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token_embeddings = Embedding(config.vocab_size, config.model_dim)
        self.layers = [TransformerLayer(config, layer) for layer in range(config.num_transformer_layers)]
        self.norm = RMSNorm(config.model_dim, config.rms_norm_eps)


class OpenELM(nn.Module):
    """The language model.

    Calling it with tokens [batch, length] gives logits [batch, length, vocab]: `logits(hidden_states(tokens))`.

    Args:
        initialize: whether to draw random weights; a loader that fills all of them does without.
    """

    def __init__(self, config: ModelConfig, *, initialize: bool = True):
        super().__init__()
        self.config = config
        self.model_type = "openelm"
        self.transformer = Transformer(config)
        if not config.share_input_output_layers:
            self.lm_head = Linear(config.model_dim, config.vocab_size)
        self._token_kernel = decoding.TokenKernel(config)
        if initialize:
            self.initialize()

    def initialize(self) -> None:
        """Draw every matrix as MLX's layers do, from its global random state.

        Embeddings are normal with deviation 1 / sqrt(model_dim), the others uniform within 1 / sqrt(inputs).
        """
        embeddings = self.transformer.token_embeddings
        embeddings.weight = mx.random.normal(embeddings.weight.shape, scale=self.config.model_dim**-0.5)
        matrices = [p for layer in self.layers for p in layer._projections()]
        if not self.config.share_input_output_layers:
            matrices.append(self.lm_head)
        for matrix in matrices:
            bound = matrix.weight.shape[1] ** -0.5
            matrix.weight = mx.random.uniform(-bound, bound, matrix.weight.shape)
        mx.eval(mx.random.state)

    @property
    def layers(self) -> list[TransformerLayer]:
        return self.transformer.layers

    def hidden_states(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        mask: mx.array | str | None = None,
        *,
        run_layer: Callable[..., mx.array] = TransformerLayer.__call__,
    ) -> mx.array:
        """tokens [batch, length] to hidden states [batch, length, model_dim] after the final norm.

        Args:
            cache: one key-value cache a layer, ours or mlx-lm's, extended in place; None for a whole sequence.
            mask: what each position may see, in place of the causal mask: booleans or numbers to add,
                [length, total] or [batch, 1, length, total].
            run_layer: calls a layer, as training does in its own way.
        """
        batch, length = tokens.shape
        caches = cache if cache is not None else [None] * len(self.layers)
        first = caches[0]
        offset = 0 if first is None else first.offset
        if mask is None and first is not None and hasattr(first, "make_mask"):  # mlx-lm's ChunkedKVCache has none
            mask = first.make_mask(length, return_array=False, window_size=None)
        elif mask is None and length > 1:
            mask = "causal"
        attend = ops.Attend(self.config.head_dim, self.config.rope_freq_constant, offset, length, mask)
        # Layers see one row a position: matrix products of two dimensions need no reshaping.
        x = self.transformer.token_embeddings(tokens.reshape(-1))
        # Where a packing's scales are no floating-point numbers, embeddings come out as bfloat16.
        x = x.astype(self.transformer.norm["weight"].dtype)
        y = self._decode(x, caches) if mask is None and run_layer is TransformerLayer.__call__ else None
        if y is None:
            for layer, layer_cache in zip(self.layers, caches, strict=True):
                x = run_layer(layer, x, attend, (batch, length), layer_cache)
            y = x
        return self.transformer.norm(y).reshape(batch, length, -1)

    def _decode(self, x: mx.array, caches: Sequence[Any]) -> mx.array | None:
        """All layers for one token [1, model_dim] in one kernel, where there is one for this model; else None."""
        if x.shape[0] > 1 or not decoding.is_allowed() or any(type(cache) is not KVCache for cache in caches):
            return None
        weights: list[mx.array] = []
        for layer in self.layers:
            if not layer.add_plain_weights(weights):
                return None
        return self._token_kernel(x, weights, self._kinds, caches)

    def _kinds(self) -> list[decoding.Kind]:
        return [ops.stored(p)[3:5] for layer in self.layers for p in layer._projections()]

    def logits(self, hidden_states: mx.array) -> mx.array:
        """hidden states [..., model_dim] to logits [..., vocab]."""
        if self.config.share_input_output_layers:
            return self.transformer.token_embeddings.as_linear(hidden_states)
        return self.lm_head(hidden_states)

    def __call__(
        self, tokens: mx.array, cache: Sequence[Any] | None = None, mask: mx.array | str | None = None
    ) -> mx.array:
        return self.logits(self.hidden_states(tokens, cache, mask))
