"""Model folders in Hugging Face's layout, full precision or quantized by MLX: from Apple, mlx-community, mlx-lm, ours.

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
from . import foreign, leftovers, safetensors, shards
from .packing import PARTS, Quantization, most_common
from .weights import Weights


@dataclass
class Checkpoint:
    """A model as stored: unread weights by Hugging Face name, and how each quantized matrix is packed.

    `rounded_to` is what full weights had been quantized to before, if known: they are no more precise than that.
    """

    config: ModelConfig
    weights: Weights
    quantization: dict[str, Quantization] = field(default_factory=dict)
    rounded_to: str | None = None

    @property
    def rounding(self) -> str | None:
        """What the matrices are, or were, quantized to (`4 bits`, `mxfp4`); None for full precision."""
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
        """Stored bits per parameter, including scales and biases; call it before weights are taken."""
        return 8 * sum(tensor.nbytes for tensor in self.weights.tensors().values()) / self.config.num_parameters


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration, and all values of its `config.json`.

    Raises:
        RequestError: the file is missing or damaged, not an OpenELM configuration, or has impossible sizes.
    """
    if not (folder / "config.json").is_file():
        raise foreign.no_config(folder)
    values = read_json(folder / "config.json")
    try:
        return ModelConfig.from_dict(values), values
    except RequestError as error:
        raise RequestError(f"{folder / 'config.json'}: {error}") from None


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Headers are checked against the configuration; no weight is read yet.

    Raises:
        RequestError: damaged files, weights packed by another quantization method, or one list of every missing,
            unexpected or wrongly shaped tensor.
    """
    config, values = read_config(folder)
    if not isinstance(values.get("quantization"), dict):  # MLX's own entry wins, as in mlx-lm
        foreign.check_method(folder / "config.json", values)
    files = safetensors.weight_files(folder)
    tensors = safetensors.read_headers(files)
    shapes = config.tensor_shapes()
    for name in tensors:
        path, _, part = name.rpartition(".")
        if part not in PARTS or f"{path}.weight" not in shapes:
            foreign.check_tensors(folder, tensors)
            tensors = leftovers.drop(folder, config, tensors)
            break
    quantization = read_quantization(folder / "config.json", config, values, tensors)
    check(folder, config, quantization, tensors)
    weights = safetensors.read_lazily(files)
    return Checkpoint(config, Weights.of_arrays({name: weights[name] for name in tensors}), quantization)


def read_quantization(
    file: Path, config: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, safetensors.TensorInfo]
) -> dict[str, Quantization]:
    """How each matrix with scales is packed: by its own entry, else the common one, else judged from the shapes.

    Raises:
        RequestError: `config.json` has no usable entry.
    """
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    if not paths:
        return {}
    settings = values.get("quantization") or values.get("quantization_config")
    if not isinstance(settings, dict):
        raise RequestError(f"The weights are quantized, but {file} has no quantization entry.")
    shapes = config.tensor_shapes()
    quantization = {}
    for path in paths:
        own = settings.get(path)
        entry = settings | (own if isinstance(own, dict) else {})
        try:
            choice = Quantization(int(entry["group_size"]), int(entry["bits"]), entry.get("mode", "affine"))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"{file} has no usable quantization for {path}: {error}.") from None
        name = f"{path}.weight"
        if not isinstance(own, dict) and name in shapes and name in tensors:
            packed, scales = tensors[name].shape, tensors[f"{path}.scales"].shape
            expected = choice.packed_shapes(shapes[name])
            if (packed, scales) != (expected["weight"], expected["scales"]):
                choice = _from_shapes(choice, shapes[name], packed, scales)
        quantization[path] = choice
    return quantization


def _from_shapes(
    common: Quantization, shape: tuple[int, ...], packed: tuple[int, ...], scales: tuple[int, ...]
) -> Quantization:
    """How a matrix of `shape` [out, in] was packed, judged from its packed shapes; `common` if they are impossible."""
    try:
        return Quantization(shape[1] // scales[-1], packed[-1] * 32 // shape[1], common.mode)
    except (RequestError, ZeroDivisionError, IndexError):
        return common  # `check` will report the tensor


def check(
    source: Path,
    config: ModelConfig,
    quantization: Mapping[str, Quantization],
    tensors: Mapping[str, safetensors.TensorInfo],
    described_by: str = "its config.json",
) -> None:
    """Compare every tensor in `source` with what the configuration asks for.

    Raises:
        RequestError: one list of every missing, unexpected or wrongly shaped tensor.
    """
    expected: dict[str, tuple[tuple[int, ...], mx.Dtype | mx.DtypeCategory]] = {}
    for name, shape in config.tensor_shapes().items():
        path = name.removesuffix(".weight")
        if path in quantization and len(shape) == 2:
            choice = quantization[path]
            scales = mx.floating if choice.mode == "affine" else mx.uint8
            kinds = {"weight": mx.uint32, "scales": scales, "biases": mx.floating}
            expected |= {f"{path}.{part}": (size, kinds[part]) for part, size in choice.packed_shapes(shape).items()}
        else:
            expected[name] = shape, mx.floating
    wrong = [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, (shape, _) in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    wrong += [
        f"{name} is stored as {str(tensors[name].dtype).removeprefix('mlx.core.')}"
        for name, (_, kind) in expected.items()
        if name in tensors and not mx.issubdtype(tensors[name].dtype, kind)
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
        raise RequestError(f"The weights in {source} do not fit {described_by}; {'; '.join(problems)}.")


def write(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = shards.MAX_SHARD_BYTES,
) -> None:
    """Write weights, index and `config.json` as mlx-lm and mlx-swift read them; empties `checkpoint.weights`.

    Args:
        progress: called with the bytes written so far and the total.
    """
    values = checkpoint.config.to_dict() | {"torch_dtype": str(checkpoint.dtype).removeprefix("mlx.core.")}
    if checkpoint.quantization:
        common = most_common(checkpoint.quantization)
        entries = {path: choice.to_dict() for path, choice in checkpoint.quantization.items() if choice != common}
        # Hugging Face's pages read the second name.
        values["quantization"] = values["quantization_config"] = common.to_dict() | entries
    shards.write(
        folder,
        checkpoint.weights,
        metadata={"format": "mlx"},
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    (folder / "config.json").write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")
