"""The learned methods: AWQ's scaling and GPTQ's rounding layer by layer, then distillation of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import EMBEDDING, HEAD, LAYER_MATRICES, LAYERS
from ..errors import RequestError, quote
from ..finite import not_finite
from ..formats import rounding
from ..formats.mlx import Quantization
from ..model import OpenELM
from ..modules import module_at
from . import awq, dwq, gptq
from .calibration import Batches, Stream, Teacher, output_moments
from .dwq import Packed

METHODS = ("awq", "gptq", "dwq")
# The order in which AWQ folds scales: those of `proj_2` go into `proj_1`, so it comes before `proj_1`.
_FOLD_ORDER = ("attn.qkv_proj", "ffn.proj_2", "ffn.proj_1")

# Called with the name of a stage, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def parse_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Method names, comma-separated or one by one, in the order they are applied.

    Raises:
        RequestError: an unknown method.
    """
    asked = [part.strip().lower() for name in names for part in name.split(",") if part.strip()]
    for name in asked:
        if name not in METHODS:
            raise RequestError(f"--method must be one or more of {', '.join(METHODS)}, got {quote(name)}.")
    return tuple(method for method in METHODS if method in asked)


def quantize_model(
    model: OpenELM,
    choices: Mapping[str, Quantization],
    methods: Sequence[str],
    batches: Batches,
    dtype: mx.Dtype,
    scale_dtype: mx.Dtype,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, mx.array]:
    """The tensors of the quantized checkpoint by name; the full model is emptied.

    Without a method, weights are rounded to the nearest level of the grid that fits the calibration text best.
    Each layer is calibrated on the outputs of the quantized layers before it.

    Args:
        choices: affine quantizations by module path.
        batches: calibration tokens [batch, length].
        dtype, scale_dtype: the stored types of what is not quantized, and of scales and biases.

    Raises:
        OpenELMError: weights or logits are not finite, or a method failed: the activations of the text are unusable,
            or distillation diverged.
    """

    def report(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(stage, done, total)

    teacher = Teacher(model, batches, report("Reading the text"))
    packed: dict[str, Packed] = {}
    done = 0

    def pack(path: str, moments: mx.array) -> None:
        nonlocal done
        module = module_at(model, path)
        if not mx.all(mx.isfinite(module["weight"])).item():  # also in rows of tokens that the text does not contain
            raise not_finite(f"The weights of {path} are", model)
        packed[path] = _pack(module["weight"], moments, choices[path], "gptq" in methods, scale_dtype)
        module["weight"] = packed[path].full().astype(module["weight"].dtype)
        mx.eval(module["weight"])
        done += 1
        report("Quantizing")(done, len(choices))

    for path in (EMBEDDING, HEAD):
        if path in choices:
            pack(path, output_moments(model, teacher, path))
    stream = Stream(model, batches)
    for index, layer in enumerate(model.layers):
        moments = stream.moments(layer)
        paths = {name: f"{LAYERS}{index}.{name}" for name in LAYER_MATRICES}
        for name in _FOLD_ORDER if "awq" in methods else ():
            if paths[name] in choices:
                moments[name] = awq.fold(layer, name, moments[name], choices[paths[name]], dtype, scale_dtype)
        for name, path in paths.items():
            if path in choices:
                pack(path, moments[name])
        stream.advance(layer)
    grids = {path: part.grid for path, part in packed.items()}
    tensors = {
        name: weight.astype(dtype)
        for name, weight in dict(tree_flatten(model.parameters())).items()  # type: ignore[union-attr]
        if name.rpartition(".")[0] not in packed
    }
    if "dwq" in methods:
        grids = dwq.distill(model, packed, teacher, batches, scale_dtype, seed=seed, progress=report("Distilling"))
    for path, part in packed.items():
        scales, biases = grids[path].scales.astype(scale_dtype), grids[path].biases.astype(scale_dtype)
        tensors |= {f"{path}.weight": part.levels, f"{path}.scales": scales, f"{path}.biases": biases}
    model.clear()  # so that references to the model do not keep the weights
    return tensors


def _pack(weight: mx.array, moments: mx.array, choice: Quantization, by_gptq: bool, dtype: mx.Dtype) -> Packed:
    """weight [out, in] rounded on the grid that fits its inputs best, given their moments [in, in]."""
    grid = rounding.search(weight, mx.diag(moments), choice, dtype)
    if by_gptq:
        level = gptq.round_matrix(weight, moments, grid, choice)
    else:
        level = rounding.levels(rounding.groups(weight.astype(mx.float32), choice.group_size), grid, choice.bits)
    words = rounding.pack(level.reshape(weight.shape), choice.bits)
    mx.eval(words, grid.scales, grid.biases)
    return Packed(words, grid, choice)
