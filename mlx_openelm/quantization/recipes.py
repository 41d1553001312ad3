"""Bits for each matrix without calibration: the same for all, or by mlx-lm's recipes (`--quant-predicate`).

The recipes follow llama.cpp's Q4_K_M: in the first and last eighth of the layers and in every third between, the
matrices that carry values into and out of the residual stream get more bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from ..config import EMBEDDING, HEAD, ModelConfig
from ..errors import RequestError, quote
from ..formats.mlx import Checkpoint, Quantization
from ..formats.packing import Plan
from ..ops.packed import MODES
from ..options import Option, Options
from ..wording import flag

# What `--help` gives as the defaults; they depend on the mode.
BITS, GROUP_SIZE = "4, or the mode's", "64, or the mode's"
# Low and high bits by name.
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}


@dataclass(frozen=True, repr=False)
class Packing(Options):
    """How to store a model's matrices: the flags of `convert`, `fuse` and `quantize`, validated together.

    Attributes:
        quantize: quantize every matrix.
        q_bits, q_group_size: by default the mode's (affine: 4 and 64).
        q_mode: affine, mxfp4, nvfp4 or mxfp8.
        recipe: a key of `RECIPES`, in place of q_bits: more bits for some matrices than for others.
        dequantize: unpack a quantized model.
        dtype: the type of tensors that are not quantized; None for the command's default.

    Raises:
        RequestError: flags that contradict each other, or a mode, bits and group size that MLX does not combine.
    """

    quantize: Annotated[
        bool, Option("Store the model's matrices in few bits.", group="Quantization", flags=("-q",))
    ] = False
    q_bits: Annotated[int | None, Option("With -q, bits per weight.", group="Quantization", default=BITS)] = None
    q_group_size: Annotated[
        int | None, Option("With -q, weights that share a scale.", group="Quantization", default=GROUP_SIZE)
    ] = None
    q_mode: Annotated[
        str,
        Option("With -q, format of the quantized weights.", group="Quantization", metavar="affine|mxfp4|nvfp4|mxfp8"),
    ] = "affine"
    recipe: Annotated[
        str | None,
        Option(
            "With -q, instead of --q-bits: low bits for most matrices, high bits for those that need them.",
            group="Quantization",
            flags=("--quant-predicate",),
            metavar="mixed_2_6|mixed_3_4|mixed_3_6|mixed_4_6",
        ),
    ] = None
    dequantize: Annotated[
        bool, Option("Turn quantized weights back into full ones.", group="Quantization", flags=("-d",))
    ] = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.quantize and self.dequantize:
            raise RequestError("Choose either -q or --dequantize.")
        names = ("q_bits", "q_group_size", "q_mode", "recipe")
        given = [flag(name) for name in names if getattr(self, name) not in (None, "affine")]
        if given and not self.quantize:
            raise RequestError(f"{' and '.join(given)} {'needs' if len(given) == 1 else 'need'} -q.")
        self._planner()

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse `dequantize` for a checkpoint that is not quantized."""
        if self.dequantize and not checkpoint.quantization:
            raise RequestError("The model is not quantized, so there is nothing to --dequantize.")

    def plan(self, config: ModelConfig) -> tuple[dict[str, Quantization], dict[str, str]]:
        """What the function `plan` returns for these flags; empty without `quantize`."""
        return self._planner()(config) if self.quantize else ({}, {})

    def _planner(self) -> Plan:
        return planner(self.q_mode, self.q_bits, self.q_group_size, self.recipe)

    def flags(self) -> dict[str, Any]:
        """The flags for `command_line`; those that are not given are None or False."""
        return {
            "dtype": self.dtype,
            "quantize": self.quantize,
            "q_bits": self.q_bits,
            "q_group_size": self.q_group_size,
            "q_mode": self.q_mode if self.quantize and self.recipe is None else None,
            "recipe": self.recipe,
            "dequantize": self.dequantize,
        }


def plan(
    config: ModelConfig, requested: Quantization | Callable[[str], Quantization]
) -> tuple[dict[str, Quantization], dict[str, str]]:
    """A quantization for each matrix by module path, and descriptions of the exceptions, by path.

    If the group size does not divide a matrix's rows, the largest one that does is used; if none of the mode's does,
    the matrix is not quantized.

    Args:
        requested: one quantization for every matrix, or a function from module path to quantization.
    """
    choices: dict[str, Quantization] = {}
    exceptions: dict[str, str] = {}
    for path, (_, in_dims) in config.matrix_shapes().items():
        choice = requested(path) if callable(requested) else requested
        if in_dims % choice.group_size == 0:
            choices[path] = choice
            continue
        sizes = [size for size in MODES[choice.mode][1] if in_dims % size == 0]
        if sizes:
            choices[path] = Quantization(max(sizes), choice.bits, choice.mode)
            exceptions[path] = f"group size {max(sizes)}, since {choice.group_size} does not divide {in_dims}"
        else:
            exceptions[path] = f"not quantized, since no group size divides {in_dims}"
    return choices, exceptions


def planner(
    mode: str = "affine", bits: int | None = None, group_size: int | None = None, recipe: str | None = None
) -> Plan:
    """A function from a configuration to what `plan` returns, for these bits or this recipe.

    Raises:
        RequestError: a combination MLX does not have, an unknown recipe, or a recipe with bits or another mode.
    """
    if recipe is None:
        uniform = Quantization.make(mode, bits, group_size)
        return lambda config: plan(config, uniform)
    if recipe not in RECIPES:
        raise RequestError(f"--recipe must be one of {', '.join(RECIPES)}, got {quote(recipe)}.")
    if bits is not None or mode != "affine":
        raise RequestError("--recipe sets the bits, in affine mode; leave --q-bits and --q-mode out.")
    low, high = (Quantization.make("affine", bits, group_size) for bits in RECIPES[recipe])
    return lambda config: plan(config, lambda path: high if _gets_high_bits(path, config) else low)


def _gets_high_bits(path: str, config: ModelConfig) -> bool:
    """Whether a matrix gets the high bits.

    mlx-lm gives them to `v_proj` and `down_proj` of chosen layers and to `lm_head`. OpenELM's values are in
    `qkv_proj`, its down projection is `proj_2`, and its tied embedding is its head.
    """
    parts = path.split(".")
    if "layers" not in parts:
        return path == (EMBEDDING if config.share_input_output_layers else HEAD)
    if parts[-1] not in ("qkv_proj", "proj_2"):
        return False
    layer, count = int(parts[parts.index("layers") + 1]), config.num_transformer_layers
    eighth = count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2
