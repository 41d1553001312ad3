"""Model folders in Hugging Face's layout, plain or quantized by MLX: `apple/OpenELM-*`, mlx-community, mlx-lm, ours.

`config.json` and safetensors. Quantized matrices are stored as `.weight` (packed uint32), `.scales` and,
in affine mode, `.biases`; `quantization` in the config holds group_size, bits and mode, and entries by
module path for matrices that differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError
from ..inputs import read_json
from ..wording import some
from . import foreign, leftovers, safetensors
from .packing import Quantization, most_common
from .weights import Weights


@dataclass
class Checkpoint:
    """A model as stored: unread weights by Hugging Face name, and how each quantized matrix is packed.

    `rounded_to` says what full weights had been quantized to before, where that is known: they are no more precise.
    """

    config: ModelConfig
    weights: Weights
    quantization: dict[str, Quantization] = field(default_factory=dict)
    rounded_to: str | None = None

    @property
    def rounding(self) -> str | None:
        """What its matrices are, or were, quantized to; None for full precision."""
        if not self.quantization:
            return self.rounded_to
        common = most_common(self.quantization)
        return f"{common.bits} bits" if common.mode == "affine" else common.mode

    @property
    def dtype(self) -> mx.Dtype:
        """The stored floating-point type (of the final norm, which is never quantized)."""
        return self.weights.tensor("transformer.norm.weight").dtype

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters, scales and biases included, before weights are taken."""
        return 8 * sum(tensor.nbytes for tensor in self.weights.tensors().values()) / self.config.num_parameters


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and the whole of its `config.json`.

    Raises:
        RequestError: missing, damaged, not OpenELM, or impossible sizes.
    """
    if not (folder / "config.json").is_file():
        raise foreign.no_config(folder)
    values = read_json(folder / "config.json")
    try:
        return ModelConfig.from_dict(values), values
    except RequestError as error:
        raise RequestError(f"{folder / 'config.json'}: {error}") from None


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Headers are checked against the configuration; none of its weights is read yet.

    Raises:
        RequestError: damaged files, weights packed by a method of others, or one list of every missing, unexpected or
            wrongly shaped tensor.
    """
    config, values = read_config(folder)
    foreign.check_method(folder / "config.json", values)
    files = safetensors.weight_files(folder)
    tensors = safetensors.read_headers(files)
    foreign.check_tensors(folder, tensors)
    tensors = leftovers.drop(folder, config, tensors)
    quantization = read_quantization(folder / "config.json", config, values, tensors)
    check(folder, config, quantization, tensors)
    weights = safetensors.read_lazily(files)
    return Checkpoint(config, Weights.of_arrays({name: weights[name] for name in tensors}), quantization)


def read_quantization(
    file: Path, config: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, safetensors.TensorInfo]
) -> dict[str, Quantization]:
    """How each matrix with scales is packed: its own entry, else the common one, else what the shapes tell."""
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not paths:
        return {}
    settings = values.get("quantization") or values.get("quantization_config")
    if not isinstance(settings, dict):
        raise RequestError(f"The weights are quantized, but {file} has no quantization entry.")
    shapes = config.tensor_shapes()
    quantization = {}
    for path in paths:
        entry = settings.get(path)
        entry = entry if isinstance(entry, dict) else None
        common = settings | (entry or {})
        try:
            choice = Quantization(int(common["group_size"]), int(common["bits"]), common.get("mode", "affine"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"{file} has no usable quantization for {path}: {error}.") from None
        shape = shapes.get(f"{path}.weight")
        if entry is None and shape is not None and f"{path}.weight" in tensors:
            choice = _from_shapes(choice, shape, tensors[f"{path}.weight"].shape, tensors[f"{path}.scales"].shape)
        quantization[path] = choice
    return quantization


def _from_shapes(
    common: Quantization, shape: tuple[int, ...], packed: tuple[int, ...], scales: tuple[int, ...]
) -> Quantization:
    """`common`, or what packed parts of other shapes must have been packed with."""
    if common.packed_shapes(shape)["weight"] == packed and common.packed_shapes(shape)["scales"] == scales:
        return common
    try:
        return Quantization(shape[1] // scales[-1], packed[-1] * 32 // shape[1], common.mode)
    except (RequestError, ZeroDivisionError, IndexError):
        return common  # the check of all shapes will name the tensor


def check(
    place: Path,
    config: ModelConfig,
    quantization: Mapping[str, Quantization],
    tensors: Mapping[str, safetensors.TensorInfo],
    described_by: str = "its config.json",
) -> None:
    """Compare every tensor in `place` with what the configuration asks for.

    Raises:
        RequestError: one list of every missing, unexpected or wrongly shaped tensor.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in config.tensor_shapes().items():
        path = name.removesuffix(".weight")
        if path in quantization and len(shape) == 2:
            parts = quantization[path].packed_shapes(shape)
            expected.update({f"{path}.{part}": part_shape for part, part_shape in parts.items()})
        else:
            expected[name] = shape
    wrong = [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    wrong += [
        f"{name} is stored as {str(tensors[name].dtype).removeprefix('mlx.core.')}"
        for name in expected
        if name in tensors and not _fits(tensors[name].dtype, name, quantization)
    ]
    problems = []
    for kind, names in (
        ("missing", [name for name in expected if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in expected]),
        ("wrong", wrong),
    ):
        if names:
            problems.append(f"{kind}: {some(names)}")
    if problems:
        raise RequestError(f"The weights in {place} do not fit {described_by}; {'; '.join(problems)}.")


def _fits(dtype: mx.Dtype, name: str, quantization: Mapping[str, Quantization]) -> bool:
    """Whether a tensor is of the kind its place needs: packed weights, byte-sized scales, floating-point values."""
    path, _, part = name.rpartition(".")
    if path in quantization and part == "weight":
        return dtype == mx.uint32
    if path in quantization and part == "scales" and quantization[path].mode != "affine":
        return dtype == mx.uint8
    return mx.issubdtype(dtype, mx.floating)


def write(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
) -> None:
    """Write weights, index and `config.json` as mlx-lm and mlx-swift read them; empties `checkpoint.weights`."""
    values = checkpoint.config.to_dict() | {"torch_dtype": str(checkpoint.dtype).removeprefix("mlx.core.")}
    if checkpoint.quantization:
        common = most_common(checkpoint.quantization)
        entries = {path: choice.to_dict() for path, choice in checkpoint.quantization.items() if choice != common}
        # Hugging Face's pages read the second name.
        values["quantization"] = values["quantization_config"] = common.to_dict() | entries
    safetensors.write_shards(
        folder,
        checkpoint.weights,
        metadata={"format": "mlx"},
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    (folder / "config.json").write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")
