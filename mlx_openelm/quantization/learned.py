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
from ..formats.rounding import Grid
from ..model import OpenELM
from ..modules import module_at
from . import awq, dwq, gptq
from .calibration import Batches, Stream, Teacher, output_moments
from .dwq import Packed

METHODS = ("awq", "gptq", "dwq")
# The order in which AWQ folds scales: those of `proj_2` go into `proj_1`, so it comes before `proj_1`.
_FOLD_ORDER = ("attn.qkv_proj", "ffn.proj_2", "ffn.proj_1")

# Called with the name of a stage, the amount done, and the total.
Progress = Callable[[str, int, int], None]


def parse_methods(names: Sequence[str]) -> tuple[str, ...]:
    """Method names, comma-separated or one by one, in the order they are applied.

    Raises:
        RequestError: an unknown method.
    """
    names = [names] if isinstance(names, str) else names
    requested = [part.strip().lower() for name in names for part in name.split(",") if part.strip()]
    for name in requested:
        if name not in METHODS:
            raise RequestError(f"--method must be one or more of {', '.join(METHODS)}, got {quote(name)}.")
    return tuple(method for method in METHODS if method in requested)


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
        dtype, scale_dtype: the stored types of tensors that are not quantized, and of scales and biases.

    Raises:
        OpenELMError: weights or logits are not finite, GPTQ cannot use the activations of the text, or distillation
            diverged.
    """

    def stage(name: str) -> Callable[[int, int], None]:
        return lambda done, total: None if progress is None else progress(name, done, total)

    teacher = Teacher(model, batches, stage("Reading the text"))
    packer = _Packer(model, choices, scale_dtype, with_gptq="gptq" in methods, progress=stage("Quantizing"))
    for path in (EMBEDDING, HEAD):
        if path in choices:
            packer.pack(path, output_moments(model, teacher, path))
    stream = Stream(model, batches)
    for index, layer in enumerate(model.layers):
        moments = stream.moments(layer)  # [in, in] of each matrix
        paths = {name: f"{LAYERS}{index}.{name}" for name in LAYER_MATRICES}
        for name in _FOLD_ORDER if "awq" in methods else ():
            if paths[name] in choices:
                moments[name] = awq.fold(layer, name, moments[name], choices[paths[name]], dtype, scale_dtype)
        for name, path in paths.items():
            if path in choices:
                packer.pack(path, moments[name])
        stream.advance(layer)

    packed = packer.packed
    # Before DWQ, which replaces matrices by modules with parameters of their own.
    full = {
        name: weight.astype(dtype)
        for name, weight in dict(tree_flatten(model.parameters())).items()  # type: ignore[union-attr]
        if name.rpartition(".")[0] not in packed
    }
    grids = {path: matrix.grid for path, matrix in packed.items()}
    if "dwq" in methods:
        grids = dwq.distill(model, packed, teacher, batches, scale_dtype, seed=seed, progress=stage("Distilling"))
    model.clear()  # so that references to the model do not keep the weights
    return full | _packed_tensors(packed, grids, scale_dtype)


class _Packer:
    """Packs the matrices of a model one by one; each is replaced by what its packed form unpacks to."""

    def __init__(
        self,
        model: OpenELM,
        choices: Mapping[str, Quantization],
        scale_dtype: mx.Dtype,
        *,
        with_gptq: bool,
        progress: Callable[[int, int], None],
    ):
        self._model, self._choices, self._scale_dtype = model, choices, scale_dtype
        self._with_gptq, self._progress = with_gptq, progress
        self.packed: dict[str, Packed] = {}

    def pack(self, path: str, moments: mx.array) -> None:
        """Pack the matrix [out, in] at `path`, given the moments [in, in] of its inputs.

        Raises:
            OpenELMError: its weights are not finite.
        """
        module = module_at(self._model, path)
        weight = module["weight"]
        if not mx.all(mx.isfinite(weight)).item():  # also in rows of tokens that the text does not contain
            raise not_finite(f"The weights of {path} are", self._model)
        packed = pack(weight, moments, self._choices[path], self._scale_dtype, with_gptq=self._with_gptq)
        module["weight"] = packed.full().astype(weight.dtype)
        mx.eval(module["weight"])
        self.packed[path] = packed
        self._progress(len(self.packed), len(self._choices))


def _packed_tensors(
    packed: Mapping[str, Packed], grids: Mapping[str, Grid], scale_dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The weight, scales and biases of each packed matrix, by tensor name."""
    tensors = {}
    for path, matrix in packed.items():
        tensors[f"{path}.weight"] = matrix.levels
        tensors[f"{path}.scales"] = grids[path].scales.astype(scale_dtype)
        tensors[f"{path}.biases"] = grids[path].biases.astype(scale_dtype)
    return tensors


def pack(
    weight: mx.array, moments: mx.array, choice: Quantization, scale_dtype: mx.Dtype, *, with_gptq: bool
) -> Packed:
    """A matrix [out, in] rounded on the grid that fits its inputs best.

    Args:
        moments: the mean of x xᵀ [in, in] over its inputs x.
        choice: an affine quantization.
        scale_dtype: the type that scales and biases will be stored in.
        with_gptq: round by GPTQ, instead of each weight to its nearest level.

    Raises:
        OpenELMError: GPTQ cannot use the moments.
    """
    grid = rounding.search(weight, mx.diag(moments), choice, scale_dtype)
    if with_gptq:
        levels = gptq.round_matrix(weight, moments, grid, choice)  # [out, groups, group_size]
    else:
        levels = rounding.levels(rounding.groups(weight.astype(mx.float32), choice.group_size), grid, choice.bits)
    words = rounding.pack(levels.reshape(weight.shape), choice.bits)  # [out, in * bits / 32]
    mx.eval(words, grid.scales, grid.biases)
    return Packed(words, grid, choice)
