"""OpenELM in MLX (arXiv:2404.14619): pre-norm decoder, grouped-query attention, SwiGLU, layer-wise scaling.

Modules carry the names of the Hugging Face checkpoint, so a checkpoint's keys are the module paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .cache import KVCache, RowCaches
from .config import ModelConfig
from .cuda import decoding
from .ops import attention, layers
from .ops.attention import PlainAttention
from .ops.derived import Derived

ACTIVATIONS = {"swish": nn.silu, "silu": nn.silu, "gelu": nn.gelu, "relu": nn.relu}
_SWISH = ("swish", "silu")  # two names for one function


# Weights start as zeros, which take no memory until used; `OpenELM.initialize` or a checkpoint fills them. MLX's own
# constructors draw random ones, and each draw adds to an unevaluated chain of states that is never released.


class QuantizedLinear(nn.QuantizedLinear):
    """A linear layer without bias whose weight is packed.

    `rounds_activations` permits the CPU kernels to round few rows of activations to 8 bits.
    """

    fuses_residual = True
    rounds_activations = False

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [..., in] to [..., out], plus the residual if there is one."""
        return layers.quantized_linear(x, self, residual)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """Packed token embeddings that also serve as the output layer; `rounds_activations` as in `QuantizedLinear`."""

    rounds_activations = False

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens [...] to their embeddings [..., dims]."""
        return layers.quantized_rows(tokens, self)

    def as_linear(self, x: mx.array) -> mx.array:
        """x [..., dims] to logits [..., num_embeddings]."""
        return layers.quantized_linear(x, self)


class _Packable(nn.Module):
    """A layer that can be quantized, to one of the class `quantized_class`."""

    quantized_class: type[nn.Module]

    def to_quantized(self, group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> Any:
        """The same layer with its weight packed; group size and bits default to the mode's."""
        weight = self["weight"]
        # MLX's constructor would first draw a random weight.
        layer: Any = self.quantized_class.__new__(self.quantized_class)
        nn.Module.__init__(layer)
        layer.weight, layer.scales, *biases = mx.quantize(weight, group_size, bits, mode)
        layer.biases = biases[0] if biases else None
        layer.mode, layer.group_size = mode, weight.shape[1] // layer.scales.shape[1]
        layer.bits = layer.weight.shape[1] * 32 // weight.shape[1]
        layer.freeze()
        return layer


