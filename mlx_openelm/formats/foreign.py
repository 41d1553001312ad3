"""Error messages for folders that are not readable models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote

# Name endings of incomplete downloads.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
_PICKLED = (".bin", ".ckpt", ".pkl", ".pickle")
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# What other quantization methods store in place of a matrix, by name ending.
_PARTS = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".W_q": "HQQ",
}


def no_config(folder: Path) -> RequestError:
    """The error for a folder without `config.json`."""
    from .adapter import FILES  # here, because every model that is loaded imports this module

    if any((folder / name).exists() for name in FILES):
        return RequestError(
            f"{folder} has no config.json: it is an adapter. Give it with --adapter-path, and the model it was "
            "trained on with --model."
        )
    return RequestError(f"{folder} has no config.json, so it is not a model; give a folder that has one.")


def no_weights(folder: Path) -> RequestError:
    """The error for a folder without `model*.safetensors`."""
    from .adapter import FILES

    names = sorted(file.name for file in folder.iterdir())
    names = [name for name in names if name not in _NO_WEIGHTS and not name.startswith(".")]
    advice = (
        (_UNFINISHED, "an unfinished download: download the folder again"),
        (_PICKLED, "a pickle, which could run code and is never read: save the weights as safetensors"),
        ((".gguf", ".pt", ".pth"), "a complete model: give that file instead of the folder"),
    )
    for endings, what in advice:
        found = next((name for name in names if name.lower().endswith(endings)), None)
        if found is not None:
            return RequestError(f"{folder} has no model*.safetensors file, but {quote(found)}, {what}.")
    if any(name in FILES for name in names):
        what = "it is an adapter. Give it with --adapter-path, and the model it was trained on with --model"
        return RequestError(f"{folder} has no model*.safetensors file: {what}.")
    other = next((name for name in names if name.endswith(".safetensors")), None)
    hint = "" if other is None else f" ({quote(other)} is not read under that name)"
    return RequestError(f"{folder} has no model*.safetensors file{hint}.")


def check_method(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse weights that another quantization method packed.

    Args:
        file: the `config.json` with these `values`, which have no `quantization` entry of MLX's.

    Raises:
        RequestError: its `quantization_config` names a method.
    """
    settings = values.get("quantization_config")
    if not isinstance(settings, dict):
        return
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # how transformers reads configurations of its early versions
    if method is not None:
        raise _packed(file, quote(method).strip("'"))


def check_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise RequestError if tensor names are those of another quantization method."""
    for name in names:
        method = next((method for ending, method in _PARTS.items() if name.endswith(ending)), None)
        if method is not None:
            raise _packed(folder, f"{method} ({quote(name)})")


def _packed(path: Path, method: str) -> RequestError:
    return RequestError(
        f"{path}: the weights are quantized by {method}, which is not supported. Take the original model and quantize "
        "it with `mlx-openelm quantize`, or `convert -q`."
    )
