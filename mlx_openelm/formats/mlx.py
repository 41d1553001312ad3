"""Model folders in Hugging Face's layout, full precision or quantized by MLX: from Apple, mlx-community, mlx-lm, ours.

`config.json` and safetensors. Quantized matrices are stored as `.weight` (packed uint32), `.scales` and,
in affine mode, `.biases`; `quantization` in the config holds group_size, bits and mode, and entries by
module path for matrices that differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import NORM, ModelConfig
from ..errors import RequestError, quote
from ..inputs import read_json
from ..ops.packed import MODES, PARTS
from ..wording import one_of, some
from . import foreign, leftovers, safetensors, shards
from .safetensors import Tensor, TensorInfo, Weights

_PIECE = 1 << 20  # weights packed at a time


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed: `group_size` neighbors in a row share a scale (and, in affine mode, a bias)."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RequestError(f"--q-mode must be one of {', '.join(MODES)}, got {quote(self.mode)}.")
        bits, group_sizes = MODES[self.mode]
        if self.bits not in bits:
            raise RequestError(f"--q-bits must be {one_of(sorted(bits))} in mode {self.mode}, got {quote(self.bits)}.")
        if self.group_size not in group_sizes:
            raise RequestError(
                f"--q-group-size must be {one_of(sorted(group_sizes))} in mode {self.mode}, "
                f"got {quote(self.group_size)}."
            )

    @classmethod
    def make(cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> Quantization:
        """The mode's defaults where bits or group size are not given.

        Raises:
            RequestError: a combination MLX does not have.
        """
        default_bits, default_sizes = MODES.get(mode, ((0,), (0,)))
        return cls(group_size or default_sizes[0], bits or default_bits[0], mode)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as in `config.json`."""
        return asdict(self)

    def packed_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the packed parts of a matrix of `shape` [out, in], by name of the part."""
        out_dims, in_dims = shape
        scales = (out_dims, in_dims // self.group_size)
        parts: dict[str, tuple[int, ...]] = {"weight": (out_dims, in_dims * self.bits // 32), "scales": scales}
        return parts | {"biases": scales} if self.mode == "affine" else parts

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """The packed parts of `weight` [out, in] by name; scales and biases have at most 16 bits."""
        if self.mode == "affine":
            packed, scales, biases = mx.quantize(weight, self.group_size, self.bits)
            stored = scale_dtype(weight.dtype)
            return {"weight": packed, "scales": scales.astype(stored), "biases": biases.astype(stored)}
        mx.eval(weight)  # once, not for every piece
        pieces = []
        for rows in _row_chunks(*weight.shape):
            pieces.append(mx.quantize(weight[rows], self.group_size, self.bits, self.mode))
            mx.eval(pieces[-1])
        packed, scales = (mx.concatenate(list(parts)) for parts in zip(*pieces, strict=True))
        return {"weight": packed, "scales": scales}

    def unpack(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The matrix [out, in] of packed parts, in `dtype`; scales and biases are cast to it first."""
        scales, biases = parts["scales"], parts.get("biases")
        if self.mode == "affine":
            scales, biases = scales.astype(dtype), biases.astype(dtype) if biases is not None else None
        full = mx.dequantize(parts["weight"], scales, biases, self.group_size, self.bits, self.mode)
        return full.astype(dtype)


@dataclass
class Checkpoint:
    """A stored model: unread weights by Hugging Face name, and the quantization of each packed matrix.

    `rounded_to` says what dequantized weights were quantized to before, if known: they are no more precise than that.
    """

    config: ModelConfig
    weights: Weights
    quantization: dict[str, Quantization] = field(default_factory=dict)
    rounded_to: str | None = None

    @property
    def rounding(self) -> str | None:
        """What the matrices are or were quantized to (`4 bits`, `mxfp4`); None for full precision."""
        if not self.quantization:
            return self.rounded_to
        common = most_common(self.quantization)
        return f"{common.bits} bits" if common.mode == "affine" else common.mode

    @property
    def dtype(self) -> mx.Dtype:
        """The stored floating-point type (of the final norm, which is never quantized)."""
        return self.weights.tensors[f"{NORM}.weight"].dtype

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, including scales and biases; call it before weights are taken."""
        return 8 * sum(tensor.nbytes for tensor in self.weights.tensors.values()) / self.config.num_parameters


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration, and all values of its `config.json`.

    Raises:
        RequestError: the file is missing or damaged, not an OpenELM configuration, or has invalid sizes.
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
    tensors = safetensors.read_tensors(files)
    if not config.share_input_output_layers and leftovers.drop_tied(folder, values, tensors):
        config = replace(config, share_input_output_layers=True)
    shapes = config.tensor_shapes()
    for name in tensors:
        path, _, part = name.rpartition(".")
        if part not in PARTS or f"{path}.weight" not in shapes:
            foreign.check_tensors(folder, tensors)
            tensors = leftovers.drop(folder, files, config, tensors)
            break
    quantization = read_quantization(folder / "config.json", config, values, tensors)
    check(folder, config, quantization, tensors)
    return Checkpoint(config, Weights(tensors), quantization)


def read_quantization(
    file: Path, config: ModelConfig, values: Mapping[str, Any], tensors: Mapping[str, TensorInfo | Tensor]
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
            raise RequestError(f"{file} has no usable quantization for {path}: {str(error).rstrip('.')}.") from None
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
    tensors: Mapping[str, TensorInfo | Tensor],
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


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of a matrix's rows: without a kernel for the mode, as on a CPU, MLX makes many float32 copies."""
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def most_common(quantization: Mapping[str, Quantization]) -> Quantization:
    """The most frequent packing; `quantization` is by module path and not empty."""
    choices = list(quantization.values())
    return max(choices, key=choices.count)


def scale_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The type of the scales and biases for weights of `dtype`: 16 bits, as bits per weight are usually counted."""
    return mx.float16 if dtype == mx.float16 else mx.bfloat16