class Linear(_Packable, nn.Linear):  # type: ignore[misc]
    """A linear layer without bias."""

    quantized_class = QuantizedLinear
    fuses_residual = True

    def __init__(self, in_dims: int, out_dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((out_dims, in_dims))

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [..., in] to [..., out], plus the residual if there is one."""
        return layers.linear(x, self["weight"], residual)


class Embedding(_Packable, nn.Embedding):  # type: ignore[misc]
    """Token embeddings that also serve as the output layer."""

    quantized_class = QuantizedEmbedding

    def __init__(self, num_embeddings: int, dims: int):
        nn.Module.__init__(self)
        self.weight = mx.zeros((num_embeddings, dims))

    def to_quantized(self, *packing: Any, **named: Any) -> Any:
        """As for every layer, with the sizes that MLX's class has."""
        layer = super().to_quantized(*packing, **named)
        layer.num_embeddings, layer.dims = self["weight"].shape
        return layer

    def as_linear(self, x: mx.array) -> mx.array:
        """x [..., dims] to logits [..., num_embeddings]."""
        return layers.linear(x, self["weight"])


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dims] to the same shape."""
        return layers.rms_norm(x, self["weight"], self.eps)


def add_to(residual: mx.array, module: nn.Module, *inputs: Any) -> mx.array:
    """residual + module(*inputs), as one operation if the module's own class sets `fuses_residual`.

    A subclass does not inherit the flag, since its `__call__` may not accept a residual.
    """
    if vars(type(module)).get("fuses_residual", False):
        return module(*inputs, residual=residual)
    return residual + module(*inputs)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normalized over head_dim, then rotated."""

    fuses_residual = True
    _norms: Derived[attention.HeadNorms] | None = None  # made by the first call that needs them

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        heads, kv_heads = self.num_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.normalizes = config.normalize_qk_projections
        self.qkv_proj = Linear(config.model_dim, (heads + 2 * kv_heads) * config.head_dim)
        self.out_proj = Linear(heads * config.head_dim, config.model_dim)
        if self.normalizes:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(
        self, x: mx.array, attend: PlainAttention, cache: Any = None, residual: mx.array | None = None
    ) -> mx.array:
        """Attention of x [..., model_dim] over itself and the cache, plus the residual if there is one.

        Args:
            attend: the result of `attention.choose` for this forward pass.
            cache: this layer's cache, extended in place.
        """
        qkv, norms = self.head_norms(self["qkv_proj"](x))  # [..., (H + 2K) * D]
        mixed = attend(qkv, self["num_heads"], norms, cache)  # [..., H * D]
        return self["out_proj"](mixed) if residual is None else add_to(residual, self["out_proj"], mixed)

    def _make_norms(self, query_weight: mx.array, key_weight: mx.array) -> attention.HeadNorms:
        return attention.HeadNorms(query_weight, key_weight, self["q_norm"].eps)

    def head_norms(self, qkv: mx.array) -> tuple[mx.array, attention.HeadNorms | None]:
        """qkv, and the norms of queries and keys for `attend` to apply, which fuses them with RoPE.

        Norms of another class than `RMSNorm` are applied here.
        """
        if not self.normalizes:
            return qkv, None
        q_norm, k_norm = self["q_norm"], self["k_norm"]
        if type(q_norm) is type(k_norm) is RMSNorm and q_norm.eps == k_norm.eps:
            if self._norms is None:
                self._norms = Derived()
            return qkv, self._norms.get(q_norm.eps, self._make_norms, q_norm["weight"], k_norm["weight"])
        heads, kv_heads = self["num_heads"]
        split = qkv.reshape(-1, heads + 2 * kv_heads, qkv.shape[-1] // (heads + 2 * kv_heads))  # [N, H + 2K, D]
        queries, keys, values = mx.split(split, [heads, heads + kv_heads], axis=1)
        return mx.concatenate([q_norm(queries), k_norm(keys), values], axis=1).reshape(qkv.shape), None


class FeedForward(nn.Module):
    """proj_2(silu(gate) * up); without GLU proj_2(activation(proj_1))."""

    fuses_residual = True

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        inner = config.ffn_dims[layer]
        self.gated = config.ffn_with_glu
        self.activation = config.activation_fn_name
        self.proj_1 = Linear(config.model_dim, 2 * inner if self.gated else inner)
        self.proj_2 = Linear(inner, config.model_dim)

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """The feed-forward of x [..., model_dim], plus the residual if there is one."""
        inner = self.activate(self["proj_1"](x))  # [..., inner]
        return self["proj_2"](inner) if residual is None else add_to(residual, self["proj_2"], inner)

    @property
    def is_swiglu(self) -> bool:
        return self.gated and self.activation in _SWISH

    def activate(self, x: mx.array) -> mx.array:
        """The input of `proj_2` [..., inner] from that of `proj_1`: gate and up [..., 2 * inner] with GLU."""
        if self.is_swiglu:
            return layers.swiglu(x)
        activation = ACTIVATIONS[self.activation]
        if not self.gated:
            return activation(x)
        gate, up = mx.split(x, 2, axis=-1)
        return activation(gate) * up


class TransformerLayer(nn.Module):
    """h = x + attn(norm(x)), then h + ffn(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.ffn = FeedForward(config, layer)
        self.attn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.model_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, attend: PlainAttention, cache: Any = None) -> mx.array:
        """x [..., model_dim] to the same shape; `attend` and `cache` as for `Attention`."""
        h = add_to(x, self["attn"], self["attn_norm"](x), attend, cache)
        return add_to(h, self["ffn"], self["ffn_norm"](h))


class LayerParts(NamedTuple):
    """What kernels that compute whole layers need of them, in lists with one entry per layer."""

    norms: list[list[mx.array]]  # weights of attn_norm and ffn_norm, then of q_norm and k_norm if there are any
    projections: list[tuple[nn.Module, ...]]  # qkv_proj, out_proj, proj_1, proj_2
    num_heads: list[tuple[int, int]]  # of queries, and of keys and values


def collect_parts(blocks: Sequence[nn.Module], eps: float) -> LayerParts | None:
    """The parts of all layers, or None if a module in them is of another class than this file's.

    This runs for each token, so that a replacement is used from the next call on. A method that was replaced on an
    instance is not noticed: replace the module. Projections may be packed in affine mode.
    """
    norms: list[list[mx.array]] = []
    projections: list[tuple[nn.Module, ...]] = []
    num_heads: list[tuple[int, int]] = []
    for layer in blocks:
        if type(layer) is not TransformerLayer:
            return None
        attn, ffn = layer["attn"], layer["ffn"]
        if type(attn) is not Attention or type(ffn) is not FeedForward:
            return None
        if not ffn.gated or ffn.activation not in _SWISH:  # `is_swiglu`, without the cost of a property
            return None
        weights = []
        pair = layer["attn_norm"], layer["ffn_norm"]
        for norm in (*pair, attn["q_norm"], attn["k_norm"]) if attn.normalizes else pair:
            if type(norm) is not RMSNorm or norm.eps != eps:
                return None
            weights.append(norm["weight"])
        matrices = attn["qkv_proj"], attn["out_proj"], ffn["proj_1"], ffn["proj_2"]
        for matrix in matrices:
            if type(matrix) is not Linear and (type(matrix) is not QuantizedLinear or matrix.mode != "affine"):
                return None
        norms.append(weights)
        projections.append(matrices)
        num_heads.append(attn.num_heads)
    return LayerParts(norms, projections, num_heads)


class OpenELM(nn.Module):
    """The language model.

    Calling it with tokens [batch, length] gives logits [batch, length, vocab]: `logits(hidden_states(tokens))`.

    Args:
        initialize: whether to draw random weights, which a loader that fills all of them does not need.
    """

    def __init__(self, config: ModelConfig, *, initialize: bool = True):
        super().__init__()
        self.config = config
        self.model_type = "openelm"
        self.transformer = nn.Module()
        self.transformer.token_embeddings = Embedding(config.vocab_size, config.model_dim)
        self.transformer.layers = [TransformerLayer(config, layer) for layer in range(config.num_transformer_layers)]
        self.transformer.norm = RMSNorm(config.model_dim, config.rms_norm_eps)
        if not config.share_input_output_layers:
            self.lm_head = Linear(config.model_dim, config.vocab_size)
        self._token_kernel: decoding.TokenKernel | None = None  # made by the first token on CUDA
        if initialize:
            self.initialize()

    def initialize(self) -> None:
        """Draw all matrices from MLX's global random state, as MLX's layers do.

        Embeddings are normal with standard deviation 1 / sqrt(model_dim), other matrices uniform within
        1 / sqrt(inputs).
        """
        embeddings = self.transformer.token_embeddings
        embeddings.weight = mx.random.normal(embeddings.weight.shape, scale=self.config.model_dim**-0.5)
        matrices = [
            matrix
            for layer in self.layers
            for matrix in (layer.attn.qkv_proj, layer.attn.out_proj, layer.ffn.proj_1, layer.ffn.proj_2)
        ]
        if not self.config.share_input_output_layers:
            matrices.append(self.lm_head)
        for matrix in matrices:
            bound = matrix.weight.shape[1] ** -0.5
            matrix.weight = mx.random.uniform(-bound, bound, matrix.weight.shape)
        mx.eval(mx.random.state)

    def __repr__(self) -> str:
        """The model in one line; `transformer` shows its modules, as MLX does."""
        config = self.config
        facts = [] if config.size is None else [config.size]
        facts += [f"{config.num_transformer_layers} layers", f"{config.num_parameters / 1e6:,.1f}M parameters"]
        facts.append(str(self.transformer.norm.weight.dtype).removeprefix("mlx.core."))
        packed = [layer for layer in self.modules() if isinstance(layer, QuantizedLinear | QuantizedEmbedding)]
        facts += sorted({f"{layer.bits}-bit {layer.mode}" for layer in packed})
        return f"OpenELM({', '.join(facts)})"

    @property
    def layers(self) -> list[TransformerLayer]:
        return self.transformer.layers

    def hidden_states(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        mask: mx.array | str | None = None,
        *,
        run_layer: Callable[[nn.Module, mx.array, PlainAttention, Any], mx.array] | None = None,
    ) -> mx.array:
        """tokens [B, L] to hidden states [B, L, model_dim] after the final norm.

        Args:
            cache: one key-value cache a layer, ours or mlx-lm's, extended in place; None for a whole sequence. For a
                decoding step of several sequences, tokens [N, 1], a `RowCaches` a layer (`step_caches`).
            mask: replaces the causal mask: booleans (True: visible) or numbers to add to scores, [L, T] or
                [B, 1, L, T], where T includes the past.
            run_layer: called with each layer, x of two dimensions [B * L, model_dim] and its other arguments, in place
                of the layer itself.
        """
        batch, length = tokens.shape
        caches = cache if cache is not None else [None] * len(self.transformer.layers)
        if batch == 1 and type(caches[0]) is RowCaches:  # a step of one position
            caches = [layer.caches[0] for layer in caches if layer is not None]
        first: Any = caches[0]
        offset = 0 if first is None else first.positions if type(first) is RowCaches else first.offset
        if mask is None and first is not None and hasattr(first, "make_mask"):  # mlx-lm's ChunkedKVCache has none
            mask = first.make_mask(length, return_array=False, window_size=None)
        elif mask is None and length > 1:
            mask = "causal"
        attend = attention.choose(self.config.head_dim, self.config.rope_freq_constant, offset, length, mask)
        # The rows of a batch stay apart, since the arithmetic of products follows from L (see `layers`).
        x = self.transformer.token_embeddings(tokens if run_layer is None else tokens.reshape(-1))
        # In packings whose scales are not floating-point numbers, embeddings come out as bfloat16.
        if "weight" in self.transformer.norm:  # a module put in its place may keep its weights elsewhere
            x = x.astype(self.transformer.norm["weight"].dtype)
        y = self._run_kernels(x, attend, caches) if run_layer is None else None
        if y is None:
            y = x
            for layer, layer_cache in zip(self.transformer.layers, caches, strict=True):
                y = layer(y, attend, layer_cache) if run_layer is None else run_layer(layer, y, attend, layer_cache)
        y = self.transformer.norm(y)
        return y if run_layer is None else y.reshape(batch, length, -1)  # [B, L, model_dim]

    def _run_kernels(self, x: mx.array, attend: PlainAttention, caches: Sequence[Any]) -> mx.array | None:
        """All layers in kernels that compute a whole layer: CUDA's for one token, the CPU's for a few positions a row.

        Returns None, with nothing changed, if neither applies. Only this method decides that.
        """
        batch, length, dim = x.shape
        if length >= attention.MANY_LAYER_ROWS or isinstance(attend.mask, mx.array):
            return None
        if type(caches[0]) is RowCaches:
            if not all(attention.grows_in_kernels(rows) for rows in caches):
                return None
        elif any(type(cache) is not KVCache or not cache.has_dtype(x.dtype) for cache in caches):
            return None
        eps = self.config.rms_norm_eps
        if batch * length == 1 and attend.mask is None and decoding.is_allowed():
            parts = collect_parts(self.transformer.layers, eps)
            y = None if parts is None else self._decode_token(x.reshape(1, dim), parts, caches)
            return None if y is None else y.reshape(x.shape)
        if not isinstance(attend, attention.KernelAttention) or x.dtype != mx.float32:
            return None
        if (parts := collect_parts(self.transformer.layers, eps)) is None:
            return None
        for norms, projections, num_heads, cache in zip(*parts, caches, strict=True):
            x = attend.layer(x, num_heads, eps, norms, [layers.stored(p) for p in projections], cache)
        return x

    def _decode_token(self, x: mx.array, parts: LayerParts, caches: Sequence[KVCache]) -> mx.array | None:
        """All layers for one token [1, model_dim] in one CUDA kernel; None if it does not support these weights."""
        if self._token_kernel is None:
            self._token_kernel = decoding.TokenKernel(self.config)
        weights: list[mx.array] = []
        for norms, projections in zip(parts.norms, parts.projections, strict=True):
            weights += norms
            for projection in projections:
                weights.append(projection["weight"])
                if type(projection) is QuantizedLinear:
                    weights += projection["scales"], projection["biases"]
        return self._token_kernel(
            x, weights, lambda: [layers.stored(p)[3:5] for four in parts.projections for p in four], caches
        )

    def logits(self, hidden_states: mx.array) -> mx.array:
        """hidden states [..., model_dim] to logits [..., vocab]."""
        if self.config.share_input_output_layers:
            return self.transformer.token_embeddings.as_linear(hidden_states)
        return self.lm_head(hidden_states)

    def __call__(
        self, tokens: mx.array, cache: Sequence[Any] | None = None, mask: mx.array | str | None = None
    ) -> mx.array:
        return self.logits(self.hidden_states(tokens, cache, mask))
